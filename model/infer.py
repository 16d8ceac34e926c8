"""Configurations of networks, read off the shapes of their tensors."""

import re
from collections.abc import Iterable

from .autoencoder import AutoEncoderConfig
from .flux import FluxConfig

INPUTS = {384: "FLUX.1 Fill", 128: "FLUX.1 Canny or Depth"}  # channels per token of models that need more than noise


def dimensions(shapes: dict[str, tuple[int, ...]], key: str, ndim: int) -> tuple[int, ...]:
    """Look up a shape that an inference needs. Errors: ValueError, without a subject, if it is not there or not such"""
    if key not in shapes:
        raise ValueError(f"lacks {key}, from which the configuration is inferred")
    if len(shapes[key]) != ndim or not all(shapes[key]):
        raise ValueError(f"has {key} of shape {shapes[key]}; it should have {ndim} dimensions, none of them 0")
    return shapes[key]


def count_blocks(keys: Iterable[str], stem: str) -> int:
    """Count the blocks stem.0, stem.1, ... Errors: ValueError, without a subject, if the numbers have gaps"""
    found = {int(match[1]) for key in keys if (match := re.match(rf"{re.escape(stem)}\.([0-9]{{1,6}})\.", key))}
    gaps = set(range(len(found))) - found
    if gaps:
        raise ValueError(f"lacks {stem}.{min(gaps)} although it has {stem}.{max(found)}; blocks are numbered from 0")
    return len(found)


def infer_flux_config(shapes: dict[str, tuple[int, ...]]) -> FluxConfig:
    """Read the configuration of a transformer off its tensor shapes.

    shapes: by official name, e.g. {"img_in.weight": (3072, 64), ...}
    Errors: ValueError, without a subject ("lacks img_in.weight, ..."), for shapes that no FLUX.1 here can have
    """
    hidden, inputs = dimensions(shapes, "img_in.weight", 2)
    outputs, _ = dimensions(shapes, "final_layer.linear.weight", 2)
    depth, singles = count_blocks(shapes, "double_blocks"), count_blocks(shapes, "single_blocks")
    if inputs != 64 or outputs != 64:
        name = f" ({INPUTS[inputs]})" if inputs in INPUTS else ""
        advice = "only models with 64 and 64 are run here: use FLUX.1-dev, -schnell or -Krea-dev"
        raise ValueError(f"takes {inputs} and gives {outputs} channels per token{name}; {advice}")
    (head,) = dimensions(shapes, "double_blocks.0.img_attn.norm.query_norm.scale", 1)
    if head % 32 or hidden % head:
        right = "a multiple of 32, for rotary axes of 1/8, 7/16 and 7/16 of it, and divide the width"
        raise ValueError(f"has attention heads of width {head} at width {hidden}; the head width must be {right}")
    mlp, _ = dimensions(shapes, "double_blocks.0.img_mlp.0.weight", 2)
    vec, context = (dimensions(shapes, f"{name}.weight", 2)[1] for name in ("vector_in.in_layer", "txt_in"))
    axes = (head // 8, head * 7 // 16, head * 7 // 16)
    guidance = any(key.startswith("guidance_in.") for key in shapes)
    return FluxConfig(inputs, outputs, vec, context, hidden, mlp, hidden // head, depth, singles, axes, guidance)


def infer_autoencoder_config(shapes: dict[str, tuple[int, ...]]) -> AutoEncoderConfig:
    """Read the configuration of an autoencoder off its tensor shapes.

    shapes: by official name, e.g. {"encoder.conv_in.weight": (128, 3, 3, 3), ...}
    Errors: ValueError, without a subject, for shapes that no FLUX.1 autoencoder can have
    """
    ch = dimensions(shapes, "encoder.conv_in.weight", 4)[0]
    latent = dimensions(shapes, "encoder.conv_out.weight", 4)[0] // 2
    levels = count_blocks(shapes, "encoder.down")
    if latent != 16 or levels != 4:
        advice = "the FLUX.1 autoencoder has 16 and 4: use the ae.safetensors from the root of the FLUX.1 repository"
        raise ValueError(f"has {latent} latent channels and {levels} resolutions; {advice}")
    widths = [dimensions(shapes, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
    if ch % 32 or any(width % ch for width in widths):
        raise ValueError(f"has channels {ch} and {widths}; they must be multiples of 32 and of the first")
    blocks = count_blocks(shapes, "encoder.down.0.block")
    return AutoEncoderConfig(ch, tuple(width // ch for width in widths), blocks, latent)
