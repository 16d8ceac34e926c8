import errno
import io
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import iclora.fitted as fitted
import iclora.memory as memory
import iclora.pipeline as pipeline
import iclora.record
import model.checkpoint
import sample
from blackbox import SAME, levels_apart
from iclora.cards import MemoryPlan
from iclora.config import SampleConfig, flag, saved
from iclora.pipeline import Result
from iclora.plan import make_plan
from iclora.record import LABEL, compare, describe, save, save_as
from model.text import TextEncoders
from model.weights import examples_folder, find_model
from sampling.images import fit, open_picture

ROOT = Path(__file__).parents[2]
PROMPT = "two foxes: [IMAGE1] a fox, [IMAGE2] the fox"
SMALL = ["--device", "cpu", "--grid", "1x2", "--panel-size", "32", "--steps", "2"]


def run(out, *argv):
    return sample.main([*SMALL, "--out", str(out), *argv])


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def pngs(folder, stem):
    """The bytes of one set's PNGs by the part of their names behind the number."""
    return {name[4:]: data for name, data in files(folder).items() if name.startswith(stem) and name.endswith(".png")}


def refused(capsys, status=2):
    """The one line on stderr behind a failure; notes may come before it, nothing else."""
    *notes, line = capsys.readouterr().err.splitlines()
    assert all(note.startswith("note: ") for note in notes) and line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One run that keeps panel 1 of the bundled example and makes two sets with seeds 5 and 6."""
    out = tmp_path_factory.mktemp("made") / "new" / "out"
    assert run(out, "--mask", "2", "--seed", "5", "--num", "2") == 0
    return out


# what is written


def test_every_set_is_a_composite_its_generated_panels_and_a_json(made):
    stems = ("0001", "0002")
    assert sorted(files(made)) == sorted(f"{stem}{end}" for stem in stems for end in (".png", "-panel-2.png", ".json"))
    for stem in stems:
        composite = open_picture(made / f"{stem}.png")
        assert composite.size == (64, 32)
        assert composite.crop((32, 0, 64, 32)).tobytes() == open_picture(made / f"{stem}-panel-2.png").tobytes()


def test_the_json_holds_the_resolved_configuration_hashes_and_timings(made):
    record = json.loads((made / "0002.json").read_text())
    config = record["config"]
    assert (config["seed"], config["num"], config["steps"], config["guidance"]) == (6, 1, 2, 3.5)
    assert (config["device"], config["dtype"]) == ("cpu", "float32")
    assert "[IMAGE2]" in config["prompt"] and "out" not in config
    assert [(entry["panel"], entry["use"], len(entry["sha256"])) for entry in record["inputs"]] == [(1, "kept", 64)]
    assert record["outputs"] == {"composite": "0002.png", "panels": {"2": "0002-panel-2.png"}}
    assert {"ae.safetensors", "text_encoder/model.safetensors"} <= {file["file"] for file in record["model"]["files"]}
    assert all(len(file["sha256"]) == 64 and file["bytes"] > 0 for file in record["model"]["files"])
    assert {"text", "transformer", "sampling", "decoding"} <= set(record["seconds"])
    assert {"torch", "transformers", "pillow", "python", "threads"} <= set(record["versions"])
    assert record["model"]["name"] == "tiny"


def test_large_weight_files_are_recorded_by_name_and_size_only(monkeypatch):
    monkeypatch.setattr(model.checkpoint, "MAX_HASHED", 1_000_000)
    monkeypatch.setattr(iclora.record, "_sha256", lambda path, written: model.checkpoint.file_sha256(path))
    listed = {file["file"]: file for file in describe(plan_for())["model"]["files"]}
    size = (find_model("tiny").root / "ae.safetensors").stat().st_size
    assert listed["ae.safetensors"] == {"file": "ae.safetensors", "bytes": size, "sha256": None}
    assert len(listed["text_encoder/model.safetensors"]["sha256"]) == 64


def test_the_png_says_how_it_was_made_but_not_where(made, tmp_path):
    text = Image.open(made / "0001.png").text
    assert text["prompt"] == json.loads((made / "0001.json").read_text())["config"]["prompt"]
    config = json.loads(text["config"])
    assert (config["seed"], config["model"]) == (5, "tiny")
    assert str(made) not in str(text) and not {"panels", "set", "out", "config"} & set(config)


def test_the_pictures_of_num_are_those_of_the_next_seeds(made, tmp_path):
    assert run(tmp_path, "--mask", "2", "--seed", "6") == 0
    assert pngs(tmp_path, "0001") == pngs(made, "0002") != pngs(made, "0001")


@pytest.mark.parametrize("stem", ["0001", "0002"])
def test_a_replay_gives_the_same_bytes(made, tmp_path, stem, capsys):
    assert sample.main(["--config", str(made / f"{stem}.json"), "--out", str(tmp_path)]) == 0
    assert pngs(tmp_path, "0001") == pngs(made, stem)
    old, new = (json.loads(path.read_text()) for path in (made / f"{stem}.json", tmp_path / "0001.json"))
    assert new["config"] == old["config"]
    assert "may differ" not in capsys.readouterr().err


def test_a_replay_finds_its_own_panels_from_another_folder(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    for number in (1, 2):
        Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    settings = ["--mask", "2", "--panels", "1.png", "2.png", "--strength", "0.5", "--panel-prompt", "a", "b"]
    assert run("first", *settings) == 0
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert sample.main(["--config", "../first/0001.json", "--out", "again"]) == 0
    assert pngs(Path("again"), "0001") == pngs(tmp_path / "first", "0001")


def test_a_replay_from_other_pictures_is_noted(tmp_path, capsys):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    settings = ["--mask", "2", "--panels", str(tmp_path / "a.png"), "--prompt", PROMPT]
    assert run(tmp_path / "out", *settings) == 0
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "a.png")
    record = tmp_path / "out" / "0001.json"
    assert sample.main(["--config", str(record), "--out", str(tmp_path / "out")]) == 0
    assert f"note: the result may differ from {record}, which was made with other pictures\n" in capsys.readouterr().err
    assert sorted(files(tmp_path / "out"))[-1] == "0002.png"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"versions": {"torch": "1.0"}}, "other versions, threads or CPU features"),
        ({"model": {"files": []}}, "other weights"),
        ({"inputs": 3}, "it is not a whole record"),
        ({"model": None}, "it is not a whole record"),
    ],
)
def test_what_else_changed_is_noted(change, what):
    record, notes = {"inputs": [], "model": {"files": [1]}, "versions": {}}, []
    compare(record, {**record, **change}, "a.json", notes.append)
    assert len(notes) == 1 and what in notes[0]


def test_a_replay_of_a_picture_gives_the_same_bytes(tmp_path, capsys):
    assert run(tmp_path / "out", "--prompt", PROMPT, "--seed", "9", "--guidance", "2") == 0
    assert sample.main(["--config", str(tmp_path / "out" / "0001.png"), "--out", str(tmp_path / "again")]) == 0
    assert pngs(tmp_path / "again", "0001") == pngs(tmp_path / "out", "0001")
    old, new = (json.loads((tmp_path / name / "0001.json").read_text()) for name in ("out", "again"))
    assert new["config"] == old["config"] and "may differ" not in capsys.readouterr().err
    panel = tmp_path / "out" / "0001-panel-2.png"
    assert sample.main(["--config", str(panel), "--seed", "8", "--out", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "0002.json").read_text())["config"]["seed"] == 8, "flags win"


def test_the_pictures_panels_are_given_anew_beside_its_replay(made, tmp_path):
    """A picture says nothing of places, so kept panels are given again."""
    panel = str(examples_folder() / "1x2" / "1.png")
    argv = ["--config", str(made / "0001.png"), "--panels", panel, "--out", str(tmp_path)]
    assert sample.main(argv) == 0
    assert pngs(tmp_path, "0001") == pngs(made, "0001")


def test_a_note_says_that_the_bundled_example_is_used(tmp_path, capsys):
    assert run(tmp_path, "--mask", "2") == 0
    out, err = capsys.readouterr()
    assert "\nnote: no panels given: the bundled 1x2 example is used, with its caption: " in err
    assert out.splitlines() == [str(tmp_path / name) for name in ("0001.png", "0001-panel-2.png", "0001.json")]


# numbers


def test_files_take_the_next_free_number_and_never_overwrite(tmp_path):
    (tmp_path / "0007-panel-1.png").write_bytes(b"mine")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    assert run(tmp_path, "--prompt", PROMPT) == 0
    written = set(files(tmp_path)) - {"notes.txt", "0007-panel-1.png"}
    assert written == {"0008.png", "0008-panel-1.png", "0008-panel-2.png", "0008.json"}
    assert files(tmp_path)["0007-panel-1.png"] == b"mine"


def plan_for(**values):
    settings = {"grid": "1x2", "prompt": PROMPT, "device": "cpu", "steps": 2, **values}
    return make_plan(SampleConfig(**settings), lambda line: None)


def result_and_record():
    panel = Image.new("RGB", (64, 64))
    return Result(Image.new("RGB", (128, 64)), {1: panel, 2: panel}, {}, 3), describe(plan_for())


def test_sets_that_are_saved_at_once_share_no_number(tmp_path):
    result, record = result_and_record()

    def save_five():
        for _ in range(5):
            save(result, record, tmp_path)

    threads = [threading.Thread(target=save_five) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = sorted(files(tmp_path))
    assert len(names) == 4 * 20
    for name in (name for name in names if name.endswith(".json")):
        record = json.loads(files(tmp_path)[name])
        assert record["outputs"]["composite"] == name.replace("json", "png") and record["config"]["seed"] == 3


def test_a_number_that_is_partly_taken_is_left_alone(tmp_path):
    result, record = result_and_record()
    (tmp_path / "0001.json").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        save_as("0001", result, record, tmp_path)
    assert files(tmp_path) == {"0001.json": b"mine"}


def test_what_is_put_into_pictures_says_nothing_about_places(tmp_path):
    result, record = result_and_record()
    places = SampleConfig(panels=("/a/b.png",), set="/a", lora=("/a/b:1",), out="/a", model="/a/tiny", prompt=PROMPT)
    save_as("0001", result, {**record, "config": saved(places)}, tmp_path)
    text = json.dumps(Image.open(tmp_path / "0001.png").text)
    assert "/a" not in text and "steps" in text


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_disk_that_fills_up_leaves_no_part_of_a_set(tmp_path, monkeypatch, capsys, failing):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert run(tmp_path / "out", "--prompt", PROMPT) == 2
    assert "No space left on device; mend that" in refused(capsys)
    assert files(tmp_path / "out") == {}


# mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stpes", "3"], "--stpes is unknown; did you mean --steps?"),
        (["--steps", "0"], "--steps 0 is out of range; use 1 to 1000"),
        (["--mask", "3"], "mask '3': 3 does not fit the grid"),
        (["--model", "nowhere"], "there is no model 'nowhere'"),
        (["--panels", "nowhere.png", "--mask", "2", "--prompt", "x"], "cannot read nowhere.png: there is no such file"),
        (["--prompt", "a\nb\0"], "the prompt is not plain text"),
        (["--config", "nowhere.json"], "cannot read 'nowhere.json': there is no such file"),
        (["--panels", "a\0b", "--mask", "2", "--prompt", "x"], "cannot read"),
    ],
)
def test_a_mistake_costs_one_line_and_writes_nothing(tmp_path, capsys, argv, message):
    assert run(tmp_path / "out", *argv) == 2
    assert message in refused(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["file", "file/below", "link", "a" * 300, "a\0b"])
def test_an_impossible_folder_is_refused_before_anything_is_made(tmp_path, capsys, monkeypatch, name):
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(pipeline, "load_text_encoders", None)
    assert run(tmp_path / name, "--prompt", PROMPT) == 2
    refused(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_folder_without_write_permission_is_refused_before_anything_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(pipeline, "load_text_encoders", None)
    assert run(tmp_path / "out", "--prompt", PROMPT) == 2
    assert f"{tmp_path} cannot be written to; choose another" in refused(capsys)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("unable to mmap 64424509440 bytes from file: Cannot allocate memory (12)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_says_what_helps(tmp_path, capsys, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(pipeline, "load_flux", fail)
    assert run(tmp_path, "--prompt", PROMPT) == 2
    assert "memory ran out; try a smaller --panel-size, fewer panels or --ref, --tile" in refused(capsys)


def test_another_runtime_error_is_a_bug_and_is_shown_whole(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(pipeline, "load_flux", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run(tmp_path, "--prompt", PROMPT)


def interrupting(monkeypatch, at):
    """Press Ctrl-C when sampling starts for the given time."""
    calls, denoise = [], pipeline.denoise

    def interrupted(*args):
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return denoise(*args)

    monkeypatch.setattr(pipeline, "denoise", interrupted)


def test_an_interruption_costs_one_line_that_is_no_error_and_keeps_what_is_finished(tmp_path, capsys, monkeypatch):
    interrupting(monkeypatch, 2)
    assert run(tmp_path, "--prompt", PROMPT, "--num", "3") == 130
    *notes, line = capsys.readouterr().err.splitlines()
    assert line == "interrupted; what was finished is saved"
    assert all(note.startswith("note: ") for note in notes)
    assert sorted(files(tmp_path)) == ["0001-panel-1.png", "0001-panel-2.png", "0001.json", "0001.png"]


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(
            ["sample.py", "--device", "cpu", "--prompt", "a red cat", "--steps", "1", "--out", "OUT"],
            marks=pytest.mark.slow,
        ),
        ["-m", "iclora.convert", "--help"],
        ["sample.py", "--help"],
    ],
    ids=["pictures", "short help", "help"],
)
def test_a_reader_that_has_gone_is_no_mistake(tmp_path, argv):
    reading, writing = os.pipe()
    os.close(reading)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, *(str(tmp_path / "out") if word == "OUT" else word for word in argv)]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, env=env)
    os.close(writing)
    assert done.returncode == 0
    assert all(line.startswith("note: ") for line in done.stderr.splitlines())
    if "OUT" in argv:
        assert sorted(files(tmp_path / "out")) == ["0001-panel-1.png", "0001.json", "0001.png"]


def test_the_script_itself_exits_with_the_status(tmp_path):
    command = [sys.executable, "sample.py", "--mask", "9", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: mask '9': 9 does not fit the grid; panels are numbered 1 to 4 in reading order\n"


# progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_progress_shows_step_pace_and_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run(tmp_path, "--prompt", PROMPT, "--num", "2") == 0
    bars = [part for part in sys.stderr.getvalue().split("\r") if "step" in part]
    assert re.search(r"  0%\|.*\| 0/4 \[00:00<\?", bars[0])
    assert re.search(r"100%\|.*\| 4/4 \[\d\d:\d\d<00:00", bars[-1])


def test_progress_counts_the_steps_that_drafts_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    draft = str(ROOT / "weights" / "tiny" / "examples" / "references" / "cat.png")
    assert (
        run(tmp_path, "--prompt", PROMPT, "--grid", "1x1", "--panels", draft, "--strength", "0.5", "--steps", "4") == 0
    )
    assert re.search(r"100%\|.*\| 2/2 ", sys.stderr.getvalue())


def test_elsewhere_progress_is_silent(tmp_path, capsys):
    assert run(tmp_path, "--prompt", PROMPT) == 0
    assert all(line.startswith("note: ") for line in capsys.readouterr().err.splitlines())


def test_a_prompt_without_markers_makes_one_picture(tmp_path):
    argv = ["--prompt", "a red cat", "--device", "cpu", "--steps", "1", "--out", str(tmp_path)]
    assert sample.main(argv) == 0
    assert sorted(files(tmp_path)) == ["0001-panel-1.png", "0001.json", "0001.png"]
    assert open_picture(tmp_path / "0001.png").size == (64, 64)
    assert json.loads((tmp_path / "0001.json").read_text())["config"]["grid"] == "1x1"


def test_the_readmes_first_command_makes_its_picture_in_time(tmp_path):
    def of_children():  # what they computed, whatever else runs on the machine
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = of_children()
    command = [sys.executable, "sample.py", "--grid", "2x2", "--mask", "3", "--out", str(tmp_path)]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # as threads that wait for each other count as computing
    done = subprocess.run(command, cwd=ROOT, env=one, capture_output=True, text=True)
    seconds = of_children() - before
    assert done.returncode == 0, done.stderr
    assert seconds < 15, f"{seconds:.1f} s of computing from start to files"
    composite = Image.open(tmp_path / "0001.png")
    for panel, corner in ((1, (0, 0)), (2, (64, 0)), (4, (64, 64))):
        given = fit(open_picture(examples_folder() / "2x2" / f"{panel}.png"), 64, 64)
        assert composite.crop((*corner, corner[0] + 64, corner[1] + 64)).tobytes() == given.tobytes()
    assert done.stdout.split() == [str(tmp_path / name) for name in ("0001.png", "0001-panel-3.png", "0001.json")]
    stored = ROOT / "tests" / "fixtures" / "pictures" / "first.png"
    assert levels_apart(tmp_path / "0001.png", stored) <= SAME
    shown = Image.open(stored)
    then, now = (json.loads(picture.text["config"]) for picture in (shown, composite))
    assert {name: now[name] for name in then} == then and not any(now[name] for name in now.keys() - then.keys())


def test_a_mistake_is_one_line_without_the_notes_before_it(tmp_path, capsys):
    assert sample.main(["--ref", "nope.png", "--prompt", "a cat.", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: cannot read nope.png: there is no such file; check the name\n"


# many requests


ROWS = [
    {"prompt": PROMPT, "seed": 3},
    {"prompt": PROMPT + " in the snow", "panel_size": "48", "steps": 1},
    {"grid": "2x1", "prompt": PROMPT, "num": 2},
    {"mask": "2", "prompt": PROMPT, "panels": ["a.png"]},
]


def jobs(folder, *rows):
    """A list of requests, which may be lines that are no JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "jobs.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "jobs.jsonl")


