"""From a data set on disk to what the training loop takes: examples, buckets, caches, batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.text import load_text_encoders
from model.weights import ModelFiles, load_autoencoder

from .cache import Cache, LatentCache, TextCache, every_mask, file_mark, text_mark
from .config import ModelRow, TrainConfig
from .examples import Batches, Example, buckets, find_examples
from .layout import Layout, parse_grid, token_mask
from .training import Sets

Note = Callable[[str], None]


@dataclass
class Feed:
    """Encoded examples, in buckets of one grid and panel size; entries are read from the disk once."""

    batches: Batches
    layouts: list[Layout]
    trained: list[list[Example]]  # of each bucket
    held_out: list[tuple[Layout, list[Example]]]
    latents: LatentCache
    texts: TextCache
    conditional: bool

    def __post_init__(self) -> None:
        self.read: dict[tuple, Tensor | tuple[Tensor, Tensor]] = {}

    def batch(self, number: int) -> tuple[Layout, list[Example]]:
        """Which examples are in a batch, all of one layout."""
        bucket, chosen = self.batches[number]
        return self.layouts[bucket], [self.trained[bucket][i] for i in chosen]

    def sets(
        self, layout: Layout, examples: Sequence[Example], kept: Sequence[tuple[int, ...]], dropped: Sequence[bool]
    ) -> Sets:
        """Give examples with what the encoders made of them.

        kept: the panels that each example keeps clean, from 1
        dropped: which captions are left out
        """
        z = torch.stack([self._latents(example, layout, ()) for example in examples])
        features = [self._text("" if left else e.caption) for e, left in zip(examples, dropped, strict=True)]
        txt, vec = (torch.stack(tensors) for tensors in zip(*features, strict=True))
        if not self.conditional:
            return Sets(z, txt, vec)
        everything = range(1, layout.panels + 1)
        masked = [tuple(panel for panel in everything if panel not in some) for some in kept]
        known = [
            self._latents(example, layout, hidden) if len(hidden) < layout.panels else torch.zeros_like(z[0])
            for example, hidden in zip(examples, masked, strict=True)
        ]
        generated = torch.cat([token_mask(hidden, layout).bool() for hidden in masked])
        return Sets(z, txt, vec, torch.stack(known), generated)

    def _latents(self, example: Example, layout: Layout, masked: tuple[int, ...]) -> Tensor:
        key = example.sha256, layout, masked
        if key not in self.read:
            self.read[key] = self.latents.get(example, layout, masked)
        return self.read[key]

    def _text(self, caption: str) -> tuple[Tensor, Tensor]:
        if caption not in self.read:
            self.read[caption] = self.texts.get(caption)
        return self.read[caption]


def prepare(config: TrainConfig, files: ModelFiles, row: ModelRow, note: Note) -> Feed:
    """Read a data set, encode what is not in the cache, and free the encoders again.

    The cache lies in .cache/ inside the data folder's run, so that trials on the same data share it.

    Errors: ValueError for anything broken in the data set
    """
    examples = find_examples(config.data, parse_grid(config.grid) if config.grid else None)
    every = buckets(examples, config.panel_size)
    trained, held_out = hold_out(every, config.holdout)
    cache = Cache(Path(config.out).parent / ".cache")
    latents = LatentCache(cache, file_mark([files.autoencoder]), config.fit)
    texts = TextCache(cache, text_mark(files), row.text, getattr(torch, config.dtype))
    conditional = config.condition == "clean"
    made = latents.encode(
        every, lambda: load_autoencoder(files.autoencoder, config.device),
        every_mask if conditional else lambda layout: ((),),
    )  # fmt: skip
    captions = ["", *(example.caption for example in examples)]
    read = texts.encode(captions, lambda: load_text_encoders(files, config.device, getattr(torch, config.dtype)))
    note(f"{len(examples)} sets in {len(every)} buckets; {made} composites and {read} captions encoded, others cached")
    layouts = list(trained)
    batches = Batches([len(trained[layout]) for layout in layouts], config.batch, config.seed)
    return Feed(batches, layouts, [trained[layout] for layout in layouts], held_out, latents, texts, conditional)


def hold_out(
    every: dict[Layout, list[Example]], part: float
) -> tuple[dict[Layout, list[Example]], list[tuple[Layout, list[Example]]]]:
    """Split every bucket: the last ones of each are kept for validation, but never all of it."""
    trained, held_out = {}, []
    for layout, examples in every.items():
        count = min(len(examples) - 1, round(part * len(examples)))
        trained[layout] = examples[: len(examples) - count]
        if count:
            held_out.append((layout, examples[len(examples) - count :]))
    return trained, held_out
