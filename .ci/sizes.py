"""Fail when what is committed grows past its limits: weights in the tree and in the history, documents and results."""

import subprocess
import sys
from pathlib import Path

MIB = 2**20
TREE = 48 * MIB  # tracked files under weights/, as they are now
HISTORY = 110 * MIB  # every version of every file under weights/ that was ever committed
PAGES = 12_000_000  # tracked files under docs/ and lab/results/: pages, pictures and values


def git(*arguments: str, text: str | None = None) -> str:
    return subprocess.run(["git", *arguments], input=text, capture_output=True, text=True, check=True).stdout


def tracked(*folders: str) -> int:
    """The bytes of the tracked files in some folders, as they are now."""
    paths = [Path(name) for name in git("ls-files", "-z", "--", *folders).split("\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> int:
    blobs = {line.split(" ", 1)[0] for line in git("rev-list", "--objects", "HEAD", "--", "weights").splitlines()}
    sizes = git("cat-file", "--batch-check=%(objecttype) %(objectsize)", text="\n".join(sorted(blobs)))
    history = sum(int(size) for kind, size in map(str.split, sizes.splitlines()) if kind == "blob")
    taken = {
        "weights/": (tracked("weights"), TREE), "its history": (history, HISTORY),
        "docs/ and lab/results/": (tracked("docs", "lab/results"), PAGES),
    }  # fmt: skip
    print(", ".join(f"{name} {size / MIB:.2f} of {most / MIB:.2f} MiB" for name, (size, most) in taken.items()))
    return int(any(size > most for size, most in taken.values()))


if __name__ == "__main__":
    sys.exit(main())
