"""Reference pictures (UNO): clean latent tokens behind the target's, each picture at a place of its own.

Letters: R reference tokens, N those and the target's; h, w in tokens of 16x16 pixels.
Source: arXiv:2504.02160; bytedance/UNO@d305981 uno/flux/pipeline.py, uno/flux/sampling.py
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from model.autoencoder import AutoEncoder
from model.checkpoint import open_checkpoint, read_header
from model.flux import FluxConfig
from model.lora_files import lora_file
from model.position import grid_ids, reference_ids
from sampling.images import picture_size, to_tensor
from sampling.latents import TOKEN, pack

from .config import ALONE, UNO, SampleConfig, TrainConfig, model_row
from .knobs import flag
from .layout import MAX_TOKENS, Layout

Config = TypeVar("Config", SampleConfig, TrainConfig)
TRAINED = {  # told by a LoRA as iclora.NAME
    "offset": str, "offset_scale": float, "ref_size": int, "posterior": str, "reference_attention": str,
}  # fmt: skip
TEXT = 512  # tokens, at most
ACTIVATIONS = 40  # values held at once, a token and unit of width; 24 to 47 were measured on a CPU
KEPT = 22  # such values that training keeps of every block; 15 to 23 were counted
ALONE_KEPT = 2, 4  # of every block, for a token of references alone: keys and values; and, if recomputed, gradients too
COPIES = 5  # of what is trained, in float32: weights, gradients, averages, two moments


def about(lora: Path) -> dict[str, str]:
    """Gives the metadata of a LoRA's file."""
    return read_header(file)[1] if (file := lora_file(lora)).is_file() else {}


def follow_loras(
    config: SampleConfig, loras: Sequence[tuple[Path, float]], note: Callable[[str], None]
) -> SampleConfig:
    """Takes over how LoRAs for references were trained, where no flag says otherwise.

    loras: files and strengths
    note: is told of LoRAs that want references and get none, and of references without a LoRA
    Errors: ValueError if two LoRAs differ, or what one says makes no sense
    """
    for path, _ in loras:
        if about(path).get("iclora.method") == UNO and not config.ref:
            note(f"{path.name} was trained to follow reference pictures (UNO) and gets none; give some with --ref")
    if config.ref and not loras:
        note("references without a LoRA: the model follows them only if it was trained to; UNO's goes to --lora")
    return as_trained(config, [path for path, _ in loras])


def as_trained(config: Config, loras: Sequence[Path]) -> Config:
    """Takes what LoRA files say of the references in their training, where a configuration leaves it open."""
    told: dict[str, str | float | int] = {}
    for path in loras:
        said = about(path)
        for name, kind in TRAINED.items():
            if f"iclora.{name}" not in said or getattr(config, name) is not None:
                continue
            try:
                value = kind(said[f"iclora.{name}"])
                replace(config, **{name: value})  # checks its range
            except ValueError as error:
                raise ValueError(f"{path} has a damaged iclora.{name} in its metadata ({str(error)[:120]})") from None
            if told.setdefault(name, value) != value:
                raise ValueError(
                    f"{path.name} was trained with {flag(name)} {value}, another LoRA with {told[name]}; say which to "
                    f"use with {flag(name)}"
                )
    return replace(config, **told)


def fit_reference(picture: Image.Image, long_side: int, name: str = "a reference") -> Image.Image:
    """Scales the longer side to a length, small pictures up too, and cuts both sides to whole tokens, at the centre.

    long_side: pixels
    name: for the message
    Errors: ValueError if the shorter side is less than a token then
    Source: bytedance/UNO@d305981 uno/flux/pipeline.py preprocess_ref
    """
    (wide, high), (width, height) = (size(picture.size, long_side, name) for size in (scaled, fitted))
    left, top = (wide - width) // 2, (high - height) // 2
    picture = picture.resize((wide, high), Image.Resampling.LANCZOS)
    return picture.crop((left, top, left + width, top + height))


