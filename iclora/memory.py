"""Refuse what takes more memory than there is, before anything is loaded or encoded.

Large models, and runs that ask for it, are planned by cards.py instead, which finds what fits.
"""

import math
import os
import sys
from collections.abc import Collection
from typing import Any

import torch

from model.checkpoint import Checkpoint
from model.loading import BIG
from model.weights import ModelFiles

from .config import SampleConfig, TrainConfig, model_defaults
from .flops import count_tokens
from .layout import MAX_TOKENS, Layout
from .sizes import COPIES, forward_bytes, step_bytes

TEXT = 512  # tokens, at most


def check_memory(config: SampleConfig, layout: Layout, flux: Checkpoint) -> None:
    """Refuse more references than a run can hold, before a pixel of them is read.

    layout: with the references' sizes
    Errors: ValueError with the tokens and an estimate of the memory
    """
    if planned(config, flux):
        return
    dtype, tokens = getattr(torch, config.dtype), count_tokens(TEXT, layout, config.reference_attention)
    count, target, weights = tokens.refs, tokens.target, dtype.itemsize * stored_values(flux)
    needed = weights + forward_bytes(flux.config, dtype, tokens)
    what = f"{count} tokens of references (--ref, {len(layout.references)} given) beside {target} of the picture"
    _refuse_above(needed, weights, target + count, config.device, what, "give fewer, or lower --ref-size")


def check_training_memory(
    config: TrainConfig, layouts: Collection[Layout], files: ModelFiles, trained: int, world_size: int
) -> Any:
    """Refuse more tokens than a step of training can hold, before anything is encoded.

    layouts: of all batches; the largest decides
    trained: how many values
    world_size: processes; the estimate is for one of them
    Returns how it fits, an iclora.cards.MemoryPlan; None needs no technique
    Errors: ValueError with the tokens and an estimate of the memory
    """
    examples, flux, dtype = config.batch // (world_size * config.accumulate), files.flux, getattr(torch, config.dtype)
    if planned(config, flux):
        from .cards import plan_for_training  # the plain path does without

        return plan_for_training(config, layouts, files, trained, examples, free_memory(config.device))
    text = model_defaults(flux.config).text_length or 0  # tiny's texts are short
    sizes = [(count_tokens(text, layout, config.reference_attention), layout) for layout in layouts]
    tokens, layout = max(sizes, key=lambda size: len(size[0]))
    again = config.checkpointing * (flux.config.depth + flux.config.depth_single_blocks)
    held = step_bytes(flux.config, dtype, examples, tokens, config.targets, config.rank, again)
    fixed = dtype.itemsize * stored_values(flux) + 4 * COPIES * trained
    count, target, needed = tokens.refs, tokens.target, fixed + held
    shown = f"{count} tokens of references ({len(layout.references)} in a row of --data) beside " if count else ""
    what = f"{shown}{target} {'' if count else 'tokens '}of the picture, {examples} examples at once,"
    size_flag = "--composite-size" if config.composite_size else "--panel-size"
    less = "raise --accumulate" if config.checkpointing else "use --checkpointing, raise --accumulate"
    advice = f"{less}, lower --ref-size or have fewer" if count else f"{less} or lower {size_flag}"
    _refuse_above(needed, fixed, target + count, config.device, what, advice)
    return None


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


def planned(config: SampleConfig | TrainConfig, flux: Checkpoint) -> bool:
    """Tell whether cards.py plans a run: where a technique is asked for, and where a transformer is large."""
    asked = config.quantize or config.compile or config.offload or config.vram is not None or config.dry_run
    return bool(asked) or getattr(config, "checkpointing", None) == "auto" or 2 * stored_values(flux) > BIG


def add_memory_plans(plans: list[Any]) -> list[Any]:
    """Give the plans of one run how they fit into memory, if that is planned. plans: each an iclora.plan.Plan"""
    if plans[0].memory_plan or not planned(plans[0].config, plans[0].files.flux):
        return plans
    from .cards import share_plan  # the plain path does without

    return share_plan(plans, free_memory(plans[0].config.device))


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
