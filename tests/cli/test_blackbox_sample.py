"""sample.py from outside: pictures, names, records, replay. Stored pictures were made before the redesign."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from blackbox import (
    FIXTURES,
    REFERENCES,
    ROOT,
    TINY,
    files,
    interrupting,
    levels_apart,
    main,
    pixels,
    pngs,
    quick_collection,
    record,
)

pytestmark = pytest.mark.slow
PICTURES = FIXTURES / "pictures"
LORAS = FIXTURES / "loras"
# Levels: another instruction set or number of threads moves a picture by 4e-5, one step of 20 fewer by 0.1, so that a
# tolerance of a whole level would not see it.
SAME = 0.05
CAT, ROBOT = REFERENCES / "cat.png", REFERENCES / "robot.png"
TWO_CATS = "two pictures of a cat: [IMAGE1] it is in the middle in a bedroom, [IMAGE2] it is in the middle on a beach."
ON_A_BEACH = "[IMAGE1] a cat on a beach, [IMAGE2] it is on a beach"
WALK = (
    "three pictures of a red cat with a hat: [IMAGE1] we see the big cat on the left on a beach, [IMAGE2] it is on a "
    "beach, [IMAGE3] we see it on a beach."
)
STRIPED = (
    "two pictures of a green striped cat with a hat: [IMAGE1] it is on the left on a beach, [IMAGE2] it is in the "
    "middle in the snow."
)
FISH = "two pictures of a blue fish: [IMAGE1] it is on a beach, [IMAGE2] it is in the snow."
SMALL = ["--grid", "1x2", "--panel-size", "32", "--steps", "2", "--device", "cpu"]
# stored picture: grid, generated panels, flags
COMMANDS = {
    "two-panels": ("2x2", (2, 4), ["--grid", "2x2", "--mask", "2,4", "--seed", "7"]),
    "whole-set": ("3x1", (1, 2, 3), ["--grid", "3x1", "--mask", "all"]),
    "text": ("1x2", (1, 2), ["--grid", "1x2", "--mask", "all", "--prompt", STRIPED]),
    "reference": ("1x1", (1,), ["--ref", CAT, "--prompt", "a cat on a beach."]),
    "two-references": (
        "1x1", (1,),
        ["--ref", CAT, "--ref", ROBOT, "--prompt", "a cat on the left and a robot on the right in the snow."],
    ),
    "kept-and-reference": (
        "1x2", (2,), ["--grid", "1x2", "--mask", "2", "--panels", CAT, "--ref", CAT, "--prompt", TWO_CATS],
    ),
    "walk": (
        "3x1", (1, 2, 3),
        ["--lora", TINY / "loras" / "walk.safetensors", "--grid", "3x1", "--mask", "all", "--seed", "4",
         "--prompt", WALK],
    ),
    "drafts": (
        "1x2", (2,),
        ["--grid", "1x2", "--mask", "2", "--strength", "0.6", "--panels", CAT, ROBOT, "--prompt", TWO_CATS],
    ),
    "tiled": (
        "1x2", (1, 2),
        ["--grid", "1x2", "--mask", "all", "--tile", "--panel-size", "128", "--steps", "4", "--seed", "3",
         "--prompt", FISH],
    ),
    "clean-lora": (
        "1x2", (2,),
        ["--lora", LORAS / "clean.safetensors", "--grid", "1x2", "--mask", "2", "--panels", CAT, "--prompt",
         ON_A_BEACH],
    ),
    "tokens-lora": (
        "1x2", (2,),
        ["--lora", LORAS / "tokens.safetensors", "--grid", "1x2", "--mask", "2", "--panels", CAT, "--prompt",
         ON_A_BEACH],
    ),
    "uno-lora": ("1x1", (1,), ["--lora", LORAS / "uno.safetensors", "--ref", CAT, "--prompt", "a cat on a beach."]),
    "alone-lora": (
        "1x1", (1,),
        ["--lora", LORAS / "alone.safetensors", "--ref", CAT, ROBOT, "--prompt", "a cat and a robot on a beach."],
    ),
}  # fmt: skip
RECORDS = ("walk", "kept-and-reference", "text", "first")  # of pictures, kept beside them


@pytest.fixture(scope="module", autouse=True)
def imported():
    with quick_collection():
        yield


def small(out, *argv):
    return main("sample", *SMALL, "--out", out, *argv)


def panel_of(image, grid, number):
    """The pixels of one panel of a composite, numbered from 1 in reading order."""
    rows, cols = map(int, grid.split("x"))
    height, width = image.shape[0] // rows, image.shape[1] // cols
    row, col = divmod(number - 1, cols)
    return image[row * height : (row + 1) * height, col * width : (col + 1) * width]


def kept_are_equal(made, stored, grid, generated):
    rows, cols = map(int, grid.split("x"))
    kept = set(range(1, rows * cols + 1)) - set(generated)
    return all((panel_of(made, grid, n) == panel_of(stored, grid, n)).all() for n in kept)


# pictures


def test_the_readmes_first_command_makes_its_picture_and_keeps_three_panels_bit_for_bit(tmp_path):
    command = [sys.executable, "sample.py", "--grid", "2x2", "--mask", "3", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "error" not in done.stderr
    names = ["0001.png", "0001-panel-3.png", "0001.json"]
    assert done.stdout.splitlines() == [str(tmp_path / "out" / name) for name in names]
    made, stored = tmp_path / "out" / "0001.png", PICTURES / "first.png"
    assert levels_apart(made, stored) <= SAME
    assert kept_are_equal(pixels(made), pixels(stored), "2x2", (3,))
    for number in (1, 2, 4):
        given = Image.open(TINY / "examples" / "2x2" / f"{number}.png").convert("RGB")
        if given.size == (64, 64):
            assert (panel_of(pixels(made), "2x2", number) == pixels(given.filename)).all()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_makes_its_stored_picture_and_keeps_panels_bit_for_bit(tmp_path, name):
    grid, generated, flags = COMMANDS[name]
    assert main("sample", *flags, "--device", "cpu", "--out", tmp_path) == 0
    made = tmp_path / "0001.png"
    assert levels_apart(made, PICTURES / f"{name}.png") <= SAME
    assert kept_are_equal(pixels(made), pixels(PICTURES / f"{name}.png"), grid, generated)
    panels = {f"0001-panel-{number}.png" for number in generated}
    assert set(files(tmp_path)) == {"0001.png", "0001.json"} | panels
    for number in generated:
        assert (pixels(tmp_path / f"0001-panel-{number}.png") == panel_of(pixels(made), grid, number)).all()


@pytest.mark.parametrize("lora", ["uno", "alone"])
def test_what_a_lora_or_a_default_says_can_be_overruled_and_changes_the_picture(tmp_path, lora):
    changes = {
        "uno": [["--offset", "d"], ["--offset-scale", "1"], ["--posterior", "sample"], ["--ref-size", "32"]],
        "alone": [["--reference-attention", "joint"], ["--schedule", "uno-release"], ["--guidance", "1"]],
    }[lora]
    seen = []
    for number, change in enumerate([[], *changes]):
        argv = ["--lora", LORAS / f"{lora}.safetensors", "--ref", CAT, "--prompt", "a cat on a beach.", "--steps", "2"]
        assert (
            main("sample", *argv, "--panel-size", "32", "--device", "cpu", "--out", tmp_path / str(number), *change)
            == 0
        )
        seen.append(pixels(tmp_path / str(number) / "0001.png").tobytes())
    assert len(set(seen)) == len(seen)


def test_a_lora_of_no_strength_changes_nothing_and_half_of_it_less_than_all(tmp_path):
    for strength in ("none", "0", "0.5", "1"):
        lora = [] if strength == "none" else ["--lora", f"{TINY / 'loras' / 'walk.safetensors'}:{strength}"]
        assert small(tmp_path / strength, "--prompt", FISH, *lora) == 0
    assert (pixels(tmp_path / "0" / "0001.png") == pixels(tmp_path / "none" / "0001.png")).all()
    half, whole = (levels_apart(tmp_path / name / "0001.png", tmp_path / "0" / "0001.png") for name in ("0.5", "1"))
    assert 0 < half < whole


def test_what_stood_in_a_generated_panel_cannot_reach_the_result(tmp_path):
    for out, second in (("a", CAT), ("b", ROBOT)):
        assert small(tmp_path / out, "--mask", "2", "--panels", CAT, second, "--prompt", TWO_CATS) == 0
    assert pngs(tmp_path / "a", "0001") == pngs(tmp_path / "b", "0001")


def test_a_folder_with_panels_and_a_caption_is_the_same_as_naming_them(tmp_path):
    (tmp_path / "set").mkdir()
    for number, path in enumerate((CAT, ROBOT), start=1):
        (tmp_path / "set" / f"{number}.png").write_bytes(path.read_bytes())
    (tmp_path / "set" / "caption.txt").write_text(TWO_CATS)
    assert small(tmp_path / "a", "--mask", "1", "--set", tmp_path / "set") == 0
    assert small(tmp_path / "b", "--mask", "1", "--panels", CAT, ROBOT, "--prompt", TWO_CATS) == 0
    assert pngs(tmp_path / "a", "0001") == pngs(tmp_path / "b", "0001")


def test_a_text_for_each_panel_becomes_a_joint_caption_with_markers(tmp_path):
    argv = ["--prompt", "two pictures", "--panel-prompt", "a cat", "a robot"]
    assert small(tmp_path, *argv) == 0
    assert re.fullmatch(
        r"two pictures\W+\[IMAGE1\] a cat\W+\[IMAGE2\] a robot\W*", record(tmp_path)["config"]["prompt"]
    )


def test_a_preset_gives_its_grid_its_tag_and_its_markers(tmp_path):
    argv = ["--preset", "film-storyboard", "--steps", "1", "--panel-size", "32", "--panel-prompt", "a", "b", "c"]
    assert main("sample", *argv, "--out", tmp_path) == 0
    config = record(tmp_path)["config"]
    assert config["grid"] == "3x1" and config["preset"] == "film-storyboard"
    assert config["prompt"].startswith("[MOVIE-SHOTS]") and config["prompt"].index("[SCENE-1] a") > 0


@pytest.mark.parametrize("flags", [["--fit", "pad"], ["--fit", "stretch"], ["--dtype", "bfloat16"], ["--tile"]])
def test_other_ways_to_the_same_size_run(tmp_path, flags):
    (tmp_path / "wide.png").write_bytes(CAT.read_bytes())
    Image.open(CAT).convert("RGB").resize((90, 40)).save(tmp_path / "wide.png")
    argv = ["--mask", "2", "--panels", tmp_path / "wide.png", "--prompt", TWO_CATS, *flags]
    assert small(tmp_path / "out", *argv) == 0
    assert Image.open(tmp_path / "out" / "0001.png").size == (64, 32)


# the same again


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One run that keeps panel 1 and makes two sets, with seeds 5 and 6."""
    out = tmp_path_factory.mktemp("made") / "new" / "out"
    argv = ["--mask", "2", "--panels", CAT, "--prompt", TWO_CATS, "--seed", "5", "--num", "2"]
    assert small(out, *argv) == 0
    return out