@pytest.mark.parametrize("short", [False, True], ids=["plenty", "short"])
def test_a_job_makes_what_its_rows_alone_would_make_and_loads_every_network_once(tmp_path, monkeypatch, capsys, short):
    """Also where memory is short, as all captions are read before the transformer loads."""
    Image.effect_noise((50, 40), 90).convert("RGB").save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    alone = tmp_path / "alone"
    for row in ROWS:
        words = [[flag(name), *(value if isinstance(value, list) else [str(value)])] for name, value in row.items()]
        assert run(alone, "--guidance", "2", *itertools.chain(*words)) == 0
    loaded, out = [], tmp_path / "out"
    if short:
        short_of = MemoryPlan(free_text=True, phases={"sampling": 1.0})
        monkeypatch.setattr(pipeline, "planned", lambda *given: True)
        monkeypatch.setattr(
            memory, "add_memory_plans", lambda plans: [replace(plan, memory_plan=short_of) for plan in plans]
        )
    names = ("load_text_encoders", "load_autoencoder", "load_fitted" if short else "load_flux")
    for name in names:
        module = fitted if short and name != "load_autoencoder" else pipeline
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, n=name, real=real: loaded.append(n) or real(*args))
    capsys.readouterr()
    assert run(out, "--guidance", "2", "--jobs", jobs(tmp_path, *ROWS, "", "  ")) == 0
    assert sorted(loaded) == sorted(names)
    for number in range(1, 6):
        assert pngs(out, f"{number:04d}") == pngs(alone, f"{number:04d}")
        record, other = (json.loads((folder / f"{number:04d}.json").read_text()) for folder in (out, alone))
        assert record["config"] == other["config"] and record["inputs"] == other["inputs"]
    assert set(files(out)) == {*files(alone), "0006-sheet.png"}
    told = capsys.readouterr().out.splitlines()
    assert {Path(line).name for line in told} == set(files(out)) and told[-1] == str(out / "0006-sheet.png")


