"""What cannot be meant costs one line on stderr and status 2, names the value and what to do, and leaves nothing."""

import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from blackbox import FIXTURES, GOLDEN, REFERENCES, ROOT, SCRIPTS, TINY, files, main, refused

CAT = REFERENCES / "cat.png"
GOLDEN_LORAS = GOLDEN / "lora"
FLAGS = {
    "sample": "--grid --mask --panels --set --ref --prompt --panel-prompt --preset --model --steps --guidance --seed "
    "--num --lora --panel-size --ref-size --offset --offset-scale --posterior --reference-attention --schedule "
    "--strength --fit --device --dtype --quantize --compile --offload --tile --vram --dry-run --out --config",
    "train": "--data --method --stage --grid --model --rank --targets --init-lora --condition --concat --text "
    "--ref-size --offset --offset-scale --posterior --reference-attention --steps --batch --accumulate --lr --warmup "
    "--decay --ema --dropout --times --panel-size --fit --holdout --save-every --sample-every --checkpointing "
    "--no-checkpointing --seed --device --dtype --quantize --compile --offload --vram --dry-run --tensorboard --out "
    "--config",
    "data": "--data --grid --panel-size --ref-size --model",
    "convert": "--to --model --dtype",
}
CHOICES = {
    "sample": ["d,h,w,o", "sample,mean", "joint,alone", "tokens,uno-release", "crop,pad,stretch", "auto,cpu,cuda,mps",
               "float32,bfloat16,float16"],
    "train": ["in-context-lora,uno", "none,clean", "pixels,tokens", "joint,panel", "logit-normal,shifted,uniform"],
    "data": [],
    "convert": ["diffusers,kohya,xlabs"],
}  # fmt: skip
PRESETS = (
    "couple-profile film-storyboard font-design home-decoration portrait-illustration portrait-photography "
    "ppt-templates sandstorm-visual-effect sparklers-visual-effect visual-identity-design"
)


# the flags


@pytest.mark.parametrize("command", FLAGS)
def test_todays_flags_and_choices_are_there_tomorrow(command, capsys):
    assert main(command, "--help") == 0
    text = capsys.readouterr().out
    listed = re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", text.partition("options:")[2])
    assert set(FLAGS[command].split()) <= set(listed)
    packed = re.sub(r"\s+", "", text)
    assert all("{" + choices + "}" in packed for choices in CHOICES[command])
    if command == "sample":
        assert all(name in packed for name in PRESETS.split())