def test_every_set_is_a_composite_its_generated_panels_and_a_record(made):
    assert set(files(made)) == {
        f"{stem}{end}" for stem in ("0001", "0002") for end in (".png", "-panel-2.png", ".json")
    }


def test_the_same_command_twice_gives_the_same_bytes_and_num_counts_seeds_up(made, tmp_path):
    assert small(tmp_path, "--mask", "2", "--panels", CAT, "--prompt", TWO_CATS, "--seed", "6") == 0
    assert pngs(tmp_path, "0001") == pngs(made, "0002") != pngs(made, "0001")
    assert [record(made, stem)["config"]["seed"] for stem in ("0001", "0002")] == [5, 6]
    assert record(made, "0002")["config"]["num"] == 1


@pytest.mark.parametrize("stem", ["0002", "0001"])
def test_a_replay_gives_the_same_bytes(made, tmp_path, stem):
    assert main("sample", "--config", made / f"{stem}.json", "--out", tmp_path) == 0
    assert pngs(tmp_path, "0001") == pngs(made, stem)
    assert record(tmp_path)["config"] == record(made, stem)["config"]


def test_flags_given_beside_a_replay_win(made, tmp_path):
    assert main("sample", "--config", made / "0001.json", "--seed", "6", "--out", tmp_path) == 0
    assert pngs(tmp_path, "0001") == pngs(made, "0002")


