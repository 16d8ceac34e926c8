"""The three tasks for a LoRA: their sets are what they should be, and their truth functions can be believed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from iclora.prompts import lint
from lab.captions import LIMITS, length, vocabulary
from lab.tasks import (
    COUNT,
    GRIDS,
    SEED,
    is_pencil,
    is_sketch,
    is_sparkled,
    is_walk,
    square,
    task_sets,
    with_pencil,
    write_tasks,
)  # fmt: skip
from lab.truth import Reading, Seen
from lab.world import draw, is_held_out
from sampling.images import open_picture, to_tensor

SETS = Path(__file__).parents[2] / "sets"
ENOUGH = 49  # right answers out of 50


def image(picture):
    return to_tensor(picture)[0]


def reading(panel):
    """A reader without mistakes."""
    seen = [
        Seen(p.position, p.subject.shape, p.subject.colour, p.subject.pattern, p.subject.accessory, p.size, 0, 0, 0, 0)
        for p in panel.placed
    ]
    return Reading(panel.scene, tuple(seen))


@pytest.mark.parametrize("task", GRIDS)
def test_sets_come_from_their_seed_and_keep_to_the_held_out_subjects(task):
    sets = task_sets(task, 5, 3, held_out=True)
    assert sets == task_sets(task, 5, 3, held_out=True)
    assert sets != task_sets(task, 5, 4, held_out=True)
    assert all(is_held_out(one.panels[0].placed[0].subject) for one in sets)
    assert not any(is_held_out(one.panels[0].placed[0].subject) for one in task_sets(task, COUNT, SEED))


def test_an_unknown_task_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'jump' is unknown; choose one of sparkle, sketch, walk"):
        task_sets("jump", 1, 0)


@pytest.mark.parametrize("task", GRIDS)
def test_captions_use_known_words_and_only_the_silent_ones_say_nothing_of_the_subject(task):
    words = set(vocabulary())
    for one in task_sets(task, 40, 8, held_out=None):
        subject = one.panels[0].placed[0].subject
        for caption in (one.caption, one.silent):
            assert set(re.findall(r"\[[A-Z0-9-]+\]|\w+", caption)) <= words
            assert length(caption) <= LIMITS[0]
            assert lint(caption, *one.grid) == []
        assert subject.shape in one.caption and subject.colour in one.caption
        assert subject.shape not in one.silent and subject.colour not in one.silent
        behind = one.caption.split("[IMAGE2]")[1]
        assert not re.search("left|right|middle|sparkl|drawing", behind), "the relation is for the LoRA to learn"


def test_the_lower_panel_sparkles_and_is_otherwise_the_upper_one_at_dusk():
    sets = task_sets("sparkle", 50, 11, held_out=True)
    clean, sparkled = ([image(one.pictures[k]) for one in sets] for k in (0, 1))
    inside = [square(one.panels[0]) for one in sets]
    assert sum(map(is_sparkled, sparkled, clean, inside)) >= ENOUGH
    assert sum(map(is_sparkled, clean, clean, inside)) <= 1
    assert not any(map(is_sparkled, [0.55 * (c + 1) - 1 for c in clean], clean, inside)), "dusk without sparkles"


def test_the_right_panel_is_the_pencil_drawing_of_the_left_one():
    sets = task_sets("sketch", 50, 13, held_out=True)
    coloured, drawn = ([image(one.pictures[k]) for one in sets] for k in (0, 1))
    inside = [square(one.panels[0]) for one in sets]
    grey = [c.mean(dim=0, keepdim=True).expand(3, -1, -1) for c in coloured]
    assert sum(map(is_sketch, drawn, coloured, inside)) >= ENOUGH and sum(map(is_pencil, drawn)) >= ENOUGH
    assert sum(map(is_pencil, coloured)) <= 1
    assert sum(map(is_sketch, grey, coloured, inside)) <= 1


def test_a_walk_goes_from_left_to_right_and_nothing_else_counts():
    sets = task_sets("walk", 50, 15, held_out=True)
    walks = [[reading(panel) for panel in one.panels] for one in sets]
    clear = [torch.stack([image(p) for p in one.pictures]) for one in sets]
    assert all(map(is_walk, walks, clear))
    assert not any(is_walk(walk[::-1], sharp) for walk, sharp in zip(walks, clear, strict=True))
    assert not any(is_walk([walk[0], walk[1], walk[1]], clear[0]) for walk in walks)
    assert not any(is_walk([walk[0], Reading(walk[1].scene, ()), walk[2]], clear[0]) for walk in walks)
    mixed = [[*a[:2], b[2]] for a, b in zip(walks, walks[1:], strict=False)]
    same = [len({(r.scene, r.seen[0].shape, r.seen[0].colour) for r in readings}) == 1 for readings in mixed]
    assert [is_walk(readings, clear[0]) for readings in mixed] == same


def test_the_scene_stands_still_while_the_subject_walks():
    for one in task_sets("walk", 5, 16):
        first, _, last = (np.asarray(picture, dtype=float) for picture in one.pictures)
        assert np.abs(first - last)[:12].mean() < 25 and np.abs(first - last).mean() > 5


def test_a_drawing_can_be_made_of_any_size():
    picture = draw(task_sets("sketch", 1, 0)[0].panels[0], 128)
    assert with_pencil(picture).size == (128, 128)
    assert is_pencil(image(with_pencil(picture)))


def test_the_committed_sets_are_those_that_the_code_writes(tmp_path):
    write_tasks(tmp_path)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert written == sorted(path.relative_to(SETS) for path in SETS.rglob("*.*"))
    assert sum(path.stat().st_size for path in SETS.rglob("*.*")) < 1.5 * 2**20
    for path in written:
        if path.suffix == ".png":  # another Pillow may round a pixel differently
            old, new = (np.asarray(open_picture(folder / path), dtype=float) for folder in (SETS, tmp_path))
            assert np.abs(old - new).mean() < 0.5
        else:
            assert (SETS / path).read_text() == (tmp_path / path).read_text()
    assert json.loads((SETS / "walk" / "set.json").read_text()) == {"grid": "3x1"}
