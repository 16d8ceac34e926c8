"""Fail when committed weights grow past their limits: those in the tree, and every weight in the history."""

import subprocess
import sys
from pathlib import Path

MIB = 2**20
TREE = 48 * MIB  # tracked files under weights/, as they are now
HISTORY = 110 * MIB  # every version of every file under weights/ that was ever committed


def git(*arguments: str, text: str | None = None) -> str:
    return subprocess.run(["git", *arguments], input=text, capture_output=True, text=True, check=True).stdout


def main() -> int:
    tracked = [Path(name) for name in git("ls-files", "-z", "--", "weights").split("\0") if name]
    tree = sum(path.stat().st_size for path in tracked if path.is_file())
    blobs = {line.split(" ", 1)[0] for line in git("rev-list", "--objects", "HEAD", "--", "weights").splitlines()}
    sizes = git("cat-file", "--batch-check=%(objecttype) %(objectsize)", text="\n".join(sorted(blobs)))
    history = sum(int(size) for kind, size in map(str.split, sizes.splitlines()) if kind == "blob")
    taken = {"weights/": (tree, TREE), "its history": (history, HISTORY)}
    print(", ".join(f"{name} {size / MIB:.2f} of {most // MIB} MiB" for name, (size, most) in taken.items()))
    return int(any(size > most for size, most in taken.values()))


if __name__ == "__main__":
    sys.exit(main())