def test_a_replay_finds_its_pictures_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(CAT.read_bytes())
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    assert small("out", "--mask", "2", "--panels", "a.png", "--prompt", TWO_CATS) == 0
    monkeypatch.chdir(tmp_path / "below")
    assert main("sample", "--config", "../out/0001.json", "--out", "again") == 0
    assert pngs(tmp_path / "below" / "again", "0001") == pngs(tmp_path / "out", "0001")


def test_a_replay_from_other_pictures_is_told_and_made(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(CAT.read_bytes())
    argv = ["--mask", "2", "--panels", tmp_path / "a.png", "--prompt", TWO_CATS]
    assert small(tmp_path / "out", *argv) == 0
    (tmp_path / "a.png").write_bytes(ROBOT.read_bytes())
    capsys.readouterr()
    assert main("sample", "--config", tmp_path / "out" / "0001.json", "--out", tmp_path / "out") == 0
    assert "other pictures" in capsys.readouterr().err
    assert pngs(tmp_path / "out", "0002") != pngs(tmp_path / "out", "0001")


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_before_is_replayed_to_its_picture(tmp_path, name):
    text = (FIXTURES / "records" / f"{name}.json").read_text().replace("{root}", str(ROOT))
    (tmp_path / "old.json").write_text(text)
    assert main("sample", "--config", tmp_path / "old.json", "--out", tmp_path / "out") == 0
    assert levels_apart(tmp_path / "out" / "0001.png", PICTURES / f"{name}.png") <= SAME
    old, new = json.loads(text)["config"], record(tmp_path / "out")["config"]
    assert {key: new[key] for key in old} == old


# records and names


def test_the_record_says_what_made_the_picture(made):
    about = record(made, "0002")
    assert {"config", "model", "inputs", "versions", "seconds", "outputs"} <= set(about)
    config = about["config"]
    assert (config["grid"], config["mask"], config["seed"], config["steps"], config["guidance"]) == (
        "1x2",
        "2",
        6,
        2,
        3.5,
    )
    assert (config["panel_size"], config["device"], config["dtype"], config["model"]) == (
        "32",
        "cpu",
        "float32",
        "tiny",
    )
    assert config["prompt"] == TWO_CATS and config["panels"] == [str(CAT)] and not {"out", "config"} & set(config)
    assert about["outputs"] == {"composite": "0002.png", "panels": {"2": "0002-panel-2.png"}}
    assert [(entry["panel"], entry["use"], len(entry["sha256"])) for entry in about["inputs"]] == [(1, "kept", 64)]
    assert about["model"]["name"] == "tiny"
    by_name = {entry["file"]: entry for entry in about["model"]["files"]}
    assert {"flux1-tiny.safetensors", "ae.safetensors", "text_encoder/model.safetensors"} <= set(by_name)
    assert all(len(entry["sha256"]) == 64 and entry["bytes"] > 0 for entry in by_name.values())
    assert by_name["ae.safetensors"]["bytes"] == (TINY / "ae.safetensors").stat().st_size
    assert {"torch", "transformers", "pillow", "python", "threads"} <= set(about["versions"])
    assert {"text", "transformer", "sampling", "decoding"} <= set(about["seconds"])
    assert all(value >= 0 for value in about["seconds"].values())


def test_the_record_names_references_and_loras_with_their_strength(tmp_path):
    lora = TINY / "loras" / "uno.safetensors"
    argv = ["--steps", "1", "--device", "cpu", "--ref", CAT, "--lora", f"{lora}:0.5", "--prompt", "a cat on a beach."]
    assert main("sample", *argv, "--out", tmp_path) == 0
    about = record(tmp_path)
    assert [(entry["panel"], entry["use"]) for entry in about["inputs"]] == [(None, "reference")]
    assert about["config"]["lora"] == [f"{lora}:0.5"] and about["config"]["ref"] == [str(CAT)]
    (used,) = [entry for entry in about["model"]["files"] if entry["file"] == "uno.safetensors"]
    assert used["strength"] == 0.5 and len(used["sha256"]) == 64
    assert (about["config"]["guidance"], about["config"]["grid"], about["config"]["offset"]) == (4.0, "1x1", "d")


def test_a_lora_is_followed_in_how_its_references_were_given(tmp_path):
    argv = ["--lora", LORAS / "uno.safetensors", "--steps", "1", "--ref", CAT, "--prompt", "a cat on a beach."]
    assert main("sample", *argv, "--out", tmp_path) == 0
    config = record(tmp_path)["config"]
    assert (config["offset"], config["offset_scale"], config["posterior"], config["ref_size"]) == ("h", 2.0, "mean", 48)
    assert config["reference_attention"] == "joint"


def test_the_png_says_how_it_was_made_but_not_where(made):
    text = Image.open(made / "0001.png").text
    assert text["prompt"] == TWO_CATS
    config = json.loads(text["config"])
    assert (config["seed"], config["model"], config["steps"]) == (5, "tiny", 2)
    assert str(made) not in str(text) and str(ROOT) not in str(text)


def test_files_take_the_next_free_number_and_nothing_is_overwritten(tmp_path):
    mine = {"0007-panel-1.png": b"mine", "notes.txt": b"mine", "12.png": b"mine"}
    for name, data in mine.items():
        (tmp_path / name).write_bytes(data)
    for _ in range(2):
        assert small(tmp_path, "--prompt", FISH, "--steps", "1") == 0
    made = {f"{stem}{end}" for stem in ("0008", "0009") for end in (".png", "-panel-1.png", "-panel-2.png", ".json")}
    assert set(files(tmp_path)) == made | set(mine)
    assert {name: files(tmp_path)[name] for name in mine} == mine


def old_enough(path):
    """Whether a file was written a moment ago, so that the next picture is being made and not yet saved."""
    return path.exists() and time.time() - path.stat().st_mtime > 0.05


def test_an_interruption_is_status_130_and_keeps_whole_sets_only(tmp_path, capsys):
    with interrupting(lambda: old_enough(tmp_path / "0001.json")):
        assert small(tmp_path, "--prompt", FISH, "--steps", "40", "--num", "1000") == 130
    assert "Traceback" not in capsys.readouterr().err
    names, stems = set(files(tmp_path)), {name[:4] for name in files(tmp_path)}
    assert 1 <= len(stems) < 1000
    assert names == {f"{s}{end}" for s in stems for end in (".png", "-panel-1.png", "-panel-2.png", ".json")}


def test_a_process_that_is_interrupted_ends_with_130_and_no_traceback(tmp_path):
    command = [
        sys.executable,
        "sample.py",
        *SMALL,
        "--steps",
        "100",
        "--prompt",
        FISH,
        "--num",
        "1000",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not old_enough(tmp_path / "0001.json"):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    assert "Traceback" not in process.communicate()[1] and process.returncode == 130


def test_help_is_status_0_and_shows_the_first_command(capsys):
    assert main("sample", "--help") == 0
    assert "python sample.py --grid 2x2 --mask 3" in capsys.readouterr().out
