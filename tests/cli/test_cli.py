import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from iclora.cli import complain, note, parse, read_record
from iclora.config import (
    DEV,
    LAST_SEED,
    SCHNELL,
    TINY,
    TINY_UNGUIDED,
    SampleConfig,
    TrainConfig,
    flag,
    model_defaults,
    resolve_defaults,
    saved,
)
from iclora.convert import ConvertConfig
from iclora.data import DataConfig
from iclora.prompts import TASKS, preset
from model.lora import INITS
from model.position import MODES

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--grid --mask --panels --set --ref --prompt --panel-prompt --preset --model --steps --guidance --seed --num "
    "--lora --panel-size --ref-size --offset --offset-scale --posterior --reference-attention --schedule --strength "
    "--fit --device --dtype --quantize --compile --offload --tile --vram --dry-run --out --jobs --config"
)


def read(*argv):
    return parse(SampleConfig, list(argv), "about")


def recorded(tmp_path, **values):
    path = tmp_path / "0001.json"
    path.write_text(json.dumps({"config": values}))
    return str(path)


# flags


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (SampleConfig, FLAGS), (DataConfig, "--data --grid --panel-size --ref-size --model --method"),
        (ConvertConfig, "--to --model --dtype"),
    ],
)  # fmt: skip
def test_the_flags_are_frozen_so_that_a_new_one_is_a_decision(config, flags):
    assert [flag(field.name) for field in fields(config)] == flags.split()


def test_no_flags_give_the_defaults():
    assert read() == SampleConfig()
    assert (SampleConfig().model, SampleConfig().mask, SampleConfig().out) == ("tiny", "all", "out")


def test_every_kind_of_flag_is_read():
    config = read("--steps", "7", "--guidance", "2.5", "--tile", "--fit", "pad", "--panels", "a.png", "b.png")
    assert (config.steps, config.guidance, config.tile, config.fit) == (7, 2.5, True, "pad")
    assert (config.panels, config.prompt) == (("a.png", "b.png"), None)


def test_several_texts_may_follow_one_flag_or_repeat_it():
    assert read("--panel-prompt", "a", "b").panel_prompt == ("a", "b")
    assert read("--panel-prompt", "a", "--panel-prompt", "b").panel_prompt == ("a", "b")


