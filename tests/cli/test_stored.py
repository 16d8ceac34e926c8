"""What earlier versions made is still read, followed and equalled: pictures, records, LoRAs, and runs that were begun.

tests/make_fixtures.py makes the fixtures, by the code as it was before the redesign.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from blackbox import (
    CLOSE,
    FIXTURES,
    REFERENCES,
    ROOT,
    SAME,
    TINY,
    files,
    levels_apart,
    main,
    metadata,
    metrics,
    pixels,
    quick_collection,
    record,
    refused,
)
from golden import far
from model.lora import load_lora, merge
from model.text import load_text_encoders
from model.weights import find_model, load_flux

PICTURES, LORAS = FIXTURES / "pictures", FIXTURES / "loras"
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


ONE_LINEAR = ["--rank", "1", "--targets", "double_blocks.0.img_attn.qkv"]
OLD = ["--steps", "8", "--batch", "2", "--save-every", "2", "--sample-every", "0", "--dropout", "0.3"]
OLD_RUNS = {  # the commands of the run folders among the fixtures, which were killed after step 5
    "in-context": ["--data", "sets/sketch"],
    "tokens": ["--data", "tests/fixtures/sets", "--condition", "clean", "--concat", "tokens", "--text", "panel"],
    "uno": ["--method", "uno", "--data", "tests/fixtures/pairs/pairs.json"],
}
EFFECTS = load_file(FIXTURES / "effects.safetensors")
CAPTIONS = [
    "a cat on a beach.",
    "",
    "two pictures of a green striped cat with a hat: [IMAGE1] it is on the left on a beach, [IMAGE2] it is in the "
    "middle in the snow.",
]  # of the stored features


@pytest.fixture(scope="module", autouse=True)
def imported():
    with quick_collection():
        yield


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """The commands are typed in the repository's folder."""
    monkeypatch.chdir(ROOT)


# pictures


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_before_is_replayed_to_its_picture(tmp_path, name):
    text = (FIXTURES / "records" / f"{name}.json").read_text().replace("{root}", str(ROOT))
    (tmp_path / "old.json").write_text(text)
    assert main("sample", "--config", tmp_path / "old.json", "--out", tmp_path / "out") == 0
    assert levels_apart(tmp_path / "out" / "0001.png", PICTURES / f"{name}.png") <= SAME
    old, new = json.loads(text)["config"], record(tmp_path / "out")["config"]
    assert {key: new[key] for key in old} == old


def test_a_lora_whose_panels_read_texts_of_their_own_takes_no_references(tmp_path, capsys):
    argv = ["--grid", "1x2", "--lora", LORAS / "tokens.safetensors", "--ref", CAT, "--prompt", ON_A_BEACH]
    assert main("sample", *argv, "--out", tmp_path / "out") == 2
    refused(capsys, "--lora", "--ref")
    assert not list(tmp_path.iterdir())


# runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder for runs, which share what is encoded."""
    return tmp_path_factory.mktemp("runs")


def steps_of(folder):
    return [row["step"] for row in metrics(folder)]


