"""How large sets are learnt: panels in whole tokens, near an area that is asked for, or near several."""

import math
import re
from collections.abc import Iterable

from sampling.latents import TOKEN

from .layout import Layout


def parse_sides(text: str | None) -> tuple[int, ...]:
    """Read how large composites are, as the sides of squares of their area: "512,768"; None for none.

    Returns pixels, each once, the smallest first
    Errors: ValueError outside 16 to 8192 or for anything else
    """
    items = text.split(",") if text is not None else []
    if any(not re.fullmatch(r"\s*[0-9]{2,4}\s*", item) or not TOKEN <= int(item) <= 8192 for item in items):
        raise ValueError(f"composite size {ascii(text[:40])} is not a list of {TOKEN} to 8192 pixels; write 512,768")
    return tuple(sorted(set(map(int, items))))


def nearest_panel(aspect: float, area: float) -> tuple[int, int]:
    """Find the width and height in whole tokens that are nearest to an aspect and an area, at most a tenth above it."""
    best, least = (TOKEN, TOKEN), math.inf
    for width in range(TOKEN, TOKEN + int(math.sqrt(1.1 * area * aspect)) + 1, TOKEN):
        below = max(1, int(width / aspect / TOKEN)) * TOKEN
        for height in (below, below + TOKEN):
            cost = abs(math.log(width / height / aspect)) + abs(math.log(width * height / area)) / 2
            if width * height <= 1.1 * area and cost < least:
                best, least = (width, height), cost
    return best


def composite_layouts(rows: int, cols: int, aspect: float, area: float, sides: Iterable[int]) -> list[Layout]:
    """Give composites of several areas, with panels of one aspect that are cut to whole tokens.

    aspect, area: of a panel as it is, width through height and pixels; no layout is larger
    sides: pixels of the squares of the composites' areas
    Returns each once, those for larger sides than the panels' own being one
    Errors: as Layout
    Source: ostris/ai-toolkit@0bc4d55 toolkit/buckets.py
    """
    layouts = {}
    for side in sides:
        pixels = min(side**2 / (rows * cols), area)
        sizes = (math.sqrt(pixels * ratio) + 1e-6 for ratio in (aspect, 1 / aspect))  # else 1024 may be 1023.999...
        layouts[Layout(rows, cols, *(max(TOKEN, int(size) // TOKEN * TOKEN) for size in sizes))] = None
    return list(layouts)