def test_the_contact_sheet_shows_every_picture_in_order(tmp_path):
    rows = [{"seed": 1}, {"panel_size": "48"}, {"grid": "2x1"}, {"seed": 2}, {"seed": 3}]
    assert run(tmp_path / "out", "--prompt", PROMPT, "--jobs", jobs(tmp_path, *rows)) == 0
    sheet = open_picture(tmp_path / "out" / "0006-sheet.png")
    width, height = 96, 64  # of the largest
    row = height + LABEL
    assert sheet.size == (3 * width, 2 * row)
    for number in range(5):
        made = open_picture(tmp_path / "out" / f"{number + 1:04d}.png")
        left, top = number % 3 * width, number // 3 * row + LABEL
        assert sheet.crop((left, top, left + made.width, top + made.height)).tobytes() == made.tobytes()
        assert len(sheet.crop((left, top - LABEL, left + width, top)).getcolors()) > 1, "its number stands above it"
    rest = sheet.crop((2 * width, row, 3 * width, 2 * row))
    assert rest.getcolors() == [(width * row, (255, 255, 255))]


GOOD = {"prompt": PROMPT}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, "{"], "jobs.jsonl line 2 is no JSON object of options; write {"),
        (["[1]"], "jobs.jsonl line 1 is no JSON object of options"),
        ([GOOD, "", "[" * 100_000], "jobs.jsonl line 3 is no JSON object of options"),
        ([GOOD, {"stpes": 3}], "jobs.jsonl line 2 sets 'stpes', which is unknown; did you mean steps?"),
        ([{"steps": "3"}], "jobs.jsonl line 1 sets steps to '3', which is not a whole number"),
        ([{"panels": "a.png"}], "jobs.jsonl line 1 sets panels to 'a.png', which is not a list of texts"),
        ([GOOD, {"steps": 0}], "jobs.jsonl line 2: --steps 0 is out of range; use 1 to 1000"),
        ([GOOD, {"fit": "cropp"}], "jobs.jsonl line 2: --fit 'cropp' is unknown; did you mean crop?"),
        ([GOOD, "", {"mask": "9"}], "jobs.jsonl line 3: mask '9': 9 does not fit the grid"),
        (
            [GOOD, {**GOOD, "mask": "2", "panels": ["no.png"]}],
            "jobs.jsonl line 2: cannot read no.png: there is no such file",
        ),
        ([GOOD, {"lora": ["no.safetensors"]}], "jobs.jsonl line 2: --lora 'no.safetensors': there is no such file"),
        *(
            ([GOOD, {name: "x"}], f"line 2 sets {name}, which holds for the whole job; give --{name}")
            for name in ("model", "device", "dtype", "out", "jobs", "config")
        ),
        ([], "is no file with requests; write a JSON object of options a row"),
        (["", " "], "is no file with requests"),
    ],
)
def test_a_wrong_row_is_refused_by_its_line_before_anything_is_made(tmp_path, capsys, monkeypatch, rows, message):
    monkeypatch.setattr(pipeline, "load_text_encoders", None)
    assert run(tmp_path / "out", "--jobs", jobs(tmp_path, *rows)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nowhere.jsonl", "a\0b", "."])
def test_jobs_that_are_no_file_are_refused(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "out", f"--jobs={name}") == 2
    assert "is no file with requests" in refused(capsys) and not (tmp_path / "out").exists()


def test_jobs_that_are_no_text_are_refused(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    assert run(tmp_path / "out", "--jobs", str(tmp_path / "a.jsonl")) == 2
    assert "a.jsonl: it is not UTF-8 text" in refused(capsys)


def test_an_interrupted_job_keeps_what_is_finished_and_draws_no_sheet(tmp_path, capsys, monkeypatch):
    interrupting(monkeypatch, 2)
    assert run(tmp_path / "out", "--jobs", jobs(tmp_path, GOOD, GOOD, GOOD)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; what was finished is saved"
    assert sorted(files(tmp_path / "out")) == ["0001-panel-1.png", "0001-panel-2.png", "0001.json", "0001.png"]


def test_a_caption_of_many_rows_is_read_once_and_what_is_noted_told_once(tmp_path, capsys, monkeypatch):
    read, encode = [], TextEncoders.encode
    monkeypatch.setattr(TextEncoders, "encode", lambda self, texts, n: read.extend(texts) or encode(self, texts, n))
    rows = [GOOD, {**GOOD, "seed": 1}, {"prompt": PROMPT + " again"}, GOOD]
    assert run(tmp_path / "out", "--jobs", jobs(tmp_path, *rows)) == 0
    assert read == [PROMPT, PROMPT + " again"]
    lines = capsys.readouterr().err.splitlines()
    assert sum("panels of 64x64" in line for line in lines) == 1 and all(line.startswith("note: ") for line in lines)
