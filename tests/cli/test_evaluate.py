"""python -m iclora.evaluate: what sample.py makes of a list is scored, beside other systems; one line for a mistake."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from iclora import evaluate, record
from iclora.backbones import DINO, Backbone

ROOT = Path(__file__).parents[2]
REFERENCES = ROOT / "weights" / "tiny" / "examples" / "references"
ONE = [
    {"prompt": "a cat on a beach.", "image_paths": ["cat.png"]},
    {"prompt": "a robot in the snow.", "image_paths": ["robot.png"]},
]
TWO = [
    {"prompt": "a cat and a robot in the snow.", "image_paths": ["cat.png", "robot.png"]},
    {"prompt": "a mushroom and a robot on a beach.", "image_paths": ["mushroom.png", "robot.png"]},
]
SET = "two pictures of a cat: [IMAGE1] it is in the middle in a bedroom, [IMAGE2] it is in the middle on a beach."


@pytest.fixture
def folder(tmp_path):
    for path in REFERENCES.iterdir():
        shutil.copy(path, tmp_path)
    for name, items in (("one.json", ONE), ("two.json", TWO)):
        (tmp_path / name).write_text(json.dumps(items))
    (tmp_path / "sets.jsonl").write_text(json.dumps({"grid": "1x2", "prompt": SET}) + "\n")
    return tmp_path


def subject(name):
    return Image.open(REFERENCES / f"{name}.png").convert("RGB").resize((64, 64))


def beside(*pictures):
    """Pictures in a row, as wide as high each."""
    row = Image.new("RGB", (64 * len(pictures), 64))
    for i, picture in enumerate(pictures):
        row.paste(picture, (64 * i, 0))
    return row


def make(folder, *pictures):
    """A system's folder, in UNO's naming."""
    folder.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}_0.png")
    return str(folder)


def scores(folder, *argv):
    """Score and give the table of the JSON."""
    out = folder / f"scores{len(list(folder.glob('scores*')))}.json"
    assert evaluate.main([*map(str, argv), "--device", "cpu", "--out", str(out)]) == 0
    return json.loads(out.read_text())


def refused(capsys, *argv):
    assert evaluate.main(list(map(str, argv))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


# scores


def test_a_list_is_made_by_sample_and_scored_beside_another_system(folder, capsys):
    argv = ["--jobs", str(folder / "one.json"), "--num", "2"]
    ours, theirs = str(folder / "ours"), str(folder / "theirs")
    assert sample.main([*argv, "--steps", "2", "--device", "cpu", "--out", ours]) == 0
    Path(theirs).mkdir()
    for i, name in enumerate(("cat", "robot")):
        for j in range(2):
            subject(name).save(Path(theirs) / f"{i}_{j}.png")
    capsys.readouterr()
    found = scores(folder, *argv, "--made", ours, theirs)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"| score | {ours} | {theirs} | {ours} - {theirs} | UNO's release |"
    assert [line.split(" | ")[0].strip("| ") for line in out[2:5]] == ["DINO", "CLIP-I", "CLIP-T"]
    assert [line.rstrip(" |").split(" | ")[-1] for line in out[2:5]] == ["0.760", "0.835", "0.304"]
    assert any(line.startswith("DINO: dinov2, 128 wide, 4 layers") for line in out)
    assert out[-1].startswith("UNO's release was measured otherwise: DINO is not ViT-S/16")
    assert found["table"]["DINO"][theirs] == pytest.approx([1, 1, 1], abs=1e-5)
    assert found["table"]["DINO"][ours][0] < 0.999
    assert found["table"]["DINO"][f"{ours} - {theirs}"][0] == pytest.approx(
        found["table"]["DINO"][ours][0] - 1, abs=1e-5
    )
    assert [item["num"] for item in found["items"]] == [2, 2]
    assert len(found["DINO"]["sha256"]) == 64 and found["DINO"]["size"] == {"shortest_edge": 64}


def test_scores_rank_systems_whose_order_is_known(folder):
    noise = [Image.effect_noise((64, 64), 90).convert("RGB") for _ in range(2)]
    systems = [
        make(folder / "right", subject("cat"), subject("robot")),
        make(folder / "swapped", subject("robot"), subject("cat")),
        make(folder / "noise", *noise),
    ]
    table = scores(folder, "--jobs", folder / "one.json", "--made", *systems)["table"]
    for name in ("DINO", "CLIP-I"):
        right, swapped, nothing = (table[name][system][0] for system in systems)
        assert right == pytest.approx(1, abs=1e-5) and right > swapped + 0.3 and right > nothing + 0.3
    assert table["CLIP-T"][systems[0]][0] > table["CLIP-T"][systems[1]][0]


def test_of_several_subjects_the_score_is_the_mean_and_one_drawn_twice_is_not_told_from_the_other(folder):
    pairs = (("cat", "robot"), ("mushroom", "robot"))
    both = make(folder / "both", *(beside(*map(subject, pair)) for pair in pairs))
    twice = make(folder / "twice", *(beside(subject(pair[1]), subject(pair[1])) for pair in pairs))
    found = scores(folder, "--jobs", folder / "two.json", "--made", both, twice)
    dino = Backbone(ROOT / "weights" / "tiny" / "dinov2", DINO, "cpu")
    for i, pair in enumerate(pairs):
        made, *references = dino.see([beside(*map(subject, pair)), *map(subject, pair)]).numpy()
        assert found["values"][both]["DINO"][i] == pytest.approx(np.mean([made @ one for one in references]), abs=1e-4)
    assert found["table"]["told apart"][both][0] == 1 and found["table"]["told apart"][twice][0] < 1
    assert found["table"]["margin"][both][0] > found["table"]["margin"][twice][0] + 0.2
    assert found["table"]["told apart"][both][1:] == pytest.approx([0.342, 1], abs=1e-3)  # Wilson's, of two
    assert found["goals"] == {"DINO": 0.542, "CLIP-I": 0.733, "CLIP-T": 0.322}


def test_panels_of_a_set_are_compared_with_each_other_and_with_their_own_texts(folder, capsys):
    alike = make(folder / "alike", beside(subject("cat"), subject("cat")))
    unlike = make(folder / "unlike", beside(subject("cat"), subject("robot")))
    found = scores(folder, "--jobs", folder / "sets.jsonl", "--made", alike, unlike)
    for name in ("panels, DINO", "panels, CLIP-I"):
        assert found["table"][name][alike][0] == pytest.approx(1, abs=1e-5)
        assert found["table"][name][unlike][0] < 0.7
    assert "DINO" not in found["table"] and "CLIP-T" in found["table"]
    assert found["items"][0]["texts"][1] == "two pictures of a cat: [IMAGE2] it is in the middle on a beach."
    assert "UNO" not in capsys.readouterr().out


def test_a_subject_may_be_all_pictures_of_its_folder(folder):
    (folder / "cats").mkdir()
    for i, name in enumerate(("cat", "robot")):
        subject(name).save(folder / "cats" / f"0{i}.png")
    (folder / "cats.json").write_text(json.dumps([{"prompt": "a cat.", "image_paths": ["cats/00.png"]}]))
    made = make(folder / "made", subject("cat"))
    argv = ["--jobs", folder / "cats.json", "--made", made]
    given, all_views = (
        scores(folder, *argv, "--views", views)["table"]["DINO"][made][0] for views in ("given", "folder")
    )
    dino = Backbone(ROOT / "weights" / "tiny" / "dinov2", DINO, "cpu")
    cat, robot = dino.see([subject("cat"), subject("robot")]).numpy()
    assert given == pytest.approx(1, abs=1e-5) and all_views == pytest.approx((1 + cat @ robot) / 2, abs=1e-4)


def test_dreambenchs_folder_is_made_and_scored(folder, tmp_path):
    bench = folder / "dataset"
    (bench / "cat2").mkdir(parents=True)
    shutil.copy(REFERENCES / "cat.png", bench / "cat2" / "00.png")
    prompts = "[\n'a {0} {1} on a beach'.format(unique_token, class_token),\n'a red {0} {1}'.format(u, c)\n]"
    text = f"subject_name,class\ncat2,cat\n\nObject Prompts\n\n{prompts}\n\nLive Subject Prompts\n\n{prompts}\n"
    (bench / "prompts_and_classes.txt").write_text(text)
    out = str(folder / "out")
    assert sample.main(["--jobs", str(bench), "--steps", "2", "--device", "cpu", "--out", out]) == 0
    found = scores(folder, "--jobs", bench, "--made", out)
    assert [item["prompt"] for item in found["items"]] == ["a cat on a beach", "a red cat"]
    assert {"DINO", "CLIP-I", "CLIP-T"} == found["table"].keys()


def test_texts_that_clip_cannot_read_whole_are_counted(folder, capsys):
    (folder / "long.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in ("a cat " * 60, "a cat")))
    made = make(folder / "made", subject("cat"), subject("cat"))
    scores(folder, "--jobs", folder / "long.jsonl", "--made", made)
    assert "note: 1 texts are longer than the 77 tokens that CLIP reads" in capsys.readouterr().err


def test_a_sheet_of_many_pictures_shrinks_them_to_what_a_viewer_can_open(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "SHEET", 100)
    path = record.save_sheet({f"{i:04d}": Image.new("RGB", (64, 32), "red") for i in range(9)}, tmp_path)
    sheet = Image.open(path)
    assert sheet.size == (3 * 33, 3 * (32 + record.LABEL))
    assert (
        sheet.getpixel((16, record.LABEL + 8)) == (255, 0, 0) and sheet.getpixel((16, record.LABEL + 25)) == (255,) * 3
    )


# mistakes


def test_mistakes_are_one_line(folder, capsys):
    jobs, made = folder / "one.json", make(folder / "made", subject("cat"), subject("robot"))
    wrong = [
        ([], "name a list with --jobs, and with --made folders"),
        (["--jobs", jobs], "name a list with --jobs"),
        (["--jobs", jobs, "--made", folder / "nowhere"], "is no folder; name one with pictures"),
        (["--jobs", jobs, "--made", made, made], "--made names a folder twice"),
        (["--jobs", folder / "nowhere", "--made", made], "is no file with requests"),
        (["--jobs", jobs, "--made", made, "--num", "0"], "--num 0 is out of range"),
        (["--jobs", jobs, "--made", made, "--num", "2"], "lacks 0002.png or 0_1.png of"),
        (["--jobs", jobs, "--made", made, "--views", "all"], "--views 'all' is unknown; choose one of given, folder"),
        (["--jobs", jobs, "--made", made, "--dino", folder / "nowhere"], "config.json is no file"),
        (["--jobs", jobs, "--made", made, "--clip", ROOT / "weights/tiny/dinov2"], "of type 'dinov2', not clip"),
        (["--jobs", jobs, "--made", made, "--out", jobs], "exists and is not overwritten"),
        (["--jobs", jobs, "--made", made, "--out", folder / "no" / "a.json"], "has no folder to lie in"),
        (["--jobs", folder / "sets.jsonl", "--made", made], "1_0.png belongs to no item"),
    ]
    for argv, message in wrong:
        assert message in refused(capsys, *argv), argv


def test_wrong_pictures_are_named_before_a_network_loads(folder, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "Backbone", None)
    made = Path(make(folder / "made", subject("cat"), subject("robot")))
    argv = ["--jobs", folder / "one.json", "--made", made]
    (made / "1_0.png").write_bytes(b"no picture")
    assert "1_0.png" in refused(capsys, *argv)
    subject("robot").save(made / "1_0.png")
    (folder / "robot.png").unlink()
    assert "robot.png: there is no such file" in refused(capsys, *argv)
    made = make(folder / "odd", Image.new("RGB", (65, 64)))
    message = refused(capsys, "--jobs", folder / "sets.jsonl", "--made", made)
    assert "0_0.png of 65x64 pixels is no 1x2 grid of" in message and "line 1" in message


def test_a_picture_that_sample_made_of_another_prompt_is_refused(folder, capsys):
    out = folder / "out"
    assert sample.main(["--jobs", str(folder / "one.json"), "--steps", "1", "--device", "cpu", "--out", str(out)]) == 0
    capsys.readouterr()
    (folder / "one.json").write_text(json.dumps(ONE[::-1]))
    err = refused(capsys, "--jobs", folder / "one.json", "--made", out)
    assert "0001.png was made from another prompt than" in err and "item 1" in err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"grid": "1x2"}, "line 1: there is no prompt; correct the list"),
        ({"mask": "3", "prompt": "a cat"}, "line 1: it has no markers, but the 2x2 grid takes"),
        (
            {"grid": "2x2", "prompt": SET},
            "line 1: it has [IMAGE1] [IMAGE2], but the 2x2 grid takes [IMAGE1] to [IMAGE4]",
        ),
        ({"grid": "1x2", "panel_prompt": ["a cat"]}, "line 1: 1 texts for 2 panels; correct the list"),
        ({"grid": "2", "prompt": "a cat"}, "line 1: grid '2' is not ROWSxCOLS"),
    ],
)
def test_a_request_without_a_text_for_every_panel_is_refused_by_its_line(folder, capsys, row, message):
    (folder / "rows.jsonl").write_text(json.dumps(row))
    assert message in refused(capsys, "--jobs", folder / "rows.jsonl", "--made", folder)
