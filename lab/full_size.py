"""Writes a model as large as FLUX.1-dev with random weights, to try memory and time with: its pictures mean nothing.

  python -m lab.full_size out/full                  transformer in fp8 (12 GB), T5-XXL (9.5 GB), CLIP, autoencoder
  python -m lab.full_size out/full --dtype bfloat16     transformer in bfloat16 (24 GB), the others the same
  python -m lab.full_size out/thin --depth 1        one block of each kind and one layer of each encoder
  python sample.py --model out/full --grid 1x1 --panel-size 256 --steps 1 --prompt "a cat"

Tensors are written one by one and piece by piece, so memory stays small. Tokenizers are the tiny model's.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lab.entry import positive, run
from model.autoencoder import AutoEncoder, AutoEncoderConfig
from model.checkpoint import write_atomic
from model.flux import Flux, FluxConfig
from model.text import KNOWN
from model.weights import find_model

NAMES = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
PIECE = 2**24  # values
SPREAD = 100.0  # standard deviation of fp8 codes, whose largest is 448


def flux(depth: int | None) -> nn.Module:
    double, single = (19, 38) if depth is None else (depth, depth)
    return Flux(FluxConfig(64, 64, 768, 4096, 3072, 12288, 24, double, single, (16, 56, 56), True))


def autoencoder(depth: int | None) -> nn.Module:
    return AutoEncoder(AutoEncoderConfig(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2))


def t5(depth: int | None) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**KNOWN["t5"] | {"num_layers": depth or KNOWN["t5"]["num_layers"]}))


def clip(depth: int | None) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    layers = {"num_hidden_layers": depth or KNOWN["clip"]["num_hidden_layers"]}
    return CLIPTextModel(CLIPTextConfig(**KNOWN["clip"] | layers))


# --dtype -> the file of the transformer, and the type of its matrices
TRANSFORMERS = {
    "fp8": ("flux1-dev-fp8.safetensors", torch.float8_e4m3fn), "bfloat16": ("flux1-dev.safetensors", torch.bfloat16),
}  # fmt: skip
# file -> the network that it is of, the type of its matrices and of the others
FILES: dict[str, tuple[Callable, torch.dtype, torch.dtype]] = {
    "ae.safetensors": (autoencoder, torch.float32, torch.float32),
    "text_encoder_2/model.safetensors": (t5, torch.bfloat16, torch.bfloat16),
    "text_encoder/model.safetensors": (clip, torch.bfloat16, torch.bfloat16),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command line. Returns the exit status"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the model; made if it is not there")
    parser.add_argument("--depth", type=positive, help="blocks of each kind, and layers of encoders (default: all)")
    parser.add_argument("--dtype", choices=TRANSFORMERS, default="fp8", help="of the transformer's matrices")
    return run(parser, lambda args: write_model(args.folder, args.depth, args.dtype), argv)


def write_model(folder: Path, depth: int | None, dtype: str) -> None:
    """Write all files of a model. depth, dtype: as --depth and --dtype"""
    transformer, matrices = TRANSFORMERS[dtype]
    files = {transformer: (flux, matrices, torch.bfloat16), **FILES}
    (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
    (folder / "text_encoder_2").mkdir(exist_ok=True)
    for name, (network, matrices, others) in files.items():
        with torch.device("meta"):
            state = network(depth).state_dict()
        write_random(folder / name, {key: t for key, t in state.items() if "embed_tokens" not in key}, matrices, others)
        print(f"{folder / name} {(folder / name).stat().st_size / 1e9:.2f} GB", flush=True)
    for encoder, settings in (
        ("text_encoder", {"num_hidden_layers": depth}),
        ("text_encoder_2", {"num_layers": depth}),
    ):
        known = KNOWN["t5" if encoder.endswith("2") else "clip"] | (settings if depth else {})
        write_atomic(folder / encoder / "config.json", json.dumps(known))
    tiny = find_model("tiny")
    shutil.copytree(tiny.clip_tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    shutil.copytree(tiny.t5_tokenizer, folder / "tokenizer_2", dirs_exist_ok=True)


def write_random(path: Path, shapes: dict[str, Tensor], matrices: torch.dtype, others: torch.dtype) -> None:
    """Write a safetensors file: matrices and kernels of random values with a variance of 1 / inputs, scales, zeros.

    shapes: tensors of the meta device, by name
    matrices: dtype of what has two dimensions or more; fp8 gets a scale in float32 beside it
    others: dtype of the rest
    """
    plan: list[tuple[str, torch.dtype, tuple[int, ...], float]] = []  # 0 zeros, 1 ones, else a standard deviation
    for key, tensor in shapes.items():
        shape = tuple(tensor.shape)
        if len(shape) < 2:
            plan.append((key, others, shape, 0.0 if key.endswith("bias") else 1.0))
            continue
        spread = float(np.prod(shape[1:])) ** -0.5
        if matrices is torch.float8_e4m3fn:
            plan.append((key, matrices, shape, SPREAD))
            plan.append((f"{key.removesuffix('weight')}scale_weight", torch.float32, (1,), spread / SPREAD))
        else:
            plan.append((key, matrices, shape, spread))
    header, end = {}, 0
    for key, dtype, shape, _ in plan:
        size = int(np.prod(shape)) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(0)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, dtype, shape, value in plan:
                for start in range(0, count := int(np.prod(shape)), PIECE):
                    many = min(PIECE, count - start)
                    random = len(shape) > 1
                    piece = normal(many, value, dtype, generator) if random else torch.full((many,), value).to(dtype)
                    file.write(piece.view(torch.uint8).numpy())

    write_atomic(path, write)


def normal(count: int, spread: float, dtype: torch.dtype, generator: np.random.Generator) -> Tensor:
    """Draw one of 256 quantiles for each value, as 12 billion true draws would take an hour."""
    quantiles = spread * 2**0.5 * torch.erfinv((2 * torch.arange(256) + 1) / 256 - 1)
    table = quantiles.to(dtype).view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]).numpy()
    return torch.from_numpy(table[np.frombuffer(generator.bytes(count), np.uint8)]).view(dtype)


if __name__ == "__main__":
    sys.exit(main())
