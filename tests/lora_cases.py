"""LoRA files to read, what the golden model makes of them, and how to change them."""

import json

import torch
from safetensors.torch import load_file, save_file

from golden import FLUX, GOLDEN, case
from model.lora import trainable
from model.weights import load_flux

FILES = GOLDEN / "lora"
EXPECTED = load_file(FILES / "expected.safetensors")
INPUTS = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
GIVEN = {name: case("dev")[name] for name in INPUTS}
PLAIN = FILES / "ai_toolkit_blocks.safetensors"
TO_Q = "transformer.transformer_blocks.0.attn.to_q"
QKV = "double_blocks.0.img_attn.qkv"


def fresh(dtype=torch.float32):
    return load_flux(FLUX["dev"], dtype=dtype)


@torch.no_grad()
def run(flux, **more):
    return flux(**{**GIVEN, **more})


def weights(flux):
    return {name: tensor.clone() for name, tensor in flux.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def scramble(flux, seed=0):
    """Give fresh adapters something to say, exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(flux):
            parameter.copy_((0.1 * torch.randn(parameter.shape, generator=generator)).bfloat16())


def changed(tmp_path, source=PLAIN, metadata=None, drop=(), **more):
    """Copy a LoRA file with some tensors replaced, added or dropped; dots in names are written __ here."""
    tensors = load_file(source) | {name.replace("__", "."): tensor for name, tensor in more.items()}
    path = tmp_path / "changed.safetensors"
    save_file({name: t.contiguous() for name, t in tensors.items() if name not in drop}, path, metadata)
    return path


def renamed(tmp_path, rename, source=PLAIN, metadata=None):
    path = tmp_path / "renamed.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(source).items()}, path, metadata)
    return path


def peft(**values):
    settings = {f"transformer.{name}": value for name, value in {"r": 4, "lora_alpha": 4, **values}.items()}
    return {"lora_adapter_metadata": json.dumps(settings)}
