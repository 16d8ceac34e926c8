"""Finding, opening, inferring, strict loading, and refusing by name everything that is not ours."""

import json
import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from golden import AE, FLUX, GOLDEN, shard, write
from model.checkpoint import read_header, save_safetensors, write_atomic
from model.infer import infer_autoencoder_config, infer_flux_config
from model.weights import find_model, load_autoencoder, load_flux

ROOT = Path(__file__).resolve().parents[2]
DEV = load_file(FLUX["dev"])
SHAPES = {key: tuple(tensor.shape) for key, tensor in DEV.items()}
DIMS = dict(hidden_size=64, mlp_hidden=256, num_heads=2, depth=2, depth_single_blocks=3, axes_dim=(4, 14, 14))
DIMS |= dict(in_channels=64, out_channels=64, vec_in_dim=24, context_in_dim=40)


def same(model, tensors) -> bool:
    state = model.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[key], tensors[key]) for key in tensors)


# ---- what loads ----


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_golden_transformers_load_with_the_inferred_configuration(name):
    config = json.loads((GOLDEN / "config.json").read_text())
    flux = load_flux(FLUX[name])
    assert {key: getattr(flux.config, key) for key in DIMS} == DIMS
    assert flux.config.guidance_embed == (name == "dev") and config["hidden"] == 64
    assert same(flux, load_file(FLUX[name]))
    assert not flux.training and not any(parameter.requires_grad for parameter in flux.parameters())


def test_golden_autoencoder_loads_with_the_inferred_configuration():
    autoencoder = load_autoencoder(AE)
    config = autoencoder.config
    assert (config.ch, config.ch_mult, config.num_res_blocks, config.z_channels) == (32, (1, 2, 2, 2), 2, 16)
    assert same(autoencoder, {key: tensor.float() for key, tensor in load_file(AE).items()})
    assert same(load_autoencoder(AE.parent, dtype=torch.bfloat16), load_file(AE))


def test_folder_index_shards_and_prefix_load_the_same(tmp_path):
    index = shard(tmp_path, DEV)
    prefixed = {"model.diffusion_model." + key: tensor for key, tensor in DEV.items()}
    single = write(tmp_path / "repackaged.safetensors", prefixed)
    for path in (tmp_path, str(tmp_path), index, single, FLUX["dev"].parent):
        assert same(load_flux(path), DEV)


def test_dtype_is_cast(tmp_path):
    assert same(load_flux(FLUX["dev"], dtype=torch.float32), {key: tensor.float() for key, tensor in DEV.items()})
    mixed = {key: tensor.float() if "norm" in key else tensor for key, tensor in DEV.items()}
    assert same(load_flux(write(tmp_path / "mixed.safetensors", mixed)), DEV)


def test_a_file_with_unaligned_tensors_loads(tmp_path):
    data = FLUX["dev"].read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", length + 1) + data[8 : 8 + length] + b" " + data[8 + length :])
    assert same(load_flux(path), DEV)


def test_writing_to_a_loaded_weight_leaves_the_file_alone(tmp_path):
    path = write(tmp_path / "flux1-dev.safetensors", DEV)
    before = path.read_bytes()
    flux = load_flux(path)
    with torch.no_grad():
        flux.img_in.weight.add_(1)
    assert path.read_bytes() == before and not torch.equal(flux.img_in.weight, DEV["img_in.weight"])


def test_released_sizes_are_inferred():
    with torch.device("meta"):
        from model.flux import Flux, FluxConfig

        config = FluxConfig(64, 64, 768, 4096, 3072, 12288, 24, 19, 38, (16, 56, 56), True)
        shapes = {key: tuple(tensor.shape) for key, tensor in Flux(config).state_dict().items()}
    assert infer_flux_config(shapes) == config and len(shapes) == 780


@pytest.mark.parametrize("depth, singles", [(1, 3), (2, 0)])
def test_pruned_models_are_counted(depth, singles):
    kept = re.compile(rf"(?!(double_blocks\.[{depth}-9]|single_blocks\.[{singles}-9]))")
    config = infer_flux_config({key: shape for key, shape in SHAPES.items() if kept.match(key)})
    assert (config.depth, config.depth_single_blocks, config.mlp_hidden) == (depth, singles, 256)


# ---- what does not, with its reason ----


