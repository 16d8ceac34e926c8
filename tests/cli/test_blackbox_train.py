"""train.py and the checker of data from outside: what a run leaves, and that a stopped one ends in the same bytes."""

import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from blackbox import (
    FIXTURES,
    REFERENCES,
    ROOT,
    files,
    interrupting,
    main,
    metadata,
    metrics,
    quick_collection,
    record,
    refused,
)

pytestmark = pytest.mark.slow
PAIRS = FIXTURES / "pairs" / "pairs.json"
ONE_LINEAR = ["--rank", "1", "--targets", "double_blocks.0.img_attn.qkv"]
FAST = [*ONE_LINEAR, "--steps", "6", "--batch", "2", "--device", "cpu", "--sample-every", "0"]
RUNS = {
    "clean": ["--data", "sets/sketch", "--condition", "clean"],
    "tokens": ["--data", "sets/sketch", "--concat", "tokens", "--text", "panel"],
    "uno": ["--method", "uno", "--data", PAIRS],
}
OLD = ["--steps", "8", "--batch", "2", "--save-every", "2", "--sample-every", "0", "--dropout", "0.3"]
OLD_RUNS = {  # the commands of the run folders among the fixtures, which were killed after step 5
    "in-context": ["--data", "sets/sketch"],
    "tokens": ["--data", "tests/fixtures/sets", "--condition", "clean", "--concat", "tokens", "--text", "panel"],
    "uno": ["--method", "uno", "--data", "tests/fixtures/pairs/pairs.json"],
}
KEPT = {"checkpoint.safetensors", "lora.safetensors", "metrics.jsonl", "loss.png", "config.json"}
SAID = {
    "clean": {"method": "in-context-lora", "condition": "clean", "concat": "pixels", "text": "joint", "grids": "1x2"},
    "tokens": {"method": "in-context-lora", "condition": "none", "concat": "tokens", "text": "panel", "grids": "1x2"},
    "uno": {
        "method": "uno", "stage": "1", "offset": "d", "offset_scale": "1.0", "posterior": "sample",
        "reference_attention": "joint",
    },
}  # fmt: skip
ENDS = {
    "clean": {f"attn.to_{part}.lora_{half}.weight" for part in "qkv" for half in "AB"},
    "uno": {f"processor.qkv_lora1.{half}.weight" for half in ("down", "up")},
}


@pytest.fixture(scope="module", autouse=True)
def imported():
    with quick_collection():
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder for runs, which share what is encoded."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def out(runs):
    return runs / f"run-{len(os.listdir(runs))}"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """The commands are typed in the repository's folder."""
    monkeypatch.chdir(ROOT)


def go(out, name, *flags):
    return main("train", *RUNS[name], *FAST, "--save-every", "3", "--out", out, *flags)


@pytest.fixture(scope="module")
def whole(runs):
    """Runs of 6 steps that nothing interrupted, each made once."""
    made = set()

    def make(name):
        folder = runs / f"whole-{name}"
        if name not in made:
            assert go(folder, name) == 0
            made.add(name)
        return folder

    return make


def steps_of(folder):
    return [row["step"] for row in metrics(folder)]


def rows(folder):
    """How many steps a run has noted so far."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def complete(folder):
    """Whether a run's files are there, and nothing that is half written."""
    return set(files(folder)) >= KEPT and not [name for name in files(folder) if name.startswith(".")]


def same_end(folder, other):
    """Whether two runs ended in the same bytes."""
    names = ("lora.safetensors", "checkpoint.safetensors")
    return all(files(folder)[name] == files(other)[name] for name in names) and steps_of(folder) == steps_of(other)


# what a run leaves


