"""Where a diptych is cut: at the straight edge that the model has drawn near the middle, if it has."""

import numpy as np
from PIL import Image

from sampling.images import fit

REACH = 16  # the seam lies within a 16th of the composite's side of its middle
LARGE = 0.75  # a step counts as large if it is among the largest quarter of its line there


def find_seam(composite: Image.Image, grid: str) -> tuple[int, float]:
    """Find the seam of a diptych: the place at which most lines across it have a large step.

    A step is judged among those of its own line, so that a faint seam between two skies counts as much as a hard one.

    grid: 1x2 if the panels stand side by side, 2x1 if one is above the other
    Returns the first pixel of the second panel, and the share of lines that have a large step there: 1 is a clean cut
    """
    pixels = np.asarray(composite, dtype=np.float32)
    pixels = pixels if grid == "1x2" else pixels.transpose(1, 0, 2)  # (lines, side, 3)
    middle = pixels.shape[1] // 2
    reach = max(2, pixels.shape[1] // REACH)
    near = pixels[:, middle - reach - 1 : middle + reach + 1]
    steps = np.abs(np.diff(near, axis=1)).mean(axis=2)  # (lines, 2 reach + 1), the middle one at the middle
    large = steps > np.maximum(np.quantile(steps, LARGE, axis=1, keepdims=True), 2)  # 2: of 255, rounding
    shares = large.mean(axis=0)
    best = int(shares.argmax())
    return middle - reach + best, float(shares[best])


def cut(composite: Image.Image, grid: str, seam: int, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """Cut a diptych at its seam, and bring both panels to one size.

    size: width and height of a panel in pixels
    """
    width, height = composite.size
    edge = (seam, height) if grid == "1x2" else (width, seam)
    start = (seam, 0) if grid == "1x2" else (0, seam)
    return fit(composite.crop((0, 0, *edge)), *size), fit(composite.crop((*start, width, height)), *size)
