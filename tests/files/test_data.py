"""Data sets on disk: three ways to write them down, buckets, batches, and the check that names whatever is broken."""

import json
import os
import pty
import shutil
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iclora import data
from iclora.config import DEV, TrainConfig, resolve_training_defaults
from iclora.data import Example, bucket, choose_layout, load, read_panels, scan, share_cropped
from iclora.layout import Layout, parse_grid
from iclora.prompts import TASKS
from model.weights import find_model

SETS = Path(__file__).parents[2] / "sets"
TWO = "two foxes: [IMAGE1] a fox, [IMAGE2] the fox"
SIDES = (512, 320)  # of references


def picture(path, size=(32, 32), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, *size]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def composite(folder, name, size=(64, 32), caption=TWO, seed=0):
    write(folder / f"{name}.txt", caption)
    return picture(folder / f"{name}.png", size, seed)


def panel_set(folder, panels=2, caption=TWO, seed=0):
    for number in range(1, panels + 1):
        picture(folder / f"{number}.png", seed=seed + number)
    if caption:
        write(folder / "caption.txt", caption)


def check(capsys, *argv):
    status = data.main([str(argument) for argument in argv])
    return status, capsys.readouterr().out.splitlines()


# the three forms


def test_composites_with_texts_of_the_same_name_are_examples(tmp_path):
    write(tmp_path / "set.json", {"grid": "1x2"})
    first = composite(tmp_path, "0001", seed=1)
    second = composite(tmp_path / "deeper" / "still", "b", seed=2)
    examples = load(tmp_path)
    assert [example.files for example in examples] == [(first,), (second,)]
    assert {(example.grid, example.caption) for example in examples} == {((1, 2), TWO)}
    assert examples[0].panel_sizes() == [(32, 32), (32, 32)]


def test_a_folder_of_numbered_panels_with_a_joint_caption_is_one_example(tmp_path):
    write(tmp_path / "set.json", {"grid": "3x4"})
    panel_set(tmp_path / "one", 12, " ".join(f"[IMAGE{n}] fox" for n in range(1, 13)))
    (example,) = load(tmp_path)
    assert [path.name for path in example.files] == [f"{number}.png" for number in range(1, 13)]


@pytest.mark.parametrize("summary", ["two foxes:", None])
def test_texts_of_panels_are_joined_with_the_markers_and_tag_of_the_task(tmp_path, summary):
    write(tmp_path / "set.json", {"preset": "sandstorm-visual-effect"})
    panel_set(tmp_path / "one", caption=None)
    write(tmp_path / "one" / "1.txt", "a fox\n")
    write(tmp_path / "one" / "2.txt", "the fox in sand")
    if summary:
        write(tmp_path / "one" / "summary.txt", summary)
    (example,) = load(tmp_path)
    assert example.grid == (2, 1)
    middle = f"{summary} " if summary else ""
    assert example.caption == f"[SANDSTORM-PSA] {middle}[TOP] a fox [BOTTOM] the fox in sand"


def test_rows_name_panels_or_composites_and_their_captions(tmp_path):
    for number in (1, 2):
        picture(tmp_path / "p" / f"{number}.png", seed=number)
    picture(tmp_path / "c.png", (32, 64))
    rows = [
        {"panels": ["p/1.png", "p/2.png"], "grid": "1x2", "prompt": TWO, "id": 7},
        {"image": "c.png", "grid": "2x1", "summary": "two foxes:", "prompts": ["a fox", "the fox"]},
    ]
    write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    for place in (tmp_path, tmp_path / "rows.jsonl"):
        first, second = load(place)
        assert (first.grid, second.grid) == ((1, 2), (2, 1))
        assert second.caption == "two foxes: [IMAGE1] a fox [IMAGE2] the fox"
        assert first.panel_sizes() == second.panel_sizes() == [(32, 32)] * 2


