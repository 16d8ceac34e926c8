"""Fail when committed weights grow past their limits: the tiny model, its LoRAs, and every weight in the history."""

import subprocess
import sys
from pathlib import Path

MIB = 2**20
TINY = 26 * MIB  # weights/tiny, without loras/
LORAS = 4 * MIB  # weights/tiny/loras
HISTORY = 40 * MIB  # every version of every file under weights/ that was ever committed


def git(*arguments: str, text: str | None = None) -> str:
    return subprocess.run(["git", *arguments], input=text, capture_output=True, text=True, check=True).stdout


def main() -> int:
    files = [p for p in Path("weights/tiny").rglob("*") if p.is_file()]
    tiny, loras = (sum(p.stat().st_size for p in files if ("loras" in p.parts) == own) for own in (False, True))
    blobs = {line.split(" ", 1)[0] for line in git("rev-list", "--objects", "HEAD", "--", "weights").splitlines()}
    sizes = git("cat-file", "--batch-check=%(objecttype) %(objectsize)", text="\n".join(sorted(blobs)))
    history = sum(int(size) for kind, size in map(str.split, sizes.splitlines()) if kind == "blob")
    taken = {"weights/tiny": (tiny, TINY), "its LoRAs": (loras, LORAS), "history": (history, HISTORY)}
    print(", ".join(f"{name} {size / MIB:.2f} of {most // MIB} MiB" for name, (size, most) in taken.items()))
    return int(any(size > most for size, most in taken.values()))


if __name__ == "__main__":
    sys.exit(main())
