"""Data sets that other tools write, and what a hostile or careless one may not do: take long, or be read outside."""

import io
import json
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image, ImageFile
from test_data import PAIR, TWO, check, composite, pairs_of, panel_set, picture, write

import train
from iclora import data, records
from iclora.config import IN_CONTEXT, UNO
from iclora.data import load, scan
from iclora.data_forms import find, match_controls
from iclora.records import Findings, read_records
from sampling import images
from sampling.images import open_picture

ROOT = Path(__file__).parents[2]
CLEAN = "a fox at night"
ACCENT = "caf\u00e9 \u5c71 01"
FORMS = "NFC", "NFD"


def table(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, newline="")


def broken(folder, **options):
    return scan(folder, **options)[1].broken


# captions


@pytest.mark.parametrize(
    ("suffix", "content"),
    [("txt", TWO), ("caption", TWO), ("json", {"caption": TWO, "score": 4}), ("JSON", {"caption": TWO})],
)
def test_a_caption_stands_beside_its_picture_in_any_of_three_files(tmp_path, suffix, content):
    picture(tmp_path / "a.b.png", (64, 32))
    write(tmp_path / f"a.b.{suffix}", content)
    (example,) = load(tmp_path, (1, 2))
    assert (example.caption, example.form) == (TWO, "composites")


def test_panels_may_have_captions_in_any_of_the_files(tmp_path):
    panel_set(tmp_path / "a", caption=None)
    write(tmp_path / "a" / "1.caption", "a fox")
    write(tmp_path / "a" / "2.json", {"caption": "the fox"})
    panel_set(tmp_path / "b", caption=None, seed=5)
    write(tmp_path / "b" / "caption.caption", TWO)
    assert [e.caption for e in load(tmp_path, (1, 2))] == ["[IMAGE1] a fox [IMAGE2] the fox", TWO]


def test_two_captions_that_say_the_same_are_one_and_others_are_named(tmp_path):
    composite(tmp_path, "a")
    write(tmp_path / "a.caption", f" {TWO}\n")
    assert load(tmp_path, (1, 2))[0].caption == TWO
    write(tmp_path / "a.caption", "a dog")
    with pytest.raises(ValueError, match=r"a.caption and \S*a.txt say different things; keep one of them"):
        load(tmp_path, (1, 2))


@pytest.mark.parametrize("content", [{}, [], {"caption": 1}, "{", {"text": "x"}])
def test_a_sidecar_without_a_caption_is_named(tmp_path, content):
    picture(tmp_path / "a.png", (64, 32))
    write(tmp_path / "a.json", content)
    with pytest.raises(ValueError, match='a.json holds no caption; write {"caption": "..."}, or remove it'):
        load(tmp_path, (1, 2))


def test_other_json_is_no_caption(tmp_path):
    composite(tmp_path, "a")
    write(tmp_path / "dataset_infos.json", {"caption": "x"})
    examples, findings = scan(tmp_path, (1, 2))
    assert len(examples) == 1 and not findings.broken and "dataset_infos.json is no picture or" in findings.notes[0]


# Hugging Face


def test_metadata_names_pictures_and_their_texts(tmp_path):
    for number in range(4):
        picture(tmp_path / "train" / f"{number}.png", (64, 32), number)
    rows = [{"file_name": "0.png", "text": TWO, "label": 3}, {"file_name": "1.png", "caption": TWO}]
    write(tmp_path / "train" / "metadata.jsonl", "\r\n".join(map(json.dumps, rows)))
    table(
        tmp_path / "train" / "metadata.csv",
        f'\ufefffile_name,text,more\r\n2.png,"{TWO}, and\nmore",\r\n3.png,"{TWO}",x\r\n',
    )
    examples = load(tmp_path, (1, 2))
    assert [e.files[0].name for e in examples] == ["2.png", "3.png", "0.png", "1.png"]
    assert {e.form for e in examples} == {"rows"} and examples[0].caption == f"{TWO}, and more"
    assert len(load(tmp_path / "train" / "metadata.csv", (1, 2))) == 2


