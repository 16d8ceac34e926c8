"""train.py as its users meet it: runs that are killed, stopped, resumed and shared, and what sample.py makes of them.

The transformer and the autoencoder are small random ones; text encoders and tokenizers are those of the tiny model.
"""

import errno
import gc
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

import iclora.checkpoint
import iclora.loader
import iclora.memory
import iclora.monitor
import iclora.pipeline
import iclora.training
import model.checkpoint
import sample
import train
from golden import WHOLE
from iclora.cards import MemoryPlan
from iclora.cli import parse
from iclora.config import DEV, METHODS, TINY, SampleConfig, TrainConfig, flag, resolve_training_defaults
from iclora.data import load
from iclora.layout import generate_mask
from iclora.loader import Loader, fingerprints
from iclora.monitor import GAP, LEFT, NARROW, TOP, labelled
from iclora.pipeline import Pipeline, encode_panels, encode_references, text_key
from iclora.plan import make_plan
from iclora.references import image_ids
from model.autoencoder import AutoEncoder, AutoEncoderConfig
from model.checkpoint import read_header, save_safetensors
from model.flux import Flux, FluxConfig
from model.lora import attach, save_lora, trainable
from model.lora_formats import read_lora
from model.tables import Tables, make_tables
from model.weights import find_model, load_flux
from sampling.latents import pack

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--data --method --stage --grid --preset --model --rank --targets --init-lora --lora-init --condition --concat "
    "--text --ref-size --offset --offset-scale --posterior --target-posterior --reference-attention --steps --batch "
    "--accumulate --lr --eps --warmup --decay --ema --dropout --times --panel-size --composite-size --fit --holdout "
    "--save-every --sample-every --sample-prompt --checkpointing --seed --device --dtype --quantize --compile "
    "--offload --vram --dry-run --tensorboard --out --config"
)
KEPT = (
    "checkpoint.safetensors",
    "checkpoint.previous.safetensors",
    "lora.safetensors",
    "metrics.jsonl",
    "loss.png",
    "config.json",
)
PROMPT = "two foxes: [IMAGE1] a fox, [IMAGE2] the fox"


def make_model(folder):
    """A model folder with a random transformer and autoencoder, beside the text encoders of the tiny model."""
    folder.mkdir()
    tiny = find_model("tiny")
    shape = tiny.flux.config
    torch.manual_seed(0)
    small = FluxConfig(64, 64, shape.vec_in_dim, shape.context_in_dim, 32, 48, 1, 1, 1, (4, 14, 14), True)
    save_safetensors(Flux(small).state_dict(), folder / "flux1-small.safetensors")
    save_safetensors(AutoEncoder(AutoEncoderConfig(32, (1, 1, 1, 1), 1, 16)).state_dict(), folder / "ae.safetensors")
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        (folder / name).symlink_to(tiny.root.resolve() / name)


def make_sets(folder, count=6, seed=0):
    """Sets of two panels of 32 pixels; the second panel is the first one turned around."""
    folder.mkdir()
    (folder / "set.json").write_text('{"grid": "1x2"}')
    draw = np.random.default_rng(seed)
    for number in range(count):
        pixels = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        panel = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)
        (folder / str(number)).mkdir()
        panel.save(folder / str(number) / "1.png")
        panel.transpose(Image.Transpose.ROTATE_180).save(folder / str(number) / "2.png")
        (folder / str(number) / "caption.txt").write_text(f"[IMAGE1] picture {number}, [IMAGE2] the same turned around")


def make_pairs(path, count=6):
    """Pairs with one or two references of several sizes, in turns; the first reference is the target turned around."""
    draw, rows = np.random.default_rng(1), []
    (path.parent / "pairs").mkdir()
    for number in range(count):
        names = [f"pairs/{number}-{i}.png" for i in range(2 + number % 2)]
        for name, size in zip(names, ((32, 32), (64, 64), (60, 40)), strict=False):
            panel = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            panel.resize(size, Image.Resampling.BICUBIC).save(path.parent / name)
        rows.append({"prompt": f"picture {number}", "image_paths": names[1:], "image_tgt_path": names[0], "score": 4.0})
    path.write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with model/, sets/ and runs/, whose cache all runs share; one thread, as in the processes."""
    folder, threads = tmp_path_factory.mktemp("world"), torch.get_num_threads()
    make_model(folder / "model")
    make_sets(folder / "sets")
    make_pairs(folder / "pairs.json")
    torch.set_num_threads(1)
    import transformers.models.clip.modeling_clip
    import transformers.models.t5.modeling_t5  # noqa: F401

    gc.freeze()  # what is imported, so that the collection after every encoder takes no time
    yield folder
    gc.unfreeze()
    torch.set_num_threads(threads)


def command(world, out, *flags, steps=6):
    more = ["--steps", str(steps), "--batch", "2", "--rank", "2", "--panel-size", "32", "--dropout", "0.3"]
    more += ["--save-every", "2", "--sample-every", "0", "--device", "cpu", "--lr", "0.01", "--warmup", "2"]
    more += ["--decay", "0"]  # a falling rate would fix the number of steps
    return ["--data", str(world / "sets"), "--model", str(world / "model"), "--out", str(out), *more, *flags]


def go(world, out, *flags, **more):
    return train.main(command(world, out, *flags, **more))


@pytest.fixture
def out(world):
    """A folder for a run, beside the shared cache."""
    (world / "runs").mkdir(exist_ok=True)
    return world / "runs" / str(len(os.listdir(world / "runs")))


def encoded(world, out, *flags):
    """A loader with everything encoded; the whole way: files, cache, loader."""
    config = resolve_training_defaults(parse(TrainConfig, command(world, out, *flags), ""), TINY, "cpu")
    loader = Loader(config, load(config.data), find_model(config.model))
    loader.encode(lambda line: None)
    return loader


def beside(out, name):
    """Another folder for a run that shares the cache."""
    return out.with_name(f"{out.name}-{name}")


@pytest.fixture(scope="module")
def whole(world):
    """A run of 6 steps that nothing interrupted."""
    assert go(world, world / "runs" / "whole") == 0
    return world / "runs" / "whole"


def files(folder):
    """The bytes of all files in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def refused(capsys):
    """The one line on stderr of a failure; lines that are no errors may come before it."""
    *before, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and not any("Traceback" in other or "error" in other for other in before)
    return line


def last_line(capsys):
    """The last line on stderr of an interruption, which is no error."""
    err = capsys.readouterr().err
    assert "error" not in err and "Traceback" not in err
    return err.splitlines()[-1]


# the command line


def test_the_flags_are_frozen_so_that_a_new_one_is_a_decision():
    assert [flag(field.name) for field in fields(TrainConfig)] == FLAGS.split()


def test_help_lists_every_knob_once(capsys):
    assert train.main(["--help"]) == 0
    words = capsys.readouterr().out.split("\noptions:\n")[1].split()
    listed = [word for word in words if word.startswith("--") and word != "--help"]
    assert listed == FLAGS.replace("--checkpointing", "--checkpointing --no-checkpointing").split()