@pytest.mark.parametrize(
    "change, message",
    [
        ({"img_in.weight": (64, 384)}, r"takes 384 and gives 64 channels per token \(FLUX.1 Fill\)"),
        ({"img_in.weight": (64, 128)}, r"takes 128 .* \(FLUX.1 Canny or Depth\)"),
        ({"img_in.weight": (64, 96)}, "takes 96 and gives 64 channels per token; .* use FLUX.1-dev"),
        ({"img_in.weight": (64,)}, r"img_in.weight of shape \(64,\); it should have 2 dimensions"),
        ({"img_in.weight": (0, 64)}, "none of them 0"),
        ({"img_in.weight": None}, "lacks img_in.weight, from which"),
        ({"double_blocks.0.img_attn.norm.query_norm.scale": (48,)}, "heads of width 48 .* multiple of 32"),
        ({"double_blocks.7.img_mod.lin.bias": (384,)}, "lacks double_blocks.2 although it has double_blocks.7"),
    ],
)
def test_configurations_that_cannot_run_are_refused_by_name(change, message):
    shapes = {key: shape for key, shape in (SHAPES | change).items() if shape is not None}
    with pytest.raises(ValueError, match=message):
        infer_flux_config(shapes)


def test_autoencoders_of_other_models_are_refused():
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(AE).items()}
    with pytest.raises(ValueError, match="has 32 latent channels and 4 resolutions; .* has 16 and 4"):
        infer_autoencoder_config(shapes | {"encoder.conv_out.weight": (64, 64, 3, 3)})
    with pytest.raises(ValueError, match="must be multiples of 32"):
        infer_autoencoder_config(shapes | {"encoder.conv_in.weight": (24, 3, 3, 3)})


def test_missing_unexpected_and_misshapen_tensors_are_counted_and_named(tmp_path):
    path = tmp_path / "flux1-dev.safetensors"
    lacking = {key: tensor for key, tensor in DEV.items() if key not in ("img_in.bias", "txt_in.bias")}
    with pytest.raises(ValueError, match=r"flux1-dev.safetensors lacks 2 of 92 tensors \(img_in.bias, txt_in.bias\)$"):
        load_flux(write(path, lacking))
    changed = DEV | {"extra": torch.zeros(1), "img_in.bias": torch.zeros(63), "txt_in.bias": torch.zeros(64).int()}
    with pytest.raises(ValueError) as error:
        load_flux(write(path, changed))
    for part in (
        "has 1 unexpected tensors (extra)",
        "has 1 tensors of the wrong shape (img_in.bias (63,), not (64,))",
        "has 1 tensors that are no floats of 16 bits or more (txt_in.bias I32)",
    ):
        assert part in str(error.value)


ONE = torch.zeros(1)
FOREIGN = {
    "nf4": DEV | {"img_in.weight.absmax": ONE, "img_in.weight.quant_state.bitsandbytes__nf4": ONE.byte()},
    "nunchaku": {"transformer_blocks.0.qkv_proj.qweight": ONE, "transformer_blocks.0.qkv_proj.lora_down": ONE},
    "a FLUX.2 transformer": DEV | {"double_stream_modulation_img.lin.weight": ONE},
    "a Chroma transformer": DEV | {"distilled_guidance_layer.in_proj.weight": ONE},
    "a ControlNet": {"controlnet_x_embedder.weight": ONE, "transformer_blocks.0.norm1.linear.weight": ONE},
    "another model": {"model.diffusion_model.input_blocks.0.0.weight": ONE},
    "an all-in-one checkpoint": {"vae.encoder.conv_in.weight": ONE},
    "an autoencoder with diffusers' names": {"encoder.down_blocks.0.resnets.0.conv1.weight": ONE},
    "a T5 text encoder": {"shared.weight": ONE, "encoder.block.0.layer.0.SelfAttention.q.weight": ONE},
    "a CLIP text encoder": {"text_model.embeddings.token_embedding.weight": ONE},
    "a FLUX.1 autoencoder": load_file(AE),
    "no network": {"something.weight": ONE},
}
LORA = (
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    "double_blocks.0.processor.qkv_lora1.down.weight",
    "single_blocks.0.processor.proj_lora.up.weight",
    "img_in.lora_A.weight",
    "base_model.model.double_blocks.0.img_mlp.0.lora_B.weight",
    "transformer.transformer_blocks.0.attn.to_q.lora.down.weight",
    "lycoris_transformer_blocks_0_attn_to_q.lokr_w1",
    "diffusion_model.double_blocks.0.img_mlp.0.hada_w1_a",
    "diffusion_model.double_blocks.0.img_mlp.0.diff",
)


