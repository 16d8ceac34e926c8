"""Refuse what takes more memory than there is, before anything is loaded or encoded; estimates made on a CPU."""

import math
import os
import sys
from collections.abc import Iterable

import torch

from model.checkpoint import Checkpoint
from model.quantize import quantized_bytes

from .config import ALONE, SampleConfig, TrainConfig, model_defaults
from .layout import MAX_TOKENS, Layout

BIG = 2e9  # bytes of a transformer in bfloat16, from which on what is exact and saves memory or time is on
TEXT = 512  # tokens, at most
ACTIVATIONS = 40  # values held at once, a token and unit of width; 24 to 47 were measured on a CPU
KEPT = 22  # such values that training keeps of every block; 15 to 25 were counted
ALONE_KEPT = 2, 4  # of every block, for a token of references alone: keys and values; and, if recomputed, gradients too
COPIES = 5  # of what is trained, in float32: weights, gradients, averages, two moments


def check_memory(config: SampleConfig, layout: Layout, flux: Checkpoint) -> None:
    """Refuse more references than a run can hold, before a pixel of them is read.

    layout: with the references' sizes
    Errors: ValueError with the tokens and an estimate of the memory
    """
    count, target = layout.reference_tokens, layout.tokens_high * layout.tokens_wide
    size, blocks = getattr(torch, config.dtype).itemsize, flux.config.depth + flux.config.depth_single_blocks
    once = 2 * blocks * count if config.reference_attention == ALONE else 0  # keys and values
    weights = quantized_bytes(flux, size) if config.quantize else size * stored_values(flux)
    needed = weights + size * flux.config.hidden_size * (ACTIVATIONS * (TEXT + target + count) + once)
    what = f"{count} tokens of references (--ref, {len(layout.references)} given) beside {target} of the picture"
    _refuse_above(needed, weights, target + count, config.device, what, "give fewer, or lower --ref-size")


def check_training_memory(
    config: TrainConfig, layouts: Iterable[Layout], flux: Checkpoint, trained: int, world_size: int
) -> None:
    """Refuse more tokens than a step of training can hold, before anything is encoded.

    layouts: of all batches; the largest decides
    trained: how many values
    world_size: processes; the estimate is for one of them
    Errors: ValueError with the tokens and an estimate of the memory
    """
    sizes = [(layout.tokens_high * layout.tokens_wide, layout.reference_tokens, layout) for layout in layouts]
    target, count, layout = max(sizes, key=lambda size: size[0] + size[1])
    text = model_defaults(flux.config).text_length or 0  # tiny's texts are short
    examples = config.batch // (world_size * config.accumulate)
    size, blocks = getattr(torch, config.dtype).itemsize, flux.config.depth + flux.config.depth_single_blocks
    kept = blocks + KEPT if config.checkpointing else KEPT * blocks  # a block that is computed again keeps its input
    once = ALONE_KEPT[config.checkpointing] * blocks * count if config.reference_attention == ALONE else 0
    fixed = (quantized_bytes(flux, size) if config.quantize else size * stored_values(flux)) + 4 * COPIES * trained
    needed = fixed + size * flux.config.hidden_size * (kept * (text + target + count) + once) * examples
    shown = f"{count} tokens of references ({len(layout.references)} in a row of --data) beside " if count else ""
    what = f"{shown}{target} {'' if count else 'tokens '}of the picture, {examples} examples at once,"
    size_flag = "--composite-size" if config.composite_size else "--panel-size"
    less = "raise --accumulate" if config.checkpointing else "use --checkpointing, raise --accumulate"
    advice = f"{less}, lower --ref-size or have fewer" if count else f"{less} or lower {size_flag}"
    _refuse_above(needed, fixed, target + count, config.device, what, advice)


def _refuse_above(needed: int, fixed: int, tokens: int, device: str, what: str, advice: str) -> None:
    """Refuse what takes more memory than there is, where a CPU may map what is fixed; and too many tokens."""
    what, free = f"{what} take about {needed / 1e9:.3g} GB in the transformer", free_memory(device)
    if device == "cuda" and fixed > free:
        held = f"the weights alone take about {fixed / 1e9:.3g} GB, but the GPU has {free / 1e9:.3g} GB free"
        raise ValueError(f"{held}; use a larger one, or --device cpu")
    if fixed <= free < needed:
        raise ValueError(f"{what}, but {device} has {free / 1e9:.3g} GB; {advice}")
    if tokens > MAX_TOKENS:
        raise ValueError(f"{what}; at most {MAX_TOKENS} tokens are possible, so {advice}")


def stored_values(flux: Checkpoint) -> int:
    """Count the values of a transformer's file."""
    return sum(math.prod(stored.shape) for stored in flux.tensors.values())


def free_memory(device: str) -> int:
    """Say how many bytes a process's GPU has left, or how many the machine has in all."""
    if device == "cuda":
        return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0]
    if not hasattr(os, "sysconf"):  # Windows does not tell; what is too much ends in torch's own error there
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