def test_a_row_with_a_joint_caption_and_a_summary_is_refused(tmp_path):
    panel_set(tmp_path / "p", caption=None)
    write(tmp_path / "rows.jsonl", {"panels": ["p/1.png", "p/2.png"], "grid": "1x2", "prompt": TWO, "summary": "foxes"})
    with pytest.raises(ValueError, match='line 1: "summary" stands before "prompts"; with "prompt", put its words'):
        load(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "deep/../../outside.png", "a\0.png"])
def test_rows_do_not_reach_out_of_their_folder(tmp_path, name):
    picture(tmp_path / "outside.png")
    write(tmp_path / "in" / "rows.jsonl", {"panels": [name], "prompt": "a fox"})
    with pytest.raises(ValueError, match="rows.jsonl line 1: .*leads out of its folder"):
        load(tmp_path / "in")


def test_the_grid_comes_from_the_nearest_set_json_and_the_command_line_overrules_it(tmp_path):
    write(tmp_path / "set.json", {"grid": "1x2", "markers": "scene"})
    write(tmp_path / "tall" / "set.json", {"grid": "2x1"})
    panel_set(tmp_path / "wide" / "1", seed=1)
    panel_set(tmp_path / "tall" / "1", seed=5)
    assert {Path(e.name).parent.name: e.grid for e in load(tmp_path)} == {"wide": (1, 2), "tall": (2, 1)}
    assert {example.grid for example in load(tmp_path, (1, 2))} == {(1, 2)}


def test_numbered_composites_are_not_taken_for_panels(tmp_path):
    write(tmp_path / "set.json", {"grid": "1x2"})
    for number in range(1, 4):
        composite(tmp_path, str(number), seed=number)
    assert [len(example.files) for example in load(tmp_path)] == [1, 1, 1]


def test_single_pictures_need_no_grid_where_they_are_panels(tmp_path):
    panel_set(tmp_path / "one", 1, "a fox")
    assert load(tmp_path)[0].grid == (1, 1)


def test_a_pipe_is_no_list_of_rows(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="rows.jsonl: it is no file"):
        load(tmp_path)


def test_junk_is_passed_over_in_silence(tmp_path):
    write(tmp_path / "set.json", {"grid": "1x2"})
    composite(tmp_path, "a")
    for name in (".DS_Store", "Thumbs.db", "._a.png", "__MACOSX/b.png", "@eaDir/c.png", ".cache/d.txt"):
        write(tmp_path / name, "junk")
    examples, findings = scan(tmp_path)
    assert (len(examples), findings.broken, findings.notes) == (1, [], [])


def test_a_link_round_in_circles_ends(tmp_path):
    panel_set(tmp_path / "one", 1, "a fox")
    (tmp_path / "one" / "again").symlink_to(tmp_path)
    examples, findings = scan(tmp_path)
    assert len(examples) == 1 and "read already" in findings.notes[0]


# what is broken


def truncated(path):
    path.write_bytes(picture(path).read_bytes()[:-20])