@pytest.mark.parametrize("name", OLD_RUNS)
def test_a_run_that_was_killed_before_is_continued_by_the_same_command(runs, name):
    folder = runs / f"old-{name}"
    shutil.copytree(FIXTURES / "begun" / name, folder)
    old, losses = json.loads((folder / "config.json").read_text())["config"], metrics(folder)
    argv = [*OLD_RUNS[name], *ONE_LINEAR, *OLD, "--holdout", "0.2", "--out", folder]
    before = load_file(folder / "lora.safetensors")
    assert main("train", *argv) == 0
    assert steps_of(folder) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert metrics(folder)[:4] == losses[:4], "what was before the checkpoint is kept"
    assert metrics(folder)[4]["loss"] == pytest.approx(losses[4]["loss"], rel=1e-3), "the step after it is made again"
    after = load_file(folder / "lora.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)
    about, was = metadata(folder / "lora.safetensors"), metadata(FIXTURES / "begun" / name / "lora.safetensors")
    assert about["iclora.steps"] == "8" and {key: about.get(key) for key in was} == {**was, "iclora.steps": "8"}
    new = json.loads((folder / "config.json").read_text())["config"]
    assert {key: new[key] for key in old} == old


def test_a_run_that_was_killed_before_still_refuses_other_settings(runs, capsys):
    folder = runs / "old-refusing"
    shutil.copytree(FIXTURES / "begun" / "in-context", folder)
    before = files(folder)
    argv = [*OLD_RUNS["in-context"], *ONE_LINEAR, *OLD, "--holdout", "0.2", "--out", folder]
    assert main("train", *argv, "--rank", "2") == 2
    refused(capsys, "--rank 1", "2", "--out")
    assert main("train", *argv, "--data", "sets/walk") == 2
    refused(capsys, "--data sets/sketch", "sets/walk")
    assert files(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", OLD_RUNS)
def test_the_settings_of_a_run_of_before_repeat_it(runs, name):
    out = runs / f"repeated-{name}"
    assert main("train", "--config", FIXTURES / "begun" / name / "config.json", "--out", out) == 0
    losses = [[row["loss"] for row in metrics(folder)] for folder in (out, FIXTURES / "begun" / name)]
    assert losses[0][:5] == pytest.approx(losses[1], rel=1e-3)


# texts and LoRAs


def effect(path):
    """What the tiny transformer predicts with a LoRA merged into it."""
    flux = load_flux(TINY / "flux1-tiny.safetensors", dtype=torch.float32)
    load_lora(flux, path)
    merge(flux)
    with torch.no_grad():
        return flux(**{name: tensor for name, tensor in EFFECTS.items() if not name.startswith("out.")})


def convert(source, target, *more):
    assert main("convert", source, target, *more) == 0
    return target


def test_texts_have_the_features_they_had_before():
    stored = load_file(FIXTURES / "text.safetensors")
    encoders = load_text_encoders(find_model("tiny"), "cpu", torch.float32)
    txt, vec = encoders.encode(CAPTIONS, 40)
    assert far(txt[:, ::4], stored["txt"]) < 1e-4 and far(vec, stored["vec"]) < 1e-4
    assert encoders.encode(CAPTIONS[:1], 16)[0].shape == (1, 16, txt.shape[2])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_converting_to_a_dtype_and_naming_the_model_are_possible(tmp_path, capsys, dtype):
    argv = ["--to", "diffusers", "--dtype", dtype, "--model", "tiny"]
    path = convert(LORAS / "kohya.safetensors", tmp_path / "a.safetensors", *argv)
    assert {t.dtype for t in load_file(path).values()} == {getattr(torch, dtype)}
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "kohya names" in line and f"wrote {path}" in line


@pytest.mark.parametrize("name", ["clean", "kohya", "tokens", "uno", "alone"])
def test_a_file_trained_before_has_the_effect_it_had(name):
    assert far(effect(LORAS / f"{name}.safetensors"), EFFECTS[f"out.{name}"]) < CLOSE
    assert far(EFFECTS[f"out.{name}"], EFFECTS["out.base"]) > 0.1


def test_a_file_trained_before_is_the_same_after_conversion(tmp_path):
    once = convert(LORAS / "clean.safetensors", tmp_path / "1.safetensors", "--to", "kohya")
    twice = convert(once, tmp_path / "2.safetensors", "--to", "diffusers")
    assert far(effect(twice), EFFECTS["out.clean"]) < CLOSE
    uno = convert(LORAS / "uno.safetensors", tmp_path / "3.safetensors", "--to", "kohya")
    back = convert(uno, tmp_path / "4.safetensors", "--to", "xlabs")
    assert far(effect(back), EFFECTS["out.uno"]) < CLOSE
    assert set(load_file(back)) == set(load_file(LORAS / "uno.safetensors"))
    assert metadata(back)["iclora.offset"] == "h", "what sample.py follows goes along"


@pytest.mark.parametrize(("name", "told"), [
    ("clean", {"method": "in-context-lora", "condition": "clean", "concat": "pixels", "text": "joint"}),
    ("tokens", {"method": "in-context-lora", "condition": "clean", "concat": "tokens", "text": "panel"}),
    ("uno", {"method": "uno", "offset": "h", "offset_scale": "2.0", "posterior": "mean", "ref_size": "48"}),
    ("alone", {"method": "uno", "reference_attention": "alone", "stage": "1"}),
])  # fmt: skip
def test_the_metadata_of_a_file_trained_before_is_what_these_tests_rely_on(name, told):
    about = metadata(LORAS / f"{name}.safetensors")
    assert {key: about[f"iclora.{key}"] for key in told} == told
