"""Sets for a LoRA that fills in panels: the picture world's own, with captions that tell more or less.

python -m lab.panels --out runs/panels --count 1200

A third of the captions names the subjects, a third only their shapes, a third says "it": what such a set has in common
can then come from its other panels alone.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from model.checkpoint import write_atomic

from . import entry
from .captions import joint_caption, silent_caption
from .pairs import bare
from .sets import composite
from .world import Panel, random_set

GRIDS = {(1, 2): 0.15, (2, 1): 0.15, (2, 2): 0.5, (3, 1): 0.2}  # rows, columns -> share of the sets
SEVERAL = 0.3  # share of the sets with two subjects
TELLING = ("all", "shapes", "nothing")


def caption(panels: tuple[Panel, ...], rows: int, cols: int, telling: str, rng: np.random.Generator | None) -> str:
    """A joint caption that tells all that captions can of the subjects, or their shapes, or nothing.

    telling: one of TELLING
    Errors: ValueError for another, or if the panels do not fill the grid
    """
    if telling not in TELLING:
        raise ValueError(f"telling {telling!r} is unknown; choose one of {', '.join(TELLING)}")
    if telling == "nothing":
        return silent_caption(panels, rows, cols, rng)
    return joint_caption(panels if telling == "all" else tuple(map(bare, panels)), rows, cols, rng)


def make_set(rng: np.random.Generator) -> tuple[tuple[int, int], tuple[Panel, ...], str]:
    """One set: its grid, its panels, and a caption."""
    grids, shares = zip(*GRIDS.items(), strict=True)
    rows, cols = grids[int(rng.choice(len(grids), p=shares))]
    panels = random_set(rng, rows, cols, 1 + int(rng.random() < SEVERAL))
    return (rows, cols), panels, caption(panels, rows, cols, TELLING[int(rng.integers(len(TELLING)))], rng)


def write_sets(folder: Path, count: int, seed: int = 0) -> Path:
    """Write sets.jsonl, and a composite of every set beside it; the same arguments give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sets.jsonl").unlink(missing_ok=True)  # it is true of the old pictures only
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        grid, panels, text = make_set(rng)
        name = f"{number:05d}.png"
        Image.fromarray(composite(panels, *grid)).save(folder / name)
        rows.append(json.dumps({"image": name, "grid": "{}x{}".format(*grid), "prompt": text}))
    write_atomic(folder / "sets.jsonl", "\n".join(rows) + "\n")
    return folder / "sets.jsonl"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.panels", description="Draw sets with few words.")
    parser.add_argument("--out", type=Path, default=Path("runs/panels"), help="folder that receives them")
    parser.add_argument("--count", type=entry.positive, default=1200, help="sets")
    parser.add_argument("--seed", type=int, default=0)
    return entry.run(parser, lambda args: write_sets(args.out, args.count, args.seed), argv)


if __name__ == "__main__":
    sys.exit(main())
