"""Filling in panels: sets whose captions tell more or less, and what a filled-in panel is judged by; no training."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lab import judge, judge_kept, panels
from lab.captions import length, silent_caption, vocabulary
from lab.judge import FIGURES, GIVEN, OWN
from lab.truth import Reading, Seen
from lab.world import ACCESSORIES, COLOURS, PATTERNS, SHAPES, is_held_out, random_set


def words(text):
    return set(text.replace(",", " ").replace(".", " ").replace(";", " ").replace(":", " ").split())


@pytest.mark.parametrize("subjects", [1, 2])
@pytest.mark.parametrize("telling", panels.TELLING)
def test_captions_tell_as_much_as_they_should(telling, subjects):
    rng = np.random.default_rng(0)
    for _ in range(20):
        shown = random_set(rng, 2, 2, subjects)
        text = panels.caption(shown, 2, 2, telling, rng)
        found = {one.subject for one in shown[0].placed}
        expected = {one.shape for one in found} if telling != "nothing" else set()
        expected |= {one.colour for one in found} if telling == "all" else set()
        assert words(text) & {*COLOURS, *SHAPES} == expected
        assert telling == "all" or not words(text) & {*PATTERNS, *ACCESSORIES}
        assert [f"[IMAGE{i}]" in text for i in range(1, 5)] == [True] * 4


def test_a_silent_caption_uses_words_that_the_model_knows_and_is_short_enough():
    rng, known = np.random.default_rng(1), set(vocabulary())
    for _ in range(50):
        text = silent_caption(random_set(rng, 2, 2, 2), 2, 2, rng)
        assert words(text) <= known and length(text) <= 64


def test_sets_are_written_as_the_trainer_reads_them(tmp_path):
    path = panels.write_sets(tmp_path / "a", 12)
    again = panels.write_sets(tmp_path / "b", 20)
    rows, more = ([json.loads(line) for line in one.read_text().splitlines()] for one in (path, again))
    assert rows == more[:12], "a larger number begins with the same sets"
    for row in rows:
        high, wide = map(int, row["grid"].split("x"))
        assert Image.open(path.parent / row["image"]).size == (64 * wide, 64 * high)
    assert panels.main(["--out", str(tmp_path / "a"), "--count", "12"]) == 0
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


@pytest.mark.parametrize("telling", panels.TELLING)
def test_other_panels_fit_the_caption_and_show_somebody_drawn_anew(telling):
    """Traits that the caption does not tell come out alike as often as chance has it: neither never nor always."""
    sets, alike = judge_kept.held_out(60), []
    for own, other in zip(sets, judge_kept.others(sets, telling), strict=True):
        assert panels.caption(own, 2, 2, telling, None) == panels.caption(other, 2, 2, telling, None)
        (mine, *_), (theirs, *more) = ([panel.placed[0].subject for panel in shown] for shown in (own, other))
        assert mine != theirs and is_held_out(mine) and more == [theirs] * 3
        assert [(panel.scene, panel.seed) for panel in own] == [(panel.scene, panel.seed) for panel in other]
        alike.append([getattr(mine, trait) == getattr(theirs, trait) for trait in ("shape", "colour", "face")])
    shape, colour, face = np.mean(alike, axis=0)
    assert shape == 1 if telling != "nothing" else 0 < shape < 0.3
    assert colour == 1 if telling == "all" else 0 < colour < 0.4
    assert 0 < face < 0.5


def test_a_panel_is_judged_by_its_own_scene_and_the_traits_of_its_sets_subject(monkeypatch):
    sets = judge_kept.held_out(2)
    pages = []
    for shown in sets:
        subject = shown[0].placed[0].subject
        names = ("shape", "colour", "pattern", "accessory", "face", "hue", "angle", "spacing")
        one = Seen(position="left", size="big", **{name: getattr(subject, name) for name in names})
        nobody = Reading("nowhere", ())
        pages.append([nobody, nobody, Reading(shown[2].scene, (one,)), nobody])
    pages[1][2] = Reading(sets[0][2].scene, ())
    monkeypatch.setattr(judge_kept, "read_sets", lambda reader, image: pages)
    figures = judge_kept.judge(None, torch.zeros(2, 3, 128, 128), sets, "own panel")
    same = float(sets[0][2].scene == sets[1][2].scene)
    assert figures == {f"{trait}, {OWN}": [1, 0] for trait in FIGURES} | {f"scene, {OWN}": [1, same]}


def test_an_arm_is_measured_in_its_own_way_from_own_panels_from_anothers_and_from_none(monkeypatch):
    calls = []

    def generate(networks, captions, grid, seeds, options, kept=None, masked=()):
        calls.append((captions, list(seeds), options, kept, masked))
        return torch.zeros(len(captions), 3, 128, 128)

    monkeypatch.setattr(judge_kept, "generate", generate)
    monkeypatch.setattr(judge_kept, "read_sets", lambda reader, image: [[Reading("", ())] * 4] * len(image))
    ruler = judge.Ruler(SimpleNamespace())
    figures, rows = judge_kept.measure("nothing", None, {"iclora.condition": "clean"}, ruler, 3)
    told = [panels.caption(shown, 2, 2, "nothing", None) for shown in judge_kept.held_out(3)]
    assert all(call[:2] == (told, [0, 1, 2]) and call[2].clean for call in calls)
    (own, other, none), masked = zip(*(call[3:] for call in calls), strict=True)
    assert masked == ((3,), (3,), ()) and none is None
    assert not own[:, :, 64:, :64].any() and not torch.equal(own, other)
    assert set(figures) == {f"{name}, {given}" for name in ("scene", *FIGURES) for given in GIVEN} and len(rows) == 1
    most = {name: [1.0] * 3 for name in figures}
    assert len(judge.details("nothing", "clean", figures, most)) == len(FIGURES)