BREAKAGES = {
    "a picture without a caption": (lambda f: (f / "a.txt").unlink(), "a.png has no caption; write a.txt"),
    "a caption without a picture": (lambda f: write(f / "z.txt", "x"), "z.txt is a caption without a picture"),
    "a picture cut short": (lambda f: truncated(f / "a.png"), "cannot read .*a.png"),
    "a picture of one pixel": (lambda f: picture(f / "a.png", (1, 1)), "a.png has fewer pixels than its 1x2 grid"),
    "a link to itself": (lambda f: (f / "l.png").symlink_to(f / "l.png"), "l.png has no caption"),
    "a row of a link to itself": (
        lambda f: (write(f / "r.jsonl", {"image": "l.png", "prompt": "x"}), (f / "l.png").symlink_to("l.png")),
        "cannot read .*l.png",
    ),
    "an empty picture": (lambda f: (f / "a.png").write_bytes(b""), "a.png: it is empty"),
    "an empty caption": (lambda f: write(f / "a.txt", " \n"), "a.png has an empty caption"),
    "a caption that is no UTF-8": (lambda f: (f / "a.txt").write_bytes(b"\xff\xfea\0"), "a.txt: it is not UTF-8"),
    "a caption without end": (lambda f: write(f / "a.txt", "x" * 30_000), "a.png: .*20000 at most"),
    "one caption for two": (lambda f: picture(f / "a.jpg"), "a.jpg shares its caption with a.jpg and a.png"),
    "a panel too many": (lambda f: picture(f / "s" / "3.png"), "s has 3 panels, but its 1x2 grid takes 2"),
    "a panel too few": (lambda f: (f / "s" / "2.png").unlink(), "s has 1 panels, but its 1x2 grid takes 2"),
    "a gap": (lambda f: (f / "s" / "1.png").rename(f / "s" / "3.png"), "has the panels 2.png, 3.png; number them"),
    "a number twice": (lambda f: picture(f / "s" / "2.jpg"), "has the panels 1.png, 2.jpg, 2.png; number them"),
    "a picture besides": (lambda f: picture(f / "s" / "cover.png"), "cover.png is not numbered"),
    "two kinds of captions": (lambda f: write(f / "s" / "1.txt", "x"), "1.txt belongs to no panel; caption.txt is"),
    "panels without words": (
        lambda f: (f / "s" / "caption.txt").unlink(),
        "s has no caption; write caption.txt into it",
    ),
    "a caption alone": (lambda f: write(f / "t" / "caption.txt", "x"), "has a caption, but no pictures named 1.png"),
    "a set.json of lists": (lambda f: write(f / "set.json", []), "set.json is not a JSON object"),
    "a set.json cut short": (lambda f: write(f / "set.json", '{"gr'), "set.json is not a JSON object"),
    "a misspelt key": (lambda f: write(f / "set.json", {"gird": "1x2"}), "set.json sets 'gird', which is unknown"),
    "a bad grid": (lambda f: write(f / "set.json", {"grid": "two"}), "set.json: grid 'two' is not ROWSxCOLS"),
    "a huge grid": (lambda f: write(f / "set.json", {"grid": "99x99"}), "9801 panels; 1 to 64 are possible"),
    "an unknown preset": (lambda f: write(f / "set.json", {"preset": "sand"}), "set.json: preset 'sand' is unknown"),
    "bad markers": (lambda f: write(f / "set.json", {"markers": "x"}), "set.json: markers 'x' are not one of image"),
    "no grid at all": (lambda f: (f / "set.json").unlink(), "nothing tells the grid of the composites in"),
    "a row of nothing": (lambda f: write(f / "r.jsonl", "{"), "r.jsonl line 1: it is not a JSON object"),
    "a row of a list": (lambda f: write(f / "r.jsonl", "[]"), "r.jsonl line 1: it is not a JSON object"),
    "a row without pictures": (lambda f: write(f / "r.jsonl", {"prompt": "x"}), 'needs either "panels"'),
    "a row without words": (lambda f: write(f / "r.jsonl", {"image": "a.png"}), 'needs either "prompt"'),
    "a row of numbers": (lambda f: write(f / "r.jsonl", {"panels": [1], "prompt": "x"}), "panels is not a list of"),
    "a row of a lost file": (lambda f: write(f / "r.jsonl", {"image": "x.png", "prompt": "x"}), "no such file"),
    "rows that are no text": (lambda f: (f / "r.jsonl").write_bytes(b"\xff\xfe"), "r.jsonl: it is not UTF-8"),
}


@pytest.mark.parametrize("kind", BREAKAGES)
def test_whatever_is_broken_is_named_and_stops_the_training_but_not_the_check(tmp_path, kind, capsys):
    write(tmp_path / "set.json", {"grid": "1x2"})
    composite(tmp_path, "a")
    panel_set(tmp_path / "s")
    assert len(load(tmp_path)) == 2
    damage, message = BREAKAGES[kind]
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    status, lines = check(capsys, tmp_path)
    assert status == 2 and lines[-1].startswith("not usable")
    assert any(line.startswith("broken: ") for line in lines)