@pytest.mark.parametrize("words", FOREIGN)
def test_other_checkpoints_are_refused_by_name_with_what_to_use(tmp_path, words):
    path = write(tmp_path / "flux1-x.safetensors", FOREIGN[words])
    words = "the transformer of another model" if words == "another model" else words.strip()
    with pytest.raises(ValueError, match=f"flux1-x.safetensors .*{words}.*; use the bfloat16 flux1-.*.safetensors"):
        load_flux(path)


@pytest.mark.parametrize("key", LORA)
def test_a_lora_is_told_where_it_belongs(tmp_path, key):
    path = write(tmp_path / "style.safetensors", {key: ONE, "single_blocks.0.norm.key_norm.scale": ONE})
    with pytest.raises(ValueError, match="holds LoRA weights, not a FLUX.1 transformer; pass it with --lora"):
        load_flux(path)
    with pytest.raises(ValueError, match="holds LoRA weights"):
        find_model(str(path))


@pytest.mark.parametrize(
    "start, message",
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "is a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "is a torch pickle, which is never unpickled"),
        (b"\x80\x02}q\x00.", "is a pickle, which is never unpickled"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (b'\x80\x0b\0\0\0\0\0\0{"img_in.bias":', "is no safetensors file, or it is cut short"),
        (b"<!DOCTYPE html>", "is no safetensors file"),
        (b"", "is no safetensors file"),
    ],
)
def test_files_of_other_formats_are_refused_by_name(tmp_path, start, message):
    path = tmp_path / "flux1-dev.ckpt"
    path.write_bytes(start)
    with pytest.raises(ValueError, match=f"flux1-dev.ckpt {message}") as error:
        load_flux(path)
    assert "\n" not in str(error.value)


def test_a_folder_with_nothing_or_too_much_is_refused(tmp_path):
    with pytest.raises(ValueError, match="flux1-.*.safetensors is no file; use the bfloat16 flux1"):
        load_flux(tmp_path)
    for name in ("flux1-dev", "flux1-fill-dev"):
        write(tmp_path / f"{name}.safetensors", DEV)
    with pytest.raises(ValueError, match=r"has 2 candidates \(flux1-dev.safetensors, flux1-fill-dev.safetensors\)"):
        load_flux(tmp_path)
    with pytest.raises(ValueError, match="nowhere.safetensors is no file"):
        load_flux(tmp_path / "nowhere.safetensors")


def test_a_broken_index_is_one_line(tmp_path):
    index = shard(tmp_path, DEV)
    good = index.read_text()
    for text in ("", good[:100], "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000, "\udcff"):
        index.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match="index.json (is not a JSON object|has no weight_map)"):
            load_flux(index)
    index.write_text(good.replace("00002-of", "../00002-of"))
    with pytest.raises(ValueError, match="names a shard .* that is not beside it"):
        load_flux(tmp_path)
    index.write_text(good)
    (tmp_path / "flux1-dev-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="names a shard 'flux1-dev-00002-of-00003.safetensors' that is not"):
        load_flux(tmp_path)


# ---- damage ----


def rewrite_header(data: bytes, change) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def damage(number: int, data: bytes) -> bytes:
    """The file cut somewhere, or with one bit of its length or header flipped, or a header that lies."""
    rng = random.Random(number)
    (length,) = struct.unpack("<Q", data[:8])
    if number % 4 == 0:
        return data[: rng.randrange(len(data))]
    if number % 4 == 1:
        flipped = bytearray(data)
        flipped[rng.randrange(8)] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if number % 4 == 2:
        flipped = bytearray(data)
        flipped[8 + rng.randrange(length)] ^= 1 << rng.randrange(8)
        return bytes(flipped)

    def change(header):
        entry = header[rng.choice(sorted(header))]
        lies = ({"shape": [1 << 62, 1 << 62]}, {"shape": [-1]}, {"dtype": "F33"}, {"data_offsets": [0, 1 << 61]})
        lies += ({"data_offsets": [2, 1]}, {"shape": [0]}, {"shape": None}, {"data_offsets": "ab"}, {"shape": [True]})
        entry.update(rng.choice(lies))

    return rewrite_header(data, change)


@pytest.mark.parametrize("number", range(60))
def test_truncated_and_flipped_files_are_one_line(tmp_path, number):
    path = tmp_path / "flux1-dev.safetensors"
    path.write_bytes(damage(number, FLUX["dev"].read_bytes()))
    try:
        load_flux(path)
    except ValueError as error:
        assert "flux1-dev.safetensors" in str(error) and "\n" not in str(error) and len(str(error)) < 500
    else:
        assert number % 4 == 2  # a flip in white space, or in a number's notation, changes nothing


def test_trailing_bytes_and_endless_nesting_are_refused(tmp_path):
    path = tmp_path / "flux1-dev.safetensors"
    path.write_bytes(FLUX["dev"].read_bytes() + b"more")
    with pytest.raises(ValueError, match="or it is cut short or its header is damaged; download it again"):
        load_flux(path)
    text = b'{"a":' + b"[" * 200_000
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match="header is damaged"):
        load_flux(path)


