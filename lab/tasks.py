"""Three small tasks for a LoRA to learn: how the panels of a set relate, which their captions do not say.

sparkle (2x1): below is the upper panel again, at dusk and full of sparkles. sketch (1x2): on the right is a pencil
drawing of the left panel. walk (3x1): the subject goes from left to right through one scene. Pretraining shows none of
this: its panels all have scenes of their own, and nobody walks from left to right.

Every relation has a truth function, which tells from pixels, or from what the truth reader saw, whether a set has it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from iclora.layout import Layout, paste
from iclora.prompts import markers_for
from sampling.images import to_picture, to_tensor

from .captions import NUMBERS, PANELS, POSITION_WORDS, SCENE_WORDS, name, with_article
from .domains import DIM, PURPLE, VEIL, with_pencil, with_sparkles
from .truth import Reading
from .world import POSITIONS, SCENES, SIZES, Panel, Placed, box, draw, random_subject

GRIDS = {"sparkle": (2, 1), "sketch": (1, 2), "walk": (3, 1)}
WALK = ("left", "middle", "right")
PANEL = 64  # pixels
COUNT, SEED = 20, 1  # of the committed sets

# Captions: the set, the first panel, the others. "It" says nothing of who or where.
BEGINNINGS = ("{number} pictures of {who}:", "a set of {number} images shows {who}:", "the story of {who}:")
OTHERS = ("it is {scene}", "we see it {scene}", "now it is {scene}", "{scene} we see it")

# Thresholds of the truth functions, from true and wrong pictures alone (lab/tests/test_wrong_pictures.py): what
# explained must give for the subject and for a drawing's scene, how far dusk may be off, how sharp a panel must be
SUBJECT, SCENE, DUSK, SHARP = {"sparkle": 0.5, "sketch": 0.6}, 0.5, 0.045, 0.12


@dataclass(frozen=True)
class TaskSet:
    """One set of a task.

    panels: what is drawn, before the sparkles or the pencil
    caption: names the subject, its place in panel 1, and the scene
    silent: the same, but nothing of the subject
    """

    grid: tuple[int, int]
    panels: tuple[Panel, ...]
    pictures: tuple[Image.Image, ...]
    caption: str
    silent: str


# making sets


def task_sets(task: str, count: int, seed: int, held_out: bool | None = False) -> list[TaskSet]:
    """Draw sets of a task; the same arguments give the same bytes.

    task: a key of GRIDS
    held_out: as for lab.world.random_subject
    Errors: ValueError for another task
    """
    if task not in GRIDS:
        raise ValueError(f"task {task!r} is unknown; choose one of {', '.join(GRIDS)}")
    rng = np.random.default_rng([seed, tuple(GRIDS).index(task)])
    return [_task_set(task, rng, held_out) for _ in range(count)]


def _task_set(task: str, rng: np.random.Generator, held_out: bool | None) -> TaskSet:
    subject = random_subject(rng, held_out)
    scene, how_big, seed = _pick(rng, tuple(SCENES)), _pick(rng, SIZES), int(rng.integers(2**31))
    places = WALK if task == "walk" else (_pick(rng, POSITIONS[:3]),) * 2
    panels = tuple(Panel(scene, (Placed(subject, place, how_big),), seed) for place in places)
    pictures = [draw(panel, PANEL) for panel in panels]
    if task == "sparkle":
        pictures[1] = with_sparkles(pictures[0], seed)
    if task == "sketch":
        pictures[1] = with_pencil(pictures[0])
    caption, silent = _captions(GRIDS[task], panels[0], rng)
    return TaskSet(GRIDS[task], panels, tuple(pictures), caption, silent)


def _captions(grid: tuple[int, int], first: Panel, rng: np.random.Generator) -> tuple[str, str]:
    """A caption that names the subject, and one in the same words that does not."""
    placed, markers = first.placed[0], markers_for("image", *grid)
    place, scenes = POSITION_WORDS[placed.position], SCENE_WORDS[first.scene]
    beginning, between = _pick(rng, BEGINNINGS), _pick(rng, (", ", "; "))
    opening, opening_scene = _pick(rng, PANELS), _pick(rng, scenes)
    others = [_pick(rng, OTHERS).format(scene=_pick(rng, scenes)) for _ in markers[1:]]

    def caption(start: str, who: str) -> str:
        phrases = [opening.format(who=f"{who} {place}", scene=opening_scene), *others]
        return start + between.join(f"{marker} {phrase}" for marker, phrase in zip(markers, phrases, strict=True)) + "."

    it = "it" if "we see" in opening else "it is"
    start = beginning.format(number=NUMBERS[len(markers)], who=with_article(name(placed.subject))) + " "
    return caption(start, f"the {placed.size} {placed.subject.shape}"), caption("", it)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


# telling the truth


def square(panel: Panel) -> Tensor:
    """Mark the square round the subject of a panel: (64, 64) bool."""
    left, top, right, bottom = box(panel, 0)
    inside = torch.zeros(PANEL, PANEL, dtype=torch.bool)
    inside[int(top) : math.ceil(bottom), int(left) : math.ceil(right)] = True
    return inside


def sparkle_measures(panel: Tensor, clean: Tensor, inside: Tensor) -> tuple[int, float, float, float]:
    """What is_sparkled looks at: how many lights, the share of pixels between them, how far those are from dusk, and
    how much of the subject's detail they show.

    panel, clean: (3, h, w) images in -1..1
    inside: (h, w) bool, where the subject is
    Returns lights, share, mean distance per colour channel in 0..1, and what explained gives
    """
    got, dusk = (panel + 1) / 2, DIM * (clean + 1) / 2 + VEIL * torch.tensor(PURPLE)[:, None, None] / 255
    off = _soft(got - dusk, 3)  # (3, h, w)
    light = _soft(off.mean(dim=0, keepdim=True), 3)  # softened twice, as a blurred plateau has one highest pixel
    peaks = (light == max_pool2d(light, 11, 1, 5)) & (light > 0.25) & (light - _soft(light, 17) > 0.15)
    between = light[0] < 0.1
    distance = float(off[:, between].abs().mean().nan_to_num(1.0))
    detail = explained(*(image - _soft(image, 9) for image in (got, dusk)), inside & between)
    return int(peaks.sum()), float(between.float().mean()), distance, detail


def is_sparkled(panel: Tensor, clean: Tensor, inside: Tensor) -> bool:
    """Whether a panel is the clean one at dusk and with sparkles: about eight, dusk between them, and its subject.

    panel, clean, inside: as for sparkle_measures
    """
    lights, share, off, detail = sparkle_measures(panel, clean, inside)
    return 6 <= lights <= 11 and share > 0.65 and off < DUSK and detail > SUBJECT["sparkle"]


def is_pencil(panel: Tensor) -> bool:
    """Whether a panel (3, h, w) in -1..1 is a pencil drawing of anything: grey lines on bright paper."""
    bright = _brightness(panel)
    lines = float((bright < bright.quantile(0.9) - 0.2).float().mean())
    colourful = float((panel.amax(0) - panel.amin(0)).mean() / 2)
    return colourful < 0.08 and float(bright.mean()) > 0.68 and 0.04 < lines < 0.5


def sketch_measures(panel: Tensor, coloured: Tensor, inside: Tensor) -> tuple[float, float]:
    """How much of the drawing that should be there is there: of the subject, and of the scene; see explained.

    panel, coloured, inside: as for sparkle_measures
    """
    drawn = to_tensor(with_pencil(to_picture(coloured.clamp(-1, 1))))[0]
    strokes = [_soft(image, 3) - _soft(image, 15) for image in map(_brightness, (panel, drawn))]
    return explained(*strokes, inside), explained(*strokes, ~inside)


def is_sketch(panel: Tensor, coloured: Tensor, inside: Tensor) -> bool:
    """Whether a panel is the pencil drawing of another one, of its subject and of its scene.

    panel, coloured, inside: as for sparkle_measures
    """
    subject, scene = sketch_measures(panel, coloured, inside)
    return is_pencil(panel) and subject > SUBJECT["sketch"] and scene > SCENE


def is_walk(readings: Sequence[Reading], panels: Tensor) -> bool:
    """Whether one subject, alone and drawn clearly, goes from left to right through one scene.

    readings: of the panels, as lab.truth.read gives them
    panels: (N, 3, 64, 64) in -1..1
    """
    alone = all(len(reading.seen) == 1 for reading in readings)
    one_scene = len({reading.scene for reading in readings}) == 1
    same = len({(one.shape, one.colour) for reading in readings for one in reading.seen}) == 1
    walks = alone and tuple(reading.seen[0].position for reading in readings) == WALK
    return walks and one_scene and same and min(map(sharpness, panels)) > SHARP


def sharpness(panel: Tensor) -> float:
    """The share of a picture's contrast that is between neighbouring pixels."""
    bright = _brightness(panel)
    return float((bright - _soft(bright, 3)).std() / bright.std())


