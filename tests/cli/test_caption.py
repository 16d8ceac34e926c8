"""Captions for sets that have none: by an endpoint, by the picture world's reader, and by tellers of the tests' own."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chat_server import pictures, serve, texts
from iclora import caption, chat, data
from iclora.chat import Answer, EndpointError
from iclora.prompts import lint
from lab import caption as reader_caption
from lab.captions import name
from lab.tasks import COUNT, SEED, task_sets

ROOT = Path(__file__).parents[2]
GOOD = "a red cat: [IMAGE1] it is on a beach, [IMAGE2] it is in the snow."
needs_openai = pytest.mark.skipif(chat.openai is None, reason="needs the extra `factory`: pip install 'openai>=3'")


def picture(path, size=(32, 32), colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def sets(tmp_path):
    """Two composites and two folders of panels, all 1x2, without captions."""
    folder = tmp_path / "sets"
    for stem in ("01", "02"):
        picture(folder / f"{stem}.png", (64, 32))
        pixels = np.zeros((32, 64, 3), np.uint8)
        pixels[:, 32:] = 255
        Image.fromarray(pixels).save(folder / f"{stem}.png")
    for stem in ("a", "b"):
        picture(folder / stem / "1.png")
        picture(folder / stem / "2.png", colour="blue")
    (folder / "set.json").write_text('{"grid": "1x2"}')
    return folder


TARGETS = ["01.txt", "02.txt", "a/caption.txt", "b/caption.txt"]


def tell_by(*captions, calls=None, cost=(10, 2)):
    """A teller that says these one after the other, the last again and again."""
    left, calls = list(captions), [] if calls is None else calls

    def make(config, limit, answers):
        def tell(*arguments):
            calls.append((*arguments[:3], list(arguments[3])))
            said = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(said, Exception):
                raise said
            answers.append(Answer(said, *cost))
            return said

        return tell

    return make


def run(capsys, folder, make, *flags):
    """Give status, last line of stdout, and lines of stderr."""
    capsys.readouterr()
    status = caption.main([str(folder), "--at-once", "1", *flags], make)
    out, err = capsys.readouterr()
    return status, out.splitlines()[-1] if out else "", [line for line in err.splitlines() if line.strip()]


def captions(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.txt"))}


def lay(folder, **files):
    for path, text in files.items():
        (folder / path).write_text(text)


# what is written


def test_every_set_gets_a_caption_and_the_cost_is_told(sets, capsys):
    status, line, errors = run(capsys, sets, tell_by(GOOD))
    assert (status, errors) == (0, [])
    assert line == "captions: 4 written, 0 skipped, 0 failed; tokens: 40 in, 8 out"
    assert captions(sets) == dict.fromkeys(TARGETS, GOOD + "\n")
    assert len(data.load(sets)) == 4


def test_a_composite_is_shown_cut_into_its_panels_in_order(sets, capsys):
    calls = []
    run(capsys, sets, tell_by(GOOD, calls=calls))
    shown = [[panel.getpixel((8, 8)) for panel in panels] for panels, *_ in calls]
    assert shown == [[(0, 0, 0), (255, 255, 255)]] * 2 + [[(255, 0, 0), (0, 0, 255)]] * 2
    assert [markers for _, markers, *_ in calls] == [("[IMAGE1]", "[IMAGE2]")] * 4


def test_more_than_nine_panels_stand_in_the_order_of_their_numbers(tmp_path, capsys):
    for number in range(1, 13):
        picture(tmp_path / "set" / f"{number}.png", colour=(number, 0, 0))
    calls = []
    run(capsys, tmp_path, tell_by("no", calls=calls), "--grid", "3x4")
    assert [panel.getpixel((0, 0))[0] for panel in calls[0][0]] == list(range(1, 13))


def test_large_pictures_are_shown_smaller(tmp_path, capsys):
    picture(tmp_path / "01.png", (2400, 1200))
    calls = []
    status, *_ = run(capsys, tmp_path, tell_by(GOOD, calls=calls), "--grid", "1x2")
    assert status == 0 and {panel.size for panel in calls[0][0]} == {(1024, 1024)}


def test_a_single_picture_needs_no_markers(tmp_path, capsys):
    picture(tmp_path / "01.png")
    calls = []
    assert run(capsys, tmp_path, tell_by("a cat.", calls=calls), "--grid", "1x1")[0] == 0
    assert calls[0][1] == () and captions(tmp_path) == {"01.txt": "a cat.\n"}


def test_markers_and_beginning_are_those_of_the_preset(tmp_path, capsys):
    picture(tmp_path / "01.png", (32, 96))
    (tmp_path / "set.json").write_text('{"preset": "film-storyboard"}')
    calls, rest = [], "a cat: [SCENE-1] it is at sea, [SCENE-2] it is at night, [SCENE-3] it is in space."
    assert run(capsys, tmp_path, tell_by(rest, f"[MOVIE-SHOTS] {rest}", calls=calls))[0] == 0
    assert calls[0][1:3] == (("[SCENE-1]", "[SCENE-2]", "[SCENE-3]"), "[MOVIE-SHOTS]")
    assert calls[1][3] == [(rest, "it does not begin with [MOVIE-SHOTS]")]


def test_a_set_json_that_cannot_be_read_is_named(sets, capsys):
    lay(sets, **{"set.json": '{"grid": '})
    status, _, (line,) = run(capsys, sets, tell_by(GOOD))
    assert status == 2 and line.startswith("error: ") and "set.json" in line and "is no folder with sets" not in line


# what is there already


def test_a_second_run_does_the_rest_and_leaves_captions_alone(sets, capsys):
    lay(sets, **{"01.txt": "mine", "b/caption.txt": "mine"})
    assert run(capsys, sets, tell_by(GOOD))[1].startswith("captions: 2 written, 2 skipped, 0 failed")
    assert run(capsys, sets, tell_by(AssertionError()))[1].startswith("captions: 0 written, 4 skipped, 0 failed")
    assert captions(sets) == dict.fromkeys(TARGETS, GOOD + "\n") | {"01.txt": "mine", "b/caption.txt": "mine"}


def test_with_overwrite_captions_are_written_anew(sets, capsys):
    lay(sets, **{"01.txt": "mine", "a/caption.txt": "mine"})
    assert run(capsys, sets, tell_by(GOOD), "--overwrite")[1].startswith("captions: 4 written, 0 skipped")
    assert captions(sets) == dict.fromkeys(TARGETS, GOOD + "\n")


@pytest.mark.parametrize("name", ["a.png", "missing.png"])
def test_what_is_no_folder_costs_a_line(tmp_path, capsys, name):
    picture(tmp_path / "a.png")
    status, _, errors = run(capsys, tmp_path / name, tell_by(GOOD), "--grid", "1x1")
    assert status == 2 and len(errors) == 1 and "is no folder with sets" in errors[0]


READ = {  # files, and what set.json says, if any
    "an ending in capitals": (("a.png", "a.TXT"), None),
    "kohya's": (("a.png", "a.caption"), None),
    "accents in two forms": (("e\u0301.png", "\u00e9.txt"), None),
    "panels and a caption": (("1.png", "2.png", "caption.TXT"), {"grid": "1x2"}),
    "panels whose numbers begin with 0": (("01.png", "02.png", "caption.txt"), {"grid": "1x2"}),
    "control pictures": (("images/a.png", "images/a.txt", "edges/a.png"), {"targets": "images", "control": ["edges"]}),
}


@pytest.mark.parametrize("name", READ)
def test_what_the_reader_counts_as_captioned_is_passed_over(tmp_path, capsys, name):
    files, settings = READ[name]
    for file in map(tmp_path.joinpath, files):
        file.parent.mkdir(exist_ok=True)
        picture(file) if file.suffix == ".png" else file.write_text("a cat")
    if settings:
        (tmp_path / "set.json").write_text(json.dumps(settings))
    before = sorted(tmp_path.rglob("*"))
    status, line, errors = run(capsys, tmp_path, tell_by(AssertionError()))
    assert (status, errors) == (0, []) and sorted(tmp_path.rglob("*")) == before
    assert line.startswith("captions: 0 written, 1 skipped, 0 failed")


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_texts_of_panels_and_rows_are_captions_too(sets, capsys, flags):
    lay(sets, **{"a/1.txt": "one", "a/2.txt": "two"})
    lay(sets, **{"rows.jsonl": json.dumps({"image": "02.png", "grid": "1x2", "prompt": GOOD})})
    assert run(capsys, sets, tell_by(GOOD), *flags)[1].startswith("captions: 2 written, 1 skipped, 0 failed")
    assert sorted(captions(sets)) == ["01.txt", "a/1.txt", "a/2.txt", "b/caption.txt"]


def test_a_caption_that_somebody_else_writes_meanwhile_is_left_alone(sets, capsys):
    def make(config, limit, answers):
        def tell(*arguments):
            (sets / "01.txt").write_text("mine")
            return GOOD

        return tell

    status, line, errors = run(capsys, sets, make)
    assert status == 2 and line.startswith("captions: 3 written, 0 skipped, 1 failed")
    assert "exists" in errors[0] and (sets / "01.txt").read_text() == "mine"


# what is wrong with a caption


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ("a red cat on a beach and in the snow", "it has no markers, but the 1x2 grid takes"),
        ("a cat: [IMAGE1] it sits", "it has [IMAGE1], but the 1x2 grid takes [IMAGE1] to [IMAGE2]"),
        ("a cat: [IMAGE2] it sits, [IMAGE1] it sits", "it has [IMAGE2] [IMAGE1], but"),
        ("a cat: [IMAGE1] it sits, [IMAGE2] it sits, [IMAGE3] it sits", "it has [IMAGE1] [IMAGE2] [IMAGE3], but"),
        ("a cat: [IMAGE1], [IMAGE2] it sits", "[IMAGE1] has no text after it"),
        ("a cat: [LEFT] it sits, [RIGHT] it sits", "the markers [IMAGE1] [IMAGE2]"),
        ("[IMAGE1] a cat sits, [IMAGE2] it sits", "it needs a sentence about all panels"),
        (GOOD + " it is" * 40, "T5 tokens long, of which 64 are read"),
        ("", "the prompt is empty"),
    ],
)
def test_a_wrong_caption_is_asked_for_again_with_the_reason(tmp_path, capsys, wrong, problem):
    picture(tmp_path / "01.png", (64, 32))
    calls = []
    status, line, _ = run(capsys, tmp_path, tell_by(wrong, GOOD, calls=calls), "--grid", "1x2")
    assert (status, captions(tmp_path)) == (0, {"01.txt": GOOD + "\n"})
    assert line.endswith("tokens: 20 in, 4 out")  # the wrong one costs as well
    (said, why), *more = calls[1][3]
    assert not more and said == wrong and problem in why


def test_after_three_tries_a_set_has_failed_and_the_others_go_on(sets, capsys):
    wrong, calls = ["no 1", "no 2", "no 3"], []
    status, line, errors = run(capsys, sets, tell_by(*wrong, GOOD, calls=calls))
    assert status == 2 and line == "captions: 3 written, 0 skipped, 1 failed; tokens: 60 in, 12 out"
    assert len(errors) == 1 and errors[0].startswith(f"failed: {sets}/01.png: no caption in 3 tries; of the last one: ")
    assert [text for text, _ in calls[2][3]] == ["no 1", "no 2"] and "01.txt" not in captions(sets)


def test_captions_become_one_line_and_control_characters_fail(sets, capsys):
    status, _, errors = run(capsys, sets, tell_by(GOOD.replace(": ", ":\n\n"), "a \x1b[2Jcat", GOOD))
    assert status == 2 and captions(sets)["01.txt"] == GOOD + "\n"
    assert len(errors) == 1 and "character 3 is U+001B" in errors[0]


# mistakes


def test_each_failure_is_named_in_a_line_and_the_rest_is_captioned(sets, capsys):
    (sets / "02.png").write_bytes(b"no picture")
    picture(sets / "other" / "06.png")
    (sets / "other" / "set.json").write_text('{"grid": 3}')
    status, line, errors = run(capsys, sets, tell_by(GOOD))
    assert status == 2 and line.startswith("captions: 3 written, 0 skipped, 2 failed")
    assert len(errors) == 2 and all(line.startswith("failed: ") for line in errors)
    assert "set.json" in errors[0] and "02.png: cannot read" in errors[1]


def test_a_grid_that_nothing_tells_is_a_failure_of_each_set(tmp_path, capsys):
    picture(tmp_path / "01.png")
    status, _, errors = run(capsys, tmp_path, tell_by(GOOD))
    assert status == 2 and errors == [
        f"failed: {tmp_path}/01.png: nothing tells its grid; give --grid, or write a set.json into the folder"
    ]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_a_folder_without_sets_costs_a_line(tmp_path, capsys, make):
    make(tmp_path / "place")
    status, _, errors = run(capsys, tmp_path / "place", tell_by(GOOD))
    assert status == 2 and len(errors) == 1 and "is no folder with sets" in errors[0]


@pytest.mark.parametrize(
    ("flags", "line"),
    [(["--grid", "2"], "is not ROWSxCOLS"), (["--at-once", "0"], "is out of range"), (["--model", "none"], "none")],
)
def test_a_wrong_option_costs_a_line(sets, capsys, flags, line):
    status, _, errors = run(capsys, sets, tell_by(GOOD), *flags)
    assert status == 2 and len(errors) == 1 and line in errors[0] and not captions(sets)


def test_an_absurd_grid_is_a_failure_and_takes_no_memory(sets, capsys):
    status, _, errors = run(capsys, sets, tell_by(GOOD), "--grid", "9999x9999")
    assert status == 2 and len(errors) == 6 and not captions(sets)


def test_an_endpoint_that_fails_for_good_stops_the_run_and_what_was_written_stays(sets, capsys):
    status, line, errors = run(capsys, sets, tell_by(GOOD, EndpointError("http://host/v1 is down")))
    assert status == 2 and line.startswith("captions: 1 written") and errors == ["error: http://host/v1 is down"]
    assert list(captions(sets)) == ["01.txt"]


def test_a_full_disk_is_a_failure_of_the_set(sets, capsys, monkeypatch):
    def full(path, *rest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caption, "write_atomic", full)
    status, line, errors = run(capsys, sets, tell_by(GOOD))
    assert status == 2 and "4 failed" in line and len(errors) == 4 and "No space left" in errors[0]


def test_several_sets_are_captioned_at_once(sets, capsys):
    meeting = threading.Barrier(4, timeout=20)

    def make(config, limit, answers):
        def tell(*arguments):
            meeting.wait()
            return GOOD

        return tell

    assert run(capsys, sets, make, "--at-once", "4")[0] == 0 and len(captions(sets)) == 4


# by an endpoint


@needs_openai
def test_an_endpoint_captions_sets_and_corrects_itself(sets, capsys, monkeypatch):
    monkeypatch.setenv("ICLORA_API_KEY", "sk-very-secret-0123")
    shutil.rmtree(sets / "a")
    shutil.rmtree(sets / "b")
    with serve("a cat", GOOD) as endpoint:
        flags = ["--captioner", endpoint.address, "--captioner-model", "seer", "--at-once", "1"]
        assert caption.main([str(sets), *flags]) == 0
    out, err = capsys.readouterr()
    assert out == "captions: 2 written, 0 skipped, 0 failed; tokens: 300 in, 21 out\n" and "secret" not in err
    assert captions(sets) == {"01.txt": GOOD + "\n", "02.txt": GOOD + "\n"}
    first, again, _ = endpoint.asked
    assert "[IMAGE1] [IMAGE2]" in texts(first)[0] and [p.size for p in pictures(first)] == [(32, 32)] * 2
    assert texts(again)[1] == "a cat" and "it has no markers, but the 1x2 grid takes" in texts(again)[2]


@needs_openai
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], "the endpoint is no address"),
        (["--captioner", "ftp://host/v1", "--captioner-model", "seer"], "the endpoint is no address"),
        (["--captioner", "http://127.0.0.1:9/v1"], "names no model"),
        pytest.param(
            ["--captioner", "http://127.0.0.1:9/v1", "--captioner-model", "seer"],
            "is it running|ConnectError",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_endpoint_that_cannot_work_costs_a_line(sets, capsys, flags, line):
    assert caption.main([str(sets), *flags]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and any(part in err for part in line.split("|")) and not captions(sets)


@pytest.mark.slow
def test_the_command_runs_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "iclora.caption", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path} is no folder with sets")
    assert len(done.stderr.splitlines()) == 1


# by the reader of the picture world


def test_the_reader_captions_drawn_sets_and_names_the_right_subject_in_most(tmp_path, capsys):
    folder = tmp_path / "walk"
    shutil.copytree(ROOT / "sets" / "walk", folder, ignore=shutil.ignore_patterns("*.txt"))
    assert reader_caption.main([str(folder)]) == 0
    assert capsys.readouterr().out.startswith("captions: 20 written, 0 skipped, 0 failed")
    examples, findings = data.scan(folder)
    assert len(examples) == COUNT and not findings.broken and not findings.notes
    assert not any(lint(example.caption, *example.grid) for example in examples)
    named = [
        name(one.panels[0].placed[0].subject) in example.caption
        for one, example in zip(task_sets("walk", COUNT, SEED), examples, strict=True)
    ]
    assert sum(named) >= 18


def test_what_the_reader_cannot_see_is_a_failure(tmp_path, capsys):
    shutil.copytree(ROOT / "sets" / "sparkle" / "15", tmp_path / "15", ignore=shutil.ignore_patterns("*.txt"))
    assert reader_caption.main([str(tmp_path), "--grid", "1x2"]) == 2
    assert "the reader sees nobody in panel 2" in capsys.readouterr().err and not captions(tmp_path)