def test_every_broken_file_of_many_is_named(tmp_path, capsys):
    write(tmp_path / "set.json", {"grid": "1x2"})
    for number in range(5):
        composite(tmp_path, f"c{number}", seed=number)
    for number in (1, 3):
        (tmp_path / f"c{number}.png").write_bytes(b"no picture")
    status, lines = check(capsys, tmp_path)
    broken = [line for line in lines if line.startswith("broken: ")]
    assert status == 2 and len(broken) == 2 and "c1.png" in broken[0] and "c3.png" in broken[1]
    assert lines[0].startswith(f"{tmp_path}: 3 sets")
    assert any(line.startswith("note: tiny does not know ") for line in lines)
    assert lines[-1] == "not usable (broken: 2, notes: 2)"
    with pytest.raises(ValueError, match="the first of 2 things that are broken.*lists everything"):
        load(tmp_path)


def test_one_line_says_that_many_sets_lack_a_grid(tmp_path):
    for number in range(4):
        panel_set(tmp_path / str(number), seed=10 * number)
    _, findings = scan(tmp_path)
    assert len(findings.broken) == 1 and "sets of 2 panels" in findings.broken[0]


# pairs


def pairs_of(folder, *rows):
    """UNO's JSON with the pictures a.png, b.png and c.png beside it."""
    for number, name in enumerate("abc"):
        picture(folder / "p" / f"{name}.png", seed=number)
    write(folder / "pairs.json", list(rows))
    return folder / "pairs.json"


PAIR = {"prompt": "a fox", "image_path": "p/a.png", "image_tgt_path": "p/b.png"}
TWO_SHOWN = {"prompt": "two foxes", "image_paths": ["p/a.png", "p/c.png"], "image_tgt_path": "p/b.png", "score": [4.0]}


def test_pairs_have_references_and_one_panel_as_their_target(tmp_path):
    first, second = load(pairs_of(tmp_path, PAIR, TWO_SHOWN))
    a, b, c = ((tmp_path / "p" / f"{name}.png").resolve() for name in "abc")
    assert (first.files, first.references, first.grid, first.caption) == ((b,), (a,), (1, 1), "a fox")
    assert (second.references, second.reference_sizes) == ((a, c), ((32, 32),) * 2)
    assert first.reference_sha256 == second.reference_sha256[:1] != second.reference_sha256[1:]


def test_a_bucket_holds_one_number_of_references_and_sizes_are_those_of_sampling(tmp_path):
    picture(tmp_path / "p" / "wide.png", (100, 70))
    rows = [PAIR, TWO_SHOWN, {**PAIR, "image_path": "p/wide.png"}, PAIR]
    found = bucket(load(pairs_of(tmp_path, *rows)), 32, (64, 48))
    shapes = {layout.references: len(members) for layout, members in found.items()}
    assert shapes == {((64, 64),): 2, ((48, 48), (48, 48)): 1, ((64, 32),): 1}
    assert {(b.panels, b.panel_width, b.panel_height) for b in found} == {(1, 32, 32)}
    assert [b.reference_tokens for b in found] == [18, 8, 16]


BAD_PAIRS = {
    "no list": ({"a": 1}, "is no list of pairs"),
    "an empty list": ([], "is no list of pairs"),
    "no object": ([[]], "row 1: it is not a JSON object"),
    "references that are numbers": ([{**TWO_SHOWN, "image_paths": [1]}], "row 1: image_path is not a text, or"),
    "both kinds of references": ([{**PAIR, **TWO_SHOWN}], 'row 1: it has both "image_path" and "image_paths"'),
    "no target": ([{"prompt": "x", "image_path": "p/a.png"}], 'row 1: it has no "image_tgt_path"'),
    "no prompt": ([{**PAIR, "prompt": None}], 'row 1: it has no "prompt"'),
    "an empty prompt": ([{**PAIR, "prompt": " "}], "row 1 has an empty caption"),
    "a reference outside": ([{**PAIR, "image_path": "../x.png"}], "row 1: '../x.png' leads out of its folder"),
    "a target outside": ([{**PAIR, "image_tgt_path": "/etc/x.png"}], "row 1: '/etc/x.png' leads out of its folder"),
    "a lost reference": ([{**PAIR, "image_path": "p/d.png"}], "row 1: cannot read .*d.png: there is no such file"),
    "an unreadable reference": ([{**PAIR, "image_path": "pairs.json"}], "row 1: cannot read .*pairs.json"),
    "an absurd reference": ([{**PAIR, "image_path": "p/line.png"}], "row 1: .*400x2 is narrower than 32:1"),
}