def test_a_picture_that_metadata_forget_is_named(tmp_path):
    picture(tmp_path / "0.png", (64, 32))
    picture(tmp_path / "1.png", (64, 32), 1)
    table(tmp_path / "metadata.csv", f'file_name,text\n0.png,"{TWO}"\n')
    assert broken(tmp_path, grid=(1, 2)) == [f"{tmp_path}/1.png has no caption; write 1.txt beside it"]


def test_a_table_of_another_name_is_no_list(tmp_path):
    composite(tmp_path, "a")
    table(tmp_path / "scores.csv", "name,score\na,1\n")
    examples, findings = scan(tmp_path, (1, 2))
    assert len(examples) == 1 and "scores.csv is no picture or caption" in findings.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file_name,text\n0.png,a fox, and more\n",
            "metadata.csv line 2: it has more cells than the table has columns",
        ),
        ("file_name,text\n0.png\n", 'line 2: it needs either "prompt"'),
        ('file_name,text\n"0.png,a fox\n', "metadata.csv line 2: unexpected end of data; correct the table"),
        ("file_name,text\n" + "x" * 200_000, "metadata.csv line 2: field larger than field limit"),
        ("name;text\n0.png;x\n", 'line 2: it needs either "panels"'),
        ("file_name,text,caption\n0.png,a,b\n", "line 2: text and caption say different things"),
        ("file_name,text\n../0.png,a\n", "line 2: '../0.png' leads out of its folder"),
    ],
)
def test_a_broken_table_is_one_line(tmp_path, text, message):
    table(tmp_path / "metadata.csv", text)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "metadata.csv", (1, 2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"file_name": 1, "text": "x"},
        {"file_name": "0.png", "text": []},
        {"image_path": "0.png", "caption": "x", "control_path": 3},
    ],
)
def test_a_row_of_other_types_is_named(tmp_path, row):
    write(tmp_path / "rows.jsonl", row)
    with pytest.raises(ValueError, match="rows.jsonl line 1: .* is not a text; correct it"):
        load(tmp_path)


# links and names


def test_pictures_that_are_links_are_read_wherever_they_lead(tmp_path):
    blob = picture(tmp_path / "blobs" / "b.png", (64, 32)).rename(tmp_path / "blobs" / "0123")
    snapshot = tmp_path / "snapshots" / "1"
    (snapshot / "images").mkdir(parents=True)
    for place in (snapshot / "a.png", snapshot / "images" / "b.png"):
        place.symlink_to(os.path.relpath(blob, place.parent))
    write(snapshot / "a.txt", TWO)
    write(snapshot / "rows.jsonl", {"image": "images/b.png", "prompt": TWO})
    assert sorted(e.files[0].name for e in load(snapshot, (1, 2))) == ["a.png", "b.png"]
    write(snapshot / "pairs.json", [{"prompt": "x", "image_path": "a.png", "image_tgt_path": "images/b.png"}])
    assert len(load(snapshot / "pairs.json")) == 1