@pytest.mark.parametrize(("flags", "message"), [
    (["--lr", "nan"], "--lr nan is out of range; use 0 to 1"),
    (["--lr", "fast"], "--lr 'fast' is not a number"),
    (["--rank", "0"], "--rank 0 is out of range; use 1 to 4096"),
    (["--ema", "1"], "--ema 1.0 is out of range"),
    (["--condition", "cleen"], "--condition 'cleen' is unknown; did you mean clean?"),
    (["--times", "log"], "--times 'log' is unknown"),
    (["--model", "flux-nowhere"], "there is no model 'flux-nowhere'"),
    (["--model", "{sets}"], "sets lacks flux1-*.safetensors"),
    (["--batch", "4", "--accumulate", "3"], "a batch of 4 cannot be cut for 1 processes and --accumulate 3"),
    (["--targets", "attention"], "LoRA target 'attention' means no Linear of this model; did you mean"),
    (["--init-lora", "nowhere.safetensors"], "nowhere.safetensors cannot be read"),
    (["--init-lora", "{model}/ae.safetensors"], "holds a FLUX.1 autoencoder, not a LoRA"),
    (["--grid", "2by2"], "grid '2by2' is not ROWSxCOLS"),
    (["--grid", "3x1"], "has 2 panels, but its 3x1 grid takes 3"),
    (["--data", "nowhere"], "there is no folder 'nowhere'; --data takes"),
    (["--data", "{sample}"], "sample' is no folder; --data takes"),
    (["--data", "{empty}"], "holds no sets"),
    (["--data", "{broken}"], "2.png"),
    (["--data", "{model}/ae.safetensors"], "--data takes one with pictures"),
    (["--config", "{model}/ae.safetensors"], "it is damaged or no JSON"),
    (["--config", "{sets}/set.json"], "holds no configuration"),
    (["--config", "{sample}"], "sets 'mask', which is unknown"),
    (["--out", "{model}/ae.safetensors"], "ae.safetensors is not a folder; choose another"),
    (["--out", "{model}/ae.safetensors/run"], "ae.safetensors is not a folder; choose another"),
    (["--out", "a\0b"], "no name may have; choose another"),
    (["--out", "a" * 300], "File name too long; mend that, or name another"),
    (["--device", "mps"], "--device mps is not available"),
    (["--concat", "token"], "--concat 'token' is unknown; did you mean tokens?"),
    (["--dtype", "float16"], "--dtype 'float16' is unknown; did you mean bfloat16"),
    (["--text", "panels"], "--text 'panels' is unknown; did you mean panel?"),
    (["--data", "{unmarked}", "--text", "panel"], "turned around': it has no markers, but the 1x2 grid takes"),
    (["--method", "uno"], "is not for --method uno, which takes a .json of pairs"),
    (["--data", "{pairs}"], "is not for --method in-context-lora, which takes sets; pairs are for --method uno"),
    (["--method", "unos"], "--method 'unos' is unknown; did you mean uno?"),
    (["--offset", "w"], "--offset means nothing to --method in-context-lora; leave it out"),
    (["--method", "uno", "--stage", "3"], "--stage 3 is out of range; use 1 to 2"),
    (["--method", "uno", "--targets", "mod"], "no place for rows 0 to 192 of double_blocks.0.img_mod.lin, so the"),
    (["--method", "uno", "--data", "{unreferred}"], "unreferred.json' is not for --method uno, which takes"),
    (["--method", "uno", "--data", "{pairs}", "--ref-size", "20"], "row 2: 1-2.png of 60x40 pixels becomes 20x13"),
    (["--lora-init", "unos"], "--lora-init 'unos' is unknown; did you mean uno?"),
    (["--composite-size", "64", "--panel-size", "32"], "two ways to say how large sets are; use one of them"),
    (["--method", "uno", "--data", "{pairs}", "--preset", "couple-profile"], "--preset means nothing to --method uno"),
    (["--tensorboard"], "--tensorboard needs a package that is not installed; pip install tensorboard, or leave it"),
], ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "")  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(world, out, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    places = {name: tmp_path / name for name in ("empty", "broken", "sample", "unmarked")}
    places["empty"].mkdir()
    shutil.copytree(world / "sets", places["broken"])
    (places["broken"] / "3" / "2.png").write_bytes(b"no picture")
    shutil.copytree(world / "sets", places["unmarked"])
    (places["unmarked"] / "3" / "caption.txt").write_text("a picture and the same turned around")
    places["sample"].write_text(json.dumps({"config": {"mask": "all"}}))
    places |= {"sets": world / "sets", "model": world / "model", "pairs": world / "pairs.json"}
    places["unreferred"] = tmp_path / "unreferred.json"
    places["unreferred"].write_text(json.dumps([{"prompt": "x", "image_tgt_path": "x.png"}]))
    before = files(world / "model")["ae.safetensors"]
    assert go(world, out, *(text.format(**places) for text in flags)) == 2
    assert message in refused(capsys)
    assert not out.exists() and files(world / "model")["ae.safetensors"] == before


def test_bad_input_costs_an_earlier_run_nothing(world, whole, tmp_path, capsys):
    before = files(whole)
    for flags in (["--lr", "nan"], ["--data", "nowhere"], ["--targets", "x"], ["--model", "no"], ["--accumulate", "9"]):
        assert go(world, whole, *flags) == 2
    assert files(whole) == before and len(capsys.readouterr().err.splitlines()) == 5


def test_a_folder_that_cannot_be_written_is_refused(world, out, capsys, monkeypatch):
    out.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != out)
    assert go(world, out) == 2
    assert f"{out} cannot be written to; choose another" in refused(capsys) and not files(out)


def test_a_run_within_its_own_data_is_refused(world, capsys):
    assert go(world, world / "sets" / "runs") == 2
    assert "lies in --data, where the next run would read it; choose one outside" in refused(capsys)
    assert not (world / "sets" / "runs").exists()


def test_what_is_doubtful_about_the_sets_is_told(world, out, tmp_path, capsys):
    shutil.copytree(world / "sets", tmp_path / "sets")
    (tmp_path / "sets" / "README.md").write_text("words")
    assert go(world, out, "--data", str(tmp_path / "sets"), steps=1) == 0
    assert "README.md is no picture or caption; passed over (note 1 of " in capsys.readouterr().err


def test_encoders_of_another_model_are_refused(world, out, tmp_path, capsys):
    shutil.copytree(world / "model", tmp_path / "m", symlinks=True)
    other = FluxConfig(64, 64, 7, 9, 32, 48, 1, 1, 1, (4, 14, 14), True)
    save_safetensors(Flux(other).state_dict(), tmp_path / "m" / "flux1-small.safetensors")
    assert go(world, out, "--model", str(tmp_path / "m")) == 2
    assert "but its transformer takes 9 and 7; use the encoders that belong to it" in refused(capsys)


