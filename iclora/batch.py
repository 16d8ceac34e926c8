"""Encoded examples, as the training loop takes them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .examples import Example
from .layout import Layout


@dataclass(frozen=True)
class Sets:
    """Examples of one grid and panel size, encoded.

    z: (B, 16, h, w) their latents
    txt: (B, T, C), vec: (B, V) their captions
    known: (B, 16, h, w) latents of the composites whose generated panels are 0; None trains all panels
    generated: (B, I, 1) True where tokens are generated; None with known
    mask: (L, L) which tokens see which, from iclora.layout.sight; None lets all see all
    references: (B, R, 64) clean tokens of their references; None if they have none
    spread: (B, R, 64) the standard deviation of those, whose mean references is
    ids: (1, I + R, 3) places of their tokens and the references'; None without references
    alone: whether references see each other only
    """

    z: Tensor
    txt: Tensor
    vec: Tensor
    known: Tensor | None = None
    generated: Tensor | None = None
    mask: Tensor | None = None
    references: Tensor | None = None
    spread: Tensor | None = None
    ids: Tensor | None = None
    alone: bool = False

    def drawn(self, noise: Tensor | None) -> "Sets":
        """Draw the references from their posterior. noise: (B, R, 64), or None for the mean"""
        return self if noise is None else replace(self, references=self.references + self.spread * noise)


class Feed(Protocol):
    """What the loop takes examples from; iclora.feed makes it."""

    layouts: list[Layout]
    held_out: list[tuple[Layout, list[Example]]]

    def batch(self, number: int) -> tuple[Layout, list[Example]]: ...

    def sets(
        self, layout: Layout, examples: Sequence[Example], kept: Sequence[tuple[int, ...]], dropped: Sequence[bool]
    ) -> Sets: ...

    def prompt(self, text: str, layout: Layout) -> Sets: ...


def to(sets: Sets, device: torch.device) -> Sets:
    return Sets(*(value.to(device) if isinstance(value, Tensor) else value for value in vars(sets).values()))
