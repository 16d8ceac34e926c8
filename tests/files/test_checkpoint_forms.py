"""Checkpoints of other programs: written here by plain slices, read as the released ones, bit for bit, or refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, T5Config, T5ForConditionalGeneration

import model.text
from golden import AE, FLUX, WHOLE, case, far, shard, write
from model.text import load_text_encoders
from model.weights import find_model, load_autoencoder, load_flux, weight_files

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "weights" / "tiny"
DEV, SCHNELL, VAE = load_file(FLUX["dev"]), load_file(FLUX["schnell"]), load_file(AE)
FP8, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ONE = torch.ones(1)


def same(network, tensors) -> bool:
    state = network.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[key], tensors[key]) for key in tensors)


# ---- the writers ----

WHOLE_LAYERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
SINGLE = {"modulation.lin": "norm.linear", "linear2": "proj_out"}


def diffusers_flux(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformer as diffusers saves it."""
    d = tensors["img_in.weight"].shape[0]
    out = {}
    for key, tensor in tensors.items():
        module, end = key.rsplit(".", 1)
        kind, _, rest = module.partition(".")
        number, _, layer = rest.partition(".")
        if module == "final_layer.adaLN_modulation.1":
            out[f"norm_out.linear.{end}"] = torch.cat((tensor[d:], tensor[:d]))
        elif kind not in ("double_blocks", "single_blocks"):
            out[f"{WHOLE_LAYERS[module]}.{end}"] = tensor
        elif kind == "double_blocks":
            block = f"transformer_blocks.{number}."
            if layer.endswith("qkv"):
                names = ("attn.to_{}", "attn.add_{}_proj")[layer.startswith("txt")]
                for i, letter in enumerate("qkv"):
                    out[f"{block}{names.format(letter)}.{end}"] = tensor[i * d : (i + 1) * d]
            elif end == "scale":
                added = "added_" if layer.startswith("txt") else ""
                out[f"{block}attn.norm_{added}{'q' if 'query' in layer else 'k'}.weight"] = tensor
            else:
                out[f"{block}{DOUBLE[layer]}.{end}"] = tensor
        else:
            block = f"single_transformer_blocks.{number}."
            if layer == "linear1":
                for i, letter in enumerate("qkv"):
                    out[f"{block}attn.to_{letter}.{end}"] = tensor[i * d : (i + 1) * d]
                out[f"{block}proj_mlp.{end}"] = tensor[3 * d :]
            elif end == "scale":
                out[f"{block}attn.norm_{'q' if 'query' in layer else 'k'}.weight"] = tensor
            else:
                out[f"{block}{SINGLE[layer]}.{end}"] = tensor
    return out


