"""Pairs for UNO: what may come from the prompt, what must come from the references, and their files."""

import json

import numpy as np
import pytest
from PIL import Image

from lab import pairs, panels, report
from lab.world import ACCESSORIES, COLOURS, PATTERNS, SCENES, draw, is_held_out

WORN = {"hat": "hat", "scarf": "scarf", "glasses": "glasses"}


@pytest.mark.parametrize("kind", ["one", "two", "three", "four", "up-to-four", "cropped"])
def test_prompts_name_shapes_and_nothing_else_of_a_subject(kind):
    told = {*COLOURS, *PATTERNS, *ACCESSORIES}
    for pair in pairs.make_pairs(kind, 12, 3):
        words = set(pair.prompt.rstrip(".").replace(",", "").split())
        assert not words & told, pair.prompt
        assert {one.subject.shape for one in pair.panel.placed} <= words


@pytest.mark.parametrize("kind", pairs.KINDS)
def test_every_subject_has_a_reference_of_its_own_in_another_scene(kind):
    for pair in pairs.make_pairs(kind, 6, 4):
        assert len(pair.references) == len(pair.shown) == len(pair.panel.placed) + (kind == "try-on")
        assert len({pair.panel.scene, *(shown.scene for shown in pair.shown)}) == 1 + len(pair.shown)
        for shown, one in zip(pair.shown, pair.panel.placed, strict=False):
            assert [each.subject.shape for each in shown.placed] == [one.subject.shape]
            assert shown.placed[0].subject.face == one.subject.face


@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_subjects_stay_held_out(held_out):
    drawn = [one.subject for pair in pairs.make_pairs("two", 10, 5, held_out) for one in pair.panel.placed]
    assert {is_held_out(subject) for subject in drawn} == {held_out}


def test_the_kinds_change_what_they_say():
    for pair in pairs.make_pairs("recolour", 10, 6):
        before, after = pair.shown[0].placed[0].subject, pair.panel.placed[0].subject
        assert before.colour != after.colour and after.colour in pair.prompt
    for kind in ("hat", "try-on"):
        for pair in pairs.make_pairs(kind, 10, 6):
            before, after = pair.shown[0].placed[0].subject, pair.panel.placed[0].subject
            assert before.accessory == "none" and WORN[after.accessory] in pair.prompt
    for pair in pairs.make_pairs("sketch", 3, 6):
        spread = np.asarray(pair.target).astype(int)
        assert (spread.max(axis=2) - spread.min(axis=2)).mean() < 20 and "pencil" in pair.prompt
    for kind in ("recolour", "hat"):
        for pair in pairs.make_pairs(kind, 3, 6):
            assert pair.target.tobytes() == draw(pair.panel).tobytes()


def test_a_cut_out_comes_from_the_target_and_shows_its_subject_large():
    for pair in pairs.make_pairs("cropped", 5, 7):
        left, top, right, bottom = pairs.box(pair.panel, 1)
        size = (round(right - left),) * 2
        again = np.asarray(pair.references[1].resize(size, Image.Resampling.BOX)).astype(int)
        inside = np.asarray(pair.target.crop(tuple(round(edge) for edge in (left, top, right, bottom)))).astype(int)
        inside = inside[: size[0], : size[1]]
        assert np.abs(again[: len(inside), : inside.shape[1]] - inside).mean() < 30
        assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64, "or the picture would have black edges"


def test_the_same_arguments_draw_the_same_pairs_and_unknown_kinds_are_refused():
    first, again, other = (pairs.make_pairs("two", 3, seed) for seed in (1, 1, 2))
    assert [p.target.tobytes() for p in first] == [p.target.tobytes() for p in again]
    assert [p.prompt for p in first] == [p.prompt for p in again] != [p.prompt for p in other]
    with pytest.raises(ValueError, match="choose one of one, two"):
        pairs.make_pairs("nobody", 1, 0)


@pytest.mark.parametrize("flags", [("--count", "0"), ("--count", "x"), ("--kind", "nobody"), ("--modle", "tiny")])
def test_mistakes_cost_one_line(tmp_path, capsys, flags):
    assert pairs.main(["--out", str(tmp_path / "out"), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("out, line", [("", "a value is empty; give one"), ("taken", "taken is not a folder; choose")])
def test_a_place_that_cannot_be_is_refused_before_the_work(tmp_path, monkeypatch, capsys, out, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    for command in (pairs, panels, report):
        assert command.main(["--out", out]) == 2 and line in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_while_pictures_are_drawn_again_no_json_tells_of_the_old_ones(tmp_path, monkeypatch):
    pairs.write_pairs(pairs.make_pairs("one", 1, 0), tmp_path / "one.json")
    monkeypatch.setattr(pairs, "write_atomic", None)
    with pytest.raises(TypeError):
        pairs.write_pairs(pairs.make_pairs("one", 1, 1), tmp_path / "one.json")
    assert not (tmp_path / "one.json").exists()


def test_files_are_as_uno_writes_them(tmp_path):
    assert pairs.main(["--out", str(tmp_path), "--kind", "two", "--count", "2"]) == 0
    rows = json.loads((tmp_path / "two.json").read_text())
    assert [set(row) for row in rows] == [{"prompt", "image_paths", "image_tgt_path"}] * 2
    for row, pair in zip(rows, pairs.make_pairs("two", 2, 0), strict=True):
        assert Image.open(tmp_path / row["image_tgt_path"]).tobytes() == pair.target.tobytes()
        names = row["image_paths"]
        assert [Image.open(tmp_path / n).tobytes() for n in names] == [r.tobytes() for r in pair.references]
    assert set(SCENES) >= {p.panel.scene for p in pairs.make_pairs("two", 2, 0)}
