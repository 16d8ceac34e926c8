"""What a LoRA's sets are judged by: does a set of held-out subjects show its task's relation, and do traits survive?"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iclora.layout import Layout, stitch
from sampling.images import to_tensor

from .eyes import Eyes
from .generate import Networks, generate
from .report import tensors_after
from .scores import hidden_agreement, interval, line, ratio, tiles
from .sets import PANEL
from .tasks import GRIDS, TaskSet, is_sketch, is_sparkled, is_walk, task_sets
from .truth import Reader, Reading, read
from .world import Subject

SEED = 9_000_000  # of the sets that are judged
COLUMNS = 6  # sets on a sheet
SUCCESS = ("from text", "first panel given", "given, caption silent")
KINDS = ("named", "unnamed")  # traits that captions may name, and those that they never do
Figures = dict[str, list[float]]  # name -> a value of each set
Found = tuple[Figures, list[Tensor]]  # and rows of composites for a sheet


@dataclass(frozen=True)
class Ruler:
    """What everything is measured with; eyes are None where a model has none."""

    reader: Reader
    eyes: Eyes | None = None


@dataclass(frozen=True)
class Judge:
    """How the arms of a method are judged.

    measure: (case, networks, metadata of the LoRA, ruler, count) -> figures and rows of what was made
    measure_truth: (case, networks, ruler, count) -> the same of true pictures, as the autoencoder gives them back
    columns: figures that tables show
    head: of a second table, and details: its lines for an arm: (case, name, figures, those of true pictures)
    notes: what the figures are; sheet: what it shows
    """

    name: str
    measure: Callable[..., Found]
    measure_truth: Callable[..., Found]
    columns: tuple[str, ...]
    head: tuple[str, ...]
    details: Callable[[str, str, Figures, Figures], list[str]]
    notes: tuple[str, ...] = ()
    sheet: str = ""


def measure(task: str, networks: Networks, about: dict[str, str], ruler: Ruler, count: int) -> Found:
    """Make sets with the networks of an arm and judge them.

    about: metadata of its LoRA, whose ways are followed; the base has none
    """
    reader = ruler.reader
    ways = {"clean": about.get("iclora.condition") == "clean"}
    ways |= {"concat": about.get("iclora.concat", "pixels"), "text": about.get("iclora.text", "joint")}
    sets = task_sets(task, count, SEED, held_out=True)
    true, seeds = to_tensors(sets), list(range(count))
    given = {"kept": only_first(true), "masked": tuple(range(2, len(sets[0].pictures) + 1))}

    def make(captions: list[str], **kept: Tensor | tuple[int, ...]) -> Tensor:
        return generate(networks, captions, GRIDS[task], seeds, **ways, **kept)

    silent = [one.silent for one in sets]
    made = [make([one.caption for one in sets]), make([one.caption for one in sets], **given), make(silent, **given)]
    figures = {name: judge(task, reader, image) for name, image in zip(SUCCESS, made, strict=True)}
    if task == "walk":  # dusk and pencil hide what the reader reads
        figures |= identity(reader, made[2], sets, "own panel")
        given["kept"] = only_first(true.roll(1, dims=0))
        figures |= identity(reader, make(silent, **given), sets, "another's panel")
    return figures, [made[0][:COLUMNS], made[1][:COLUMNS]]


def measure_truth(task: str, networks: Networks, ruler: Ruler, count: int) -> Found:
    """The same figures of the true sets, as the autoencoder gives them back: more cannot be reached."""
    sets = task_sets(task, count, SEED, held_out=True)
    after = tensors_after(networks, to_tensors(sets))
    figures = dict.fromkeys(SUCCESS, judge(task, ruler.reader, after))
    return figures | (identity(ruler.reader, after, sets, "own panel") if task == "walk" else {}), [after[:COLUMNS]]


def to_tensors(sets: list[TaskSet]) -> Tensor:
    """The sets as composites: (N, 3, h, w) in -1..1."""
    layout = Layout(*sets[0].grid, PANEL, PANEL)
    return torch.cat([to_tensor(stitch(one.pictures, layout)) for one in sets])


def only_first(image: Tensor) -> Tensor:
    """Composites (N, 3, h, w) in which all but the first panel is 0."""
    kept = torch.zeros_like(image)
    kept[:, :, :PANEL, :PANEL] = image[:, :, :PANEL, :PANEL]
    return kept


def judge(task: str, reader: Reader, image: Tensor) -> list[float]:
    """Whether each composite (N, 3, h, w) shows the relation of the task: 1 or 0."""
    rows, cols = GRIDS[task]
    panels = tiles(image).unflatten(0, (-1, rows * cols))  # (N, panels, 3, 64, 64)
    if task == "walk":
        return [float(is_walk(read(reader, group))) for group in panels]
    relation = is_sparkled if task == "sparkle" else is_sketch
    return [float(relation(group[1], group[0])) for group in panels]


def identity(reader: Reader, image: Tensor, sets: list[TaskSet], given: str) -> Figures:
    """Which share of the subject's traits the later panels show, by kind of trait; a mean of each set."""
    readings, size = read(reader, tiles(image)), len(sets[0].panels)
    figures: Figures = {f"{kind}, {given}": [] for kind in KINDS}
    for first, one in zip(range(0, len(readings), size), sets, strict=True):
        shares = [traits(found, one.panels[0].placed[0].subject) for found in readings[first + 1 : first + size]]
        for values, share in zip(figures.values(), np.mean(shares, axis=0), strict=True):
            values.append(float(share))
    return figures


def traits(reading: Reading, subject: Subject) -> tuple[float, float]:
    """Which share of the subject's named and unnamed traits one of its shape has in a panel; if there is none, 0."""
    same = [one for one in reading.seen if one.shape == subject.shape]
    names = ("shape", "colour", "pattern", "accessory")
    named = [any(getattr(one, name) == getattr(subject, name) for one in same) for name in names]
    return float(np.mean(named)), float(np.mean(list(hidden_agreement(reading, subject).values())))


IDENTITY = (
    "The given subject's traits in the generated panels, with captions silent about it (bar: 80 % of the ceiling):",
    "",
    "| arm | traits | own panel given | another's given | difference | ceiling | own / ceiling | |",
    "|---|---|---|---|---|---|---|---|",
)


def kept_traits(task: str, name: str, figures: Figures, most: Figures) -> list[str]:
    """Lines of traits that reappear, by kind, against the same run with another subject's panel."""
    lines = []
    for kind in KINDS:
        if f"{kind}, own panel" in figures:
            own, other = figures[f"{kind}, own panel"], figures[f"{kind}, another's panel"]
            ceiling = most[f"{kind}, own panel"]
            cells = [*map(interval, (own, other, np.subtract(own, other), ceiling)), ratio(own, ceiling)]
            lines.append(line(name, kind, cells))
    return lines


IN_CONTEXT = Judge(
    "in-context", measure, measure_truth, SUCCESS, IDENTITY, kept_traits,
    sheet="true sets, then for every arm sets from text and with their first panel given",
)  # fmt: skip