def diffusers_vae(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An autoencoder as diffusers saves it."""
    out = {}
    for key, tensor in tensors.items():
        if match := re.fullmatch(r"(encoder|decoder)\.(?:down|up)\.(\d)\.block\.(\d)\.(.+)", key):
            half, level, block, layer = match.groups()
            place = f"down_blocks.{level}" if half == "encoder" else f"up_blocks.{3 - int(level)}"
            name = f"{half}.{place}.resnets.{block}.{layer.replace('nin_shortcut', 'conv_shortcut')}"
        elif match := re.fullmatch(r"encoder\.down\.(\d)\.downsample\.conv\.(\w+)", key):
            name = f"encoder.down_blocks.{match[1]}.downsamplers.0.conv.{match[2]}"
        elif match := re.fullmatch(r"decoder\.up\.(\d)\.upsample\.conv\.(\w+)", key):
            name = f"decoder.up_blocks.{3 - int(match[1])}.upsamplers.0.conv.{match[2]}"
        elif match := re.fullmatch(r"(encoder|decoder)\.mid\.block_([12])\.(.+)", key):
            name = f"{match[1]}.mid_block.resnets.{int(match[2]) - 1}.{match[3]}"
        elif match := re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(\w+)\.(\w+)", key):
            layer = {"norm": "group_norm", "proj_out": "to_out.0"}.get(match[2], f"to_{match[2]}")
            name = f"{match[1]}.mid_block.attentions.0.{layer}.{match[3]}"
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        else:
            name = key.replace("norm_out", "conv_norm_out")
        out[name] = tensor
    return out


def scaled(tensors: dict[str, torch.Tensor], scale: str, dtype=FP8, rows: bool = False) -> tuple[dict, dict]:
    """Matrices in fp8 with scales, all else as it is; and what that means in float32."""
    out, meant = {}, {}
    for key, tensor in tensors.items():
        if tensor.ndim != 2:
            out[key], meant[key] = tensor, tensor.float()
            continue
        size = tensor.float().abs()
        size = (size.amax(dim=1, keepdim=True) if rows else size.max()) / 300 + 1e-6
        out[key] = (tensor.float() / size).to(dtype)
        out[f"{key.removesuffix('weight')}{scale}"] = size
        meant[key] = out[key].float() * size
    return out, meant


def behind(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def as_bytes(value: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


# ---- diffusers' names ----


@pytest.mark.parametrize("name, tensors", [("dev", DEV), ("schnell", SCHNELL)])
def test_a_transformer_with_diffusers_names_gives_the_golden_output(tmp_path, name, tensors):
    path = write(tmp_path / "diffusion_pytorch_model.safetensors", diffusers_flux(tensors))
    assert same(load_flux(path), tensors) and same(load_flux(tmp_path), tensors)
    flux, golden = load_flux(path, dtype=torch.float32), case(name)
    assert same(flux, {key: tensor.float() for key, tensor in tensors.items()})
    names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
    with torch.no_grad():
        assert far(flux(**{key: golden[key] for key in names if key in golden}), golden["out"]) < WHOLE


def test_shards_with_diffusers_names_load_the_same_and_are_all_listed(tmp_path):
    index = shard(tmp_path / "transformer", diffusers_flux(DEV), "diffusion_pytorch_model")
    for path in (index, index.parent, tmp_path):
        assert same(load_flux(path), DEV)
    assert len(list(tmp_path.glob("transformer/*-of-00003.safetensors"))) == 3


def test_an_autoencoder_with_diffusers_names_gives_the_golden_output(tmp_path):
    path = write(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", diffusers_vae(VAE))
    assert same(load_autoencoder(path, dtype=torch.bfloat16), VAE)
    golden, autoencoder = case("ae"), load_autoencoder(tmp_path)
    with torch.no_grad():
        assert far(autoencoder.decode(golden["z"]), golden["decoded"]) < WHOLE


def test_problems_are_told_in_the_names_of_the_file(tmp_path):
    path, tensors = tmp_path / "diffusion_pytorch_model.safetensors", diffusers_flux(DEV)

    def refused(changes: dict, message: str) -> None:
        write(path, {key: tensor for key, tensor in (tensors | changes).items() if tensor is not None})
        with pytest.raises(ValueError, match=message) as error:
            load_flux(path)
        assert "\n" not in str(error.value) and not re.search(r"double_blocks|img_in|img_attn", str(error.value))

    one = "transformer_blocks.0.attn"
    refused({f"{one}.to_k.weight": None}, rf"with diffusers' names, lacks {one}.to_k.weight; download")
    refused({f"{one}.to_{letter}.weight": None for letter in "qkv"}, rf"lacks 1 of 92 tensors \({one}.to_q.weight \+")
    refused({"norm_out.linear.bias": None}, r"lacks 1 of 92 tensors \(norm_out.linear.bias\)$")
    refused({f"{one}.norm_q.weight": None}, rf"lacks {one}.norm_q.weight, from which")
    refused({"x_embedder.weight": None}, "lacks x_embedder.weight, from which")
    refused({f"{one}.norm_added_k.weight": None}, rf"lacks 1 of 92 tensors \({one}.norm_added_k.weight\)$")
    refused({f"{one}.to_qkv.weight": ONE}, rf"has 1 unexpected tensors \({one}.to_qkv.weight\)$")
    refused({f"{one}.norm_q.bias": ONE}, rf"has 1 unexpected tensors \({one}.norm_q.bias\)$")
    refused({"norm_out.linear.bias": ONE}, r"wrong shape \(norm_out.linear.bias \(1,\), not \(128,\)\)")
    refused({"x_embedder.bias": torch.ones(64).int()}, r"no floats of 16 bits or more \(x_embedder.bias I32\)")
    for odd in (torch.ones(63, 64), torch.ones(64, 63), torch.ones(())):
        refused({f"{one}.to_v.weight": odd}, rf"do not fit together \({one}.to_q.weight \(64, 64\), .*to_v.weight")
    refused({"transformer_blocks.7.norm1.linear.bias": ONE}, r"lacks transformer_blocks.2 although it has transformer_")
    for name in ("img_in.weight", "double_blocks.0.img_attn.qkv.weight", "final_layer.adaLN_modulation.1.bias"):
        write(path, tensors | {name: DEV[name]})
        with pytest.raises(ValueError, match=f"(has both .*{name}|{name}, which it has twice)"):
            load_flux(path)

    path, tensors = tmp_path / "vae.safetensors", diffusers_vae(VAE)
    write(path, {key: t for key, t in tensors.items() if key != "decoder.up_blocks.0.resnets.2.conv1.weight"})
    with pytest.raises(ValueError, match=r"lacks 1 of \d+ tensors \(decoder.up_blocks.0.resnets.2.conv1.weight\)$"):
        load_autoencoder(path)
    write(path, tensors | {"quant_conv.weight": ONE, "decoder.up_blocks.7.resnets.0.conv1.weight": ONE})
    with pytest.raises(ValueError, match=r"unexpected tensors \(.*quant_conv.weight.*\)$"):
        load_autoencoder(path)


# ---- fp8 ----


@pytest.mark.parametrize("dtype", [FP8, E5M2])
@pytest.mark.parametrize("convert", [dict, diffusers_flux])
def test_a_plain_fp8_transformer_is_widened(tmp_path, dtype, convert):
    narrow = {key: tensor.to(dtype) for key, tensor in DEV.items()}
    path = write(tmp_path / "flux1-dev-fp8.safetensors", convert(narrow))
    for wide in (torch.bfloat16, torch.float32):
        assert same(load_flux(path, dtype=wide), {key: tensor.to(wide) for key, tensor in narrow.items()})


def test_a_prefix_that_only_some_names_have_is_refused(tmp_path):
    prefixed = behind("model.diffusion_model.", DEV)
    assert same(load_flux(write(tmp_path / "a.safetensors", prefixed)), DEV)
    with pytest.raises(ValueError, match=r"a.safetensors has 1 unexpected tensors \(extra.weight\)$"):
        load_flux(write(tmp_path / "a.safetensors", prefixed | {"extra.weight": ONE}))
    with pytest.raises(ValueError, match="has tensors both with and without model.diffusion_model. before"):
        load_flux(write(tmp_path / "a.safetensors", prefixed | {"img_in.bias": DEV["img_in.bias"]}))


def test_fp8_beside_wider_tensors_is_widened(tmp_path):
    mixed = {key: tensor.to(FP8) if tensor.ndim == 2 else tensor for key, tensor in DEV.items()}
    path = write(tmp_path / "flux1-dev.safetensors", mixed)
    assert same(load_flux(path), {key: tensor.bfloat16() for key, tensor in mixed.items()})


COMFY = {"format": "float8_e4m3fn"}
SCALED = {
    "with a mark and scale_weight": ("scale_weight", {"scaled_fp8": torch.zeros(0, dtype=FP8)}, None, {}),
    "of e5m2": ("scale_weight", {"scaled_fp8": torch.zeros(2, dtype=E5M2)}, None, {"dtype": E5M2}),
    "with scales of activations": ("scale_weight", {"scaled_fp8": ONE, "img_in.scale_input": ONE}, None, {}),
    "with weight_scale": ("weight_scale", {"img_in.input_scale": ONE}, None, {}),
    "with a scale a row": ("weight_scale", {"img_in.comfy_quant": as_bytes(COMFY)}, None, {"rows": True}),
    "with a note in its header": (
        "weight_scale",
        {},
        {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {"img_in": COMFY}})},
        {},
    ),
}


@pytest.mark.parametrize("how", SCALED)
@pytest.mark.parametrize("convert", [dict, diffusers_flux])
def test_a_scaled_fp8_transformer_is_weight_times_scale(tmp_path, how, convert):
    scale, marks, metadata, settings = SCALED[how]
    tensors, meant = scaled(convert(DEV), scale, **settings)
    path = write(tmp_path / "flux1-dev.safetensors", tensors | marks, metadata)
    network = load_flux(path, dtype=torch.float32)
    state = convert(network.state_dict())
    assert state.keys() == meant.keys() and all(torch.equal(state[key], meant[key]) for key in meant)
    state = convert(load_flux(path).state_dict())
    assert all(torch.equal(state[key], meant[key].bfloat16()) for key in meant), "cast once, from float32"


def test_a_scale_in_another_float_is_taken_in_float32(tmp_path):
    tensors, _ = scaled(DEV, "scale_weight")
    tensors = {key: tensor.bfloat16() if "scale_weight" in key else tensor for key, tensor in tensors.items()}
    got = load_flux(write(tmp_path / "a.safetensors", tensors), dtype=torch.float32).img_in.weight
    assert torch.equal(got, tensors["img_in.weight"].float() * tensors["img_in.scale_weight"].float())


NARROW = scaled(DEV, "weight_scale")[0]
BLOCKS = torch.ones(64, 2)
ODD = {
    "img_in.weight_scale (64, 2)": NARROW | {"img_in.weight_scale": BLOCKS},
    "img_in.weight_scale (64, 2) as F8_E8M0": NARROW | {"img_in.weight_scale": BLOCKS.to(torch.float8_e8m0fnu)},
    "img_in.weight as I8 with img_in.weight_scale": NARROW | {"img_in.weight": torch.ones(64, 64).to(torch.int8)},
    "img_in.weight as fp8 without a scale": {k: t for k, t in NARROW.items() if k != "img_in.weight_scale"},
    "scales of weights that it lacks (absent.weight)": NARROW | {"absent.weight_scale": ONE},
    "the format nvfp4": NARROW | {"img_in.comfy_quant": as_bytes({"format": "nvfp4"})},
    "the format mxfp8": NARROW | {"img_in.comfy_quant": as_bytes({"format": "mxfp8"})},
    "the format int8_tensorwise": NARROW | {"img_in.comfy_quant": as_bytes({"format": "int8_tensorwise"})},
    "notes on its quantisation": NARROW | {"img_in.comfy_quant": as_bytes([1])},
    "notes on its quantisation  ": NARROW | {"img_in.comfy_quant": torch.tensor(1, dtype=torch.uint8)},
    "notes on its quantisation ": NARROW | {"img_in.comfy_quant": torch.tensor(list(b"[" * 9000), dtype=torch.uint8)},
    "nvfp4 weights": NARROW | {"img_in.weight_scale_2": ONE},
    "int8 weights": NARROW | {"img_in.weight.SCB": ONE},
    "int8 weights ": NARROW | {"img_in.weight._data": ONE},
    "nf4": NARROW | {"img_in.weight.absmax": ONE, "img_in.weight.quant_state.bitsandbytes__nf4": ONE.byte()},
    "nunchaku": NARROW | {"transformer_blocks.0.qkv_proj.qweight": ONE},
    "a FLUX.2 transformer": NARROW | {"double_stream_modulation_img.lin.weight": ONE},
    "a Chroma transformer": NARROW | {"distilled_guidance_layer.in_proj.weight": ONE},
    "fp8 weights": DEV | {"img_in.weight": DEV["img_in.weight"].to(torch.float8_e4m3fnuz)},
}


@pytest.mark.parametrize("words", ODD)
def test_other_quantisation_is_refused_by_name(tmp_path, words):
    path = write(tmp_path / "flux1-x.safetensors", ODD[words])
    with pytest.raises(ValueError, match=rf"flux1-x.safetensors .*{re.escape(words.strip())}.*; (use|down)") as error:
        load_flux(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": []}', '{"layers": {"a": 1}}', "[" * 100_000, "null", "{"])
def test_a_damaged_note_in_the_header_is_one_line(tmp_path, text):
    path = write(tmp_path / "a.safetensors", NARROW, {"_quantization_metadata": text})
    if text:
        with pytest.raises(ValueError, match="a.safetensors has notes on its quantisation that cannot be read; downl"):
            load_flux(path)
    else:
        load_flux(path)


# ---- all-in-one files, text encoders, folders ----


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The bundled model without transformer and autoencoder; single text encoders have its configurations."""
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        (tmp_path / part).symlink_to(TINY / part)
    for kind, part in (("clip", "text_encoder"), ("t5", "text_encoder_2")):
        monkeypatch.setitem(model.text.KNOWN, kind, json.loads((TINY / part / "config.json").read_text()))
    return tmp_path


def encoders(path: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(path / "model.safetensors")
    if path.name == "text_encoder":
        tensors = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in tensors.items()}
    return tensors


def encode(root: Path):
    return load_text_encoders(find_model(str(root)), dtype=torch.float32).encode(["two cats", "a beach"], 16)


def all_in_one(vae: str = "vae.") -> dict[str, torch.Tensor]:
    t5, clip = encoders(TINY / "text_encoder_2"), encoders(TINY / "text_encoder")
    return {
        **behind("model.diffusion_model.", {key: tensor.to(FP8) for key, tensor in DEV.items()}),
        **behind(vae, VAE),
        **behind("text_encoders.t5xxl.transformer.", t5),
        **behind("text_encoders.clip_l.transformer.", clip | {"text_projection.weight": torch.eye(4)}),
        "text_encoders.clip_l.logit_scale": ONE,
    }


@pytest.mark.parametrize("vae", ["vae.", "first_stage_model."])
def test_all_parts_are_read_out_of_one_file(folder, vae):
    path = write(folder / "flux1-dev-fp8.safetensors", all_in_one(vae))
    write(folder / "ae.safetensors", {key: torch.zeros_like(tensor) for key, tensor in VAE.items()})
    for part in ("text_encoder", "text_encoder_2"):
        (folder / part).unlink()
    for name in (path, folder):  # given by its path, and found in a folder
        files = find_model(str(name))
        assert same(load_flux(files.flux), {key: tensor.to(FP8).bfloat16() for key, tensor in DEV.items()})
        assert same(load_autoencoder(files.autoencoder, dtype=torch.bfloat16), VAE), "before the file beside it"
        assert weight_files(files) == [path] and files.clip == files.t5 == path
    for got, want in zip(encode(path), encode(TINY), strict=True):
        assert torch.equal(got, want)


def test_an_all_in_one_file_without_its_tokenizers_says_what_to_fetch(tmp_path):
    path = write(tmp_path / "flux1-dev-fp8.safetensors", all_in_one())
    with pytest.raises(
        ValueError, match="lacks tokenizer/, tokenizer_2/; .*FLUX.1-dev --include 'tokenizer.' --local-"
    ):
        find_model(str(path))


def test_parts_of_other_models_in_one_file_are_refused_by_name(folder):
    path = write(
        folder / "sdxl.safetensors",
        behind("model.diffusion_model.", {"input_blocks.0.0.weight": ONE}) | behind("first_stage_model.", VAE),
    )
    with pytest.raises(ValueError, match="sdxl.safetensors holds the transformer of another model, not a FLUX.1"):
        find_model(str(path))
    with pytest.raises(ValueError, match="sdxl.safetensors holds an all-in-one checkpoint, not a T5"):
        model.weights.open_checkpoint(path, "t5")


def test_sft_is_another_word_for_safetensors(folder):
    write(folder / "flux1-dev.sft", DEV)
    write(folder / "ae.sft", VAE)
    for part, name in (("text_encoder", "clip_l"), ("text_encoder_2", "t5xxl_fp16")):
        (folder / part).unlink()
        write(folder / f"{name}.sft", encoders(TINY / part))
    files = find_model(str(folder))
    assert [path.name for path in (files.flux.path, files.clip, files.t5)] == [
        "flux1-dev.sft",
        "clip_l.sft",
        "t5xxl_fp16.sft",
    ]
    assert same(load_flux(folder), DEV) and same(load_autoencoder(folder, dtype=torch.bfloat16), VAE)
    for got, want in zip(encode(folder), encode(TINY), strict=True):
        assert torch.equal(got, want)


def test_a_hub_folder_is_read_without_the_files_in_its_root(folder):
    index = shard(folder / "transformer", diffusers_flux(DEV), "diffusion_pytorch_model")
    vae = write(folder / "vae" / "diffusion_pytorch_model.safetensors", diffusers_vae(VAE))
    files = find_model(str(folder))
    assert (files.flux.path, files.autoencoder.path) == (index, vae)
    assert same(load_flux(files.flux), DEV) and same(load_autoencoder(files.autoencoder, dtype=torch.bfloat16), VAE)
    assert {path.parent.name for path in weight_files(files)} == {
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
    }
    assert len(files.flux.paths) == 3
    root = write(folder / "flux1-dev.safetensors", DEV)
    assert find_model(str(folder)).flux.path == root


def test_a_hub_cache_is_read_through_its_links(tmp_path):
    cache, plain = tmp_path / "models--black-forest-labs--FLUX.1-dev", tmp_path / "plain"
    shard(plain / "transformer", diffusers_flux(DEV), "diffusion_pytorch_model")
    write(plain / "vae" / "diffusion_pytorch_model.safetensors", diffusers_vae(VAE))
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(TINY / part, plain / part)
    (cache / "blobs").mkdir(parents=True)
    (cache / "refs").mkdir()
    for path in [path for path in plain.rglob("*") if path.is_file()]:
        link = cache / "snapshots" / "abc123" / path.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = path.rename(cache / "blobs" / str(len(list((cache / "blobs").iterdir()))))
        link.symlink_to(os.path.relpath(blob, link.parent))
    snapshot = cache / "snapshots" / "abc123"
    for name in (snapshot, cache):
        files = find_model(str(name))
        assert files.root == snapshot and same(load_flux(files.flux), DEV)
        assert encode(name)[0].shape[0] == 2
    (cache / "snapshots" / "older").mkdir()
    with pytest.raises(ValueError, match="has 2 snapshots and no refs/main that names one; give the path of one"):
        find_model(str(cache))
    for text in ("../snapshots/abc123", "", "a" * 100_000, "\xff"):
        (cache / "refs" / "main").write_text(text)
        with pytest.raises(ValueError, match="has 2 snapshots and no refs/main"):
            find_model(str(cache))
    (cache / "refs" / "main").write_text("abc123\n")
    assert find_model(str(cache)).root == snapshot


@pytest.mark.parametrize("place", ["folder", "file"])
@pytest.mark.parametrize("how", ["plain", "scaled"])
def test_an_fp8_t5_is_widened(folder, place, how):
    write(folder / "flux1-dev.safetensors", DEV)
    write(folder / "ae.safetensors", VAE)
    tensors = encoders(TINY / "text_encoder_2")
    if how == "plain":
        narrow = {key: tensor.to(FP8) for key, tensor in tensors.items()}
        meant = {key: tensor.float() for key, tensor in narrow.items()}
    else:
        narrow, meant = scaled(tensors, "scale_weight")
        narrow |= {"scaled_fp8": torch.zeros(0, dtype=FP8)}
    (folder / "text_encoder_2").unlink()
    if place == "file":
        write(folder / f"t5xxl_fp8_e4m3fn{'_scaled' * (how == 'scaled')}.safetensors", narrow)
    else:
        write(folder / "text_encoder_2" / "model.safetensors", narrow)
        shutil.copy(TINY / "text_encoder_2" / "config.json", folder / "text_encoder_2")
    got = load_text_encoders(find_model(str(folder)), dtype=torch.float32).t5.state_dict()
    assert meant.keys() <= got.keys() and all(torch.equal(got[key], meant[key]) for key in meant)
    half = load_text_encoders(find_model(str(folder))).t5.state_dict()
    assert all(torch.equal(half[key], meant[key].bfloat16()) for key in meant)


def test_whole_t5_and_clip_repositories_serve_as_text_encoders(folder):
    write(folder / "flux1-dev.safetensors", DEV)
    write(folder / "ae.safetensors", VAE)
    torch.manual_seed(0)
    known = json.loads((TINY / "text_encoder_2" / "config.json").read_text())
    sizes = {key: known[key] for key in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    text = json.loads((TINY / "text_encoder" / "config.json").read_text())
    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, patch_size=16)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=small | {"image_size": 32}, projection_dim=8))
    for part, whole in (("text_encoder_2", t5), ("text_encoder", clip)):
        (folder / part).unlink()
        whole.save_pretrained(folder / part)
    assert any(key.startswith("decoder.") for key in load_file(folder / "text_encoder_2" / "model.safetensors"))
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    assert any(key.startswith("vision_model.") for key in tensors)
    tensors["text_model.embeddings.position_ids"] = torch.arange(text["max_position_embeddings"])[None]
    write(folder / "text_encoder" / "model.safetensors", tensors)
    loaded = load_text_encoders(find_model(str(folder)), dtype=torch.float32)
    want = t5.encoder.state_dict()
    assert all(torch.equal(tensor, want[key]) for key, tensor in loaded.t5.encoder.state_dict().items())
    got = {key.removeprefix("text_model."): tensor for key, tensor in loaded.clip.state_dict().items()}
    want = {key.removeprefix("text_model."): tensor for key, tensor in clip.text_model.state_dict().items()}
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def test_a_text_encoder_that_is_a_pickle_only_is_told(folder):
    write(folder / "flux1-dev.safetensors", DEV)
    write(folder / "ae.safetensors", VAE)
    (folder / "text_encoder_2").unlink()
    (folder / "text_encoder_2").mkdir()
    (folder / "text_encoder_2" / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(
        ValueError, match="lacks text_encoder_2/ .*pytorch_model.bin is a pickle, which is never unpick"
    ):
        find_model(str(folder))


# ---- memory ----

MEASURE = """
import sys
import torch
from model.weights import load_flux

def kilobytes(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

before = kilobytes("VmRSS")
flux = load_flux(sys.argv[1])
touched = sum(float(parameter.view(-1)[::64].float().sum()) for parameter in flux.parameters())
print(1024 * (kilobytes("VmHWM") - before), sum(2 * parameter.numel() for parameter in flux.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure the resident set")
@pytest.mark.parametrize("form", ["diffusers", "scaled", "both"])
def test_loading_another_form_adds_little_more_than_what_it_makes(tmp_path, form):
    from model.flux import Flux, FluxConfig

    config = FluxConfig(64, 64, 768, 1024, 512, 2048, 4, 8, 24, (16, 56, 56), True)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in Flux(config).state_dict().items()}
    tensors = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
    tensors = diffusers_flux(tensors) if form != "scaled" else tensors
    if form != "diffusers":
        tensors = {key: tensor.to(FP8) for key, tensor in tensors.items()}
        tensors |= {f"{key.removesuffix('weight')}scale_weight": ONE for key in tensors if tensors[key].ndim == 2}
    path = write(tmp_path / "a.safetensors", tensors)
    mapped = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}  # as those of a real model are, over 32 MB each
    command = [sys.executable, "-c", MEASURE, path]
    done = subprocess.run(command, cwd=ROOT, env=mapped, capture_output=True, text=True, check=True)
    peak, result = map(int, done.stdout.split())
    print(f"{form}: the resident set grows by {peak / result:.3f} of {result / 1e6:.0f} MB")
    assert result > 3e8 and peak <= 1.05 * result