@pytest.mark.parametrize("kind", BAD_PAIRS)
def test_broken_pairs_are_named_by_their_row(tmp_path, kind, capsys):
    rows, message = BAD_PAIRS[kind]
    picture(tmp_path / "p" / "line.png", (400, 2))
    path = pairs_of(tmp_path)
    write(path, rows)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_pairs_that_is_no_json_or_not_there_is_one_line(tmp_path):
    write(tmp_path / "a.json", "{")
    with pytest.raises(ValueError, match="cannot read .*a.json: it is damaged or no JSON; correct it"):
        load(tmp_path / "a.json")
    with pytest.raises(ValueError, match="there is no file .*b.json'; --data takes"):
        load(tmp_path / "b.json")


def test_a_reference_too_narrow_for_a_token_is_named(tmp_path):
    path = pairs_of(tmp_path, PAIR, {**PAIR, "image_path": "p/thin.png"})
    picture(tmp_path / "p" / "thin.png", (320, 40))
    with pytest.raises(ValueError, match="row 2: thin.png of 320x40 pixels becomes 64x8, but a token has 16x16"):
        bucket(load(path), 64, (64, 64))


def test_the_check_lists_every_reference_that_is_too_narrow_and_takes_a_size_for_it(tmp_path, capsys):
    thin = [{**PAIR, "image_path": f"p/{name}.png"} for name in ("thin", "flat")]
    path = pairs_of(tmp_path, PAIR, *thin)
    picture(tmp_path / "p" / "thin.png", (40, 320))
    picture(tmp_path / "p" / "flat.png", (320, 40))
    status, lines = check(capsys, path)
    one, other = (line for line in lines if line.startswith("broken: "))
    assert status == 2 and "thin.png" in one and "flat.png" in other
    assert data.main([str(path), "--ref-size", "128"]) == 0
    assert "references of 128x16" in capsys.readouterr().out


def test_the_check_counts_pairs_and_their_references(tmp_path, capsys):
    status, lines = check(capsys, pairs_of(tmp_path, PAIR, TWO_SHOWN, PAIR))
    assert status == 0 and lines[1] == "references: 4 pictures of 32x32 (4)"
    tokens = "4 tokens, references of 64x64, 64x64, 32 tokens"
    assert [line for line in lines if line == f"bucket: 1x1 panels of 32x32, {tokens}: 1 sets"]
    assert [line for line in lines if "row 3 shows the same as" in line] and "row 2 shows" not in "".join(lines)


# the check


def test_the_check_of_the_demo_sets_finds_nothing_wrong(capsys):
    status, lines = check(capsys, SETS)
    assert status == 0
    assert lines[0].endswith("60 sets in 120 pictures of 64x64 (100), 128x64 (20)")
    assert [line for line in lines if line.startswith("bucket: 3x1 panels of 64x64, 48 tokens: 20 sets")]
    assert lines[-2].startswith("captions: ") and lines[-2].endswith("tiny reads 64")
    assert lines[-1] == "usable (broken: 0, notes: 0)"


def test_the_check_notes_what_is_doubtful(tmp_path, capsys):
    write(tmp_path / "set.json", {"grid": "1x2"})
    write(tmp_path / "README.md", "words")
    composite(tmp_path, "a")
    composite(tmp_path, "b", caption="two foxes: [IMAGE1] a fox")
    composite(tmp_path, "c", (160, 64), TWO + " and a red fox" * 40, seed=1)
    for number in ("1", "2"):
        composite(tmp_path / "either", number, seed=2)
    write(tmp_path / "either" / "set.json", {"grid": "1x2"})
    composite(tmp_path / "rows", "d", seed=3)
    write(tmp_path / "rows" / "rows.jsonl", {"image": "d.png", "prompt": TWO})
    status, lines = check(capsys, tmp_path, "--panel-size", "64")
    notes = "\n".join(line for line in lines if line.startswith("note: "))
    assert status == 0
    for wanted in (
        "README.md is no picture or caption", "b.png: it has [IMAGE1], but the 1x2 grid takes",
        "b.png shows the same as", "with another caption; it counts double", "c.png: T5 reads 64 of the caption's",
        "4 sets have panels of fewer pixels than 64x64", "either is read as one set of 2 panels; name composites 01",
        "d.txt is passed over, as a row has the caption of its picture",
    ):  # fmt: skip
        assert wanted in notes


