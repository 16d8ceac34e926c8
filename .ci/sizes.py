"""Fail when the committed weights grow past their limits: the tiny model, and every weight in the history."""

import subprocess
import sys
from pathlib import Path

MIB = 2**20
TINY = 26 * MIB  # weights/tiny, without loras/
HISTORY = 40 * MIB  # every version of every file under weights/ that was ever committed


def git(*arguments: str, text: str | None = None) -> str:
    return subprocess.run(["git", *arguments], input=text, capture_output=True, text=True, check=True).stdout


def main() -> int:
    tiny = sum(p.stat().st_size for p in Path("weights/tiny").rglob("*") if p.is_file() and "loras" not in p.parts)
    blobs = {line.split(" ", 1)[0] for line in git("rev-list", "--objects", "HEAD", "--", "weights").splitlines()}
    sizes = git("cat-file", "--batch-check=%(objecttype) %(objectsize)", text="\n".join(sorted(blobs)))
    history = sum(int(size) for kind, size in map(str.split, sizes.splitlines()) if kind == "blob")
    print(f"weights/tiny {tiny / MIB:.2f} of {TINY // MIB} MiB, history {history / MIB:.2f} of {HISTORY // MIB} MiB")
    return int(tiny > TINY or history > HISTORY)


if __name__ == "__main__":
    sys.exit(main())