@pytest.mark.parametrize("name", ["/dev/zero", "pipe"])
def test_links_to_devices_and_pipes_are_refused(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    composite(tmp_path / "in", "a")
    (tmp_path / "in" / "a.png").unlink()
    (tmp_path / "in" / "a.png").symlink_to(tmp_path / name)
    assert "a.png: it is a folder or a device" in broken(tmp_path / "in", grid=(1, 2))[0]
    for caption in ("a.txt", "r.jsonl", "metadata.csv", "set.json"):
        folder = tmp_path / caption
        composite(folder, "a")
        (folder / caption).unlink(missing_ok=True)
        (folder / caption).symlink_to(tmp_path / name)
        assert f"{caption}: it is no file; correct or remove it" in broken(folder, grid=(1, 2))[0]


@pytest.mark.parametrize("stored", FORMS)
@pytest.mark.parametrize("written", FORMS)
def test_names_that_look_alike_are_alike(tmp_path, stored, written):
    stored, written = (unicodedata.normalize(form, ACCENT) for form in (stored, written))
    picture(tmp_path / "a" / f"{stored}.png", (64, 32))
    write(tmp_path / "a" / f"{written}.txt", TWO)
    picture(tmp_path / "b" / stored / f"{stored}.png", (64, 32), 1)
    write(tmp_path / "b" / "rows.jsonl", {"image": f"{written}/{written}.png", "prompt": TWO})
    picture(tmp_path / "c" / "images" / f"{stored}.png", seed=2)
    picture(tmp_path / "c" / "control" / f"{written}.png", seed=3)
    write(tmp_path / "c" / "images" / f"{stored}.txt", CLEAN)
    write(tmp_path / "c" / "set.json", {"targets": "images", "control": "control"})
    assert len(load(tmp_path, (1, 2), method=IN_CONTEXT)) == 3


def test_a_backslash_in_a_row_means_a_folder(tmp_path):
    assert find(tmp_path, "a\\b/c.png") == tmp_path / "a" / "b" / "c.png"
    for name in (
        "..\\x.png",
        "C:\\x.png",
        "c:x.png",
        "\\x.png",
        "\\\\host\\share\\x.png",
        "a\\..\\x.png",
        "a/../x.png",
    ):
        with pytest.raises(ValueError, match="leads out of its folder; put the pictures beside the rows"):
            find(tmp_path, name)


def test_a_name_of_a_hundred_thousand_folders_is_not_looked_for(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(os.path, "lexists", lambda path: looked.append(path))
    find(tmp_path, "\u00e9/" * 100_000)
    find(tmp_path, "e/" * 100_000)
    assert not looked
    find(tmp_path, "\u00e9/" * 10)
    assert len(looked) == 30


# control folders


def control_set(folder, names=("a", "b"), controls=("control",), **settings):
    """Targets in images/ with captions, and control pictures of the same names in other folders."""
    for seed, name in enumerate(names):
        picture(folder / "images" / f"{name}.png", seed=seed)
        write(folder / "images" / f"{name}.txt", f"{CLEAN} {name}")
        for number, control in enumerate(controls, start=1):
            picture(folder / control / f"{name}.jpg", (48, 32), seed=seed + 100 * number)
    write(folder / "set.json", {"targets": "images", "control": list(controls), **settings})
    return folder


def test_control_folders_are_references_for_uno(tmp_path):
    first, second = load(control_set(tmp_path, controls=("control", "more/edges")), method=UNO)
    assert (first.files, first.grid) == ((tmp_path / "images" / "a.png",), (1, 1))
    assert first.references == (tmp_path / "control" / "a.jpg", tmp_path / "more" / "edges" / "a.jpg")
    assert (first.caption, second.caption) == (f"{CLEAN} a", f"{CLEAN} b")
    assert first.form == "targets with control pictures" and len(load(tmp_path)[0].references) == 2


def test_control_folders_are_sets_for_in_context_training_with_the_target_last(tmp_path):
    examples, findings = scan(control_set(tmp_path), method=IN_CONTEXT)
    assert [(e.grid, [path.name for path in e.files], e.references) for e in examples] == [
        ((1, 2), ["a.jpg", "a.png"], ()), ((1, 2), ["b.jpg", "b.png"], ())
    ]  # fmt: skip
    assert not findings.broken and not findings.notes, "captions of other tools have no markers"
    (example,) = load(control_set(tmp_path / "tall", ["c"], ["x", "y"], grid="3x1"), method=IN_CONTEXT)
    assert (example.grid, len(example.files)) == ((3, 1), 3)


def test_targets_may_stand_beside_the_folder_of_their_control_pictures_and_below(tmp_path):
    for name in ("a", "sub/b"):
        picture(tmp_path / f"{name}.png")
        write(tmp_path / f"{name}.txt", CLEAN)
        picture(tmp_path / "control" / f"{name}.webp", seed=len(name))
    write(tmp_path / "set.json", {"control": "control"})
    assert [e.references[0].name for e in load(tmp_path, method=UNO)] == ["a.webp", "b.webp"]


def test_targets_that_are_numbered_are_no_panels_of_one_set(tmp_path):
    control_set(tmp_path, ["1", "2"], grid="1x2")
    assert [e.files[-1].name for e in load(tmp_path, method=IN_CONTEXT)] == ["1.png", "2.png"]


def test_a_control_folder_may_be_a_link(tmp_path):
    control_set(tmp_path / "in")
    (tmp_path / "in" / "control").rename(tmp_path / "edges")
    (tmp_path / "in" / "control").symlink_to(tmp_path / "edges")
    assert [e.references[0].name for e in load(tmp_path / "in", method=UNO)] == ["a.jpg", "b.jpg"]


def test_numbered_control_pictures_of_one_target_come_in_their_order(tmp_path):
    control_set(tmp_path, ["a", "a_1", "b"])
    (tmp_path / "control" / "b.jpg").unlink()
    for number in (10, 2, 0):
        picture(tmp_path / "control" / f"b_{number}.png", seed=number)
    picture(tmp_path / "control" / "a_0.png", seed=50)
    found = {e.files[0].stem: [path.name for path in e.references] for e in load(tmp_path, method=UNO)}
    assert found == {"a": ["a.jpg", "a_0.png"], "a_1": ["a_1.jpg"], "b": ["b_0.png", "b_2.png", "b_10.png"]}


def test_every_target_without_its_control_picture_is_named_and_so_is_what_is_left(tmp_path, capsys):
    control_set(tmp_path, [f"{n:02}" for n in range(6)], ["control", "edges"])
    for name in ("control/01.jpg", "edges/03.jpg", "control/04.jpg", "edges/04.jpg"):
        (tmp_path / name).unlink()
    picture(tmp_path / "control" / "05.png")
    picture(tmp_path / "edges" / "06.png")
    for method in ("uno", "in-context-lora"):
        status, lines = check(capsys, tmp_path, "--method", method)
        named = [line.removeprefix(f"broken: {tmp_path}/images/") for line in lines if line.startswith("broken: ")]
        assert status == 2 and len(named) == 5
        for name, control in (("01", "control"), ("03", "edges"), ("04", "control"), ("04", "edges")):
            assert f"{name}.png has no control picture in {tmp_path}/{control}; add {name}.png there" in named
        assert [
            line
            for line in named
            if "05.jpg and" in line and line.endswith("05.png as its control picture; keep one of them")
        ]
        assert [
            line for line in lines if line.startswith("note: ") and "edges/06.png is the control picture of no" in line
        ]
        assert "targets with control pictures: 2 sets, 2 cropped by up to 33%" in lines or method == "uno"
    with pytest.raises(ValueError, match="01.png has no control picture in .*the first of 5 things that are broken"):
        load(tmp_path, method=UNO)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"control": "x"}, "set.json: there is no folder .*x'"),
        ({"control": ".."}, "set.json: '..' leads out of its folder"),
        ({"control": []}, 'set.json: it has 0 "control" folders beside "targets"; name 1 to 8'),
        ({"control": ["images"] * 9}, "name 1 to 8"),
        ({"targets": "images"}, 'it has 0 "control" folders'),
        ({"targets": "images", "control": "images"}, "stand in the same folder"),
        ({"control": [1]}, '"control" is not the name of a folder, or a list of such names'),
        ({"control": {}}, '"control" is not the name of a folder'),
        ({"targets": [], "control": "control"}, "is not a JSON object of texts"),
    ],
)
def test_control_folders_that_cannot_be_meant_are_one_line(tmp_path, settings, message):
    control_set(tmp_path)
    write(tmp_path / "set.json", settings)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, method=UNO)


