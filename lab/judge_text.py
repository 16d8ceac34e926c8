"""Sets from text, of one subject or two: what the base knows, and what a LoRA leaves of it that learnt other things.

lab.report asks the base alone, the experiment "knowledge" each LoRA too.
"""

import numpy as np
from torch import Tensor

from .captions import joint_caption
from .generate import Networks, generate
from .judge import Figures, Found, Judge, Ruler, options_of
from .scores import TEXT_SCORES, per_set, read_sets, to_tensors
from .train_truth import tensors_after
from .world import Panel, random_set

SEED = 9_300_000  # of the sets that are judged
COLUMNS = 6  # sets on a sheet
TEXT_CASES = {  # subjects in a panel, and the grid
    "one subject, 2x2": (1, (2, 2)), "two subjects, 1x1": (2, (1, 1)), "two subjects, 1x2": (2, (1, 2)),
    "two subjects, 2x2": (2, (2, 2)),
}  # fmt: skip
NAMES = ("colour and shape", "pattern", "accessory", "colours unmixed", "scene", "position", "same subject")


def held_out(case: str, count: int) -> list[tuple[Panel, ...]]:
    subjects, (rows, cols) = TEXT_CASES[case]
    rng = np.random.default_rng(SEED)
    return [random_set(rng, rows, cols, subjects, held_out=True) for _ in range(count)]


def measure(case: str, networks: Networks, metadata: dict[str, str], ruler: Ruler, count: int) -> Found:
    """Make sets from text with the networks of an arm, and judge them. case: of TEXT_CASES"""
    grid, sets = TEXT_CASES[case][1], held_out(case, count)
    captions = [joint_caption(panels, *grid) for panels in sets]
    made = generate(networks, captions, grid, range(count), options_of(metadata))
    return judge(case, ruler, made, sets), [made[:COLUMNS]]


def measure_truth(case: str, networks: Networks, ruler: Ruler, count: int) -> Found:
    """The same figures of the true sets, as the autoencoder gives them back."""
    sets = held_out(case, count)
    after = tensors_after(networks.autoencoder, to_tensors(sets, *TEXT_CASES[case][1]))
    return judge(case, ruler, after, sets), [after[:COLUMNS]]


def judge(case: str, ruler: Ruler, image: Tensor, sets: list[tuple[Panel, ...]]) -> Figures:
    """The figures of composites (N, 3, h, w): a mean of each set's panels."""
    subjects, readings = TEXT_CASES[case][0], read_sets(ruler.reader, image)
    figures = {name: per_set(readings, sets, score) for name, score in TEXT_SCORES[subjects].items()}
    if case == "two subjects, 2x2":
        del figures["position"]  # a caption of two subjects in four panels has no room for places
    if subjects == 1:
        figures["same subject"] = [float(share == 1) for share in figures["colour and shape"]]
    return figures


TEXT = Judge(
    "text", measure, measure_truth, NAMES,
    notes=("same subject: all four panels have the colour and shape that are asked for.",),
    sheet="true sets, then for every arm sets from the same captions and noise",
)  # fmt: skip
