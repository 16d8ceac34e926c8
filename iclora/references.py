"""Reference pictures (UNO): clean latent tokens behind the target's, each picture at a place of its own.

Letters: I target tokens, R reference tokens; h, w in tokens of 16x16 pixels.
Source: arXiv:2504.02160; bytedance/UNO@d305981 uno/flux/pipeline.py, uno/flux/sampling.py
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from model.autoencoder import AutoEncoder
from model.lora_formats import LoraFile
from model.position import grid_ids, reference_ids
from sampling.images import to_tensor
from sampling.latents import TOKEN, pack

from .config import SampleConfig, TrainConfig, flag
from .layout import Layout

Config = TypeVar("Config", SampleConfig, TrainConfig)
TRAINED_WITH = {  # what a LoRA says of its training, as iclora.NAME
    "offset": str,
    "offset_scale": float,
    "ref_size": int,
    "posterior": str,
    "reference_attention": str,
}


def follow_loras(config: Config, loras: Sequence[LoraFile]) -> Config:
    """Take what LoRA files say of the references in their training, where a configuration leaves it open.

    Errors: ValueError if two LoRAs differ, or what one says makes no sense
    """
    chosen: dict[str, str | float | int] = {}
    for lora in loras:
        for name, kind in TRAINED_WITH.items():
            if f"iclora.{name}" not in lora.metadata or getattr(config, name) is not None:
                continue
            try:
                value = kind(lora.metadata[f"iclora.{name}"])
                replace(config, **{name: value})  # checks its range
            except ValueError as error:
                reason = f"damaged iclora.{name} in its metadata ({str(error)[:120]})"
                raise ValueError(f"{lora.path} has a {reason}") from None
            if chosen.setdefault(name, value) != value:
                raise ValueError(
                    f"{lora.path.name} was trained with {flag(name)} {value}, another LoRA with {chosen[name]}; say "
                    f"which to use with {flag(name)}"
                )
    return replace(config, **chosen)


def fit_reference(picture: Image.Image, long_side: int, name: str = "a reference") -> Image.Image:
    """Scale the longer side to a length, small pictures up too, and cut both sides to whole tokens, at the centre.

    long_side: pixels
    name: for the message
    Errors: ValueError if the shorter side is less than a token then
    Source: bytedance/UNO@d305981 uno/flux/pipeline.py preprocess_ref
    """
    (wide, high), (width, height) = (size(picture.size, long_side, name) for size in (scaled, reference_size))
    left, top = (wide - width) // 2, (high - height) // 2
    picture = picture.resize((wide, high), Image.Resampling.LANCZOS)
    return picture.crop((left, top, left + width, top + height))


def scaled(size: tuple[int, int], long_side: int, name: str = "a reference") -> tuple[int, int]:
    """Give width and height when the longer is long_side; the release's floats lose a pixel of it now and then.

    Errors: ValueError if the shorter is less than a token then
    """
    wide, high = (side * long_side // max(size) for side in size)
    if min(wide, high) < TOKEN:
        raise ValueError(
            f"{name} of {size[0]}x{size[1]} pixels becomes {wide}x{high}, but a token has {TOKEN}x{TOKEN}; crop it or "
            "raise --ref-size"
        )
    return wide, high


def reference_size(size: tuple[int, int], long_side: int, name: str = "a reference") -> tuple[int, int]:
    """Give width and height of a reference as fit_reference makes it. Errors: as scaled"""
    wide, high = scaled(size, long_side, name)
    return wide // TOKEN * TOKEN, high // TOKEN * TOKEN


def image_ids(layout: Layout, mode: str, scale: float) -> Tensor:
    """Give the positions of the target's tokens and, behind them, of the references', see reference_ids.

    Returns ids: (1, N, 3), N being I and R together
    """
    target = layout.tokens_high, layout.tokens_wide
    sizes = [(height // TOKEN, width // TOKEN) for width, height in layout.references]
    return torch.cat([grid_ids(*target), *reference_ids(target, sizes, mode, scale)])[None]


def encode(
    autoencoder: AutoEncoder, references: Sequence[Image.Image], generator: torch.Generator | None = None
) -> Tensor:
    """Encode references, each by itself, into clean tokens.

    generator: draws from the posterior, as the release does; None takes its mean
    Returns tokens: (1, R, 64); R is 0 without references
    """
    device = next(autoencoder.parameters()).device
    tokens = [pack(autoencoder.encode(to_tensor(picture).to(device), generator)) for picture in references]
    return torch.cat([torch.empty(1, 0, 64, device=device), *tokens], dim=1)  # (1, R, 64)


def encode_posterior(autoencoder: AutoEncoder, image: Tensor) -> tuple[Tensor, Tensor]:
    """Give all that training needs to draw from the posterior of pictures anew in every step.

    image: (B, 3, h, w) in -1..1
    Returns its mean, scaled and shifted as the autoencoder's encode does, and its standard deviation, scaled; both
        (B, 16, h/8, w/8)
    """
    config = autoencoder.config
    mean, logvar = autoencoder.moments(image.to(autoencoder.encoder.conv_in.weight))
    return config.scale_factor * (mean - config.shift_factor), config.scale_factor * (logvar / 2).exp()
