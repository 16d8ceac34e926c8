"""Judges let true pictures pass that went through the autoencoder, and wrong ones not.

Thresholds in lab/tasks.py come from other sets of the same kinds, and from no generated picture.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from wrong import KINDS, with_effect, wrong

from lab import judge_kept, judge_text
from lab.judge import OWN, Ruler, judge
from lab.judge_uno import score
from lab.pairs import make_pairs
from lab.scores import traits_shown
from lab.tasks import task_sets
from lab.truth import load_reader, read
from lab.world import draw
from model.weights import find_model, load_autoencoder
from sampling.images import to_tensor

COUNT, FEW, SEED = 60, 20, 21  # sets; of four panels
TRUE, WRONG = 0.95, 0.10  # of true pictures at least, of wrong ones at most
TASKS = ("sparkle", "sketch", "walk")


@pytest.fixture(scope="module")
def ruler():
    return Ruler(load_reader("tiny"))


@pytest.fixture(scope="module")
def after():
    """What the bundled autoencoder makes of pictures: (N, 3, h, w)."""
    autoencoder = load_autoencoder(find_model("tiny").autoencoder)

    @torch.no_grad()
    def decode(pictures):
        image = torch.cat([to_tensor(picture) for picture in pictures])
        return torch.cat([autoencoder.decode(autoencoder.encode(part)) for part in image.split(16)]).clamp(-1, 1)

    return decode


def passed(task, kind, ruler, after):
    """The share of composites that pass, whose later panels are wrong; of a walk one of the three."""
    sets, rng = task_sets(task, COUNT, SEED, held_out=True), np.random.default_rng(SEED)
    panels = []
    for one in sets:
        pictures = list(one.pictures)
        if task != "walk":
            pictures[1] = with_effect(task, one.panels[0], kind, rng)
        elif kind != "true":
            for at in range(3) if kind == "blurred" else [int(rng.integers(3))]:
                pictures[at] = wrong(one.panels[at], kind, rng)
        panels += pictures
    return np.mean(judge(task, ruler.reader, composites(after(panels), *sets[0].grid), sets))


def composites(panels, rows, cols):
    """Sets as they are judged, (N, 3, rows h, cols w), from their panels (N rows cols, 3, h, w)."""
    return panels.unflatten(0, (-1, rows, cols)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


@pytest.mark.parametrize("task", TASKS)
def test_true_sets_pass(task, ruler, after):
    assert passed(task, "true", ruler, after) >= TRUE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_wrong_sets_fail(task, kind, ruler, after):
    assert passed(task, kind, ruler, after) <= WRONG


@pytest.fixture(scope="module")
def pairs():
    return make_pairs("one", COUNT, SEED, held_out=True)


def scores(pairs, kind, ruler, after):
    """What a picture of every pair gets whose target is wrong in one way: figures by name, a mean of all."""
    rng = np.random.default_rng(SEED)
    readings = read(ruler.reader, after([wrong(pair.panel, kind, rng) for pair in pairs]))
    found = [score(reading, pair) for reading, pair in zip(readings, pairs, strict=True)]
    return {name: np.mean([one[name] for one in found]) for name in ("traits", "look", "scene", "missing")}


def test_true_targets_of_uno_get_nearly_everything(pairs, ruler, after):
    true = scores(pairs, "true", ruler, after)
    assert min(true[name] for name in ("traits", "look", "scene")) >= TRUE and true["missing"] <= 1 - TRUE


def test_wrong_targets_of_uno_get_next_to_nothing(pairs, ruler, after):
    nobody = scores(pairs, "subject removed", ruler, after)
    assert nobody["look"] <= WRONG and nobody["missing"] >= 1 - WRONG
    assert max(scores(pairs, kind, ruler, after)["look"] for kind in ("somebody else", "blurred")) <= WRONG
    assert scores(pairs, "another scene", ruler, after)["scene"] <= WRONG


def means(name, panels, pairs, ruler, after):
    """The mean of a figure over drawn panels, where it can be told."""
    readings = read(ruler.reader, after([draw(panel) for panel in panels]))
    found = [score(reading, pair) for reading, pair in zip(readings, pairs, strict=True)]
    return np.mean([one[name] for one in found if name in one])


def test_who_stands_as_in_the_reference_is_pasted(pairs, ruler, after):
    assert means("pasted", [pair.panel for pair in pairs], pairs, ruler, after) <= 1 - TRUE
    as_shown = [
        replace(p.panel, placed=(replace(p.shown[0].placed[0], subject=p.panel.placed[0].subject),)) for p in pairs
    ]
    assert means("pasted", as_shown, pairs, ruler, after) >= 1 - WRONG


def test_two_in_each_others_looks_are_swapped(ruler, after):
    pairs, exchanged = make_pairs("two", COUNT, SEED, held_out=True), []
    for pair in pairs:
        one, other = pair.panel.placed
        looks = [replace(b.subject, shape=a.subject.shape) for a, b in ((one, other), (other, one))]
        placed = replace(one, subject=looks[0]), replace(other, subject=looks[1])
        exchanged.append(replace(pair.panel, placed=placed))
    assert means("swapped", [pair.panel for pair in pairs], pairs, ruler, after) <= 1 - TRUE
    assert means("swapped", exchanged, pairs, ruler, after) >= 1 - WRONG
    assert means("all right", exchanged, pairs, ruler, after) <= WRONG


def test_traits_are_those_of_the_subject_alone(ruler, after):
    sets, rng = task_sets("walk", COUNT, SEED, held_out=True), np.random.default_rng(SEED)
    panels = [one.panels[1] for one in sets]

    def mean(kind):
        readings = read(ruler.reader, after([wrong(panel, kind, rng) for panel in panels]))
        shown = [traits_shown(found, p.placed[0].subject) for found, p in zip(readings, panels, strict=True)]
        return {trait: np.mean([one[trait] for one in shown]) for trait in shown[0]}

    true, other, nobody, blurred = map(mean, ("true", "somebody else", "subject removed", "blurred"))
    assert min(true.values()) >= 0.8 and true["all traits"] >= TRUE, "small patterns are hard to read"
    assert (
        other["shape"] == 0 and other["all traits"] <= 0.3 and max(nobody["all traits"], blurred["all traits"]) <= WRONG
    )


def wrongly(sets, kind, at, grid, after):
    """Composites of sets whose panels of these numbers are wrong in one way."""
    rng = np.random.default_rng(SEED)
    return composites(
        after([wrong(panel, kind if i in at else "true", rng) for one in sets for i, panel in enumerate(one)]), *grid
    )


def means_of(figures):
    return {name.removesuffix(f", {OWN}"): np.mean(values) for name, values in figures.items()}


def test_a_wrong_panel_is_not_filled_in(ruler, after):
    sets, found = judge_kept.held_out(FEW), {}
    for kind in ("true", "somebody else", "subject removed", "another scene", "blurred"):
        image = wrongly(sets, kind, (judge_kept.MASKED - 1,), (2, 2), after)
        found[kind] = means_of(judge_kept.judge(ruler.reader, image, sets, OWN))
    true, other, nobody, elsewhere, blurred = found.values()
    assert min(true[name] for name in ("scene", "shape", "all traits")) >= TRUE
    assert other["shape"] <= WRONG and nobody["all traits"] <= WRONG
    assert max(other["all traits"], blurred["all traits"]) <= 0.3, "some traits are guessed right"
    assert elsewhere["scene"] <= WRONG


def test_a_set_that_is_not_as_its_text_says_is_told(ruler, after):
    case = "one subject, 2x2"
    sets, found = judge_text.held_out(case, FEW), {}
    for kind, at in (
        ("true", ()), ("somebody else", (2,)), ("subject removed", (2,)), ("another scene", range(4)),
        ("another place", range(4)), ("blurred", range(4)),
    ):  # fmt: skip
        image = wrongly(sets, kind, at, judge_text.TEXT_CASES[case][1], after)
        found[kind] = means_of(judge_text.judge(case, ruler, image, sets))
    true, other, nobody, scene, place, blurred = found.values()
    assert min(true[name] for name in ("colour and shape", "scene", "position", "same subject")) >= TRUE
    assert max(one["same subject"] for one in (other, nobody, blurred)) <= WRONG
    assert max(blurred["colour and shape"], scene["scene"], place["position"]) <= WRONG


def test_exchanged_colours_are_told(ruler, after):
    case, exchanged = "two subjects, 1x1", []
    sets = judge_text.held_out(case, FEW)
    for (panel,) in sets:
        one, other = panel.placed
        colours = [replace(a.subject, colour=b.subject.colour) for a, b in ((one, other), (other, one))]
        placed = replace(one, subject=colours[0]), replace(other, subject=colours[1])
        exchanged.append(replace(panel, placed=placed))
    for panels, least, most in (([panel for (panel,) in sets], TRUE, 1), (exchanged, 0, WRONG)):
        image = after([draw(panel) for panel in panels])
        assert least <= means_of(judge_text.judge(case, ruler, image, sets))["colours unmixed"] <= most