def scaled(size: tuple[int, int], long_side: int, name: str = "a reference") -> tuple[int, int]:
    """Gives width and height when the longer is long_side; the release's floats lose a pixel of it now and then.

    Errors: ValueError if the shorter is less than a token then
    """
    wide, high = (side * long_side // max(size) for side in size)
    if min(wide, high) < TOKEN:
        raise ValueError(
            f"{name} of {size[0]}x{size[1]} pixels becomes {wide}x{high}, but a token has {TOKEN}x{TOKEN}; crop it or "
            "raise --ref-size"
        )
    return wide, high


def fitted(size: tuple[int, int], long_side: int, name: str = "a reference") -> tuple[int, int]:
    """Gives width and height of a reference as fit_reference makes it. Errors: as scaled"""
    wide, high = scaled(size, long_side, name)
    return wide // TOKEN * TOKEN, high // TOKEN * TOKEN


def place(layout: Layout, mode: str, scale: float) -> Tensor:
    """Gives the positions of the target's tokens and, behind them, of the references', see reference_ids.

    returns: (1, N, 3) ids
    """
    target = layout.tokens_high, layout.tokens_wide
    sizes = [(height // TOKEN, width // TOKEN) for width, height in layout.references]
    return torch.cat([grid_ids(*target), *reference_ids(target, sizes, mode, scale)])[None]


def encode(
    autoencoder: AutoEncoder, references: Sequence[Image.Image], generator: torch.Generator | None = None
) -> Tensor:
    """Encodes references, each by itself, into clean tokens.

    generator: draws from the posterior, as the release does; None takes its mean
    returns: (1, R, 64) tokens; R is 0 without references
    """
    device = next(autoencoder.parameters()).device
    tokens = [pack(autoencoder.encode(to_tensor(picture).to(device), generator)) for picture in references]
    return torch.cat([torch.empty(1, 0, 64, device=device), *tokens], dim=1)  # (1, R, 64)


def encode_posterior(autoencoder: AutoEncoder, reference: Image.Image) -> tuple[Tensor, Tensor]:
    """Gives all that training needs to draw from the posterior of a reference anew in every step.

    returns: its mean as encode gives it, and its standard deviation; both (1, R, 64)
    """
    config, device = autoencoder.config, next(autoencoder.parameters()).device
    mean, logvar = autoencoder.moments(to_tensor(reference).to(device, autoencoder.encoder.conv_in.weight.dtype))
    return pack(config.scale_factor * (mean - config.shift_factor)), pack(config.scale_factor * (logvar / 2).exp())


def check_memory(config: SampleConfig, layout: Layout, flux: Path, shape: FluxConfig) -> None:
    """Refuses more references than a run can hold, before a pixel of them is read.

    flux, shape: the transformer's file, and what it is
    Errors: ValueError with the tokens and an estimate of the memory; or for a file that is no picture, or too narrow
    """
    shapes = [scaled(picture_size(path), config.ref_size, Path(path).name) for path in config.ref]
    count, target = sum(w // TOKEN * (h // TOKEN) for w, h in shapes), layout.tokens_high * layout.tokens_wide
    size, blocks = getattr(torch, config.dtype).itemsize, shape.depth + shape.depth_single_blocks
    once = 2 * blocks * count if config.reference_attention == ALONE else 0  # keys and values
    weights = size * stored_values(flux)
    needed = weights + size * shape.hidden_size * (ACTIVATIONS * (TEXT + target + count) + once)
    about = f"{count} tokens of references (--ref, {len(shapes)} given) beside {target} of the picture"
    refuse_above(needed, weights, target + count, config.device, about, "give fewer, or lower --ref-size")


def check_training_memory(
    config: TrainConfig, layouts: Iterable[Layout], flux: Path, shape: FluxConfig, trained: int, ranks: int
) -> None:
    """Refuses more tokens than a step of training can hold, before anything is encoded.

    layouts: of all batches; the largest decides
    trained: how many values
    ranks: processes; the estimate is for one of them
    Errors: ValueError with the tokens and an estimate of the memory
    """
    sizes = [(layout.tokens_high * layout.tokens_wide, layout.reference_tokens, layout) for layout in layouts]
    target, count, layout = max(sizes, key=lambda some: some[0] + some[1])
    text, examples = model_row(shape).text or 0, config.batch // (ranks * config.accumulate)  # tiny's texts are short
    size, blocks = getattr(torch, config.dtype).itemsize, shape.depth + shape.depth_single_blocks
    kept = blocks + KEPT if config.checkpointing else KEPT * blocks  # a block that is computed again keeps its input
    once = ALONE_KEPT[config.checkpointing] * blocks * count if config.reference_attention == ALONE else 0
    fixed = size * stored_values(flux) + 4 * COPIES * trained
    needed = fixed + size * shape.hidden_size * (kept * (text + target + count) + once) * examples
    shown = f"{count} tokens of references ({len(layout.references)} in a row of --data) beside " if count else ""
    about = f"{shown}{target} {'' if count else 'tokens '}of the picture, {examples} examples at once,"
    less = "raise --accumulate" if config.checkpointing else "use --checkpointing, raise --accumulate"
    advice = f"{less}, lower --ref-size or have fewer" if count else f"{less} or lower --panel-size"
    refuse_above(needed, fixed, target + count, config.device, about, advice)


def refuse_above(needed: int, fixed: int, tokens: int, device: str, about: str, advice: str) -> None:
    """Refuses what takes more memory than there is, where a CPU may map what is fixed; and too many tokens."""
    about, free = f"{about} take about {needed / 1e9:.3g} GB in the transformer", free_memory(device)
    if device == "cuda" and fixed > free:
        held = f"the weights alone take about {fixed / 1e9:.3g} GB, but the GPU has {free / 1e9:.3g} GB free"
        raise ValueError(f"{held}; use a larger one, or --device cpu")
    if fixed <= free < needed:
        raise ValueError(f"{about}, but {device} has {free / 1e9:.3g} GB; {advice}")
    if tokens > MAX_TOKENS:
        raise ValueError(f"{about}; at most {MAX_TOKENS} tokens are possible, so {advice}")


def stored_values(flux: Path) -> int:
    """Counts the values of a transformer's file."""
    return sum(math.prod(stored.shape) for stored in open_checkpoint(flux, "transformer").tensors.values())


def free_memory(device: str) -> int:
    """Says how many bytes a process's GPU has left, or how many the machine has in all."""
    if device == "cuda":
        return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
