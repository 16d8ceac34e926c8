"""What a LoRA's sets are judged by: does a set of held-out subjects show its task's relation, and do traits survive?"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from iclora.layout import Layout, stitch
from sampling.images import to_tensor

from .eyes import Eyes
from .generate import Networks, Options, generate
from .report import tensors_after
from .scores import ALL, above_chance, interval, line, tiles, traits_shown, verdict
from .sets import PANEL
from .tasks import GRIDS, TaskSet, is_sketch, is_sparkled, is_walk, square, task_sets
from .truth import SHOWN, Reader, read

SEED = 9_000_000  # of the sets that are judged
COLUMNS = 6  # sets on a sheet
SUCCESS = ("from text", "first panel given", "given, caption silent")
FIGURES = (*SHOWN, ALL)  # of the subject that is given, one by one
GIVEN = OWN, OTHERS, NONE = "own panel", "another's panel", "no panel"  # what pictures are made from
ALIKE = "face and hue, from text"  # how far panels from text agree with each other
BASE_BAR, LORA_BAR, TRAITS_BAR = 0.2, 0.85, 0.8  # at most, at least, and at least above chance
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
    one: (case, networks, metadata of the LoRA) -> a call that makes a single set, to be timed
    """

    name: str
    measure: Callable[..., Found]
    measure_truth: Callable[..., Found]
    columns: tuple[str, ...]
    head: tuple[str, ...]
    details: Callable[[str, str, Figures, Figures], list[str]]
    notes: tuple[str, ...] = ()
    sheet: str = ""
    one: Callable[..., Callable[[], Tensor]] | None = None


def measure(task: str, networks: Networks, metadata: dict[str, str], ruler: Ruler, count: int) -> Found:
    """Make sets with the networks of an arm and judge them.

    metadata: of its LoRA, made with the options that it says; the base has none
    """
    reader, options = ruler.reader, options_of(metadata)
    sets = task_sets(task, count, SEED, held_out=True)
    true, seeds = to_tensors(sets), list(range(count))
    given = {"kept": only_first(true), "masked": tuple(range(2, len(sets[0].pictures) + 1))}

    def make(captions: list[str], seeds: list[int] = seeds, **kept: Tensor | tuple[int, ...]) -> Tensor:
        return generate(networks, captions, GRIDS[task], seeds, options, **kept)

    told, silent = [one.caption for one in sets], [one.silent for one in sets]
    made = [make(told), make(told, **given), make(silent, **given)]
    figures = {name: judge(task, reader, image, sets) for name, image in zip(SUCCESS, made, strict=True)}
    if task == "walk":  # dusk and pencil hide what the reader reads
        figures |= identity(reader, made[2], sets, OWN)
        given["kept"] = only_first(true.roll(1, dims=0))
        figures |= identity(reader, make(silent, **given), sets, OTHERS)
        figures |= identity(reader, make(silent), sets, NONE)
        again = make(told, [count + seed for seed in seeds])
        figures |= alike(reader, made[0], made[0], sets, OWN)
        figures |= alike(reader, made[0], again, sets, OTHERS)
    return figures, [made[0][:COLUMNS], made[1][:COLUMNS]]


def options_of(metadata: dict[str, str]) -> Options:
    """The options that a LoRA says it was trained with; the base says nothing."""
    options = {name: metadata[f"iclora.{name}"] for name in ("concat", "text") if f"iclora.{name}" in metadata}
    return Options(clean=metadata.get("iclora.condition") == "clean", **options)


def measure_truth(task: str, networks: Networks, ruler: Ruler, count: int) -> Found:
    """The same figures of the true sets, as the autoencoder gives them back: more cannot be reached."""
    sets = task_sets(task, count, SEED, held_out=True)
    after = tensors_after(networks, to_tensors(sets))
    figures = dict.fromkeys(SUCCESS, judge(task, ruler.reader, after, sets))
    if task == "walk":
        figures |= identity(ruler.reader, after, sets, OWN)
        figures |= alike(ruler.reader, after, after, sets, OWN)
    return figures, [after[:COLUMNS]]


def to_tensors(sets: list[TaskSet]) -> Tensor:
    """The sets as composites: (N, 3, h, w) in -1..1."""
    layout = Layout(*sets[0].grid, PANEL, PANEL)
    return torch.cat([to_tensor(stitch(one.pictures, layout)) for one in sets])


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


def alike(reader: Reader, image: Tensor, other: Tensor, sets: list[TaskSet], whose: str) -> Figures:
    """Whether the later panels of a picture have the face and hue that the subject in panel 1 of another one has.

    Captions cannot tell them, so panels of one set agree only as far as the model makes them for each other.
    """
    size = len(sets[0].panels)
    pages = [read(reader, tiles(picture)) for picture in (image, other)]
    values = []
    for first in range(0, len(pages[0]), size):
        agree = [
            [traits_shown(found, shown)[trait] for trait in ("face", "hue")]
            for shown in pages[1][first].seen[:1]
            for found in pages[0][first + 1 : first + size]
        ]
        values.append(float(np.mean(agree or [0])))
    return {f"{ALIKE}, {whose}": values}


AGREEMENT = (
    "| arm | figure | own panel | another's | no panel | ceiling | above chance | bar | |",
    "|---|---|---|---|---|---|---|---|---|",
)
DETAILS = (
    "Task success against its bars, if it has some; and, with captions that are silent about the subject, which of its "
    "traits the panels behind the first show, each by itself: those of the panel that was given, of another's panel "
    "(whose subject shares some by chance), and with no panel given. Above chance: (own - no panel) / (ceiling - no "
    "panel). The last line is of panels from text that tells neither face nor hue: those that the first panel got, "
    "in the same set and in another one of the same caption.",
    "",
    *AGREEMENT,
)


def details(task: str, name: str, figures: Figures, most: Figures, barred: bool = False) -> list[str]:
    """Lines of an arm: traits that reappear, each by itself, beside the same runs with another's panel and with none.

    barred: whether the bars hold here; then task success is told too
    """
    lines, base = [], name == "base"
    for way in SUCCESS[:2] if barred else ():
        told = verdict(float(np.mean(figures[way])), BASE_BAR if base else LORA_BAR, most=base)
        cells = [interval(figures[way]), None, None, interval(most[way]), None]
        lines.append(line(f"{task}: {name}", f"task success, {way}", cells, *told))
    for trait in (*FIGURES, ALIKE):
        if f"{trait}, {OWN}" not in figures:
            continue
        own, others, none = (figures.get(f"{trait}, {given}") for given in GIVEN)
        ceiling = most[f"{trait}, {OWN}"]
        share = None if none is None else above_chance(own, none, ceiling)
        told = verdict(share[0], TRAITS_BAR) if barred and not base and trait == ALL and share else ("", "")
        cells = [None if v is None else interval(v) for v in (own, others, none, ceiling)]
        lines.append(line(f"{task}: {name}", trait, [*cells, share], *told))
    return lines


IN_CONTEXT = Judge(
    "in-context", measure, measure_truth, SUCCESS, DETAILS, details,
    sheet="true sets, then for every arm sets from text and with their first panel given",
)  # fmt: skip
IN_CONTEXT_WITH_BARS = replace(IN_CONTEXT, details=partial(details, barred=True))
