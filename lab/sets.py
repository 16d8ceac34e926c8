"""The sets that pretraining sees: composites of every grid, drawn once and kept on disk, and their captions.

python -m lab.sets writes the small demo sets of lab.tasks, which are committed in sets/.
"""

import argparse
import hashlib
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from model.checkpoint import save_safetensors

from . import entry
from .captions import DOMAIN_WORDS, ROOM, joint_caption, length, reticent, say_domain
from .domains import in_domain
from .world import Panel, draw, random_set

PANEL = 64
CHUNK = 250  # sets a job
CAPTIONS = 3  # phrasings a set
MARKERS = (("image", 0.6), ("position", 0.25), ("scene", 0.15))

# rows, columns -> share of the sets, chance of 1, 2, 3, 4 subjects
GRIDS = {
    (1, 1): (0.17, (0.45, 0.35, 0.10, 0.10)),
    (1, 2): (0.083, (0.65, 0.35)),
    (2, 1): (0.083, (0.65, 0.35)),
    (2, 2): (0.581, (0.65, 0.35)),
    (3, 1): (0.083, (0.65, 0.35)),
}
IN_DOMAIN = {False: 0.22, True: 0.13}  # share of single panels, and of larger sets, whose captions have room to say so


@dataclass(frozen=True)
class PlannedSet:
    """A set before it is drawn.

    captions: CAPTIONS phrasings
    domain: of all its panels alike, a key of lab.captions.DOMAIN_WORDS; "" is the plain one
    """

    panels: tuple[Panel, ...]
    captions: tuple[str, ...]
    domain: str = ""


def composite(panels: tuple[Panel, ...], rows: int, cols: int, size: int = PANEL, domain: str = "") -> np.ndarray:
    """Draw a set as one picture: (rows*size, cols*size, 3) uint8."""
    drawn = [np.asarray(in_domain(draw(panel, size), domain, panel.seed)) for panel in panels]
    return np.concatenate([np.concatenate(drawn[r * cols : (r + 1) * cols], axis=1) for r in range(rows)], axis=0)


def choose_domain(captions: Sequence[str], panels: int, rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    """Now and then choose a domain for a set whose captions all have room for it: the domain, and what they say then.

    The relations that a LoRA is to teach, a panel beside its drawing or beside itself at dusk, are never shown.
    """
    if max(map(length, captions)) > ROOM or rng.random() >= IN_DOMAIN[panels > 1]:
        return "", tuple(captions)
    domain = str(rng.choice(tuple(DOMAIN_WORDS)))
    return domain, tuple(say_domain(caption, domain, panels, rng) for caption in captions)


def plan_chunk(job: tuple[int, int, int, int]) -> list[PlannedSet]:
    """Decide CHUNK sets of one grid; the job is (rows, columns, chunk number, seed)."""
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
        domain, captions = choose_domain(captions, len(panels), rng)
        planned.append(PlannedSet(panels, captions, domain))
    return planned


def jobs_of(grid: tuple[int, int], count: int, seed: int) -> list[tuple[int, int, int, int]]:
    """The jobs that decide or draw the first sets of a grid."""
    return [(*grid, chunk, seed) for chunk in range(-(-count // CHUNK))]


def plan_sets(grid: tuple[int, int], count: int, seed: int, processes: int = 1) -> list[PlannedSet]:
    """Decide the first sets of a grid, as they were decided when they were drawn."""
    jobs = jobs_of(grid, count, seed)
    if processes == 1:
        return [one for job in jobs for one in plan_chunk(job)][:count]
    with multiprocessing.Pool(processes) as pool:
        return [one for chunk in pool.imap(plan_chunk, jobs) for one in chunk][:count]


def draw_chunk(job: tuple[int, int, int, int]) -> np.ndarray:
    """Draw the sets of one job: (CHUNK, 3, h, w) uint8."""
    pictures = [composite(one.panels, *job[:2], domain=one.domain) for one in plan_chunk(job)]
    return np.stack(pictures).transpose(0, 3, 1, 2)


def sets_of(grid: tuple[int, int], total: int) -> int:
    """Sets of one grid among a total over all grids; whole chunks."""
    return CHUNK * max(1, round(total * GRIDS[grid][0] / CHUNK))


def draw_sets(folder: Path, total: int, seed: int, processes: int) -> None:
    """Draw the sets of every grid that the folder does not hold yet, enough of them and as plan_sets decides them now.

    total: sets over all grids, split as GRIDS says
    """
    folder.mkdir(parents=True, exist_ok=True)
    for rows, cols in GRIDS:
        path, count = folder / f"sets-{rows}x{cols}.safetensors", sets_of((rows, cols), total)
        plan = hashlib.sha256(repr(plan_chunk((rows, cols, 0, seed))).encode()).hexdigest()
        if path.exists():
            with safe_open(path, "pt") as file:
                drawn = file.metadata()
            if drawn.get("plan") == plan and int(drawn["count"]) >= count:
                continue
        pictures = torch.empty(count, 3, rows * PANEL, cols * PANEL, dtype=torch.uint8)
        with multiprocessing.Pool(processes) as pool:
            chunks = pool.imap(draw_chunk, jobs_of((rows, cols), count, seed))
            for part, chunk in zip(pictures.split(CHUNK), chunks, strict=True):
                part.copy_(torch.from_numpy(chunk))
        save_safetensors({"pictures": pictures}, path, {"plan": plan, "seed": str(seed), "count": str(count)})


def load_sets(folder: Path, grid: tuple[int, int], count: int) -> Tensor:
    """Give the first N = count pictures of a grid: (N, 3, h, w) uint8."""
    with safe_open(folder / f"sets-{grid[0]}x{grid[1]}.safetensors", "pt") as file:
        return file.get_slice("pictures")[:count]


def main(argv: list[str] | None = None) -> int:
    from .tasks import write_tasks  # which builds on this module

    parser = argparse.ArgumentParser(prog="python -m lab.sets", description="Draw the demo sets.")
    parser.add_argument("--out", type=Path, default=Path("sets"), help="folder that receives them")
    return entry.run(parser, lambda args: write_tasks(args.out), argv)


if __name__ == "__main__":
    sys.exit(main())
