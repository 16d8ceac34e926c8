"""How much a run computes: FLOPs of a forward and of a training step, two for a product that is added to a sum.

Counted are matrix products and attention, as torch's FlopCounterMode does; tests/cli/test_cards.py compares.
"""

import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from model.flux import FluxConfig
from model.lora import layers
from model.position import SINUSOID

from .config import ALONE, TrainConfig
from .layout import Layout

ONCE = ("time_in", "guidance_in", "vector_in", "modulation", "img_mod", "txt_mod", "adaLN_modulation")  # of an example


@dataclass(frozen=True)
class Tokens:
    """How many tokens an example has. alone: whether references see only each other, in a pass of their own"""

    text: int
    target: int
    refs: int = 0
    alone: bool = False

    def __len__(self) -> int:
        return self.text + self.target + self.refs


def count_tokens(text: int, layout: Layout, reference_attention: str | None = None) -> Tokens:
    """Count the tokens of an example. text: those of its texts"""
    return Tokens(text, layout.image_tokens, layout.reference_tokens, reference_attention == ALONE)


@dataclass(frozen=True)
class Flops:
    """Those of one forward."""

    linear: float  # L, of frozen Linears
    attention: float  # A
    lora: float  # l, of adapters

    @property
    def forward(self) -> float:
        """All of them."""
        return self.linear + self.attention + self.lora

    @property
    def step(self) -> float:
        """What a training step is credited with: 2L + 3A + 3l, as frozen weights need no gradient of their own.

        What is computed twice does not count: attention in its backward pass, and blocks that keep nothing.
        """
        return 2 * self.linear + 3 * self.attention + 3 * self.lora


def count_flops(flux: FluxConfig, examples: int, tokens: Tokens, adapters: nn.Module | None = None) -> Flops:
    """Count those of one forward.

    tokens: of every example
    adapters: the transformer, if it has some
    """
    width, blocks = flux.hidden_size, flux.depth + flux.depth_single_blocks
    blockwise = 2 * width * (2 * width + flux.mlp_hidden) * blocks * len(tokens)  # qkv, proj and MLP, fused or not
    embedded = [SINUSOID] * (1 + flux.guidance_embed) + [flux.vec_in_dim]
    once = (12 * flux.depth + 3 * flux.depth_single_blocks) * width**2 + sum((n + width) * width for n in embedded)
    edges = flux.in_channels * (tokens.target + tokens.refs) + flux.context_in_dim * tokens.text
    edges = (edges + flux.out_channels * tokens.target + 2 * width) * width
    others = len(tokens) - tokens.refs
    pairs = tokens.refs**2 + others * len(tokens) if tokens.alone else len(tokens) ** 2
    lora = 0
    for name, layer in layers(adapters).items() if adapters is not None else ():
        lora += rows(name, tokens) * sum(p.numel() for p in layer.adapters.parameters() if p.ndim == 2)
    linear = blockwise + (1 + tokens.alone) * once + edges
    return Flops(2.0 * examples * linear, 4.0 * examples * pairs * width * blocks, 2.0 * examples * lora)


def rows(name: str, tokens: Tokens) -> int:
    """Tell how many vectors of an example pass a Linear, by its released name."""
    parts = name.split(".")
    if not {*ONCE}.isdisjoint(parts):
        return 1 if "final_layer" in parts else 1 + tokens.alone
    if parts[0] == "final_layer":
        return tokens.target
    if any(part.startswith("txt_") for part in parts):
        return tokens.text
    return len(tokens) - tokens.text * any(part.startswith("img_") for part in parts)


class Meter:
    """How fast a training is: what its steps are credited with, over the time they take."""

    def __init__(self, config: TrainConfig, flux: nn.Module, loader: Any):
        self.config, self.flux, self.loader, self.known = config, flux, loader, {}
        self.start()

    def start(self) -> None:
        """Begin to time a step; what is saved or shown between two does not count."""
        self.began = time.perf_counter()

    def teraflops(self, step: int) -> float:
        """Give the TFLOP/s of the step just taken, of all processes."""
        layout, _ = self.loader.batch(step - 1)
        if layout not in self.known:
            tokens = count_tokens(self.loader.prompt("", layout).txt.shape[1], layout, self.config.reference_attention)
            self.known[layout] = count_flops(self.flux.config, self.config.batch, tokens, self.flux).step / 1e12
        return self.known[layout] / (time.perf_counter() - self.began)