def test_rows_name_their_control_pictures(tmp_path):
    for seed, name in enumerate(("t", "c", "d", "e")):
        picture(tmp_path / f"{name}.png", seed=seed)
    rows = [
        {"image_path": "t.png", "control_path": "c.png", "caption": CLEAN},
        {
            "image_path": "t.png",
            "control_path_10": "e.png",
            "control_path_0": "d.png",
            "control_path_2": "c.png",
            "caption": "x",
        },
        {"file_name": "t.png", "text": "y", "control_path": "e.png"},
        {"image": "t.png", "prompt": "z", "control_path": "d.png", "control_path_1": None},
        {"prompt": "v", "image_path": "d.png", "image_tgt_path": "t.png"},
        {"image_path": "t.png", "caption": "no reference"},
    ]
    write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    examples = load(tmp_path, method=UNO)
    assert [[path.stem for path in e.references] for e in examples] == [["c"], ["d", "c", "e"], ["e"], ["d"], ["d"], []]
    assert {e.files[0].stem for e in examples} == {"t"} and {e.grid for e in examples} == {(1, 1)}
    write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows[:2])))
    assert [e.grid for e in load(tmp_path, method=IN_CONTEXT)] == [(1, 2), (1, 4)]


def test_matching_takes_as_long_as_there_are_pictures():
    touched = []

    class Name(type(Path())):
        def relative_to(self, other):
            touched.append(self)
            return Path(self.name)

    targets = [Name(f"t/{n}.png") for n in range(3000)]
    controls = [Name(f"c/{n}_{k}.png") for n in range(3000) for k in (0, 1)]
    found = match_controls((Path("t"), targets), [(Path("c"), controls)], [], [])
    assert len(found) == 3000 and len(touched) == 9000