def test_a_header_that_is_too_long_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    path = tmp_path / "flux1-dev.safetensors"
    tensors = ", ".join(f'"t{i}": {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}' for i in range(21_000))
    for text in ("{" + tensors + "}", "{" + " " * 16_000_000 + "}"):
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode())
        with pytest.raises(ValueError, match="its header is damaged; download it again"):
            read_header(path)
    monkeypatch.setattr("model.checkpoint.safe_open", None)
    with pytest.raises(ValueError, match="its header is damaged; download it again"):
        read_header(path)


def test_tensors_that_do_not_fit_are_told_before_any_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "flux1-dev.safetensors", DEV | {"extra": ONE})
    monkeypatch.setattr("model.checkpoint.Checkpoint.read", None)
    with pytest.raises(ValueError, match=r"has 1 unexpected tensors \(extra\)$"):
        load_flux(path)


@pytest.mark.parametrize("metadata", [["x"], {"iclora.method": ["x"]}, {"iclora.offset_scale": None}])
def test_metadata_that_are_no_texts_are_refused(tmp_path, metadata):
    text = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match="header is damaged"):
        read_header(tmp_path / "a.safetensors")


# ---- finding ----


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model named mine under $ICLORA_WEIGHTS, in the hub layout; the text encoders' files are empty."""
    root = tmp_path / "weights" / "mine"
    for folder, file in (
        ("text_encoder", "model.safetensors"),
        ("text_encoder_2", "model-00001-of-00001.safetensors"),
        ("tokenizer", "vocab.json"),
        ("tokenizer_2", "tokenizer.json"),
    ):
        (root / folder).mkdir(parents=True)
        (root / folder / file).write_text("")
    write(root / "flux1-dev.safetensors", DEV)
    write(root / "ae.safetensors", load_file(AE))
    monkeypatch.setenv("ICLORA_WEIGHTS", str(root.parent))
    monkeypatch.chdir(tmp_path)
    return root


def test_a_model_is_found_by_name_folder_or_file(model):
    by_name = find_model("mine")
    assert by_name.flux.path == model / "flux1-dev.safetensors"
    assert by_name.autoencoder.path == model / "ae.safetensors"
    assert by_name.clip == model / "text_encoder" and by_name.t5 == model / "text_encoder_2"
    assert by_name.clip_tokenizer == model / "tokenizer" and by_name.t5_tokenizer == model / "tokenizer_2"
    assert (by_name.root, by_name.name) == (model, "mine")
    assert find_model(str(model)) == by_name
    assert find_model("weights/mine/").flux.path.resolve() == by_name.flux.path
    by_file = find_model(str(model / "flux1-dev.safetensors"))
    assert (by_file.flux, by_file.name) == (by_name.flux, "flux1-dev")


def test_a_bare_name_is_a_model_before_it_is_a_path(model, tmp_path):
    (tmp_path / "mine").mkdir()
    assert find_model("mine").root == model


def test_single_file_encoders_are_found_beside_the_tokenizers(model):
    for folder in ("text_encoder", "text_encoder_2"):
        for file in (model / folder).iterdir():
            file.unlink()
    for name in ("clip_l", "t5xxl_fp8_e4m3fn", "t5xxl_fp16"):
        (model / f"{name}.safetensors").write_text("")
    files = find_model("mine")
    assert files.clip == model / "clip_l.safetensors" and files.t5 == model / "t5xxl_fp16.safetensors"


def test_a_sharded_transformer_is_found_by_its_index(model):
    (model / "flux1-dev.safetensors").unlink()
    index = shard(model, DEV)
    assert find_model("mine").flux.path == index
    assert same(load_flux(find_model("mine").flux), DEV)