def test_the_check_answers_mistakes_in_one_line(tmp_path, capsys):
    for argv in ((tmp_path / "nowhere",), (tmp_path, "--grid", "x"), (tmp_path, "--modle", "x")):
        assert data.main([str(argument) for argument in argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    status, lines = check(capsys, tmp_path)
    assert status == 2 and lines[-1] == "not usable, there are no sets (broken: 0, notes: 0)"


def test_the_check_names_the_markers_of_the_preset_and_the_longest_of_many_captions(tmp_path, capsys):
    write(tmp_path / "set.json", {"preset": "film-storyboard"})
    for number in range(3):
        composite(tmp_path, f"c{number}", (32, 96), "[MOVIE-SHOTS] <Ann>" + " walks" * (60 + number), seed=number)
    status, lines = check(capsys, tmp_path)
    notes = [line for line in lines if line.startswith("note: ")]
    assert status == 0
    assert sum("it has no markers, but the 3x1 grid takes [SCENE-1] to [SCENE-3]" in note for note in notes) == 3
    (length,) = (note for note in notes if "T5 reads" in note)
    assert "c2.png: T5 reads 64 of" in length and length.endswith("; it is the longest of 3 that are too long")


def test_an_interrupted_check_is_one_line_and_130(monkeypatch, capsys):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "open_picture", interrupt)
    assert data.main([str(SETS / "sketch")]) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "interrupted" in err


@pytest.mark.slow
def test_a_closed_pipe_is_no_traceback():
    command = [sys.executable, "-m", "iclora.data", str(SETS / "sketch")]
    read, write_end = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=SETS.parent, stdout=write_end, stderr=subprocess.PIPE, timeout=60)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
def test_reading_shows_progress_on_a_terminal_and_nowhere_else():
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 80))
    os.set_blocking(main, False)
    script = f"from iclora.data import scan; scan({str(SETS / 'sketch')!r})"
    command = {"args": [sys.executable, "-c", script], "cwd": SETS.parent, "timeout": 60}
    subprocess.run(stderr=side, **command)
    assert b"reading sets:   0%" in (drawn := os.read(main, 10_000)) and b"| 0/20 [" in drawn
    assert subprocess.run(stderr=subprocess.PIPE, **command).stderr == b""
    os.close(side)
    os.close(main)


def test_a_pipe_is_no_caption(tmp_path, capsys):
    composite(tmp_path, "01", seed=1)
    (tmp_path / "01.txt").unlink()
    os.mkfifo(tmp_path / "01.txt")
    write(tmp_path / "set.json", {"grid": "1x2"})
    status, lines = check(capsys, tmp_path)
    assert status == 2 and any("01.txt: it is no file" in line for line in lines)


def test_a_damaged_tokenizer_is_told_by_name(tmp_path, capsys):
    shutil.copytree(find_model("tiny").root, tmp_path / "tiny")
    (tmp_path / "tiny" / "tokenizer_2" / "tokenizer.json").write_text("{}")
    assert data.main([str(Path(__file__).parents[2] / "sets" / "sketch"), "--model", str(tmp_path / "tiny")]) == 2
    assert "tokenizer_2 cannot be read" in capsys.readouterr().err


# buckets


def example_of(size, grid=(1, 1)):
    return Example("one", grid, "a fox", (Path("1.png"),), (size,), ("",))


