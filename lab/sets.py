"""The sets that pretraining sees: composites of every grid with their captions, drawn once and kept on disk.

python -m lab.sets writes the small demo sets of lab.tasks, which are committed in sets/.
"""

import argparse
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from model.checkpoint import save_safetensors

from . import entry
from .captions import joint_caption, reticent
from .world import Panel, draw, random_set

PANEL = 64
CHUNK = 250  # sets a job
CAPTIONS = 3  # phrasings a set
MARKERS = (("image", 0.6), ("position", 0.25), ("scene", 0.15))

# rows, columns -> share of the sets, chance of 1, 2, 3, 4 subjects
GRIDS = {
    (1, 1): (0.20, (0.45, 0.35, 0.10, 0.10)),
    (1, 2): (0.10, (0.65, 0.35)),
    (2, 1): (0.10, (0.65, 0.35)),
    (2, 2): (0.50, (0.65, 0.35)),
    (3, 1): (0.10, (0.65, 0.35)),
}


def composite(panels: tuple[Panel, ...], rows: int, cols: int, size: int = PANEL) -> np.ndarray:
    """Draw a set as one picture: (rows*size, cols*size, 3) uint8."""
    drawn = [np.asarray(draw(panel, size)) for panel in panels]
    return np.concatenate([np.concatenate(drawn[r * cols : (r + 1) * cols], axis=1) for r in range(rows)], axis=0)


def plan_chunk(job: tuple[int, int, int, int]) -> list[tuple[tuple[Panel, ...], list[str]]]:
    """Decide CHUNK sets of one grid: their panels and captions; the job is (rows, columns, chunk number, seed)."""
    rows, cols, chunk, seed = job
    rng = np.random.default_rng([seed, rows, cols, chunk])
    chances = GRIDS[rows, cols][1]
    kinds, weights = zip(*MARKERS, strict=True)
    planned = []
    for _ in range(CHUNK):
        panels = random_set(rng, rows, cols, 1 + int(rng.choice(len(chances), p=chances)))
        captions = [
            joint_caption(reticent(panels, rng), rows, cols, rng, str(rng.choice(kinds, p=weights)))
            for _ in range(CAPTIONS)
        ]
        planned.append((panels, captions))
    return planned


def plan_sets(grid: tuple[int, int], count: int, seed: int) -> list[tuple[Panel, ...]]:
    """Decide the panels of the first sets of a grid again, as they were decided when they were drawn."""
    chunks = range(-(-count // CHUNK))
    return [panels for chunk in chunks for panels, _ in plan_chunk((*grid, chunk, seed))][:count]


def draw_chunk(job: tuple[int, int, int, int]) -> tuple[np.ndarray, list[list[str]]]:
    """Draw the sets of one job: (CHUNK, 3, h, w) uint8, and their captions."""
    planned = plan_chunk(job)
    pictures = [composite(panels, *job[:2]).transpose(2, 0, 1) for panels, _ in planned]
    return np.stack(pictures), [captions for _, captions in planned]


def sets_of(grid: tuple[int, int], total: int) -> int:
    """Sets of one grid among a total over all grids; whole chunks."""
    return CHUNK * max(1, round(total * GRIDS[grid][0] / CHUNK))


def draw_sets(folder: Path, total: int, seed: int, processes: int) -> None:
    """Draw the sets of every grid that the folder does not hold yet, enough of them and from this seed.

    total: sets over all grids, split as GRIDS says
    """
    folder.mkdir(parents=True, exist_ok=True)
    for rows, cols in GRIDS:
        path, count = folder / f"sets-{rows}x{cols}.safetensors", sets_of((rows, cols), total)
        if path.exists():
            with safe_open(path, "pt") as file:
                drawn = file.metadata()
            if drawn.get("seed") == str(seed) and int(drawn["count"]) >= count:
                continue
        jobs = [(rows, cols, chunk, seed) for chunk in range(count // CHUNK)]
        with multiprocessing.Pool(processes) as pool:
            pictures, captions = zip(*pool.imap(draw_chunk, jobs), strict=True)
        tensor = torch.from_numpy(np.concatenate(pictures))
        texts = json.dumps([c for part in captions for c in part])
        save_safetensors({"pictures": tensor}, path, {"captions": texts, "seed": str(seed), "count": str(count)})


def load_sets(folder: Path, grid: tuple[int, int], count: int) -> tuple[Tensor, list[list[str]]]:
    """Give the first N = count pictures (N, 3, h, w) uint8 of a grid and their lists of captions."""
    with safe_open(folder / f"sets-{grid[0]}x{grid[1]}.safetensors", "pt") as file:
        return file.get_slice("pictures")[:count], json.loads(file.metadata()["captions"])[:count]


def main(argv: list[str] | None = None) -> int:
    from .tasks import write_tasks  # which builds on this module

    parser = argparse.ArgumentParser(prog="python -m lab.sets", description="Draw the demo sets.")
    parser.add_argument("--out", type=Path, default=Path("sets"), help="folder that receives them")
    return entry.run(parser, lambda args: write_tasks(args.out), argv)


if __name__ == "__main__":
    sys.exit(main())
