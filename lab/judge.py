"""What a LoRA's sets are judged by: does a set of held-out subjects show its task's relation, and do traits survive?"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from iclora.layout import Layout, compose

from .eyes import Eyes
from .generate import Networks, Options, generate
from .scores import ALL, Figures, above_chance, interval, line, tiles, traits_shown, verdict
from .sets import PANEL
from .tasks import GRIDS, TaskSet, is_sketch, is_sparkled, is_walk, square, task_sets
from .train_truth import tensors_after
from .truth import SHOWN, Reader, read

SEED = 9_000_000  # of the sets that are judged
COLUMNS = 6  # sets on a sheet
SUCCESS = ("from text", "first panel given")
FIGURES = (*SHOWN, ALL)  # of the subject that is given, one by one
GIVEN = OWN, OTHERS, NONE = "own panel", "another's panel", "no panel"  # what pictures are made from
ALL_TASKS = "one LoRA of all tasks"
BASE_BAR, LORA_BAR, ALL_BAR, TRAITS_BAR = 0.2, 0.85, 0.7, 0.8  # at most, at least, and above chance
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
    eyes: whether CLIP and DINOv2 are asked too
    """

    name: str
    measure: Callable[..., Found]
    measure_truth: Callable[..., Found]
    columns: tuple[str, ...]
    head: tuple[str, ...] = ()
    details: Callable[[str, str, Figures, Figures], list[str]] = lambda task, name, figures, most: []
    notes: tuple[str, ...] = ()
    sheet: str = ""
    eyes: bool = False


def measure(task: str, networks: Networks, metadata: dict[str, str], ruler: Ruler, count: int) -> Found:
    """Make sets with the networks of an arm and judge them.

    metadata: of its LoRA, made with the options that it says; the base has none
    """
    reader, options = ruler.reader, options_of(metadata)
    sets = task_sets(task, count, SEED, held_out=True)
    true = to_tensors(sets)
    given = {"kept": only_first(true), "masked": tuple(range(2, len(sets[0].pictures) + 1))}

    captions = [one.caption for one in sets]
    made = [generate(networks, captions, GRIDS[task], range(count), options, **kept) for kept in ({}, given)]
    figures = {name: judge(task, reader, image, sets) for name, image in zip(SUCCESS, made, strict=True)}
    return figures, [image[:COLUMNS] for image in made]


def measure_silent(task: str, networks: Networks, metadata: dict[str, str], ruler: Ruler, count: int) -> Found:
    """Make sets whose captions say nothing of the subject, from its own panel, from another's and from none.

    task: a walk, as dusk and pencil hide what the reader reads; metadata: as for measure
    """
    sets, figures, row = task_sets(task, count, SEED, held_out=True), {}, None
    true, masked = to_tensors(sets), tuple(range(2, len(sets[0].pictures) + 1))
    for whose, first in ((OWN, true), (OTHERS, true.roll(1, dims=0)), (NONE, None)):
        given = {} if first is None else {"kept": only_first(first), "masked": masked}
        captions = [one.silent for one in sets]
        made = generate(networks, captions, GRIDS[task], range(count), options_of(metadata), **given)
        figures |= identity(ruler.reader, made, sets, whose)
        row = made[:COLUMNS] if whose == OWN else row
    return figures, [row]


def options_of(metadata: dict[str, str]) -> Options:
    """The options that a LoRA says it was trained with; the base says nothing."""
    options = {name: metadata[f"iclora.{name}"] for name in ("concat", "text") if f"iclora.{name}" in metadata}
    return Options(clean=metadata.get("iclora.condition") == "clean", **options)


def measure_truth(task: str, networks: Networks, ruler: Ruler, count: int) -> Found:
    """The same figures of the true sets, as the autoencoder gives them back: more cannot be reached."""
    sets = task_sets(task, count, SEED, held_out=True)
    after = tensors_after(networks.autoencoder, to_tensors(sets))
    return dict.fromkeys(SUCCESS, judge(task, ruler.reader, after, sets)), [after[:COLUMNS]]


def measure_silent_truth(task: str, networks: Networks, ruler: Ruler, count: int) -> Found:
    """The traits of the true sets, as the autoencoder gives them back."""
    sets = task_sets(task, count, SEED, held_out=True)
    after = tensors_after(networks.autoencoder, to_tensors(sets))
    return identity(ruler.reader, after, sets, OWN), [after[:COLUMNS]]


