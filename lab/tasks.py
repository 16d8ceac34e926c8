"""Three small tasks for a LoRA to learn: how the panels of a set relate, which their captions do not say.

sparkle (2x1): below is the upper panel again, at dusk and full of sparkles. sketch (1x2): on the right is a pencil
drawing of the left panel. walk (3x1): the subject goes from left to right through one scene. Pretraining shows none of
this: its panels all have scenes of their own, and nobody walks from left to right.

Every relation has a truth function, which tells from pixels, or from what the truth reader saw, whether a set has it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from iclora.layout import Layout, stitch
from iclora.prompts import markers_for
from sampling.images import to_picture, to_tensor

from .captions import NUMBERS, PANELS, POSITION_WORDS, SCENE_WORDS, name
from .domains import DIM, PURPLE, VEIL, with_pencil, with_sparkles
from .truth import Reading
from .world import POSITIONS, SCENES, SIZES, Panel, Placed, Subject, draw, random_subject

GRIDS = {"sparkle": (2, 1), "sketch": (1, 2), "walk": (3, 1)}
WALK = ("left", "middle", "right")
PANEL = 64  # pixels
COUNT, SEED = 20, 1  # of the committed sets

# Captions: the set, the first panel, the others. "It" says nothing of who or where.
BEGINNINGS = ("{number} pictures of {who}:", "a set of {number} images shows {who}:", "the story of {who}:")
OTHERS = ("it is {scene}", "we see it {scene}", "now it is {scene}", "{scene} we see it")


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


def task_sets(task: str, count: int, seed: int, held_out: bool | None = False, size: int = PANEL) -> list[TaskSet]:
    """Draw sets of a task; the same arguments give the same bytes.

    task: a key of GRIDS
    held_out: as for lab.world.random_subject
    size: side of a panel in pixels
    Errors: ValueError for another task
    """
    if task not in GRIDS:
        raise ValueError(f"task {task!r} is unknown; choose one of {', '.join(GRIDS)}")
    rng = np.random.default_rng([seed, tuple(GRIDS).index(task)])
    return [_task_set(task, rng, held_out, size) for _ in range(count)]


def _task_set(task: str, rng: np.random.Generator, held_out: bool | None, size: int) -> TaskSet:
    subject = random_subject(rng, held_out)
    scene, how_big, seed = _pick(rng, tuple(SCENES)), _pick(rng, SIZES), int(rng.integers(2**31))
    places = WALK if task == "walk" else (_pick(rng, POSITIONS[:3]),) * 2
    panels = tuple(Panel(scene, (Placed(subject, place, how_big),), seed) for place in places)
    pictures = [draw(panel, size) for panel in panels]
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
    start = beginning.format(number=NUMBERS[len(markers)], who=_with_article(placed.subject)) + " "
    return caption(start, f"the {placed.size} {placed.subject.shape}"), caption("", it)


def _with_article(subject: Subject) -> str:
    return ("an " if name(subject)[0] in "aeiou" else "a ") + name(subject)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


# telling the truth


def sparkle_measures(panel: Tensor, clean: Tensor) -> tuple[int, float, float]:
    """What is_sparkled looks at: how many lights, the share of pixels between them, and how far those are from dusk.

    panel, clean: (3, h, w) images in -1..1
    returns: lights, share, mean distance per colour channel in 0..1
    """
    purple = torch.tensor(PURPLE)[:, None, None] / 255
    off = _soft((panel + 1) / 2 - DIM * (clean + 1) / 2 - VEIL * purple, 3)  # (3, h, w)
    light = _soft(off.mean(dim=0, keepdim=True), 3)  # softened twice, as a blurred plateau has one highest pixel
    peaks = (light == max_pool2d(light, 11, 1, 5)) & (light > 0.25) & (light - _soft(light, 17) > 0.15)
    between = light[0] < 0.1
    return int(peaks.sum()), float(between.float().mean()), float(off[:, between].abs().mean().nan_to_num(1.0))


def is_sparkled(panel: Tensor, clean: Tensor) -> bool:
    """Whether a panel is the clean one at dusk and with sparkles: about eight, and dusk between them.

    panel, clean: (3, h, w) images in -1..1
    """
    lights, share, off = sparkle_measures(panel, clean)
    return 6 <= lights <= 11 and share > 0.65 and off < 0.06


def sketch_measures(panel: Tensor, coloured: Tensor) -> tuple[float, float, float, float]:
    """What is_sketch looks at: colourfulness, brightness, share of lines, likeness to the drawing that should be there.

    panel, coloured: (3, h, w) images in -1..1
    """
    colourful = float((panel.amax(0) - panel.amin(0)).mean() / 2)
    bright = _brightness(panel)
    lines = float((bright < bright.quantile(0.9) - 0.2).float().mean())
    drawn = _brightness(to_tensor(with_pencil(to_picture(coloured.clamp(-1, 1))))[0])
    strokes = [_soft(image, 3) - _soft(image, 15) for image in (bright, drawn)]
    return colourful, float(bright.mean()), lines, _alike(*strokes)


def is_sketch(panel: Tensor, coloured: Tensor | None = None) -> bool:
    """Whether a panel is a pencil drawing: grey lines on bright paper.

    panel: (3, h, w) image in -1..1
    coloured: what it must be a drawing of; None for anything
    """
    colourful, bright, lines, alike = sketch_measures(panel, panel if coloured is None else coloured)
    drawn = colourful < 0.08 and bright > 0.68 and 0.04 < lines < 0.5
    return drawn and (coloured is None or alike > 0.55)


def is_walk(readings: Sequence[Reading]) -> bool:
    """Whether one subject, alone, goes from left to right through one scene.

    readings: of the panels, as lab.truth.read gives them
    """
    alone = all(len(reading.seen) == 1 for reading in readings)
    one_scene = len({reading.scene for reading in readings}) == 1
    one_shape = len({one.shape for reading in readings for one in reading.seen}) == 1
    return alone and one_scene and one_shape and tuple(reading.seen[0].position for reading in readings) == WALK


def _brightness(image: Tensor) -> Tensor:
    """(1, h, w) in 0..1 of an image in -1..1."""
    return (image.mean(dim=0, keepdim=True) + 1) / 2


def _soft(image: Tensor, window: int) -> Tensor:
    """Means over a square window, of those of its pixels that exist."""
    return avg_pool2d(image, window, 1, window // 2, count_include_pad=False)


def _alike(a: Tensor, b: Tensor) -> float:
    """Correlation of two tensors; 0 if one of them is flat."""
    if a.std() < 1e-4 or b.std() < 1e-4:
        return 0.0
    return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])


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
                composite = stitch(one.pictures, Layout(rows, cols, PANEL, PANEL))
                composite.save(place / f"{stem}.png", optimize=True)
                (place / f"{stem}.txt").write_text(one.caption + "\n")
                continue
            (place / stem).mkdir(exist_ok=True)
            for panel, picture in enumerate(one.pictures, start=1):
                picture.save(place / stem / f"{panel}.png", optimize=True)
            (place / stem / "caption.txt").write_text(one.caption + "\n")