def test_a_missing_model_says_what_goes_where_and_how_to_get_it(model):
    for name in ("flux-dev-2", "", "no/such/path", "x" * 5000, "a\x00b"):
        with pytest.raises(ValueError, match="there is no model") as error:
            find_model(name)
        message = str(error.value)
        assert "models found: mine" in message and "text_encoder_2/ (or t5xxl_fp16.safetensors)" in message
        assert "hf download black-forest-labs/FLUX.1-dev --exclude 'transformer/*' --exclude 'vae/*' --loc" in message
        assert "\n" not in message
    with pytest.raises(ValueError, match="black-forest-labs/FLUX.1-schnell .* weights/flux-schnell"):
        find_model("flux-schnell")


def test_a_missing_part_is_named(model):
    (model / "ae.safetensors").unlink()
    (model / "tokenizer_2" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="mine lacks ae.safetensors, tokenizer_2/; a model folder holds .*hf download"):
        find_model("mine")


def test_a_wrong_transformer_is_refused_while_finding(model):
    write(model / "flux1-dev.safetensors", {"single_transformer_blocks.0.proj_mlp.weight": ONE})
    with pytest.raises(ValueError, match="with diffusers' names, lacks single_transformer_blocks.0.attn.to_q.weight"):
        find_model("mine")


# ---- saving ----


def test_saved_tensors_come_back_with_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"x": torch.randn(3, 4).t(), "y": torch.ones(2, dtype=torch.bfloat16, requires_grad=True)}
    save_safetensors(tensors, path, {"note": "kept"})
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}
    loaded = load_file(path)
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_safetensors({"x": torch.zeros(2)}, path)
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_safetensors({"x": torch.ones(2)}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError):
        save_safetensors({"x": torch.ones(2)}, tmp_path / "none" / "a.safetensors")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_atomic(path, "first")
    write_atomic(path, b"second")
    write_atomic(tmp_path / "b.txt", lambda temporary: temporary.write_text("by a function"))
    with pytest.raises(FileExistsError):
        write_atomic(path, "third", overwrite=False)

    def interrupted(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, interrupted)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "second", "b.txt": "by a function"}


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("write", [b"new", "new", lambda temporary: temporary.write_text("new")])
def test_a_failing_disk_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, write, overwrite):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "none" / "a.txt", write, overwrite)
    if overwrite:
        (tmp_path / "a.txt").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "a.txt", write, overwrite)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({"a.txt": "old"} if overwrite else {})


def test_where_no_hard_links_are_a_name_is_still_taken_only_once(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    write_atomic(tmp_path / "a", "first", overwrite=False)
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "a", "second", overwrite=False)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["first"]


# ---- memory ----

MEASURE = """
import sys
import torch
from model.weights import load_flux

def kilobytes(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

before = kilobytes("VmRSS")
flux = load_flux(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
touched = sum(float(parameter.view(-1)[::64].float().sum()) for parameter in flux.parameters())
print(1024 * (kilobytes("VmHWM") - before))
"""


def write_large(path: Path, depth: int, singles: int, hidden: int) -> int:
    """Stream a random bfloat16 checkpoint to disk, a tensor at a time. Returns its bytes"""
    from model.flux import Flux, FluxConfig

    with torch.device("meta"):
        config = FluxConfig(64, 64, 768, 4096, hidden, 4 * hidden, hidden // 128, depth, singles, (16, 56, 56), True)
        shapes = {key: tuple(tensor.shape) for key, tensor in Flux(config).state_dict().items()}
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 2 * int(torch.tensor(shape).prod())
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            file.write(torch.randn(shape).bfloat16().view(torch.uint8).numpy().tobytes())
    return path.stat().st_size


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure the resident set")
@pytest.mark.parametrize("dtype, most", [("bfloat16", 1.05), ("float32", 2.05)])
def test_loading_two_gigabytes_adds_little_more_than_their_size(tmp_path, dtype, most):
    path = tmp_path / "flux1-large.safetensors"
    size = write_large(path, depth=6, singles=14, hidden=1536)
    assert size > 1.9e9
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path, dtype], cwd=ROOT, capture_output=True, text=True, check=True
    )
    path.unlink()
    ratio = int(done.stdout) / size
    print(f"{dtype}: peak resident set grows by {ratio:.3f} of the file's {size / 1e9:.2f} GB")
    assert ratio <= most