@pytest.mark.parametrize(("name", "known"), [("offset", tuple(MODES)), ("lora_init", INITS)])
def test_the_choices_are_the_ones_there_are(name, known):
    field = next(field for field in (*fields(SampleConfig), *fields(TrainConfig)) if field.name == name)
    assert field.metadata["choices"] == known


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stpes", "3"], "^--stpes is unknown; did you mean --steps[?] see --help for all flags$"),
        (["--panel_size=3"], "^--panel_size is unknown; did you mean --panel-size[?]"),
        (["--step", "3"], "--step is unknown"),
        (["-steps", "3"], "did you mean --steps"),
        (["3"], "'3' follows no flag; put texts with spaces in quotes"),
        (["--steps"], "^--steps: expected one argument; see --help$"),
        (["--panels"], "^--panels: expected at least one argument"),
        (["--tile=3"], "^--tile: ignored explicit argument"),
        (["--steps", "many"], "^--steps 'many' is not a whole number"),
        (["--steps", "2.5"], "--steps '2.5' is not a whole number"),
        (["--seed", "9" * 5000], "--seed '9{40}' is not a whole number"),
        (["--guidance", "a\nb"], r"--guidance 'a\\nb' is not a number"),
        (["--steps", "0"], "^--steps 0 is out of range; use 1 to 1000$"),
        (["--steps", str(10**9)], "--steps 1000000000 is out of range; use 1 to 1000"),
        (["--num", "0"], "--num 0 is out of range; use 1 to 10000"),
        (["--seed", "-1"], f"--seed -1 is out of range; use 0 to {LAST_SEED}"),
        (["--seed", str(2**63)], "--seed 9223372036854775808 is out of range"),
        (["--seed", str(LAST_SEED), "--num", "2"], "leaves no room for --num 2"),
        (["--guidance", "nan"], "--guidance nan is out of range; use 0 to 100"),
        (["--guidance", "1e400"], "--guidance inf is out of range"),
        (["--strength", "1.5"], "--strength 1.5 is out of range; use 0 to 1"),
        (["--fit", "cropp"], "^--fit 'cropp' is unknown; did you mean crop[?] choose one of crop, pad, stretch$"),
        (["--device", "tpu"], "--device 'tpu' is unknown; .*choose one of auto, cpu, cuda, mps"),
        (["--dtype", "fp8"], "--dtype 'fp8' is unknown"),
        (["--preset", "film-story"], "--preset 'film-story' is unknown; did you mean film-storyboard[?] choose one of"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line(argv, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [SampleConfig, TrainConfig])
def test_an_empty_value_as_an_unset_variable_leaves_it_is_refused_but_for_the_prompt(kind):
    for field in fields(kind):
        if field.type in ("str", "str | None", str, str | None) and field.name not in ("prompt", "config"):
            with pytest.raises(ValueError, match=f"{flag(field.name)} is empty; give it a value, or leave it out"):
                parse(kind, [flag(field.name), ""], "")
    assert SampleConfig(prompt="").prompt == ""


def test_help_shows_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert all(name in text for name in FLAGS.split())
    assert all(
        default in text
        for default in ("(default: tiny)", "(default: 20; schnell 4; UNO's released LoRA 25)", "up (default: 0)")
    )


@pytest.mark.parametrize("script", ["sample", "train"])
def test_a_typo_is_answered_without_waiting_for_torch(script):
    code = f"import sys, {script}; status = {script}.main(['--stpes']); print(status, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 False\n"
    assert done.stderr == "error: --stpes is unknown; did you mean --steps? see --help for all flags\n"


# replaying a file


def test_a_replayed_file_gives_its_values_and_flags_win(tmp_path):
    path = recorded(tmp_path, steps=7, seed=3, panels=["a.png"], guidance=2)
    config = read("--config", path, "--seed", "4")
    assert (config.steps, config.seed, config.panels, config.guidance) == (7, 4, ("a.png",), 2)


def test_what_is_saved_replays_to_the_same_configuration(tmp_path):
    config = SampleConfig(grid="3x1", panels=("a", "b"), prompt="x", strength=0.5, tile=True, dtype="bfloat16")
    path = recorded(tmp_path, **saved(config))
    assert saved(read("--config", path)) == saved(config)


def test_settings_from_before_an_option_existed_repeat_what_was_done_then(tmp_path):
    path = recorded(tmp_path, method="in-context-lora", rank=8, lr=1e-4)
    config = parse(TrainConfig, ["--config", path], "about")
    assert (config.lora_init, config.target_posterior, config.eps) == ("kaiming", "mean", 1e-8)
    assert parse(TrainConfig, ["--config", path, "--eps", "1e-6"], "about").eps == 1e-6
    for flags in (["--method", "uno"], ["--model", "flux-dev"]):
        config = parse(TrainConfig, ["--config", path, *flags], "about")
        assert (config.lora_init, config.target_posterior, config.eps) == (None, None, None), "decided anew"


@pytest.mark.parametrize(
    ("values", "flags", "forgotten"),
    [
        ({"steps": 20, "panel_size": "64", "dtype": "float32"}, ["--model", "flux-dev"], "steps panel_size dtype"),
        ({"grid": "2x2", "panel_size": "64"}, ["--preset", "film-storyboard"], "grid panel_size"),
        ({"prompt": "the joint caption"}, ["--panel-prompt", "a"], "prompt"),
        ({"set": "x"}, ["--panels", "a.png"], "set"),
        ({"ref_size": 64, "guidance": 3.5}, ["--ref", "a.png"], "ref_size guidance"),
        (
            {
                **{"ref_size": 64, "offset": "d", "offset_scale": 1, "posterior": "mean"},
                **{"reference_attention": "alone", "schedule": "uno-release"},
            },
            ["--lora", "a.safetensors"],
            "ref_size offset offset_scale posterior reference_attention schedule",
        ),
    ],
)
def test_a_flag_makes_void_what_the_file_only_derived(tmp_path, values, flags, forgotten):
    config = read("--config", recorded(tmp_path, **values), *flags)
    assert all(getattr(config, name) is None for name in forgotten.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged or no JSON; --config takes a JSON that a run saved"),
        ("\x89PNG", "cannot read .*; --config takes a JSON that a run saved"),
        ("[" * 100_000, "damaged or no JSON"),
        ("\udcff", "damaged or no JSON"),
        ("[]", "holds no configuration"),
        ('{"config": 3}', "holds no configuration"),
        ('{"config": {"stpes": 3}}', "sets 'stpes', which is unknown; did you mean steps[?]"),
        ('{"config": {"steps": "3"}}', "sets steps to '3', which is not a whole number"),
        ('{"config": {"steps": true}}', "sets steps to 'True', which is not a whole number"),
        ('{"config": {"tile": 1}}', "sets tile to '1', which is not true or false"),
        ('{"config": {"mask": null}}', "sets mask to 'None', which is not a text"),
        ('{"config": {"panels": "a.png"}}', "which is not a list of texts"),
        ('{"config": {"panels": [1]}}', "which is not a list of texts"),
        ('{"config": {"guidance": NaN}}', "--guidance nan is out of range"),
        ('{"config": {"steps": 0}}', "--steps 0 is out of range"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        read("--config", str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.json", "", "a\0b", "."])
def test_a_missing_file_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="there is no such file; --config takes"):
        read_record(tmp_path / name if name else "")


# rows of defaults


@pytest.mark.parametrize(
    ("guidance_embed", "hidden_size", "row"),
    [
        (True, 3072, DEV),
        (False, 3072, SCHNELL),
        (True, 192, TINY),
        (False, 192, TINY_UNGUIDED),
    ],
)
def test_the_row_follows_from_what_the_model_is(guidance_embed, hidden_size, row):
    assert model_defaults(SimpleNamespace(guidance_embed=guidance_embed, hidden_size=hidden_size)) is row


@pytest.mark.parametrize(
    ("row", "device", "steps", "guidance", "size", "dtype"),
    [
        (DEV, "cpu", 20, 3.5, "512", "bfloat16"),
        (DEV, "cuda", 20, 3.5, "512", "bfloat16"),
        (SCHNELL, "cuda", 4, None, "512", "bfloat16"),
        (TINY, "cpu", 20, 3.5, "64", "float32"),
        (TINY, "cuda", 20, 3.5, "64", "bfloat16"),
    ],
)
def test_the_models_row_decides_what_is_left_open(row, device, steps, guidance, size, dtype):
    config = resolve_defaults(SampleConfig(), None, row, device)
    assert (config.steps, config.guidance, config.panel_size, config.dtype) == (steps, guidance, size, dtype)
    assert (config.grid, config.device) == ("2x2", device)


@pytest.mark.parametrize(
    ("row", "references", "guidance", "size"),
    [
        (DEV, 1, 4.0, 512),
        (DEV, 2, 4.0, 320),
        (DEV, 5, 4.0, 320),
        (SCHNELL, 2, None, 320),
        (TINY, 1, 4.0, 64),
        (TINY, 3, 4.0, 64),
    ],
)
def test_references_bring_unos_defaults(row, references, guidance, size):
    config = resolve_defaults(SampleConfig(ref=("a.png",) * references), None, row, "cpu")
    assert (config.grid, config.guidance, config.ref_size) == ("1x1", guidance, size)
    assert (config.offset, config.offset_scale, config.posterior, config.schedule) == ("d", 1.0, "sample", "tokens")
    assert config.reference_attention == "joint"
    given = SampleConfig(
        ref=("a.png",), guidance=2.0, grid="1x2", ref_size=100, offset="w", posterior="mean",
        reference_attention="alone",
    )  # fmt: skip
    assert resolve_defaults(given, None, row, "cpu") == replace(
        given,
        **{"steps": row.steps, "panel_size": str(row.panel), "offset_scale": 1.0, "schedule": "tokens"},
        **{"device": "cpu", "dtype": row.cpu_dtype},
    )


def test_a_flag_beats_the_preset_and_the_preset_beats_the_model():
    task = preset("film-storyboard")
    config = resolve_defaults(SampleConfig(), task, DEV, "cpu")
    assert (config.grid, config.panel_size, config.steps) == ("3x1", "1024x512", 20)
    assert resolve_defaults(SampleConfig(), task, TINY, "cpu").panel_size == "64", "it can draw no others"
    config = resolve_defaults(SampleConfig(grid="1x3", panel_size="64", steps=2), task, TINY, "cpu")
    assert (config.grid, config.panel_size, config.steps) == ("1x3", "64", 2)


@pytest.mark.parametrize("name", TASKS)
def test_every_preset_settles_to_its_published_size(name):
    config = resolve_defaults(SampleConfig(preset=name), TASKS[name], DEV, "cpu")
    assert config.panel_size == "{}x{}".format(*TASKS[name].panel_size)


def test_a_note_comes_from_the_first_process_alone_and_a_mistake_from_each(monkeypatch, capsys):
    for rank, lines in (("0", 2), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        note("a")
        assert complain("b") == 2 and len(capsys.readouterr().err.splitlines()) == lines