@pytest.mark.parametrize("name", ["clean", "uno", "tokens"])
def test_a_run_leaves_a_lora_that_says_what_it_is_a_checkpoint_a_curve_and_its_settings(whole, name):
    folder = whole(name)
    assert complete(folder)
    told = metrics(folder)
    assert [row["step"] for row in told] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 for row in told)
    assert [row["step"] for row in told if "validation" in row] == [3, 6]
    assert Image.open(folder / "loss.png").size[0] > 100
    about = metadata(folder / "lora.safetensors")
    assert {key: about.get(f"iclora.{key}") for key in SAID[name]} == SAID[name]
    assert about["iclora.base"] == "tiny" and about["iclora.steps"] == "6"
    tensors = load_file(folder / "lora.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {min(tensor.shape) for tensor in tensors.values()} == {1}
    ends = ENDS.get(name, ENDS["clean"])
    assert len(tensors) == len(ends) and all(any(key.endswith(end) for key in tensors) for end in ends), list(tensors)
    config = json.loads((folder / "config.json").read_text())["config"]
    assert (config["steps"], config["batch"], config["rank"], config["seed"], config["model"]) == (6, 2, 1, 0, "tiny")
    assert (config["lr"], config["dtype"], config["panel_size"], config["device"]) == (0.001, "float32", 64, "cpu")
    assert not {"out", "config"} & set(config)


def test_a_sheet_of_samples_is_drawn_at_the_end(out):
    assert go(out, "uno", "--steps", "1", "--sample-every", "5", "--batch", "1") == 0
    assert {name for name in files(out) if name.startswith("sheet-")} == {"sheet-000001.png"}


def test_sheets_are_drawn_when_they_are_due_and_at_the_end(out):
    assert go(out, "clean", "--steps", "3", "--sample-every", "2", "--holdout", "0") == 0
    assert {name for name in files(out) if name.startswith("sheet-")} == {"sheet-000002.png", "sheet-000003.png"}
    assert Image.open(out / "sheet-000002.png").convert("RGB").size[0] >= 128


@pytest.mark.parametrize("name", ["clean", "uno"])
def test_sample_takes_what_was_trained_and_follows_it(whole, tmp_path, name):
    argv = ["--lora", whole(name) / "lora.safetensors", "--steps", "1", "--device", "cpu", "--out", tmp_path]
    cat = REFERENCES / "cat.png"
    more = ["--ref", cat] if name == "uno" else ["--grid", "1x2", "--mask", "2", "--panels", cat]
    assert main("sample", *argv, *more, "--prompt", "[IMAGE1] a cat, [IMAGE2] a cat") == 0
    assert record(tmp_path)["config"]["lora"] == [f"{whole(name) / 'lora.safetensors'}:1"]


def test_the_settings_beside_a_run_repeat_it(whole, out):
    assert main("train", "--config", whole("clean") / "config.json", "--out", out) == 0
    assert same_end(out, whole("clean"))
    assert json.loads((out / "config.json").read_text()) == json.loads((whole("clean") / "config.json").read_text())


def test_a_finished_run_is_left_as_it_is(whole):
    before = files(whole("clean"))
    assert go(whole("clean"), "clean") == 0
    assert files(whole("clean")) == before


def test_parts_of_a_batch_and_recomputed_activations_change_only_rounding(whole, out):
    assert go(out, "clean", "--accumulate", "2", "--checkpointing") == 0
    losses = [[row["loss"] for row in metrics(folder)] for folder in (out, whole("clean"))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_earlier_lora_is_a_start(whole, out):
    start = FIXTURES / "loras" / "clean.safetensors"
    assert (
        main("train", *RUNS["clean"], *FAST[4:], "--init-lora", start, "--lr", "0", "--steps", "1", "--out", out) == 0
    )
    before, after = load_file(start), load_file(out / "lora.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_second_stage_starts_from_the_first_and_keeps_how_references_were_given(out):
    start = FIXTURES / "loras" / "uno.safetensors"
    flags = ["--stage", "2", "--init-lora", start, "--lr", "0", "--steps", "1", "--batch", "2", "--sample-every", "0"]
    assert main("train", *RUNS["uno"], *flags, "--device", "cpu", "--out", out) == 0
    about = metadata(out / "lora.safetensors")
    told = {"stage": "2", "offset": "h", "offset_scale": "2.0", "posterior": "mean", "ref_size": "48"}
    assert {key: about[f"iclora.{key}"] for key in told} == told
    before, after = load_file(start), load_file(out / "lora.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


# stopped and resumed


@pytest.mark.parametrize(("name", "number"), [
    ("clean", signal.SIGINT), ("uno", signal.SIGTERM), ("tokens", signal.SIGINT),
], ids=["clean", "uno", "tokens"])  # fmt: skip
def test_a_stopped_run_is_status_130_and_goes_on_to_the_same_bytes(whole, out, capsys, name, number):
    handler = signal.getsignal(number)
    with interrupting(lambda: rows(out) >= 2, number):
        assert go(out, name, "--save-every", "6") == 130
    assert "Traceback" not in capsys.readouterr().err and signal.getsignal(number) is handler
    assert 2 <= rows(out) < 6 and "checkpoint.safetensors" in files(out)
    assert metadata(out / "lora.safetensors")["iclora.steps"] == str(rows(out))
    assert go(out, name) == 0
    assert files(out)["lora.safetensors"] == files(whole(name))["lora.safetensors"]
    assert steps_of(out) == [1, 2, 3, 4, 5, 6]


def test_a_raised_number_of_steps_goes_on_to_the_same_bytes(out):
    direct = out.with_name(f"{out.name}-direct")
    same = ["--decay", "0", "--holdout", "0"]
    assert go(out, "clean", *same, "--steps", "2") == 0
    assert go(out, "clean", *same, "--steps", "5") == 0
    assert go(direct, "clean", *same, "--steps", "5") == 0
    assert files(out)["lora.safetensors"] == files(direct)["lora.safetensors"] and steps_of(out) == [1, 2, 3, 4, 5]


def start(out, name, *flags, env=None):
    argv = [sys.executable, "train.py", *map(str, RUNS[name]), *FAST, "--save-every", "3", "--out", str(out), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=env)


def test_a_killed_process_is_continued_to_the_same_bytes(out):
    direct = out.with_name(f"{out.name}-direct")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert go(direct, "clean", "--steps", "10", "--holdout", "0") == 0
        process = start(out, "clean", "--steps", "10", "--holdout", "0")
        while process.poll() is None and rows(out) < 4:
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and 4 <= rows(out) < 10
        assert go(out, "clean", "--steps", "10", "--holdout", "0") == 0
        assert same_end(out, direct) and complete(out)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["clean", "uno"])
def test_five_random_kills_end_in_the_same_bytes(out, name):
    draw, direct = random.Random(name), out.with_name(f"{out.name}-direct")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert go(direct, name, "--steps", "60", "--sample-every", "25") == 0
        for _ in range(5):
            before = rows(out)
            process = start(out, name, "--steps", "60", "--sample-every", "25")
            while process.poll() is None and rows(out) < max(before, 1) + 2:
                time.sleep(0.001)
            time.sleep(0.3 * draw.random())
            process.kill()
            process.communicate()
        assert go(out, name, "--steps", "60", "--sample-every", "25") == 0
        assert same_end(out, direct) and files(out) == files(direct)
    finally:
        torch.set_num_threads(threads)


def test_a_process_that_is_stopped_ends_with_130_and_no_traceback(out):
    process = start(out, "clean", "--steps", "400")
    while process.poll() is None and rows(out) < 3:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    assert "Traceback" not in process.communicate()[1] and process.returncode == 130
    assert metadata(out / "lora.safetensors")["iclora.steps"] == str(rows(out))


@pytest.mark.parametrize("name", ["clean", "uno"])
def test_two_processes_equal_one_within_rounding(out, name):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [start(out, name, env={**place, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(2)]
    said = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    one = out.with_name(f"{out.name}-one")
    assert go(one, name) == 0
    losses = [[row["loss"] for row in metrics(folder)] for folder in (out, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and complete(out)
    a, b = (load_file(folder / "lora.safetensors") for folder in (out, one))
    assert a.keys() == b.keys()
    assert all((a[key].float() - b[key].float()).norm() <= 0.01 * b[key].float().norm() for key in a)


# another run in the same folder


@pytest.mark.parametrize(("flags", "told"), [
    (["--rank", "2"], ("--rank 1", "2")),
    (["--lr", "0.5"], ("--lr 0.001", "0.5")),
    (["--condition", "none"], ("--condition clean", "none")),
    (["--concat", "tokens"], ("--concat pixels", "tokens")),
    (["--targets", "attn"], ("--targets double_blocks.0.img_attn.qkv", "attn")),
    (["--seed", "3"], ("--seed 0", "3")),
    (["--batch", "4"], ("--batch 2", "4")),
    (["--data", "sets/sparkle"], ("--data sets/sketch", "sets/sparkle")),
    (["--init-lora", FIXTURES / "loras" / "clean.safetensors"], ("--init-lora", "clean.safetensors")),
], ids=lambda value: value[0] if isinstance(value, list) else "")  # fmt: skip
def test_other_settings_are_refused_by_name_and_cost_the_run_nothing(whole, capsys, flags, told):
    folder = whole("clean")
    before = files(folder)
    capsys.readouterr()
    assert go(folder, "clean", *flags) == 2
    refused(capsys, folder.name, *told, "--out")
    assert files(folder) == before


def test_other_content_under_the_same_name_is_refused_but_moved_content_is_not(out, tmp_path, capsys):
    shutil.copytree(ROOT / "sets" / "sketch", tmp_path / "sets")
    data = ["--data", tmp_path / "sets"]
    assert go(out, "clean", "--decay", "0", "--steps", "1", *data) == 0
    (tmp_path / "sets").rename(tmp_path / "moved")
    data = ["--data", tmp_path / "moved"]
    assert go(out, "clean", "--decay", "0", "--steps", "2", *data) == 0
    (tmp_path / "moved" / "01.txt").write_text("[IMAGE1] another [IMAGE2] caption")
    capsys.readouterr()
    assert go(out, "clean", "--decay", "0", "--steps", "3", *data) == 2
    refused(capsys, "--data", "content")


# runs that were begun before


@pytest.mark.parametrize("name", OLD_RUNS)
def test_a_run_that_was_killed_before_is_continued_by_the_same_command(runs, name):
    folder = runs / f"old-{name}"
    shutil.copytree(FIXTURES / "begun" / name, folder)
    old, losses = json.loads((folder / "config.json").read_text())["config"], metrics(folder)
    argv = [*OLD_RUNS[name], *ONE_LINEAR, *OLD, "--holdout", "0.2", "--out", folder]
    before = load_file(folder / "lora.safetensors")
    assert main("train", *argv) == 0
    assert steps_of(folder) == [1, 2, 3, 4, 5, 6, 7, 8] and complete(folder)
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


@pytest.mark.parametrize("name", OLD_RUNS)
def test_the_settings_of_a_run_of_before_repeat_it(out, name):
    assert main("train", "--config", FIXTURES / "begun" / name / "config.json", "--out", out) == 0
    losses = [[row["loss"] for row in metrics(folder)] for folder in (out, FIXTURES / "begun" / name)]
    assert losses[0][:5] == pytest.approx(losses[1], rel=1e-3)


# the check of data


@pytest.mark.parametrize(("argv", "told"), [
    (["sets/"], ("60 sets", "bucket: 1x2", "T5 tokens", "usable (broken: 0")),
    (["sets/walk"], ("20 sets", "3x1 panels of 64x64", "usable (broken: 0")),
    (["--data", "sets/sparkle"], ("20 sets", "2x1 panels of 64x64", "usable (broken: 0")),
    (["sets/sketch", "--panel-size", "32"], ("1x2 panels of 32x32", "usable (broken: 0")),
    ([PAIRS], ("6 sets", "references: 8 pictures", "usable (broken: 0")),
], ids=lambda value: str(value[0])[-12:])  # fmt: skip
def test_a_sound_data_set_is_described_and_usable(capsys, argv, told):
    assert main("data", *argv) == 0
    out = capsys.readouterr().out
    assert all(fragment in out for fragment in told), out