# bad files, made once


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder with broken and wrong things by name."""
    folder = tmp_path_factory.mktemp("bad")
    whole = CAT.read_bytes()
    (folder / "good.png").write_bytes(whole)
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("a red fish\n")
    (folder / "empty.png").write_bytes(b"")
    Image.new("RGB", (400, 2)).save(folder / "thread.png")
    Image.new("RGB", (400, 40)).save(folder / "strip.png")
    huge = b"\x00\x01\x86\xa0" * 2 + b"\x08\x02\x00\x00\x00"
    (folder / "huge.png").write_bytes(
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + huge + zlib.crc32(b"IHDR" + huge).to_bytes(4, "big")
    )
    (folder / "cut.json").write_text('{"config": {"grid": "1x2"')
    (folder / "list.json").write_text("[]")
    (folder / "unknown.json").write_text('{"config": {"colour": "red"}}')
    (folder / "wrong-kind.json").write_text('{"config": {"steps": "4"}}')
    (folder / "range.json").write_text('{"config": {"steps": 5000}}')
    lora = (FIXTURES / "loras" / "clean.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(lora[:-100])
    (folder / "long.safetensors").write_bytes(lora + b"\0")
    (folder / "pickle.safetensors").write_bytes(b"PK\x03\x04" + bytes(300))
    (folder / "file").write_bytes(b"mine")
    for name in ("several", "unnumbered", "binary"):
        (folder / name).mkdir()
    shutil.copy(CAT, folder / "several" / "1.png")
    shutil.copy(CAT, folder / "several" / "01.png")
    shutil.copy(CAT, folder / "unnumbered" / "a.png")
    shutil.copy(CAT, folder / "binary" / "1.png")
    (folder / "binary" / "caption.txt").write_bytes(bytes(range(128, 256)))
    for name, missing in {
        "no-ae": "ae.safetensors",
        "no-text": "text_encoder_2",
        "cut-flux": "flux1-tiny.safetensors",
    }.items():
        (folder / name).mkdir()
        for path in TINY.iterdir():
            if path.name != missing:
                (folder / name / path.name).symlink_to(path.resolve())
    (folder / "cut-flux" / "flux1-tiny.safetensors").write_bytes((TINY / "flux1-tiny.safetensors").read_bytes()[:-4096])
    sets = {"no-sets": [], "no-grid": [None], "no-caption": ['{"grid": "1x2"}'], "odd-set": ['{"gird": "1x2"}']}
    for name, (*settings,) in sets.items():
        (folder / name).mkdir()
        if settings:
            shutil.copy(ROOT / "sets" / "sketch" / "01.png", folder / name / "01.png")
            if name != "no-caption":
                shutil.copy(ROOT / "sets" / "sketch" / "01.txt", folder / name / "01.txt")
            if settings[0]:
                (folder / name / "set.json").write_text(settings[0])
    (folder / "unmarked").mkdir()
    (folder / "unmarked" / "set.json").write_text('{"grid": "1x2"}')
    shutil.copy(ROOT / "sets" / "sketch" / "01.png", folder / "unmarked" / "01.png")
    (folder / "unmarked" / "01.txt").write_text("a cat and its drawing")
    (folder / "broken-set").mkdir()
    (folder / "broken-set" / "set.json").write_text('{"grid": "1x2"}')
    (folder / "broken-set" / "01.png").write_bytes(b"no picture")
    (folder / "broken-set" / "01.txt").write_text("[IMAGE1] a cat [IMAGE2] a cat")
    row = {"prompt": "a cat", "image_path": "good.png", "image_tgt_path": "good.png"}
    pairs = {
        "no-reference": {key: row[key] for key in ("prompt", "image_tgt_path")},
        "no-target": {key: row[key] for key in ("prompt", "image_path")},
        "missing-target": {**row, "image_tgt_path": "nowhere.png"},
        "outside": {**row, "image_path": "../good.png"},
        "both": {**row, "image_paths": ["good.png"]},
    }
    for name, entry in pairs.items():
        (folder / f"{name}.pairs.json").write_text(json.dumps([entry]))
    (folder / "rows.jsonl").write_text('{"panels": ["good.png", "good.png"], "grid": "1x2"}\n')
    (folder / "damaged-run").mkdir()
    (folder / "damaged-run" / "checkpoint.safetensors").write_bytes(lora[:100])
    (folder / "other-run").mkdir()
    (folder / "other-run" / "checkpoint.safetensors").write_bytes(lora)
    return folder


TWO = ["--prompt", "[IMAGE1] a cat, [IMAGE2] a cat"]
SAMPLE = [
    (["--stpes", "3"], ("--stpes", "did you mean --steps")),
    (["stray"], ("'stray'", "follows no flag")),
    (["--steps"], ("--steps", "--help")),
    (["--steps", "0"], ("--steps 0", "1 to 1000")),
    (["--steps", "many"], ("--steps 'many'", "whole number")),
    (["--guidance", "nan"], ("--guidance nan", "0 to 100")),
    (["--strength", "1.5"], ("--strength 1.5", "0 to 1")),
    (["--num", "0"], ("--num 0", "1 to 10000")),
    (["--seed", "9223372036854775807", "--num", "2"], ("--seed 9223372036854775807", "--num 2", "last seed")),
    (["--fit", "crap"], ("--fit 'crap'", "did you mean crop")),
    (["--offset", "x"], ("--offset 'x'", "d, h, w, o")),
    (["--preset", "film"], ("--preset 'film'", "film-storyboard")),
    (["--grid", "2by2"], ("'2by2'", "ROWSxCOLS", "2x2")),
    (["--grid", "0x2"], ("0x2", "2x2")),
    (["--grid", "9x9"], ("9x9", "81 panels")),
    (["--grid", "2x2", "--mask", "9"], ("'9'", "1 to 4")),
    (["--grid", "2x2", "--mask", "a"], ("'a'", "2,4")),
    (["--panel-size", "17", *TWO], ("17x17", "multiples of 16")),
    (["--grid", "5x7"], ("5x7", "2x2")),
    (["--model", "nowhere"], ("'nowhere'", "tiny")),
    (["--model", "{bad}/no-ae"], ("no-ae", "ae.safetensors")),
    (["--model", "{bad}/no-text", *TWO], ("no-text", "text_encoder_2")),
    (["--model", "{bad}/cut-flux", *TWO], ("flux1-tiny.safetensors",)),
    (["--grid", "1x2", "--mask", "2", "--panels", "nowhere.png", *TWO], ("nowhere.png", "no such file")),
    (["--grid", "1x2", "--mask", "2", "--panels", "{bad}/cut.png", *TWO], ("cut.png",)),
    (["--grid", "1x2", "--mask", "2", "--panels", "{bad}/text.png", *TWO], ("text.png",)),
    (["--grid", "1x2", "--mask", "2", "--panels", "{bad}/empty.png", *TWO], ("empty.png",)),
    (["--grid", "1x2", "--mask", "2", "--panels", "{bad}/huge.png", *TWO], ("huge.png",)),
    (["--grid", "1x2", "--mask", "2", "--panels", "{bad}/thread.png", *TWO], ("thread.png",)),
    (["--grid", "1x2", "--mask", "2", "--panels", *["{bad}/good.png"] * 3, *TWO], ("3 panels", "1x2")),
    (["--grid", "1x2", "--strength", "0.5", "--panels", "{bad}/good.png", *TWO], ("1 panels", "0.5", "all 2")),
    (["--grid", "1x2", "--set", "{bad}/unnumbered", "--panels", "{bad}/good.png"], ("--panels and --set",)),
    (["--grid", "1x2", "--mask", "2", "--set", "{bad}/unnumbered"], ("unnumbered", "1.png")),
    (["--grid", "1x2", "--mask", "2", "--set", "{bad}/several"], ("several", "same number twice")),
    (["--grid", "1x2", "--mask", "2", "--set", "{bad}/binary"], ("caption.txt", "UTF-8")),
    (["--grid", "1x2", "--mask", "2", "--set", "sets/walk"], ("sets/walk", "many sets", "train.py")),
    (["--grid", "1x2", "--panel-prompt", "a"], ("1 --panel-prompt", "1x2")),
    (["--prompt", "a\0b"], ("prompt", "plain text")),
    (["--ref", "nope.png", "--prompt", "a cat."], ("nope.png", "no such file")),
    (["--ref", "{bad}/strip.png", "--prompt", "a cat."], ("strip.png", "400x40", "--ref-size")),
    (["--lora", "nowhere.safetensors", *TWO], ("--lora 'nowhere.safetensors'", "no such file")),
    (["--lora", "{loras}/clean.safetensors:strong", *TWO], ("'strong'", "0.8")),
    (["--lora", "{loras}/clean.safetensors:1e9", *TWO], ("1e+09", "out of range")),
    (["--lora", "{bad}/cut.safetensors", *TWO], ("cut.safetensors",)),
    (["--lora", "{bad}/long.safetensors", *TWO], ("long.safetensors",)),
    (["--lora", "{bad}/pickle.safetensors", *TWO], ("pickle.safetensors",)),
    (["--lora", "{tiny}/ae.safetensors", *TWO], ("ae.safetensors", "not a LoRA")),
    (["--lora", "{golden}/kohya.safetensors", *TWO], ("kohya.safetensors",)),
    (["--lora", "{golden}/refuse_dora.safetensors", *TWO], ("refuse_dora.safetensors", "DoRA")),
    (["--grid", "1x2", "--lora", "{loras}/tokens.safetensors", "--prompt", "a fox and a bear"], ("a fox and a bear",)),
    (["--grid", "1x2", "--lora", "{loras}/tokens.safetensors", "--ref", "{bad}/good.png", *TWO], ("--lora", "--ref")),
    (["--config", "nowhere.json"], ("nowhere.json", "no such file", "--config")),
    (["--config", "{bad}/cut.json"], ("cut.json", "damaged or no JSON")),
    (["--config", "{bad}/list.json"], ("list.json", "no configuration")),
    (["--config", "{bad}/unknown.json"], ("unknown.json", "'colour'", "unknown")),
    (["--config", "{bad}/wrong-kind.json"], ("wrong-kind.json", "steps", "whole number")),
    (["--config", "{bad}/range.json"], ("--steps 5000", "1 to 1000")),
    (["--out", "{bad}/file", *TWO], ("file", "not a folder")),
    (["--out", "{bad}/file/below", *TWO], ("file", "not a folder")),
    (["--out", "a" * 300, *TWO], ("File name too long", "name another")),
]  # fmt: skip
TRAIN = [
    (["--stpes"], ("--stpes", "did you mean --steps")),
    (["--lr", "fast"], ("--lr 'fast'", "number")),
    (["--rank", "0"], ("--rank 0", "1 to 4096")),
    (["--ema", "1"], ("--ema 1.0", "0.99999")),
    (["--condition", "cleen"], ("--condition 'cleen'", "did you mean clean")),
    (["--method", "unos"], ("--method 'unos'", "did you mean uno")),
    (["--model", "flux-nowhere"], ("'flux-nowhere'",)),
    (["--batch", "4", "--accumulate", "3"], ("batch of 4", "--accumulate 3")),
    (["--targets", "attention"], ("'attention'", "attn")),
    (["--init-lora", "nowhere.safetensors"], ("nowhere.safetensors",)),
    (["--init-lora", "{tiny}/ae.safetensors"], ("ae.safetensors", "not a LoRA")),
    (["--init-lora", "{golden}/kohya.safetensors"], ("kohya.safetensors",)),
    (["--grid", "3by1"], ("'3by1'", "ROWSxCOLS")),
    (["--data", "nowhere"], ("'nowhere'", "--data")),
    (["--data", "{bad}/no-sets"], ("no-sets", "no sets")),
    (["--data", "{bad}/no-grid"], ("grid", "set.json")),
    (["--data", "{bad}/broken-set"], ("01.png",)),
    (["--method", "uno"], ("--method uno", ".json of pairs")),
    (["--data", "{pairs}"], ("in-context-lora", "--method uno")),
    (["--offset", "w"], ("--offset", "in-context-lora", "leave it out")),
    (["--method", "uno", "--data", "{pairs}", "--condition", "clean"], ("--condition", "uno", "leave it out")),
    (["--method", "uno", "--data", "{pairs}", "--stage", "3"], ("--stage 3", "1 to 2")),
    (["--method", "uno", "--data", "{pairs}", "--targets", "mod"], ("img_mod.lin", "--targets uno")),
    (["--method", "uno", "--data", "{bad}/no-reference.pairs.json"], ("row 1", "references", "image_path")),
    (["--method", "uno", "--data", "{bad}/no-target.pairs.json"], ("row 1", "image_tgt_path")),
    (["--method", "uno", "--data", "{bad}/missing-target.pairs.json"], ("nowhere.png",)),
    (["--method", "uno", "--data", "{bad}/outside.pairs.json"], ("row 1", "../good.png", "out of its folder")),
    (["--config", "{tiny}/ae.safetensors"], ("ae.safetensors", "--config")),
    (["--config", "{bad}/unknown.json"], ("unknown.json", "'colour'")),
    (["--out", "{bad}/file"], ("file", "not a folder")),
    (["--out", "sets/runs"], ("sets/runs", "--data")),
]  # fmt: skip
CONVERT = [
    (["{golden}/kohya.safetensors", "{out}"], ("--to is missing", "diffusers, kohya, xlabs")),
    (["{golden}/kohya.safetensors", "{out}", "--to", "koya"], ("--to 'koya'", "did you mean kohya")),
    (["{golden}/kohya.safetensors", "{out}", "--too", "kohya"], ("--too", "did you mean --to")),
    (["{golden}/kohya.safetensors", "--to", "kohya"], ("two files",)),
    (["{golden}/kohya.safetensors", "{bad}/file", "--to", "kohya"], ("file", "not overwritten")),
    (["{golden}/kohya.safetensors", "{out}", "--to", "xlabs"], ("xlabs", "double_blocks.0.img_mlp.0")),
    (["{golden}/kohya.safetensors", "{out}/deeper", "--to", "kohya"], ("no folder",)),
    (["{golden}/kohya.safetensors", "{out}", "--to", "kohya", "--model", "nothing"], ("'nothing'",)),
    (["{golden}/kohya.safetensors", "{out}", "--to", "kohya", "--dtype", "int8"], ("--dtype 'int8'", "bfloat16")),
    (["none.safetensors", "{out}", "--to", "kohya"], ("none.safetensors", "cannot be read")),
    (["{bad}/cut.safetensors", "{out}", "--to", "kohya"], ("cut.safetensors",)),
    (["{bad}/pickle.safetensors", "{out}", "--to", "kohya"], ("pickle.safetensors",)),
    (["{tiny}/flux1-tiny.safetensors", "{out}", "--to", "kohya"], ("FLUX.1 transformer", "not a LoRA")),
    (["{golden}/refuse_dora.safetensors", "{out}", "--to", "kohya"], ("DoRA",)),
    (["{golden}/refuse_missing_half.safetensors", "{out}", "--to", "kohya"], ("without its lora_B",)),
    (["{golden}/refuse_wrong_width.safetensors", "{out}", "--to", "kohya"], ("(4, 56)",)),
]  # fmt: skip
DATA = [
    (["nowhere"], ("'nowhere'", "--data")),
    (["--gird", "1x2"], ("--gird", "did you mean --grid")),
    (["sets", "--grid", "1by2"], ("'1by2'", "ROWSxCOLS")),
    (["sets", "--panel-size", "8"], ("--panel-size 8", "16 to 8192")),
    (["sets", "--model", "nowhere"], ("'nowhere'",)),
]  # fmt: skip
BROKEN = [  # told on stdout, as all of a data set is looked through
    (["{bad}/no-sets"], ("no sets",)),
    (["{bad}/no-grid"], ("broken: ", "grid", "set.json")),
    (["{bad}/no-caption"], ("broken: ", "01.png", "caption")),
    (["{bad}/odd-set"], ("broken: ", "'gird'", "unknown")),
    (["{bad}/broken-set"], ("broken: ", "01.png")),
    (["{bad}/rows.jsonl"], ("broken: ", "rows.jsonl", "prompt")),
    (["sets/walk", "--grid", "2x2"], ("broken: ", "3 panels", "2x2")),
    (["{bad}/both.pairs.json"], ("broken: ", "row 1", "image_paths")),
    (["{bad}/missing-target.pairs.json"], ("broken: ", "nowhere.png")),
]
TABLE = [
    (command, *row)
    for command, rows in (("sample", SAMPLE), ("train", TRAIN), ("convert", CONVERT), ("data", DATA))
    for row in rows
]


def written(argv, bad, out):
    """A command line of the table, its places filled in."""
    places = {
        "bad": bad, "out": out, "tiny": TINY, "golden": GOLDEN_LORAS, "loras": FIXTURES / "loras",
        "pairs": FIXTURES / "pairs" / "pairs.json",
    }  # fmt: skip
    return [word.format(**places) if "{" in word else word for word in argv]


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(Path(folder).rglob("*"))}


def named(value):
    words = value if isinstance(value, list) else [value] if isinstance(value, str) else []
    return " ".join(words)[:60].replace("\0", "0")


@pytest.mark.parametrize(("command", "argv", "told"), TABLE, ids=named)
def test_bad_input_is_one_line_with_the_value_and_advice_and_leaves_nothing(
    bad, tmp_path, monkeypatch, capsys, command, argv, told
):
    monkeypatch.chdir(ROOT)
    out, before = tmp_path / "out", everything(bad)
    more = ["--out", out] if command in ("sample", "train") and "--out" not in argv else []
    assert main(command, *written(argv, bad, out), *more) == 2
    refused(capsys, *told)
    assert not list(tmp_path.iterdir()) and everything(bad) == before
    assert not (ROOT / "sets" / "runs").exists()


@pytest.mark.parametrize(("argv", "told"), BROKEN, ids=named)
def test_a_broken_data_set_is_named_and_not_usable(bad, monkeypatch, capsys, argv, told):
    monkeypatch.chdir(ROOT)
    assert main("data", *written(argv, bad, None)) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert all(fragment in out for fragment in (*told, "not usable")), out + err


def test_a_caption_that_cannot_be_taken_apart_is_refused_where_each_panel_reads_its_own(bad, tmp_path, capsys):
    assert main("train", "--data", bad / "unmarked", "--text", "panel", "--out", tmp_path / "out") == 2
    *_, line = capsys.readouterr().err.splitlines()  # notes may come before it
    assert line.startswith("error: ") and "a cat and its drawing" in line and "--text joint" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["damaged-run", "other-run"])
def test_a_run_folder_with_a_foreign_checkpoint_is_refused_and_left_alone(bad, monkeypatch, capsys, name):
    monkeypatch.chdir(ROOT)
    before = files(bad / name)
    assert main("train", "--data", "sets/sketch", "--steps", "1", "--sample-every", "0", "--out", bad / name) == 2
    refused(capsys, name, "checkpoint.safetensors")
    assert files(bad / name) == before


# as processes


@pytest.mark.parametrize(("command", "argv", "told"), [
    pytest.param(
        "sample", ["--grid", "1x2", "--mask", "2", "--panels", "{bad}/cut.png", *TWO, "--out", "{out}"], "cut.png",
        marks=pytest.mark.slow,
    ),
    ("train", ["--steps", "0", "--out", "{out}"], "--steps 0"),
    pytest.param("data", ["nowhere"], "'nowhere'", marks=pytest.mark.slow),
    ("convert", ["{bad}/cut.safetensors", "{out}", "--to", "kohya"], "cut.safetensors"),
], ids=["sample", "train", "data", "convert"])  # fmt: skip
def test_a_process_says_the_same_and_exits_with_2(bad, tmp_path, command, argv, told):
    argv = [sys.executable, *SCRIPTS[command], *written(argv, bad, tmp_path / "out")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and told in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_the_flags_is_answered_without_loading_anything():
    code = "import sys, {0}; status = {0}.main(['--stpes']); print(status, 'torch' in sys.modules)"
    for command in ("sample", "train"):
        argv = [sys.executable, "-c", code.format(command)]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == "2 False\n" and "did you mean --steps" in done.stderr