def explained(got: Tensor, wanted: Tensor, where: Tensor) -> float:
    """The share of the variance of what is wanted that is there: 1 all of it, 0 as much as nothing at all.

    got, wanted: (C, h, w)
    where: (h, w) bool
    """
    a, b = (image[:, where] - image[:, where].mean() for image in (got, wanted))
    return 1 - float((a - b).square().sum() / b.square().sum().clamp(min=1e-6))


def _brightness(image: Tensor) -> Tensor:
    """(1, h, w) in 0..1 of an image in -1..1."""
    return (image.mean(dim=0, keepdim=True) + 1) / 2


def _soft(image: Tensor, window: int) -> Tensor:
    """Means over a square window, of those of its pixels that exist."""
    return avg_pool2d(image, window, 1, window // 2, count_include_pad=False)


# on disk


def write_tasks(folder: Path, count: int = COUNT) -> None:
    """Write sets of every task, by default those that are committed: sketch as composites, the others as panels."""
    for task, (rows, cols) in GRIDS.items():
        place = folder / task
        place.mkdir(parents=True, exist_ok=True)
        (place / "set.json").write_text(json.dumps({"grid": f"{rows}x{cols}"}) + "\n")
        for number, one in enumerate(task_sets(task, count, SEED), start=1):
            stem = f"{number:02d}"
            if task == "sketch":
                panels, layout = dict(enumerate(one.pictures, start=1)), Layout(rows, cols, PANEL, PANEL)
                composite = paste(Image.new("RGB", (layout.width, layout.height)), panels, layout)
                composite.save(place / f"{stem}.png", optimize=True)
                (place / f"{stem}.txt").write_text(one.caption + "\n")
                continue
            (place / stem).mkdir(exist_ok=True)
            for panel, picture in enumerate(one.pictures, start=1):
                picture.save(place / stem / f"{panel}.png", optimize=True)
            (place / stem / "caption.txt").write_text(one.caption + "\n")
