"""From a data set on disk to what the training loop takes: examples, buckets, caches, batches."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import open_checkpoint
from model.flux import FluxConfig
from model.lora_formats import lora_file
from model.text import load_text_encoders
from model.weights import ModelFiles, load_autoencoder

from .batch import Sets
from .cache import Cache, LatentCache, Progress, ReferenceCache, TextCache, every_mask, file_mark, text_mark
from .config import ALONE, UNO, TrainConfig, model_row
from .examples import Batches, Example, buckets, find_examples
from .layout import Layout, parse_grid, sight, token_mask
from .prompts import texts_of
from .references import place

Note = Callable[[str], None]
HELD = 4 * 2**30  # bytes of entries that stay in memory; the others are read whenever they are needed
MOST_HELD_OUT = 32  # in all: every validation goes through each of them


@dataclass
class Feed:
    """Encoded examples, in buckets of one grid, panel size and references; what is read from the disk is kept."""

    batches: Batches
    layouts: list[Layout]
    trained: list[list[Example]]  # of each bucket
    held_out: list[tuple[Layout, list[Example]]]
    latents: LatentCache
    references: ReferenceCache
    texts: TextCache
    config: TrainConfig

    def __post_init__(self) -> None:
        self.read: dict[Hashable, tuple[Tensor, ...]] = {}
        self.held = 0  # bytes of what was read
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
        if layout.references:
            shown = [self._once(e.reference_sha256, partial(self.references.get, e)) for e in examples]
            references, spread = (torch.stack(tensors) for tensors in zip(*shown, strict=True))
            ids = place(layout, self.config.offset, self.config.offset_scale)
            alone = self.config.reference_attention == ALONE
            return Sets(z, txt, vec, references=references, spread=spread, ids=ids, alone=alone)
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

    def prompt(self, text: str, layout: Layout) -> Sets:
        """Give what it takes to sample from a text alone: there are no latents and no references."""
        txt, vec = (features[None] for features in self._text(text, layout))
        mask = self._sight(layout, txt.shape[1]) if self.config.text == "panel" else None
        return Sets(torch.zeros(1, 16, layout.height // 8, layout.width // 8), txt, vec, mask=mask)

    def _latents(self, example: Example, layout: Layout, masked: tuple[int, ...]) -> Tensor:
        key = example.sha256, layout, masked
        return self._once(key, lambda: (self.latents.get(example, layout, masked),))[0]

    def _text(self, caption: str, layout: Layout) -> tuple[Tensor, Tensor]:
        texts = texts_of(caption, layout.rows, layout.cols, self.config.text)
        features = [self._once(text, partial(self.texts.get, text)) for text in texts]
        own = features[1:] if self.config.text == "panel" else features
        return torch.cat([txt for txt, _ in own]), features[0][1]

    def _once(self, key: Hashable, load: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Reads an entry, and keeps it in memory as long as there is room."""
        if key in self.read:
            return self.read[key]
        found = load()
        size = sum(tensor.nbytes for tensor in found)
        if self.held + size <= HELD:
            self.read[key] = found
            self.held += size
        return found

    def _sight(self, layout: Layout, text: int) -> Tensor:
        if layout not in self.sight:
            self.sight[layout] = sight(layout, text // layout.panels)
        return self.sight[layout]


def find(config: TrainConfig, note: Note) -> list[Example]:
    """Read what --data names, and note doubts. Errors: ValueError for anything broken in it, or of another method"""
    if (Path(config.data).suffix.lower() == ".json") != (config.method == UNO):
        takes = "a .json of pairs" if config.method == UNO else "sets; pairs are for --method uno"
        raise ValueError(f"--data {config.data[-80:]!a} is not for --method {config.method}, which takes {takes}")
    return find_examples(config.data, parse_grid(config.grid) if config.grid else None, note)


def origin(examples: Sequence[Example], files: ModelFiles, init_lora: str | None = None) -> dict[str, str]:
    """Mark what a run learns from by its content: the sets in their order, the base, its encoders, the LoRA before it.

    Of files over 1 GB, name and size stand for the content.
    """
    sets = json.dumps([(e.grid, e.caption, e.sha256 + e.reference_sha256) for e in examples])
    flux = {stored.path: None for stored in open_checkpoint(files.flux, "transformer").tensors.values()}  # its shards
    before = [lora_file(init_lora), lora_file(init_lora).with_name("adapter_config.json")] if init_lora else []
    return {
        "data": hashlib.sha256(sets.encode()).hexdigest(),
        "model": file_mark(flux, dated=False),
        "encoders": file_mark([files.autoencoder], dated=False) + text_mark(files, dated=False),
        "init_lora": file_mark([path for path in before if path.is_file()], dated=False) if before else "",
    }


def sort_out(config: TrainConfig, examples: Sequence[Example], shape: FluxConfig) -> dict[Layout, list[Example]]:
    """Sort examples into buckets. Errors: ValueError for what is too large or too narrow"""
    return buckets(examples, config.panel_size, model_row(shape).long_sides(config.ref_size))


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
    row = model_row(shape)
    every = sort_out(config, examples, shape)
    trained, held_out = hold_out(every, config.holdout)
    cache, dtype = Cache(Path(config.out).absolute().parent / ".cache"), getattr(torch, config.dtype)
    mark = file_mark([files.autoencoder])
    latents = LatentCache(cache, mark, config.fit, config.concat)
    references = ReferenceCache(cache, mark, row.long_sides(config.ref_size))
    texts = TextCache(cache, text_mark(files), row.text, dtype)
    load = partial(load_autoencoder, files.autoencoder, config.device)
    masks = every_mask if config.condition == "clean" else lambda layout: ((),)
    [masks(layout) for layout in every]  # refuses grids before anything is encoded
    first = next(iter(every))
    captions = [(e.caption, *e.grid) for e in examples] + [(p, first.rows, first.cols) for p in config.sample_prompt]
    captions = ["", *(text for caption in captions for text in texts_of(*caption, config.text))]
    with bar("encoding texts") as progress:
        read = texts.encode(captions, lambda: load_text_encoders(files, config.device, dtype), progress)
    widths, wanted = tuple(t.shape[-1] for t in texts.get("")), (shape.context_in_dim, shape.vec_in_dim)
    if widths != wanted:
        raise ValueError(
            f"the T5 and CLIP encoders beside {files.name} give widths {widths[0]} and {widths[1]}, but its "
            f"transformer takes {wanted[0]} and {wanted[1]}; use the encoders that belong to it"
        )
    with bar("encoding pictures") as progress:
        made = latents.encode(every, load, masks, progress)
    with bar("encoding references") as progress:
        made += references.encode(examples, load, progress)
    note(f"{len(examples)} sets in {len(every)} buckets; {made} pictures and {read} texts encoded, others cached")
    if config.holdout and not held_out:
        note("too few sets to hold any out, so there will be no validation loss")
    if small := sum(len(members) < config.batch for members in trained.values()):
        note(f"{small} buckets have fewer sets than the {config.batch} of a batch, which then holds some of them twice")
    batches = Batches([len(members) for members in trained.values()], config.batch, config.seed)
    return Feed(batches, list(trained), list(trained.values()), held_out, latents, references, texts, config)


def hold_out(
    every: dict[Layout, list[Example]], part: float
) -> tuple[dict[Layout, list[Example]], list[tuple[Layout, list[Example]]]]:
    """Split every bucket: the last ones of each are kept for validation, but never all of it, nor very many in all."""
    wanted = {layout: min(len(examples) - 1, round(part * len(examples))) for layout, examples in every.items()}
    for layout in sorted(every, key=lambda layout: -len(every[layout])):  # of what rounding left over, the largest give
        if sum(wanted.values()) < round(part * sum(map(len, every.values()))):
            wanted[layout] = min(len(every[layout]) - 1, wanted[layout] + 1)
    turns = sorted(((turn, layout) for layout in every for turn in range(wanted[layout])), key=itemgetter(0))
    counts = Counter(layout for _, layout in turns[:MOST_HELD_OUT])
    cut = {layout: len(examples) - counts[layout] for layout, examples in every.items()}
    trained = {layout: examples[: cut[layout]] for layout, examples in every.items()}
    return trained, [(layout, examples[cut[layout] :]) for layout, examples in every.items() if counts[layout]]