@pytest.mark.parametrize("resolution, bound, least", [(512, 0.035, 0.9), (128, 0.12, 0.7), (64, 0.21, 0.5)])
def test_buckets_keep_the_aspect_and_the_area_on_token_borders(resolution, bound, least):
    losses = []
    for aspect in np.geomspace(1 / 3, 3, 25):
        example = example_of((round(600 * aspect**0.5), round(600 * aspect**-0.5)))
        layout = choose_layout(example, resolution, SIDES)
        assert layout.panel_width % 16 == 0 == layout.panel_height % 16
        assert least * resolution**2 <= layout.panel_width * layout.panel_height <= 1.1 * resolution**2
        losses.append(share_cropped(example, layout))
    assert max(losses) < bound and losses[12] == 0


def test_panels_are_not_enlarged():
    assert choose_layout(example_of((100, 50)), 512, SIDES) == Layout(1, 1, 96, 48)
    assert choose_layout(example_of((3, 3)), 512, SIDES) == Layout(1, 1, 16, 16)


def test_the_size_of_the_published_storyboards_comes_out_exactly():
    assert choose_layout(example_of((1024, 1536), (3, 1)), 724, SIDES) == Layout(3, 1, 1024, 512)


@pytest.mark.parametrize("name", TASKS)
def test_a_presets_training_has_the_panels_that_its_sampling_has(name):
    task = TASKS[name]
    config = resolve_training_defaults(TrainConfig(preset=name), DEV, "cpu")
    example = example_of((task.width, task.height), parse_grid(config.grid))
    assert list(bucket([example], config.panel_size, SIDES)) == [Layout(task.rows, task.cols, *task.panel_size)]
    larger = example_of((2 * task.width, 2 * task.height), parse_grid(config.grid))
    assert list(bucket([larger], config.panel_size, SIDES)) == [Layout(task.rows, task.cols, *task.panel_size)]


def test_an_example_is_in_a_bucket_for_every_size_that_it_is_large_enough_for():
    small, large = (replace(example_of(size, (2, 1)), name=str(size)) for size in ((600, 600), (1024, 1024)))
    found = bucket([small, large], (512, 768, 1024, 1280, 1536), SIDES)
    assert {(b.panel_width, b.panel_height): [e.name for e in members] for b, members in found.items()} == {
        (512, 256): [small.name, large.name],
        (592, 288): [small.name],
        (768, 384): [large.name],
        (1024, 512): [large.name],
    }


def test_a_composite_of_absurd_size_is_refused_by_name():
    with pytest.raises(ValueError, match="one: 8x8 panels .* at most 65536"):
        bucket([example_of((16384, 16384), (8, 8))], 2048, SIDES)


def test_a_bucket_holds_one_grid_and_one_size(tmp_path):
    sets = {"1x2": (64, 32), "2x1": (32, 64)}
    for grid, size in sets.items():
        write(tmp_path / grid / "set.json", {"grid": grid})
        for number in range(3):
            composite(tmp_path / grid, f"c{number}", size, seed=number)
    composite(tmp_path / "1x2", "wide", (128, 32), seed=9)
    found = bucket(load(tmp_path), 32, SIDES)
    shapes = {(b.rows, b.cols, b.panel_width, b.panel_height): len(members) for b, members in found.items()}
    assert shapes == {(1, 2, 32, 32): 3, (1, 2, 32, 16): 1, (2, 1, 32, 32): 3}


def test_panels_of_a_composite_are_cut_at_their_own_borders_and_not_stretched(tmp_path):
    pixels = np.zeros((101, 60, 3), np.uint8)
    for row, value in enumerate((40, 120, 200)):
        pixels[round(101 * row / 3) : round(101 * (row + 1) / 3)] = value
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png")
    write(tmp_path / "a" / "x.txt", "[IMAGE1] a [IMAGE2] b [IMAGE3] c")
    (example,) = load(tmp_path, (3, 1))
    panels = read_panels(example, Layout(3, 1, 48, 32))
    assert [panel.size for panel in panels] == [(48, 32)] * 3
    assert [panel.getextrema()[0] for panel in panels] == [(40, 40), (120, 120), (200, 200)]
