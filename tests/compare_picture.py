"""Compare two pictures: python tests/compare_picture.py A.png B.png

Exit status 0 if they have one size and differ by at most one level of 255 on average, else 1.
"""

import sys

import numpy as np
from PIL import Image

LIMIT = 1.0


def difference(a: str, b: str) -> float:
    """Return the mean difference of all values, in levels; infinity for pictures of different sizes."""
    first, second = (np.asarray(Image.open(path).convert("RGB"), dtype=np.int16) for path in (a, b))
    return float(np.abs(first - second).mean()) if first.shape == second.shape else float("inf")


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        sys.exit(__doc__)
    mean = difference(*argv)
    print(f"mean difference {mean:.4f} of 255, at most {LIMIT:g}")
    return int(mean > LIMIT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
