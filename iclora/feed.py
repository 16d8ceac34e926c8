"""From a data set on disk to what the training loop takes: examples, buckets, caches, batches."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.flux import FluxConfig
from model.text import load_text_encoders
from model.weights import ModelFiles, load_autoencoder

from .cache import HASHED, Cache, LatentCache, Progress, TextCache, every_mask, file_mark, text_mark
from .config import TrainConfig, model_row
from .examples import Batches, Example, buckets, find_examples
from .layout import Layout, parse_grid, sight, token_mask
from .prompts import texts_of
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
    config: TrainConfig

    def __post_init__(self) -> None:
        self.read: dict[tuple | str, Tensor | tuple[Tensor, Tensor]] = {}
        self.sight: dict[Layout, Tensor] = {}

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
        features = [self._text("" if left else e.caption, layout) for e, left in zip(examples, dropped, strict=True)]
        txt, vec = (torch.stack(tensors) for tensors in zip(*features, strict=True))
        mask = self._sight(layout, txt.shape[1]) if self.config.text == "panel" else None
        if self.config.condition == "none":
            return Sets(z, txt, vec, mask=mask)
        everything = range(1, layout.panels + 1)
        masked = [tuple(panel for panel in everything if panel not in some) for some in kept]
        known = [
            self._latents(example, layout, hidden) if len(hidden) < layout.panels else torch.zeros_like(z[0])
            for example, hidden in zip(examples, masked, strict=True)
        ]
        generated = torch.cat([token_mask(hidden, layout).bool() for hidden in masked])
        return Sets(z, txt, vec, torch.stack(known), generated, mask)

    def _latents(self, example: Example, layout: Layout, masked: tuple[int, ...]) -> Tensor:
        key = example.sha256, layout, masked
        if key not in self.read:
            self.read[key] = self.latents.get(example, layout, masked)
        return self.read[key]

    def _text(self, caption: str, layout: Layout) -> tuple[Tensor, Tensor]:
        texts = texts_of(caption, layout.rows, layout.cols, self.config.text)
        for text in texts:
            if text not in self.read:
                self.read[text] = self.texts.get(text)
        own = texts[1:] if self.config.text == "panel" else texts
        return torch.cat([self.read[text][0] for text in own]), self.read[texts[0]][1]

    def _sight(self, layout: Layout, text: int) -> Tensor:
        if layout not in self.sight:
            self.sight[layout] = sight(layout, text // layout.panels)
        return self.sight[layout]


def find(config: TrainConfig) -> list[Example]:
    """Read what --data names. Errors: ValueError for anything broken in it"""
    return find_examples(config.data, parse_grid(config.grid) if config.grid else None)


def origin(examples: Sequence[Example], files: ModelFiles) -> dict[str, str]:
    """Mark what a run learns from by its content: the sets in their order, and the base model.

    Of a transformer over 1 GB, name and size stand for the content.
    """
    sets = json.dumps([(example.grid, example.caption, example.sha256) for example in examples])
    size = files.flux.stat().st_size
    model = file_mark([files.flux]) if size <= HASHED else f"{files.flux.name} of {size} bytes"
    return {"data": hashlib.sha256(sets.encode()).hexdigest(), "model": model}


def prepare(
    config: TrainConfig, examples: Sequence[Example], files: ModelFiles, shape: FluxConfig, note: Note,
    bar: Callable[[str], AbstractContextManager[Progress]],
) -> Feed:  # fmt: skip
    """Encode examples as far as they are not in the cache, and free the encoders again.

    The cache lies beside the run's folder, so that trials on the same data share it.

    shape: of the transformer, which must take what the encoders give
    bar: makes a progress bar of a label
    Errors: ValueError for too large composites, captions that cannot be taken apart, or encoders of another model;
        OSError if the disk is full
    """
    every = buckets(examples, config.panel_size)
    trained, held_out = hold_out(every, config.holdout)
    cache, dtype = Cache(Path(config.out).absolute().parent / ".cache"), getattr(torch, config.dtype)
    latents = LatentCache(cache, file_mark([files.autoencoder]), config.fit, config.concat)
    texts = TextCache(cache, text_mark(files), model_row(shape).text, dtype)
    masks = every_mask if config.condition == "clean" else lambda layout: ((),)
    captions = ["", *(text for e in examples for text in texts_of(e.caption, *e.grid, config.text))]
    with bar("encoding texts") as progress:
        read = texts.encode(captions, lambda: load_text_encoders(files, config.device, dtype), progress)
    widths, wanted = tuple(t.shape[-1] for t in texts.get("")), (shape.context_in_dim, shape.vec_in_dim)
    if widths != wanted:
        raise ValueError(
            f"the T5 and CLIP encoders beside {files.name} give widths {widths[0]} and {widths[1]}, but its "
            f"transformer takes {wanted[0]} and {wanted[1]}; use the encoders that belong to it"
        )
    with bar("encoding pictures") as progress:
        made = latents.encode(every, lambda: load_autoencoder(files.autoencoder, config.device), masks, progress)
    note(f"{len(examples)} sets in {len(every)} buckets; {made} composites and {read} texts encoded, others cached")
    layouts = list(trained)
    batches = Batches([len(trained[layout]) for layout in layouts], config.batch, config.seed)
    return Feed(batches, layouts, [trained[layout] for layout in layouts], held_out, latents, texts, config)


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