def to_tensors(sets: list[TaskSet]) -> Tensor:
    """The sets as composites: (N, 3, h, w) in -1..1."""
    layout = Layout(*sets[0].grid, PANEL, PANEL)
    return torch.cat([compose(dict(enumerate(one.pictures, start=1)), layout) for one in sets])


def only_first(image: Tensor) -> Tensor:
    """Composites (N, 3, h, w) in which all but the first panel is 0."""
    kept = torch.zeros_like(image)
    kept[:, :, :PANEL, :PANEL] = image[:, :, :PANEL, :PANEL]
    return kept


def judge(task: str, reader: Reader, image: Tensor, sets: list[TaskSet]) -> list[float]:
    """Whether each composite (N, 3, h, w) shows the relation of the task: 1 or 0."""
    rows, cols = GRIDS[task]
    panels = tiles(image).unflatten(0, (-1, rows * cols))  # (N, panels, 3, 64, 64)
    if task == "walk":
        return [float(is_walk(read(reader, group), group)) for group in panels]
    relation, squares = is_sparkled if task == "sparkle" else is_sketch, [square(one.panels[0]) for one in sets]
    return [float(relation(group[1], group[0], inside)) for group, inside in zip(panels, squares, strict=True)]


def identity(reader: Reader, image: Tensor, sets: list[TaskSet], given: str) -> Figures:
    """Which traits of the subject the later panels show, each by itself; a mean of each set."""
    readings, size = read(reader, tiles(image)), len(sets[0].panels)
    figures: Figures = {f"{trait}, {given}": [] for trait in FIGURES}
    for first, one in zip(range(0, len(readings), size), sets, strict=True):
        later = [traits_shown(found, one.panels[0].placed[0].subject) for found in readings[first + 1 : first + size]]
        for trait in FIGURES:
            figures[f"{trait}, {given}"].append(float(np.mean([shown[trait] for shown in later])))
    return figures


AGREEMENT = (
    "| arm | figure | own panel | another's | no panel | ceiling | above chance | bar | |",
    "|---|---|---|---|---|---|---|---|---|",
)
TRAITS = (
    "Which of the subject's traits the panels that are made show, each by itself: from panels that show it, from "
    "panels of another one (who shares some by chance), and from no panel. Above chance: (own - no panel) / (ceiling - "
    "no panel).",
    "",
    *AGREEMENT,
)


def details(task: str, name: str, figures: Figures, most: Figures, bar: float | None = None) -> list[str]:
    """Lines of an arm: traits that reappear, beside the same runs with another's panel and with none.

    bar: of all traits, above chance; the base has none
    """
    lines = []
    for trait in FIGURES:
        own, others, none = (figures[f"{trait}, {given}"] for given in GIVEN)
        ceiling = most[f"{trait}, {OWN}"]
        share = above_chance(own, none, ceiling)
        barred = bar is not None and trait == ALL and name != "base" and share is not None
        told = verdict(share[0], bar) if barred else ("", "")
        cells = [*map(interval, (own, others, none, ceiling)), share]
        lines.append(line(f"{task}: {name}", trait, cells, *told))
    return lines


def bars(task: str, name: str, figures: Figures, most: Figures) -> list[str]:
    """Lines of an arm: whether task success reaches its bar; one LoRA of all tasks has another than one of its own."""
    lines, base = [], name == "base"
    for way in SUCCESS:
        bar = BASE_BAR if base else ALL_BAR if name == ALL_TASKS else LORA_BAR
        told = verdict(float(np.mean(figures[way])), bar, most=base)
        lines.append(line(f"{task}: {name}", way, [interval(figures[way]), interval(most[way])], *told))
    return lines


IN_CONTEXT = Judge(
    "in-context", measure, measure_truth, SUCCESS,
    sheet="true sets, then for every arm sets from text and with their first panel given",
)  # fmt: skip
IN_CONTEXT_WITH_BARS = replace(
    IN_CONTEXT,
    head=(
        "Task success against its bars:",
        "",
        "| arm | figure | reached | ceiling | bar | |",
        "|---|---|---|---|---|---|",
    ),
    details=bars,
)
SILENT = Judge(
    "silent", measure_silent, measure_silent_truth, tuple(f"{trait}, {OWN}" for trait in FIGURES), TRAITS,
    partial(details, bar=TRAITS_BAR),
    sheet="true sets, then for every arm sets whose first panel is given, with captions silent about it",
)  # fmt: skip