# with and without references


@pytest.mark.slow
def test_a_run_may_have_rows_with_and_without_references(tmp_path):
    path = pairs_of(tmp_path, PAIR, {"prompt": "a cat", "image_tgt_path": "p/c.png"}, {**PAIR, "image_path": "p/c.png"})
    examples, findings = scan(path, method=UNO)
    assert [len(e.references) for e in examples] == [1, 0, 1] and not findings.broken
    assert f"1 of 3 sets have no references, to learn from text ({path} row 2)" in findings.notes
    flags = ["--method", "uno", "--data", str(path), "--rank", "4", "--batch", "2", "--steps", "2", "--holdout", "0.4"]
    flags += ["--panel-size", "32", "--ref-size", "32", "--save-every", "1", "--sample-every", "2"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["validation"] > 0 for line in lines)
    assert (tmp_path / "run" / "sheet-000002.png").stat().st_size


def test_data_without_any_reference_and_sets_of_panels_are_not_for_uno(tmp_path):
    control_set(tmp_path / "pairs")
    panel_set(tmp_path / "sets" / "one")
    write(tmp_path / "sets" / "set.json", {"grid": "1x2"})
    with pytest.raises(ValueError, match="is not for --method uno, which takes a .json of pairs or control pictures"):
        load(tmp_path / "sets", method=UNO)
    with pytest.raises(ValueError, match="one has a 1x2 grid, but --method uno learns single pictures"):
        load(tmp_path, method=UNO)
    with pytest.raises(ValueError, match="row 1|is not for --method uno"):
        load(pairs_of(tmp_path / "bare", {"prompt": "a cat", "image_tgt_path": "p/c.png"}), method=UNO)


# the check


def test_the_check_counts_sets_and_crops_by_form(tmp_path, capsys):
    write(tmp_path / "set.json", {"grid": "1x2"})
    composite(tmp_path, "a", (128, 64))
    composite(tmp_path, "b", (160, 64), seed=1)
    panel_set(tmp_path / "one", seed=3)
    picture(tmp_path / "rows" / "c.png", (128, 64), 5)
    write(tmp_path / "rows" / "rows.jsonl", {"image": "c.png", "prompt": TWO})
    status, lines = check(capsys, tmp_path, "--panel-size", "64")
    assert status == 0
    forms = [line for line in lines if line.startswith(("composites", "folders of panels", "rows"))]
    assert forms == [
        "composites: 2 sets, 1 cropped by up to 6%", "folders of panels: 1 sets, uncropped", "rows: 1 sets, uncropped"
    ]  # fmt: skip


def test_an_empty_grid_is_one_line(capsys):
    assert data.main([str(ROOT / "sets" / "sketch"), "--grid", ""]) == 2
    assert capsys.readouterr().err == "error: --grid is empty; give it a value, or leave it out\n"


# bounds