def test_running_out_of_memory_is_one_line(world, out, capsys, monkeypatch):
    def hungry(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(iclora.training, "flow_loss", hungry)
    assert go(world, out) == 2
    assert "memory ran out; try --checkpointing" in refused(capsys)


# what is written


def test_a_large_model_is_trained_with_tables_of_modulations_to_the_same_bits(world, whole, out, monkeypatch):
    monkeypatch.setattr(
        iclora.training, "check_training_memory", lambda *given: MemoryPlan(tables=True, phases={"step": 1.0})
    )
    monkeypatch.setattr(iclora.training, "prepare", lambda flux, *given: make_tables(flux))
    passes = []
    monkeypatch.setattr(Tables, "clear", lambda tables, clear=Tables.clear: passes.append(1) or clear(tables))
    assert go(world, out) == 0
    assert len(passes) == 4, "made, filled for all of six steps at once, and again behind validations that took room"
    assert [files(out)[name] for name in ("lora.safetensors", "metrics.jsonl")] == [
        files(whole)[name] for name in ("lora.safetensors", "metrics.jsonl")
    ]


def test_a_run_writes_checkpoint_lora_metrics_curve_and_settings(whole):
    assert sorted(files(whole)) == sorted(KEPT)
    assert steps_of(whole) == [1, 2, 3, 4, 5, 6]
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation" in row] == [2, 4, 6]
    assert all(np.isfinite(row["loss"]) for row in rows)
    picture = Image.open(whole / "loss.png").convert("RGB")
    assert len(picture.getcolors(2**20)) > 3


def test_the_lora_file_says_what_it_is(whole):
    tensors, metadata = read_header(whole / "lora.safetensors")
    assert {name.removeprefix("iclora."): text for name, text in metadata.items() if name.startswith("iclora.")} == {
        "method": "in-context-lora", "condition": "none", "concat": "pixels", "text": "joint", "base": "model",
        "grids": "1x2", "steps": "6",
    }  # fmt: skip
    assert {stored.dtype for stored in tensors.values()} == {"BF16"}


def test_the_lora_file_holds_the_average_and_not_the_last_weights(world, whole, tmp_path):
    config = parse(TrainConfig, ["--config", str(whole / "config.json")], "")
    tensors = load_file(whole / "checkpoint.safetensors")
    flux = load_flux(find_model(str(world / "model")).flux, dtype=torch.float32)
    attach(flux, config.targets, config.rank)
    about = read_header(whole / "lora.safetensors")[1]
    for kind, same in (("weight", False), ("average", True)):
        with torch.no_grad():
            for i, p in enumerate(trainable(flux)):
                p.copy_(tensors[f"{i}.{kind}"])
        save_lora(flux, tmp_path / kind, metadata=about)
        assert ((tmp_path / kind).read_bytes() == (whole / "lora.safetensors").read_bytes()) == same


def test_the_settings_beside_a_run_repeat_it(world, whole, out):
    assert train.main(["--config", str(whole / "config.json"), "--out", str(out)]) == 0
    assert files(out) == files(whole)


def test_another_model_beside_the_settings_of_a_run_brings_its_own_defaults(whole, tmp_path):
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    argv = ["--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "out")]
    same, other = parse(TrainConfig, argv, ""), parse(TrainConfig, [*argv, "--model", "flux-dev"], "")
    assert (same.steps, same.batch, same.lr, same.panel_size, same.dtype) == (6, 2, 0.01, 32, "float32")
    settled = resolve_training_defaults(other, DEV, "cuda")
    assert (settled.steps, settled.batch, settled.lr, settled.panel_size) == (5000, 4, 1e-4, 512)
    assert (settled.rank, settled.dropout, settled.dtype) == (2, 0.3, "bfloat16"), "what does not depend on the model"
    assert parse(TrainConfig, [*argv, "--model", "flux-dev", "--steps", "7"], "").steps == 7


def test_a_finished_run_is_left_as_it_is(world, whole, capsys):
    before = files(whole)
    assert go(world, whole) == 0
    assert files(whole) == before
    assert "this run is finished; a larger --steps goes on from it" in capsys.readouterr().err


def test_a_bar_shows_loss_speed_and_time_left_on_a_terminal_from_before_the_first_step(world, out, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert go(world, out) == 0
    bars = [part for part in capsys.readouterr().err.split("\r") if part.startswith("training: ")]
    assert "| 0/6 [00:00<?, ?step/s]" in bars[0]
    assert re.search(r"100%\|#+\| 6/6 \[00:0\d<00:00, +\d+\.\d+step/s, loss \d\.\d{4}, [\d.e-]+ TFLOP/s\]", bars[-1])


def test_a_log_gets_a_line_every_fifty_steps_and_at_the_end(world, out, capsys):
    assert go(world, out, "--holdout", "0", "--save-every", "200", steps=120) == 0
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("training: ")]
    found = [re.search(r" (\d+)/120 \[.*step/s, loss \d\.\d{4}, [\d.e-]+ TFLOP/s\]$", line) for line in lines]
    assert [each[1] for each in found] == ["50", "100", "120"]
    assert "\r" not in err and "\x1b" not in err


def test_a_bar_is_drawn_while_texts_and_pictures_are_encoded(world, out, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    make_sets(tmp_path / "sets", count=3, seed=7)
    assert go(world, out, "--data", str(tmp_path / "sets"), steps=1) == 0
    bars = [part for part in capsys.readouterr().err.split("\r") if part.startswith("encoding pictures: ")]
    assert "| 0/3 [" in bars[0]


def test_metrics_also_go_to_tensorboard_if_that_is_wanted(world, out, monkeypatch):
    class Writer:
        def __init__(self, folder, purge_step):
            told.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            told.append((name, step))

        def flush(self):
            pass

    told = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    assert go(world, out, "--tensorboard", steps=1) == 0
    assert go(world, out, "--tensorboard", steps=2) == 0
    assert told == [
        (str(out), 1), ("loss", 1), ("validation", 1),
        (str(out), 2), ("loss", 2), ("validation", 2),
    ]  # fmt: skip
    assert "tensorboard" not in (out / "config.json").read_text()


def cell(sheet, left, top, width, height):
    """A part of a sheet behind its labels, in pixels."""
    return sheet.crop((LEFT + left, TOP + top, LEFT + left + width, TOP + top + height))


def colours(picture):
    return len(picture.getcolors(2**20))


def is_blank(picture):
    return picture.getcolors() == [(picture.width * picture.height, (255, 255, 255))]


def test_sheets_of_samples_are_the_same_for_the_same_weights(world, out):
    for name in ("a", "b"):
        assert go(world, beside(out, name), "--sample-every", "2", steps=1) == 0
    first = Image.open(beside(out, "a") / "sheet-000001.png").convert("RGB")
    assert first.size == (LEFT + NARROW + GAP, TOP + 2 * (32 + GAP)), "one held-out composite above the original"
    assert all(colours(cell(first, 0, top, 64, 32)) > 50 for top in (0, 32 + GAP))
    assert files(beside(out, "a"))["sheet-000001.png"] == files(beside(out, "b"))["sheet-000001.png"]


def test_the_rows_and_columns_of_a_sheet_are_labelled():
    red, blue = Image.new("RGB", (64, 32), "red"), Image.new("RGB", (20, 20), "blue")
    columns = [("a fox", {"made": red, "target": red}), ("a bear", {"reference 1": blue, "made": blue})]
    sheet = labelled(columns, "step 7")
    rows = [0, 20 + GAP, 20 + GAP + 32 + GAP]  # the reference, what is made, the target
    assert sheet.size == (LEFT + 2 * (NARROW + GAP), TOP + rows[2] + 32 + GAP)
    second = NARROW + GAP
    assert is_blank(cell(sheet, 0, rows[0], 64, 20)) and is_blank(cell(sheet, second, rows[2], 64, 32))
    assert [sheet.getpixel((LEFT + left, TOP + top)) for left, top in ((0, rows[1]), (0, rows[2]))] == [(255, 0, 0)] * 2
    assert [sheet.getpixel((LEFT + second, TOP + top)) for top in rows[:2]] == [(0, 0, 255)] * 2
    texts = [(0, 0, LEFT, TOP), (LEFT, 0, LEFT + second, TOP), (LEFT + second, 0, sheet.width, TOP)]
    texts += [(0, TOP + top, LEFT, TOP + top + 20) for top in rows]
    assert not any(is_blank(sheet.crop(box)) for box in texts), "title, captions and names of rows"
    other = labelled([("an owl", columns[0][1]), columns[1]], "step 7")
    assert ImageChops.difference(sheet, other).getbbox()[3] <= TOP, "only the caption"


def test_own_prompts_stand_on_every_sheet_and_change_nothing_that_is_trained(world, whole, out):
    prompts = ["--sample-prompt", PROMPT, "--sample-prompt", "[IMAGE1] a red owl, [IMAGE2] the owl, a long way away"]
    assert go(world, out, "--sample-every", "2", *prompts, steps=2) == 0
    sheet = Image.open(out / "sheet-000002.png").convert("RGB")
    assert sheet.width == LEFT + 3 * (NARROW + GAP)
    for left in (NARROW + GAP, 2 * (NARROW + GAP)):
        assert colours(cell(sheet, left, 0, 64, 32)) > 50 and is_blank(cell(sheet, left, 32 + GAP, 64, 32))
    assert ImageChops.difference(*(cell(sheet, i * (NARROW + GAP), 0, 64, 32) for i in (1, 2))).getbbox()
    assert go(world, out, "--sample-every", "6", "--sample-prompt", PROMPT) == 0, "others on resume"
    assert Image.open(out / "sheet-000006.png").width == LEFT + 2 * (NARROW + GAP)
    assert json.loads((out / "config.json").read_text())["config"]["sample_prompt"] == [PROMPT]
    assert files(out)["lora.safetensors"] == files(whole)["lora.safetensors"]
    assert compare(out, whole) == 0


def test_a_prompt_that_panels_cannot_read_is_refused(world, out, capsys):
    assert go(world, out, "--text", "panel", "--sample-prompt", "a fox") == 2
    assert "each panel is to read its own part of 'a fox': it has no markers" in refused(capsys) and not out.exists()


def test_an_own_prompt_of_a_run_on_pairs_has_no_references(world, out):
    assert uno(world, out, "--sample-every", "1", "--sample-prompt", "a fox", steps=1) == 0
    sheet = Image.open(out / "sheet-000001.png").convert("RGB")
    right = sheet.crop((sheet.width - NARROW - GAP, TOP, sheet.width, sheet.height))
    pictures = [is_blank(right.crop((0, top, 32, top + 16))) for top in range(0, right.height, 38)]
    assert pictures.count(False) == 1, "what is made, and neither references nor a target"


def test_a_finished_run_whose_rate_has_fallen_says_how_to_train_on_from_it(world, out, capsys):
    argv = [*command(world, out, steps=2), "--decay", "0.5", "--sample-prompt", PROMPT]
    assert train.main(argv) == 0
    beside(out, "2").mkdir()  # taken
    capsys.readouterr()
    on = ["--init-lora", str(out / "lora.safetensors"), "--out", str(beside(out, "3"))]
    for more, status in (([], 0), (["--steps", "4"], 2)):
        assert train.main([*argv, *more]) == status
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "to train on from it: " in line]
        said = line.partition("to train on from it: python train.py ")[2]
        assert parse(TrainConfig, shlex.split(said), "") == parse(TrainConfig, [*argv, *more, *on], "")
    assert line.startswith(f"error: {out} holds a run with --steps 2, not 4, and its rate has fallen to 0; to train on")
    assert train.main(shlex.split(said)) == 0
    assert "starting from lora.safetensors" in capsys.readouterr().err and steps_of(beside(out, "3")) == [1, 2, 3, 4]


def no_memory(*_):
    raise RuntimeError("DefaultCPUAllocator: not enough memory")


def test_one_run_learns_sets_at_several_sizes_and_says_what_the_tiny_model_knows(world, out, capsys):
    argv = command(world, out, "--composite-size", "32,46", "--holdout", "0.2", "--sample-every", "6")
    at = argv.index("--panel-size")
    assert train.main(argv[:at] + argv[at + 2 :]) == 0
    said = capsys.readouterr().err
    assert "6 sets in 2 buckets; " in said and "model knows panels of 64 pixels; what it learns of other sizes" in said
    config = json.loads((out / "config.json").read_text())["config"]
    assert (config["panel_size"], config["composite_size"]) == (None, "32,46")
    assert steps_of(out) == [1, 2, 3, 4, 5, 6] and (out / "sheet-000006.png").exists()
    assert go(world, out) == 2
    assert "holds a run with --panel-size None, not 32; give the same settings" in refused(capsys)


def test_the_largest_of_several_sizes_has_to_fit_into_memory(world, out, capsys, monkeypatch):
    monkeypatch.setattr(iclora.memory, "MAX_TOKENS", 7)
    argv = command(world, out, "--composite-size", "32,46")
    at = argv.index("--panel-size")
    assert train.main(argv[:at] + argv[at + 2 :]) == 2
    told = (
        r"^error: 8 tokens of the picture, 2 examples .*; at most 7 tokens are possible, .* or lower --composite-size$"
    )
    assert re.search(told, refused(capsys)) and not out.exists()
    assert train.main([*argv[:at], *argv[at + 2 :], "--composite-size", "512,1k"]) == 2
    assert "composite size '512,1k' is not a list of 16 to 8192 pixels; write 512,768" in refused(capsys)


def test_a_sheet_that_a_kill_prevented_is_drawn_on_resume(world, out, monkeypatch):
    monkeypatch.setattr(iclora.monitor.Monitor, "draw_sheet", killing(iclora.monitor.Monitor.draw_sheet, 1))
    with pytest.raises(Killed):
        go(world, out, "--sample-every", "2", steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(iclora.monitor, "sheet_columns", no_memory)
        assert go(world, out, "--sample-every", "2", steps=2) == 0, "one that fails is left out, on resume"
        assert go(world, beside(out, "new"), "--sample-every", "1", steps=2) == 0, "and while training"
    assert not [*out.glob("sheet-*"), *beside(out, "new").glob("sheet-*")]
    assert go(world, out, "--sample-every", "2", steps=3) == 0
    assert go(world, beside(out, "whole"), "--sample-every", "2", steps=3) == 0
    made, whole = files(out), files(beside(out, "whole"))
    del made[KEPT[1]], whole[KEPT[1]]  # which one was asked for fewer steps says so
    assert "sheet-000002.png" in made and made == whole


def test_without_held_out_sets_there_is_no_validation_and_the_sheet_shows_trained_ones(world, out):
    assert go(world, out, "--holdout", "0", "--sample-every", "2", steps=2) == 0
    assert "validation" not in (out / "metrics.jsonl").read_text()
    size = LEFT + 2 * (NARROW + GAP), TOP + 2 * (32 + GAP)
    assert Image.open(out / "sheet-000002.png").size == size, "the two sets of the first batch"


def test_an_earlier_lora_is_a_start(world, whole, out, capsys):
    shutil.copy(whole / "lora.safetensors", world / "start.safetensors")
    assert go(world, out, "--init-lora", str(world / "start.safetensors"), "--lr", "0", steps=1) == 0
    assert "starting from start.safetensors: diffusers names" in capsys.readouterr().err
    before, after = (read_lora(path / "lora.safetensors") for path in (whole, out))
    assert before.tensors.keys() == after.tensors.keys()
    assert all(load_file(out / "checkpoint.safetensors")[f"{i}.weight"].any() for i in range(4)), "ups are not fresh"


def test_a_large_model_is_known_by_its_size_and_not_by_its_date(world, monkeypatch):
    files_of_model = find_model(str(world / "model"))
    before = fingerprints([], files_of_model)["model"]
    monkeypatch.setattr(model.checkpoint, "MAX_HASHED", 1000)
    large = fingerprints([], files_of_model)["model"]
    os.utime(files_of_model.flux.path)
    assert large == fingerprints([], files_of_model)["model"] != before


def test_every_shard_of_a_model_and_the_settings_beside_a_lora_count(world, whole, tmp_path):
    files_of_model = find_model(str(world / "model"))
    tensors = load_file(files_of_model.flux.path)
    names = {name: f"shard-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(names.values()):
        save_file({name: tensors[name] for name in tensors if names[name] == shard}, tmp_path / shard)
    index = tmp_path / "flux1-small.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    (tmp_path / "lora").mkdir()
    shutil.copy(whole / "lora.safetensors", tmp_path / "lora" / "adapter_model.safetensors")

    def contents():
        sharded = replace(files_of_model, flux=model.weights.open_checkpoint(index, "transformer"))
        return fingerprints([], sharded, read_lora(tmp_path / "lora"))

    first = contents()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    second = contents()
    assert first["init_lora"] != second["init_lora"] and first["model"] == second["model"]
    save_file({name: 2 * tensors[name] for name in tensors if names[name] == shard}, tmp_path / shard)
    assert contents()["model"] != second["model"] and contents()["init_lora"] == second["init_lora"]


def test_another_lora_under_the_same_name_is_refused_on_resume(world, whole, out, tmp_path, capsys):
    start = tmp_path / "start.safetensors"
    shutil.copy(whole / "lora.safetensors", start)
    assert go(world, out, "--init-lora", str(start), steps=1) == 0
    assert go(world, out, "--init-lora", str(shutil.copy(start, tmp_path / "moved.safetensors")), steps=1) == 0
    shutil.copy(out / "lora.safetensors", start)
    capsys.readouterr()
    assert go(world, out, "--init-lora", str(start), steps=2) == 2
    assert "moved.safetensors, not" in (line := refused(capsys)) and "start.safetensors; give the same" in line


def test_what_is_seldom_meant_is_told(world, whole, clean, out, capsys):
    flags = ["--init-lora", str(clean), "--batch", "6"]
    assert go(world, out, *flags, steps=1) == 0
    said = capsys.readouterr().err
    assert "lora.safetensors was trained with --condition clean; now it is used with none" in said
    assert "1 buckets have fewer sets than the 6 of a batch, which holds some of them twice" in said


# killed, stopped, resumed


class Killed(BaseException):
    """Ends a run in the middle, as no handler expects it."""


def killing(real, when):
    """Calls the real function, but is killed the given time."""
    calls = []

    def function(*args, **more):
        calls.append(args)
        if len(calls) == when:
            raise Killed
        return real(*args, **more)

    return function


PLACES = {
    "in a step": (iclora.training, "flow_loss", 4),
    "before the first checkpoint": (iclora.training, "flow_loss", 2),
    "before anything": (iclora.checkpoint, "write_atomic", 1),
    "while the checkpoint gets its name": (os, "replace", 4),
    "after the checkpoint": (iclora.monitor, "save_lora", 2),
    "in the last lora": (iclora.monitor, "save_lora", 3),
    "while the curve is drawn": (iclora.monitor, "draw_curve", 2),
    "between the moments and the average": (torch, "_foreach_lerp_", 4),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_and_resumed_run_ends_in_the_same_bytes(world, whole, out, monkeypatch, place):
    owner, name, when = PLACES[place]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, killing(getattr(owner, name), when))
        go(world, out)
    assert go(world, out) == 0
    assert files(out) == files(whole)


def test_so_does_one_with_clean_panels_and_parts(world, clean, out, monkeypatch):
    flags = ["--condition", "clean", "--accumulate", "2"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(iclora.training, "flow_loss", killing(iclora.training.flow_loss, 6))
        go(world, out, *flags)
    assert go(world, out, *flags) == 0
    assert files(out) == files(clean.parent)


def test_a_raised_number_of_steps_goes_on_to_the_same_bytes(world, whole, out):
    assert go(world, out, steps=3) == 0
    assert go(world, out) == 0
    assert {name: data for name, data in files(out).items() if name in KEPT[:3:2]} == {
        name: files(whole)[name] for name in KEPT[:3:2]
    }
    assert steps_of(out) == [1, 2, 3, 4, 5, 6]


def test_a_base_in_fp8_is_trained_on_and_gone_on_with_to_the_same_bytes(world, whole, out):
    fp8 = "--quantize", "fp8"
    assert go(world, out, *fp8) == 0
    assert go(world, beside(out, "resumed"), *fp8, steps=3) == 0
    assert go(world, beside(out, "resumed")) == 0, "with the fp8 of its beginning, be it asked for or chosen for a card"
    one, other, plain = (files(folder) for folder in (out, beside(out, "resumed"), whole))
    assert one["lora.safetensors"] == other["lora.safetensors"] != plain["lora.safetensors"]
    assert json.loads(one["config.json"])["config"]["quantize"] == "fp8"


def test_damage_costs_one_interval_and_ends_in_the_same_bytes(world, whole, out, capsys):
    shutil.copytree(whole, out)
    path = out / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert go(world, out) == 0
    assert "; going on from the one before it, step 4\n" in capsys.readouterr().err
    assert files(out) == files(whole)
    for name in KEPT[:2]:
        (out / name).write_bytes((out / name).read_bytes()[:-1])
    before = files(out)
    assert go(world, out) == 2
    assert "checkpoint.safetensors is no safetensors file, or it is cut short" in refused(capsys)
    assert files(out) == before


def test_tensors_of_another_run_are_refused_before_anything_is_encoded(world, whole, out, capsys, monkeypatch):
    shutil.copytree(whole, out)
    path = out / "checkpoint.safetensors"
    about = {name: text for name, text in read_header(path)[1].items() if name != "digest"}  # as older ones
    save_safetensors({**load_file(path), "0.optimizer.exp_avg": torch.ones(3)}, path, about)
    monkeypatch.setattr(Loader, "encode", None)
    assert go(world, out) == 2
    assert "does not hold what this run trains ('0.optimizer.exp_avg'); remove it" in refused(capsys)


def test_a_run_that_ended_while_another_one_was_planned_is_not_overwritten(world, whole, out, capsys, monkeypatch):
    real = iclora.training.plan_training

    def slow(*args):
        plan = real(*args)
        shutil.copytree(whole, out)
        return plan

    monkeypatch.setattr(iclora.training, "plan_training", slow)
    assert go(world, out) == 2
    assert capsys.readouterr().err.endswith("checkpoint.safetensors meanwhile; the same command goes on from it\n")
    assert files(out) == files(whole)


def test_so_is_one_whose_checkpoint_was_just_being_written(world, whole, out, tmp_path, capsys, monkeypatch):
    shutil.copytree(whole, out)
    last, real = out / "checkpoint.safetensors", iclora.training.plan_training

    def slow(*args):
        last.rename(tmp_path / "aside")  # the one before has its other name by now
        plan = real(*args)
        (tmp_path / "aside").rename(last)
        return plan

    monkeypatch.setattr(iclora.training, "plan_training", slow)
    assert go(world, out) == 2
    assert capsys.readouterr().err.endswith("checkpoint.safetensors meanwhile; the same command goes on from it\n")
    assert files(out) == files(whole)


def test_other_settings_in_the_folder_of_a_run_are_refused_by_name(world, whole, capsys):
    before = files(whole)
    for flags, message in {
        ("--rank", "4"): "holds a run with --rank 2, not 4; give the same settings to go on, or another --out",
        ("--lr", "0.5"): "with --lr 0.01, not 0.5;",
        ("--condition", "clean"): "with --condition none, not clean;",
        ("--targets", "attn"): "with --targets all-linear, not attn;",
    }.items():
        assert go(world, whole, *flags) == 2
        assert message in refused(capsys)
    assert files(whole) == before


def test_other_sets_under_the_same_name_are_refused(world, out, tmp_path, capsys):
    shutil.copytree(world / "sets", tmp_path / "sets")
    assert go(world, out, "--data", str(tmp_path / "sets"), steps=2) == 0
    shutil.move(tmp_path / "sets", tmp_path / "moved")
    assert go(world, out, "--data", str(tmp_path / "moved"), steps=3) == 0, "moved, but the same"
    (tmp_path / "moved" / "0" / "caption.txt").write_text("[IMAGE1] another [IMAGE2] caption")
    capsys.readouterr()
    assert go(world, out, "--data", str(tmp_path / "moved"), steps=4) == 2
    assert "moved with other content; give the same settings to go on" in refused(capsys)


def test_a_mistake_leaves_nothing_that_would_refuse_the_next_attempt(world, out):
    assert go(world, out, "--rank", "4", "--data", "nowhere") == 2
    assert go(world, out, steps=1) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_stopped_run_is_saved_and_goes_on_to_the_same_bytes(world, whole, out, capsys, monkeypatch, number):
    real, calls = iclora.training.flow_loss, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return real(*args)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(iclora.training, "flow_loss", stopped)
        assert go(world, out) == 130
    assert last_line(capsys) == "stopped after step 3 of 6; the same command goes on there"
    assert signal.getsignal(number) is handler
    assert iclora.checkpoint.read_checkpoint(out / "checkpoint.safetensors")[2] == 3 and steps_of(out) == [1, 2, 3]
    assert go(world, out) == 0
    assert files(out) == files(whole)


def test_a_second_interruption_stops_at_once_and_keeps_the_last_checkpoint(world, whole, out, capsys, monkeypatch):
    real, calls = torch._foreach_lerp_, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_lerp_", stopped)
        assert go(world, out) == 130
    assert last_line(capsys) == "interrupted; the same command goes on from the last checkpoint"
    assert iclora.checkpoint.read_checkpoint(out / "checkpoint.safetensors")[2] == 2
    assert go(world, out) == 0
    assert files(out) == files(whole)


def test_a_full_disk_is_one_line_and_loses_no_earlier_checkpoint(world, whole, out, capsys, monkeypatch):
    real, calls = os.replace, []

    def full(source, target):
        calls.append(target)
        if len([name for name in calls if Path(name).name == "checkpoint.safetensors"]) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert go(world, out) == 2
    assert "No space left on device" in refused(capsys)
    assert iclora.checkpoint.read_checkpoint(out / "checkpoint.previous.safetensors")[2] == 2
    assert not [name for name in files(out) if name.startswith(".")]
    assert go(world, out) == 0
    assert files(out) == files(whole)


# processes of their own


TRAIN = "import sys, train; sys.exit(train.main(sys.argv[1:]))"


def start(world, out, *flags, code=TRAIN, env=None, **more):
    argv = [sys.executable, "-c", code, *command(world, out, *flags, **more)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=env)


LONG = ["--save-every", "10"]
HIT = """
import os, sys, train
import iclora.training, model.checkpoint, model.lora
real, calls = {place}, []
def hit(*args, **more):
    calls.append(args)
    if len(calls) == {when}:
        os.kill(os.getpid(), {number})
    return real(*args, **more)
{place} = hit
sys.exit(train.main(sys.argv[1:]))
"""


def hit(place, when, number=signal.SIGKILL):
    """Code that trains, and sends itself a signal when something is called the given time."""
    return HIT.format(place=place, when=when, number=int(number))


@pytest.mark.slow
def test_killed_processes_end_in_the_same_bytes_and_one_that_is_stopped_too(world, out):
    assert go(world, beside(out, "whole"), *LONG, steps=40) == 0
    folder = beside(out, "killed")
    codes = [hit("os.replace", 9), hit("iclora.training.flow_loss", 17), hit("iclora.training.flow_loss", 4, 2)]
    steps, said = [], []
    for code in codes:
        process = start(world, folder, *LONG, steps=40, code=code)
        said.append((process.communicate()[1].splitlines()[-1], process.returncode))
        last = iclora.checkpoint.last_good(folder / "checkpoint.safetensors", lambda line: None)
        steps.append((iclora.checkpoint.read_checkpoint(last)[2], steps_of(folder)[-1]))
        scraps = {name.split(".")[1] for name in files(folder) if name.endswith(".tmp")}
        assert scraps == ({"checkpoint"} if code is codes[0] else set()), "the second one was not named yet"
    assert [status for _, status in said] == [-signal.SIGKILL, -signal.SIGKILL, 130]
    assert steps == [(10, 20), (20, 21), (24, 24)]
    assert said[2][0] == "stopped after step 24 of 40; the same command goes on there"
    assert go(world, folder, *LONG, steps=40) == 0
    assert files(folder) == files(beside(out, "whole"))


def wait_for_step(process, out, step):
    """Waits until a run has noted a step; False if it ended before."""
    path = out / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= step:
            return True
        time.sleep(0.002)
    return False


SLOW_DISK = """
import os, time
for name in ("fsync", "replace"):
    def late(*args, real=getattr(os, name)):
        time.sleep(0.01)
        return real(*args)
    setattr(os, name, late)
"""


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["", SLOW_DISK], ids=["disk", "slow disk"])
def test_random_kills_end_in_the_same_bytes_and_locks_die_with_their_process(world, out, disk):
    steps, draw, inside = 1200, random.Random(len(disk)), 0
    assert go(world, beside(out, "whole"), *LONG, steps=steps) == 0
    folder = beside(out, "killed")
    for number in range(10 if disk else 20):
        if number % 2:
            place = draw.choice(["os.replace", "os.fsync", "model.checkpoint.save_file"])
            process = start(world, folder, *LONG, steps=steps, code=disk + hit(place, draw.randint(3, 9)))
        else:
            process = start(world, folder, *LONG, steps=steps, code=disk + TRAIN)
            done = steps_of(folder)[-1] if (folder / "metrics.jsonl").exists() else 0
            assert wait_for_step(process, folder, done + draw.randint(1, 60))
            time.sleep(0.01 * draw.random())
            if number % 10 == 0:
                process.send_signal(signal.SIGSTOP)
                rival = start(world, folder, *LONG, steps=steps)
                assert "another run works in" in rival.communicate()[1] and rival.returncode == 2
            process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        inside += any(name.endswith(".tmp") for name in files(folder))
    assert inside >= 3, "some were inside a save"
    assert go(world, folder, *LONG, steps=steps) == 0
    assert files(folder) == files(beside(out, "whole"))
    assert steps_of(folder) == list(range(1, steps + 1))


def together(world, out, *flags, codes=(TRAIN, TRAIN), **more):
    """Runs two processes as torchrun would start them; returns their statuses and what each says last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        start(world, out, *flags, code=code, env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **more)
        for rank, code in enumerate(codes)
    ]
    said = [process.communicate(timeout=600)[1].splitlines()[-1:] for process in processes]
    return [process.returncode for process in processes], said


def compare(folder, other):
    """How far two runs are apart, relative to the size of all weights, averages and moments of each kind."""
    a, b = (load_file(path / "checkpoint.safetensors") for path in (folder, other))
    assert a.keys() == b.keys()
    far = {}
    for kind in ("weight", "average", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
        names = [name for name in a if name.endswith(f".{kind}")]
        one, two = (torch.cat([tensors[name].flatten().double() for name in names]) for tensors in (a, b))
        far[kind] = float((one - two).norm() / two.norm())
    return max(far.values())


@pytest.mark.slow
def test_two_processes_equal_one_stop_together_and_their_checkpoint_resumes_on_one(world, whole, out):
    interrupted = hit("iclora.training.flow_loss", 3, 2)  # the second process alone, and in its third step
    status, said = together(world, out, codes=(TRAIN, interrupted))
    assert status == [130, 130] and said[0] == said[1], said
    assert said[0] == ["stopped after step 3 of 6; the same command goes on there"]
    assert steps_of(out) == [1, 2, 3]
    assert go(world, beside(out, "one"), steps=3) == 0
    assert compare(out, beside(out, "one")) < 1e-5
    assert go(world, out) == 0
    assert steps_of(out) == [1, 2, 3, 4, 5, 6]
    assert compare(out, whole) < 1e-5
    losses = [[json.loads(row)["loss"] for row in (f / "metrics.jsonl").read_text().splitlines()] for f in (out, whole)]
    assert np.allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(world, whole, out):
    assert go(world, out, steps=2) == 0
    status, said = together(world, out)
    assert status == [0, 0] and said[1] == [], said
    assert compare(out, whole) < 1e-5


def test_a_batch_that_two_processes_cannot_share_is_refused(world, out, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert go(world, out, "--batch", "3") == 2
    assert "a batch of 3 cannot be cut for 2 processes" in refused(capsys) and not out.exists()


# memory, conditioning


def test_recomputing_activations_ends_in_the_same_weights(world, whole, out):
    assert go(world, out, "--checkpointing") == 0
    assert compare(out, whole) < 1e-5


def test_pixels_of_masked_panels_never_reach_the_kept_latents(world, tmp_path):
    """The whole way: files, cache, loader."""
    known = []
    for name in ("before", "after"):
        make_sets(tmp_path / name, count=2)
        if name == "after":
            Image.new("RGB", (32, 32), "red").save(tmp_path / name / "0" / "2.png")
        loader = encoded(world, tmp_path / "run", "--condition", "clean", "--data", str(tmp_path / name))
        layout, examples = loader.layouts[0], loader.trained[0][:1]
        known.append([loader.collate(layout, examples, [kept], [False]) for kept in ((1,), (2,), ())])
    left, right, none = zip(*known, strict=True)
    assert torch.equal(left[0].known, left[1].known)
    assert not torch.equal(right[0].known, right[1].known), "panel 2 was changed, and here it is kept"
    assert not none[0].known.any() and none[0].generate_mask.all()
    assert left[0].generate_mask.flatten().tolist() == [False, False, True, True] * 2
    assert not torch.equal(left[0].z[..., :4], left[1].z[..., :4]), "else nothing could leak and the test not fail"


# what sample.py makes of the file


@pytest.fixture(scope="module")
def clean(world):
    """A run that learnt from clean panels, in parts."""
    assert go(world, world / "runs" / "clean", "--condition", "clean", "--accumulate", "2") == 0
    return world / "runs" / "clean" / "lora.safetensors"


class Sampler:
    """What sample.py makes of LoRAs: a plan, and what a pipeline gives the transformer in every step."""

    def __init__(self, world, *loras, **more):
        settings = {"grid": "1x2", "panel_size": "32", "steps": 3, "prompt": PROMPT, "device": "cpu", **more}
        config = SampleConfig(model=str(world / "model"), lora=tuple(map(str, loras)), **settings)
        self.notes = []
        self.plan = make_plan(config, self.notes.append)
        self.pipeline = Pipeline(self.plan.config, self.notes.append)
        self.points, self.velocities, self.prefilled = [], [], []
        real = iclora.pipeline.denoise
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(iclora.pipeline, "denoise", lambda flux, *given: real(self.spy(flux), *given))
            (self.result,) = self.pipeline.run(self.plan)
        self.points, self.velocities = torch.cat(self.points), torch.cat(self.velocities)  # (steps, I, 64)
        self.txt, self.vec = self.pipeline.texts[text_key(self.plan)]
        mask = generate_mask(self.plan.generated, self.plan.layout)
        self.kept = ~mask[0, :, 0].bool()
        with torch.inference_mode():
            self.data = encode_panels(self.pipeline.autoencoder, self.plan, mask)

    def spy(self, flux):
        def velocity(x, *more):
            self.points.append(x.clone())
            self.velocities.append(flux.velocity(x, *more))
            return self.velocities[-1]

        def prefill(*given):
            self.prefilled.append(given)
            return flux.prefill(*given)

        return SimpleNamespace(prefill=prefill, velocity=velocity, conditioning=flux.conditioning)

    @property
    def first(self):
        """What the transformer gives in the first step, from the noise of seed 0."""
        return self.velocities[:1]


def test_the_lora_changes_the_sampler_by_its_strength(world, whole):
    path = whole / "lora.safetensors"
    loras = ([], [f"{path}:0"], [f"{path}:.5"], [path])
    samplers = [Sampler(world, *lora) for lora in loras]
    base, none, half, full = (sampler.first for sampler in samplers)
    assert (none - base).abs().max() < 1e-6
    assert (full - base).abs().max() > 1e-3
    assert 0.3 < float((half - base).norm() / (full - base).norm()) < 0.7
    assert "lora.safetensors: diffusers names" in " ".join(samplers[-1].notes)


def test_a_file_of_an_untrained_lora_changes_nothing(world, out):
    assert go(world, out, "--lr", "0", steps=1) == 0
    loras = ([out / "lora.safetensors"], [])
    given, base = (Sampler(world, *lora).pipeline.flux.state_dict() for lora in loras)
    assert given.keys() == base.keys() and all(torch.equal(given[name], base[name]) for name in base)


def test_kept_panels_are_clean_at_every_step_if_the_lora_was_trained_so(world, clean, whole):
    panel = str(world / "sets" / "0" / "1.png")
    for path, stays in ((clean, True), (whole / "lora.safetensors", False)):
        sampler = Sampler(world, path, mask="2", panels=(panel,))
        points, kept, data = sampler.points, sampler.kept, sampler.data[0]
        same = [torch.equal(x[kept], data[kept]) for x in points]
        assert len(same) == 3 and all(same) == stays and any(same) == stays
        assert not torch.equal(points[0][~kept], data[~kept])


def test_kept_panels_stay_clean_beside_drafts(world, clean):
    panels = tuple(str(world / "sets" / "0" / f"{number}.png") for number in (1, 2))
    sampler = Sampler(world, clean, mask="2", panels=panels, strength=0.7)
    points, kept, data = sampler.points, sampler.kept, sampler.data[0]
    assert len(points) and all(torch.equal(x[kept], data[kept]) for x in points)
    assert not torch.equal(points[0][~kept], data[~kept])


def test_the_12b_model_recomputes_activations_that_do_not_fit_unless_told_not_to(world, out):
    for method in METHODS:
        config = TrainConfig(method=method)
        chosen = [resolve_training_defaults(config, row, "cpu").checkpointing for row in (DEV, TINY)]
        assert chosen == ["auto", False]
        assert not resolve_training_defaults(replace(config, checkpointing=False), DEV, "cpu").checkpointing
    assert go(world, out, "--no-checkpointing", steps=1) == 0
    assert json.loads((out / "config.json").read_text())["config"]["checkpointing"] is False


def test_the_sampler_feeds_what_training_fed_with_tokens_and_texts_of_panels(world, out):
    """Texts, latents of kept panels, and who sees whom; the whole way through the file's metadata."""
    flags = ["--condition", "clean", "--concat", "tokens", "--text", "panel"]
    assert go(world, out, *flags, "--sample-every", "1", steps=1) == 0
    loader = encoded(world, out, *flags)
    example = loader.trained[0][0]
    batch = loader.collate(loader.layouts[0], [example], [(1,)], [False])
    request = {"prompt": example.caption, "mask": "2", "panels": (str(world / "sets" / "0" / "1.png"),)}
    sampler, plain = (Sampler(world, *lora, **request) for lora in ([out / "lora.safetensors"], []))
    kept = sampler.kept
    for sampled, trained in ((sampler.txt, batch.txt), (sampler.vec, batch.vec)):
        assert torch.allclose(sampled, trained, atol=1e-5), "but for rounding: training encodes texts one by one"
    assert torch.equal(sampler.data[:, kept], pack(batch.known)[:, kept])
    assert sampler.txt.shape[1] == 2 * plain.txt.shape[1] and not torch.equal(sampler.vec, plain.vec)
    assert not torch.equal(sampler.data, plain.data), "encoded by itself"
    ((_, txt, _, mask, _),) = sampler.prefilled
    assert torch.equal(txt, sampler.txt) and torch.equal(mask, batch.attention_mask)
    assert plain.prefilled[0][3] is None


def test_a_caption_that_a_lora_of_panel_texts_cannot_read_is_refused_before_anything_loads(world, out):
    assert go(world, out, "--text", "panel", steps=1) == 0
    with pytest.raises(ValueError, match="each panel is to read its own part of 'a fox and a bear': it has no mark"):
        Sampler(world, out / "lora.safetensors", prompt="a fox and a bear")


def test_the_sheet_of_a_clean_run_keeps_the_first_panel(world, out, monkeypatch):
    calls, real = [], iclora.monitor.keep_clean
    monkeypatch.setattr(iclora.monitor, "keep_clean", lambda *args: calls.append(args) or real(*args))
    assert go(world, out, "--condition", "clean", "--sample-every", "2", steps=2) == 0
    ((known, mask),) = calls
    assert mask.flatten().tolist() == [0, 0, 1, 1] * 2 and known.abs().max() > 0


# references (UNO)


def on_pairs(world):
    return "--method", "uno", "--data", str(world / "pairs.json"), "--ref-size", "32", "--offset", "w"


def uno(world, out, *flags, **more):
    return go(world, out, *on_pairs(world), *flags, **more)


@pytest.fixture(scope="module")
def referred(world):
    """A run on pairs with one and two references, mixed."""
    assert uno(world, world / "runs" / "uno", "--holdout", "0.4", "--sample-every", "6") == 0
    return world / "runs" / "uno"


def test_uno_writes_the_names_of_the_release_and_how_it_was_trained(world, referred):
    tensors, metadata = read_header(referred / "lora.safetensors")
    ends = [f"processor.{kind}_lora{{}}.{half}.weight" for kind in ("proj", "qkv") for half in ("down", "up")]
    double = {"double_blocks.0." + end.format(stream) for end in ends for stream in (1, 2)}
    assert tensors.keys() == double | {"single_blocks.0." + end.format("") for end in ends}
    assert {name.removeprefix("iclora."): text for name, text in metadata.items() if name.startswith("iclora.")} == {
        "method": "uno", "stage": "1", "offset": "w", "offset_scale": "1.0", "ref_size": "32", "posterior": "sample",
        "reference_attention": "joint", "base": "model", "steps": "6",
    }  # fmt: skip
    rows = [json.loads(line) for line in (referred / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation" in row] == [2, 4, 6]
    size = LEFT + 2 * (NARROW + GAP), TOP + 32 + 16 + 32 + 32 + 4 * GAP  # two references above what is made and target
    assert Image.open(referred / "sheet-000006.png").size == size, "one pair of each bucket"


def test_batches_of_one_and_two_references_take_turns_and_no_pair_is_left_out(world, referred):
    loader = encoded(world, referred, *on_pairs(world), "--holdout", "0")
    seen = [loader.batch(number) for number in range(loader.batches.before(2))]
    assert {len(layout.references) for layout, _ in seen} == {1, 2}
    assert all(len(e.references) == len(layout.references) for layout, some in seen for e in some)
    assert len({e.name for _, some in seen for e in some}) == 6


def test_a_killed_uno_run_ends_in_the_same_bytes(world, referred, out, monkeypatch):
    flags = ["--holdout", "0.4", "--sample-every", "6"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(iclora.training, "flow_loss", killing(iclora.training.flow_loss, 4))
        uno(world, out, *flags)
    assert uno(world, out, *flags) == 0
    assert files(out) == files(referred)


def test_a_killed_run_with_the_official_codes_choices_ends_in_the_same_bytes(world, referred, out, monkeypatch):
    flags = ["--lora-init", "uno", "--target-posterior", "sample", "--eps", "1e-6"]
    assert uno(world, beside(out, "choices"), *flags) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(iclora.training, "flow_loss", killing(iclora.training.flow_loss, 4))
        uno(world, out, *flags)
    assert uno(world, out, *flags) == 0
    assert files(out) == files(beside(out, "choices")) != files(referred)
    told = {key for key in read_header(out / "lora.safetensors")[1] if key.startswith("iclora.")}
    assert told == {key for key in read_header(referred / "lora.safetensors")[1] if key.startswith("iclora.")}


def shown(world, *loras, **more):
    request = {"ref": (str(world / "pairs" / "1-2.png"),), "grid": "1x1", "prompt": "picture 1"}
    return Sampler(world, *loras, **{**request, **more})


def test_the_sampler_follows_how_uno_was_trained_and_an_untrained_file_changes_nothing(world, referred, out):
    sampler = shown(world, referred / "lora.safetensors")
    config = sampler.plan.config
    assert (config.offset, config.ref_size, config.posterior, config.guidance) == ("w", 32, "sample", 4.0)
    assert uno(world, out, "--lr", "0", steps=1) == 0
    base, fresh = (shown(world, *lora, ref_size=32, offset="w").first for lora in ([], [out / "lora.safetensors"]))
    assert torch.equal(fresh, base) and (sampler.first - base).abs().max() > 1e-4


def test_the_sampler_feeds_the_references_and_places_that_training_fed(world, referred):
    loader = encoded(world, referred, *on_pairs(world), "--holdout", "0.4")
    layout, example = next((layout, e) for layout, some in loader.held_out for e in some if len(e.references) == 2)
    batch = loader.collate(layout, [example], [()], [False])
    references = tuple(map(str, example.references))
    sampler = shown(world, referred / "lora.safetensors", posterior="mean", ref=references)
    ((ids, txt, refs, mask, isolate_refs),) = sampler.prefilled
    assert torch.allclose(refs, batch.references, atol=1e-6) and refs.shape[1] > 0
    assert torch.equal(ids[:, txt.shape[1] :], batch.ids) and not ids[:, : txt.shape[1]].any()
    assert mask is None and not isolate_refs


def test_the_second_stage_starts_from_the_first_and_keeps_its_offset(world, referred, out, capsys):
    shutil.copy(referred / "lora.safetensors", world / "first.safetensors")
    flags = ["--method", "uno", "--data", str(world / "pairs.json"), "--stage", "2", "--lr", "0"]
    assert go(world, out, *flags, "--init-lora", str(world / "first.safetensors"), steps=1) == 0
    said = capsys.readouterr().err
    assert "starting from first.safetensors: xlabs names" in said and "stage 2 starts cold" not in said
    metadata = read_header(out / "lora.safetensors")[1]
    assert (metadata["iclora.stage"], metadata["iclora.offset"], metadata["iclora.ref_size"]) == ("2", "w", "32")
    first, second = (load_file(path / "lora.safetensors") for path in (referred, out))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert steps_of(out) == [1]
    assert go(world, beside(out, "cold"), *flags, "--ref-size", "32", steps=1) == 0
    assert "stage 2 starts cold; the paper starts it from the LoRA of stage 1, which goes" in capsys.readouterr().err
    assert go(world, beside(out, "one"), *flags[:4], "--ref-size", "32", steps=1) == 0
    assert "rows of --data have up to 2 references; the paper's stage 1 has one" in capsys.readouterr().err
    rows = [row for row in json.loads((world / "pairs.json").read_text()) if len(row["image_paths"]) == 1]
    (world / "single.json").write_text(json.dumps(rows))
    flags[3] = str(world / "single.json")
    assert go(world, beside(out, "single"), *flags, "--ref-size", "32", steps=1) == 0
    assert "every row of --data has one reference; the paper's stage 2 has several" in capsys.readouterr().err


def test_references_alone_are_trained_and_followed_by_the_sampler_and_the_second_stage(world, out, monkeypatch):
    fed, real = [], iclora.training.flow_loss
    monkeypatch.setattr(iclora.training, "flow_loss", lambda flux, *given: fed.append(given[0]) or real(flux, *given))
    assert uno(world, out, "--reference-attention", "alone", "--sample-every", "2", steps=2) == 0
    assert len(fed) >= 2 and all(batch.isolate_refs for batch in fed) and (out / "sheet-000002.png").exists()
    shutil.copy(out / "lora.safetensors", world / "alone.safetensors")
    sampler = shown(world, world / "alone.safetensors")
    x, ids = sampler.points[:1], image_ids(sampler.plan.layout, "w", 1.0)
    txt, vec, txt_ids = sampler.txt, sampler.vec, torch.zeros(1, sampler.txt.shape[1], 3)
    with torch.inference_mode():
        references = encode_references(sampler.pipeline.autoencoder, sampler.plan, 0)
        given = (x, ids, txt, txt_ids, torch.ones(1), vec, torch.tensor([4.0]), None, references)
        trained, joint = (sampler.pipeline.flux(*given, isolate_refs) for isolate_refs in (True, False))
    assert sampler.plan.config.reference_attention == "alone"
    assert torch.equal(sampler.first, trained), "what flow_loss calls"
    assert (sampler.first - joint).abs().max() > 1e-4
    assert torch.equal(shown(world, world / "alone.safetensors", reference_attention="joint").first, joint)
    flags = ["--method", "uno", "--data", str(world / "pairs.json"), "--stage", "2"]
    assert go(world, beside(out, "two"), *flags, "--init-lora", str(world / "alone.safetensors"), steps=1) == 0
    assert read_header(beside(out, "two") / "lora.safetensors")[1]["iclora.reference_attention"] == "alone"


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["joint", "alone"])
def test_two_processes_of_uno_equal_one(world, out, attention):
    flags = [*on_pairs(world), "--holdout", "0", "--reference-attention", attention]
    status, said = together(world, out, *flags)
    assert status == [0, 0] and said[1] == [], said
    one = beside(out, "one")
    assert go(world, one, *flags) == 0
    # moments are 1e-6 apart; but AdamW's first steps are as long for an element whose gradient is nothing but rounding
    assert compare(out, one) < WHOLE
    losses = [[json.loads(row)["loss"] for row in (f / "metrics.jsonl").read_text().splitlines()] for f in (out, one)]
    assert len(losses[0]) == 6 and np.allclose(*losses, rtol=1e-5)


def test_more_references_than_memory_allows_are_refused_before_anything_is_encoded(world, out, capsys, monkeypatch):
    monkeypatch.setattr(iclora.loader.Loader, "encode", None)
    about = (
        r"^error: 6 tokens of references \(2 in a row of --data\) beside 4 of the picture, {} examples at once, take "
        r"about \S+ GB in the transformer"
    )
    with monkeypatch.context() as patch:
        patch.setattr(iclora.memory, "MAX_TOKENS", 9)
        assert uno(world, out) == 2
    assert re.search(about.format(2) + "; at most 9 tokens are possible, so use --checkpointing", refused(capsys))
    monkeypatch.setattr(iclora.memory, "free_memory", lambda device: 4_000_000)
    estimates = []
    for flags, advice in {
        (): "use --checkpointing, raise --accumulate",
        ("--checkpointing",): "raise --accumulate",
        ("--reference-attention", "alone"): "use --checkpointing, raise --accumulate",
    }.items():
        assert uno(world, out, "--batch", "4000", "--accumulate", "2", *flags) == 2
        line = refused(capsys)
        told = about.format(2000) + f", but cpu has 0.004 GB; {advice}, lower --ref-size or have fewer$"
        assert re.search(told, line)
        estimates.append(float(re.search(r"about (\S+) GB", line)[1]))
    assert estimates[2] > estimates[0] > estimates[1] and not out.exists()


def test_sample_py_takes_the_file_with_and_without_a_strength(world, clean, tmp_path, capsys):
    argv = ["--model", str(world / "model"), "--grid", "1x2", "--panel-size", "32", "--steps", "1", "--prompt", PROMPT]
    argv += ["--device", "cpu", "--out", str(tmp_path / "out")]
    for number, text in enumerate((f"{clean}", f"{clean}:0.8"), start=1):
        assert sample.main([*argv, "--lora", text]) == 0
        record = json.loads((tmp_path / "out" / f"000{number}.json").read_text())
        assert record["config"]["lora"] == [f"{clean}:{0.8 if number == 2 else 1:g}"]
    capsys.readouterr()
    before = files(tmp_path / "out")
    for text, message in {
        "nowhere.safetensors": "'nowhere.safetensors': there is no such file",
        "nowhere.safetensors:0.5": "'nowhere.safetensors': there is no such file",
        f"{clean}:strong": "'strong' is no strength; use 0.8",
        f"{clean}:nan": "strength nan is out of range",
        f"{clean}:1e9": "strength 1e+09 is out of range; 1 is as trained",
        f"{world / 'model' / 'ae.safetensors'}": "holds a FLUX.1 autoencoder, not a LoRA",
    }.items():
        assert sample.main([*argv, "--lora", text]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert files(tmp_path / "out") == before
