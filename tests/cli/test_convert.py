"""python -m iclora.convert: every dialect into every other, without the model, and one line for a mistake."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from golden import FLUX, WHOLE, far
from iclora.convert import main
from lora_cases import EXPECTED, FILES, GIVEN
from model.lora import attach, load_lora, merge, save_lora, trainable
from model.weights import load_flux

ROOT = Path(__file__).parents[2]


def output(path):
    flux = load_flux(FLUX["dev"], dtype=torch.float32)
    load_lora(flux, path)
    merge(flux)
    with torch.no_grad():
        return flux(**GIVEN)


def convert(source, target, *more):
    assert main([str(source), str(target), *more]) == 0
    return target


def refused(capsys, *argv):
    """Run a command line that is wrong and give its one line of complaint."""
    assert main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


POSSIBLE = [
    (name, to)
    for name in sorted(EXPECTED)
    for to in ("diffusers", "kohya", "xlabs")
    if to == "diffusers"
    or name == "xlabs_partial"
    or to == "kohya"
    and name not in ("comfyui_official_names", "diffusers_all_linears")
]


@pytest.mark.parametrize(("name", "to"), POSSIBLE)
def test_every_golden_file_does_the_same_in_every_dialect_that_can_hold_it(tmp_path, name, to):
    path = convert(FILES / f"{name}.safetensors", tmp_path / "a.safetensors", "--to", to)
    assert far(output(path), EXPECTED[name]) < WHOLE


@pytest.mark.parametrize("first", ["diffusers", "kohya", "xlabs"])
@pytest.mark.parametrize("second", ["diffusers", "kohya", "xlabs"])
def test_to_and_fro_through_every_pair_changes_neither_effect_nor_rank(tmp_path, first, second):
    path = FILES / "xlabs_partial.safetensors"
    for i, to in enumerate((first, second, first, second)):
        path = convert(path, tmp_path / f"{i}.safetensors", "--to", to)
    assert far(output(path), EXPECTED["xlabs_partial"]) < WHOLE
    assert {min(t.shape) for key, t in load_file(path).items() if not key.endswith("alpha")} == {4}


@pytest.mark.parametrize("name", ["kohya", "kohya_split_qkv", "ai_toolkit_blocks"])
def test_kohya_to_diffusers_and_back_changes_neither_effect_nor_size(tmp_path, name):
    once = convert(FILES / f"{name}.safetensors", tmp_path / "1.safetensors", "--to", "kohya")
    twice = convert(
        convert(once, tmp_path / "2.safetensors", "--to", "diffusers"), tmp_path / "3.safetensors", "--to", "kohya"
    )
    assert far(output(twice), EXPECTED[name]) < WHOLE
    assert {key: t.shape for key, t in load_file(once).items()} == {key: t.shape for key, t in load_file(twice).items()}


def test_a_published_file_becomes_what_all_programs_load(tmp_path, capsys):
    path = convert(FILES / "ai_toolkit_blocks.safetensors", tmp_path / "a.safetensors", "--to", "kohya")
    line = "ai_toolkit_blocks.safetensors: diffusers names, 46 modules, rank 4, scale 1, 0 keys unused"
    assert capsys.readouterr().out == f"{line}; wrote {path}\n"
    tensors = load_file(path)
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (12, 64)
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"] == 12
    assert tensors["lora_unet_single_blocks_2_linear1.lora_up.weight"].shape == (448, 16)


def test_the_model_can_be_named_to_check_against(tmp_path, capsys):
    line = refused(capsys, FILES / "kohya.safetensors", tmp_path / "a", "--to", "kohya", "--model", "tiny")
    assert re.search("of this model needs|this model has no", line)


def test_an_mlp_that_nothing_tells_is_four_times_the_width(tmp_path, capsys):
    """Queries of a single block alone: the fused Linear's width depends on the MLP's."""
    names = ("lora_A", "lora_B")
    tensors = {
        f"transformer.single_transformer_blocks.0.attn.to_q.{name}.weight": torch.randn(size)
        for name, size in zip(names, ((2, 64), (64, 2)), strict=True)
    }
    save_file(tensors, tmp_path / "q.safetensors")
    assert main([str(tmp_path / "q.safetensors"), str(tmp_path / "a"), "--to", "kohya"]) == 0
    found = load_file(tmp_path / "a")
    assert found["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (3 * 64 + 4 * 64, 2)


def test_embedders_tell_their_own_widths(tmp_path):
    flux = load_flux(FLUX["dev"], dtype=torch.float32)
    attach(flux, "txt_in,img_in,vector_in.*,time_in.*,final_layer.*", 2)
    with torch.no_grad():
        for parameter in trainable(flux):
            parameter.normal_()
        save_lora(flux, tmp_path / "a.safetensors")
        want = output(tmp_path / "a.safetensors")
    path = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "diffusers")
    assert torch.equal(output(path), want)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_dtype_is_that_of_the_file_or_the_one_asked_for(tmp_path, dtype):
    path = convert(FILES / "kohya.safetensors", tmp_path / "a.safetensors", "--to", "diffusers")
    assert {t.dtype for t in load_file(path).values()} == {torch.bfloat16}
    path = convert(FILES / "kohya.safetensors", tmp_path / "b.safetensors", "--to", "diffusers", "--dtype", dtype)
    assert {t.dtype for t in load_file(path).values()} == {getattr(torch, dtype)}


def test_of_two_dtypes_the_finer_one_is_kept(tmp_path):
    tensors = load_file(FILES / "kohya.safetensors")
    save_file({k: t.float() if "lora_down" in k else t for k, t in tensors.items()}, tmp_path / "mixed.safetensors")
    path = convert(tmp_path / "mixed.safetensors", tmp_path / "a.safetensors", "--to", "diffusers")
    assert {t.dtype for t in load_file(path).values()} == {torch.float32}


def test_the_header_goes_along_without_what_became_untrue(tmp_path):
    source = tmp_path / "in.safetensors"
    header = {"trigger": "x", "ss_network_alpha": "2", "sshs_model_hash": "0"}
    save_file(load_file(FILES / "kohya.safetensors"), source, header)
    with safe_open(convert(source, tmp_path / "out.safetensors", "--to", "diffusers"), "pt") as file:
        assert file.metadata() == {"format": "pt", "trigger": "x"}


def test_text_encoders_are_left_out_with_a_word(tmp_path, capsys):
    source, key = tmp_path / "te.safetensors", "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"
    save_file(load_file(FILES / "kohya.safetensors") | {key: torch.zeros(4, 4)}, source)
    path = convert(source, tmp_path / "a", "--to", "kohya")
    assert "1 of text encoders skipped" in capsys.readouterr().out
    assert far(output(path), EXPECTED["kohya"]) < WHOLE


def test_biases_to_add_stay_unscaled_and_kohya_has_no_place_for_them(tmp_path, capsys):
    tensors, name = load_file(FILES / "kohya.safetensors"), "lora_unet_double_blocks_0_img_attn_proj"
    bias = torch.randn(64)
    save_file(tensors | {f"{name}.diff_b": bias}, tmp_path / "bias.safetensors")
    path = convert(tmp_path / "bias.safetensors", tmp_path / "a", "--to", "diffusers", "--dtype", "float32")
    assert far(output(path), output(tmp_path / "bias.safetensors")) < WHOLE
    assert torch.equal(load_file(path)["transformer.transformer_blocks.0.attn.to_out.0.lora_B.bias"], bias)
    capsys.readouterr()
    line = refused(capsys, tmp_path / "bias.safetensors", tmp_path / "b", "--to", "kohya")
    assert "no place for rows 0 to 64 of double_blocks.0.img_attn.proj with a bias" in line
    save_file({f"{name}.diff_b": bias}, tmp_path / "alone.safetensors")
    line = refused(capsys, tmp_path / "alone.safetensors", tmp_path / "c", "--to", "diffusers")
    assert "has biases only, which do not tell the model's widths; name it with --model" in line


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"lokr_w1": (4, 4), "lokr_w2": (16, 16)}, "LoKr factors (lora_unet_double_blocks_0_img_attn_proj.lokr_w1)"),
        ({f"hada_w{i}_{h}": s for i in "12" for h, s in (("a", (64, 2)), ("b", (2, 64)))}, "LoHa factors"),
        ({"diff": (64, 64)}, "whole weights to add"),
    ],
)
def test_factors_of_whole_weights_are_refused_by_name(tmp_path, capsys, factors, message):
    name = "lora_unet_double_blocks_0_img_attn_proj"
    save_file({f"{name}.{key}": torch.ones(size) for key, size in factors.items()}, tmp_path / "f.safetensors")
    line = refused(capsys, tmp_path / "f.safetensors", tmp_path / "a", "--to", "diffusers")
    assert message in line and "which no dialect that is written has a place for; use the file as it is" in line


def test_fp8_is_written_as_bfloat16(tmp_path):
    name = "lora_unet_double_blocks_0_img_attn_proj"
    halves = {"lora_down": torch.randn(2, 64), "lora_up": torch.randn(64, 2)}
    tensors = {f"{name}.{half}.weight": tensor.to(torch.float8_e4m3fn) for half, tensor in halves.items()}
    save_file(tensors, tmp_path / "f.safetensors")
    written = load_file(convert(tmp_path / "f.safetensors", tmp_path / "a", "--to", "kohya"))
    assert written.pop(f"{name}.alpha") == 2
    assert all(torch.equal(written[key], tensor.bfloat16()) for key, tensor in tensors.items()) and len(written) == 2


def test_widths_that_no_model_has_are_refused(tmp_path, capsys):
    wide = {"txt_in.lora_A.weight": torch.zeros(1, 8), "txt_in.lora_B.weight": torch.zeros(2**20 + 1, 1)}
    save_file(wide, tmp_path / "w.safetensors")
    line = refused(capsys, tmp_path / "w.safetensors", tmp_path / "a", "--to", "diffusers")
    assert "has shapes that no FLUX.1 can have (width 1048577" in line


KOHYA = FILES / "kohya.safetensors"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((KOHYA, "OUT"), "--to is missing; choose one of diffusers, kohya, xlabs"),
        ((KOHYA, "OUT", "--to", "koya"), "--to 'koya' is unknown; did you mean kohya?"),
        ((KOHYA, "OUT", "--too", "kohya"), "--too is unknown; did you mean --to?"),
        ((KOHYA, "--to", "kohya"), "name two files before the flags"),
        (("--to", "kohya", KOHYA, "OUT"), "name two files before the flags"),
        ((KOHYA, "", "--to", "kohya"), "name two files before the flags"),
        ((KOHYA, KOHYA, "--to", "kohya"), "exists and is not overwritten"),
        ((KOHYA, "OUT", "--to", "xlabs"), "xlabs dialect has no place for rows 0 to 256 of double_blocks.0.img_mlp.0"),
        (
            (FILES / "diffusers_all_linears.safetensors", "OUT", "--to", "kohya"),
            "kohya dialect has no place for rows 0",
        ),
        (("none.safetensors", "OUT", "--to", "kohya"), "none.safetensors cannot be read"),
        ((FLUX["dev"], "OUT", "--to", "kohya"), "holds a FLUX.1 transformer, not a LoRA"),
        ((FILES / "refuse_dora.safetensors", "OUT", "--to", "kohya"), "DoRA"),
        ((FILES / "refuse_missing_half.safetensors", "OUT", "--to", "kohya"), "without its lora_B"),
        ((FILES / "refuse_wrong_width.safetensors", "OUT", "--to", "kohya"), "of shape (4, 56)"),
        ((KOHYA, "OUT", "--to", "kohya", "--model", "nothing"), "there is no model 'nothing'"),
        ((KOHYA, "OUT/deeper", "--to", "kohya"), "there is no folder "),
    ],
)
def test_a_mistake_costs_one_line_and_leaves_nothing(tmp_path, capsys, argv, message):
    line = refused(capsys, *(str(word).replace("OUT", str(tmp_path / "out")) for word in argv))
    assert message in line and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_runs_as_a_module_and_explains_itself(tmp_path):
    done = subprocess.run([sys.executable, "-m", "iclora.convert", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("usage: python -m iclora.convert IN OUT [-h]")
    assert done.returncode == 0 and "--dtype" in done.stdout and "IN OUT --to kohya" in done.stdout