def test_data_that_link_to_themselves_are_one_line(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    for main, argv in ((data.main, ["--data"]), (train.main, ["--out", str(tmp_path / "run"), "--data"])):
        assert main([*argv, str(tmp_path / "loop")]) == 2
        err = capsys.readouterr().err
        assert "there is no folder" in err and err.count("\n") == 1


def test_deep_folders_are_read_to_a_depth_and_the_rest_is_named(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(900):  # deeper than a path may be long
        os.mkdir("abcdef", dir_fd=folder)
        inner = os.open("abcdef", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    findings, listed = Findings(), []
    with pytest.MonkeyPatch.context() as patch:
        real = Path.iterdir
        patch.setattr(Path, "iterdir", lambda path: listed.append(path) or real(path))
        assert read_records(tmp_path, None, findings) == []
    assert len(listed) == records.MAX_DEPTH + 1
    assert (
        len(findings.broken) == 1 and "lies more than 32 folders deep; move it up, or remove it" in findings.broken[0]
    )
    for _ in range(900):  # pytest cannot remove what it cannot name
        top = tmp_path / "abcdef"
        if not (top / "abcdef").exists():
            break
        (top / "abcdef").rename(tmp_path / "next")
        top.rmdir()
        (tmp_path / "next").rename(top)


def test_very_many_folders_are_refused(tmp_path, monkeypatch):
    for number in range(9):
        (tmp_path / str(number)).mkdir()
    monkeypatch.setattr(records, "MAX_FOLDERS", 10)
    assert scan(tmp_path)[0] == []
    monkeypatch.setattr(records, "MAX_FOLDERS", 9)
    with pytest.raises(ValueError, match="holds more than 9 folders; name one of them"):
        scan(tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "metadata.csv", "pairs.json"])
def test_a_list_without_end_is_refused_and_not_cut(tmp_path, monkeypatch, name):
    monkeypatch.setattr(records, "MAX_LIST", 100)
    table(tmp_path / name, "x" * 101)
    assert f"{name} has more than 100 characters; split it" in broken(tmp_path / name)[0]


class Counted(str):
    """A line whose comparisons with others are counted."""

    compared = 0

    def __eq__(self, other):
        Counted.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_thousands_of_broken_rows_are_named_without_comparing_each_with_all(tmp_path, monkeypatch):
    write(tmp_path / "r.jsonl", "\n".join(json.dumps({"image": f"{n}.png", "prompt": "x"}) for n in range(2000)))

    def refuse(path):
        raise ValueError(Counted(path))

    real = records.collect.__wrapped__

    def collect(problems, prefix=""):
        lines = []
        yield from real(lines, prefix)
        problems.extend(Counted(line) for line in lines)

    monkeypatch.setattr(data, "open_picture", refuse)
    monkeypatch.setattr(data, "collect", records.contextmanager(collect))
    assert len(broken(tmp_path, grid=(1, 2))) == 2000
    assert Counted.compared < 20_000


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    last = whole.rindex(b"\xff\xda")
    scan_of = whole[last : last + 2 + int.from_bytes(whole[last + 2 : last + 4])]
    count = whole.count(b"\xff\xda")
    for more, path in (
        (images.MAX_SCANS - count, tmp_path / "fine.jpg"),
        (images.MAX_SCANS - count + 1, tmp_path / "b.jpg"),
    ):
        path.write_bytes(whole[:-2] + scan_of * more + whole[-2:])
    assert open_picture(tmp_path / "fine.jpg").size == (64, 64)
    loaded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda picture: loaded.append(picture))
    with pytest.raises(ValueError, match="b.jpg: it has 65 scans, more than 64; save it again as PNG"):
        open_picture(tmp_path / "b.jpg")
    assert not loaded


def test_scans_are_not_counted_in_what_a_camera_adds(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 200, 90)).save(buffer, "JPEG", progressive=True)
    extra = b"\xff\xda\0\x02" * 1000  # as in a thumbnail, or by chance
    whole = buffer.getvalue()
    (tmp_path / "a.jpg").write_bytes(whole[:2] + b"\xff\xe5" + (len(extra) + 2).to_bytes(2) + extra + whole[2:])
    assert open_picture(tmp_path / "a.jpg").size == (32, 32)


def test_scans_are_found_by_two_bytes_at_a_time_however_many_fill_bytes_there_are():
    found = images._SEGMENT.search(b"\xff" * 1000 + b"\0" + b"\xff" * 1000 + b"\xda")
    assert found.span() == (2000, 2002), "a longer match would try each run of them from each of its bytes"


def test_a_huge_jpeg_is_not_read_whole(tmp_path, monkeypatch):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(images, "MAX_JPEG", 100)
    with pytest.raises(ValueError, match="a.jpg: it has more than"):
        open_picture(tmp_path / "a.jpg")
