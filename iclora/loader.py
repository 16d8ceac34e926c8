"""What the training loop takes: examples are encoded once, through the cache, and come in batches of one bucket.

Letters: B batch, I image tokens, R reference tokens, T text tokens, C, V widths of the text features; h, w in latent
cells.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import fingerprint
from model.lora_formats import LoraFile
from model.text import check_widths, load_text_encoders
from model.weights import ModelFiles, load_autoencoder

from .buckets import parse_sides
from .cache import Cache, Entry, Panels, latent_entry, reference_entry, text_encoder_paths, text_entry
from .config import ALONE, TrainConfig, model_defaults
from .data import Buckets, Example, bucket
from .layout import Layout, generate_mask, panel_attention_mask
from .prompts import texts_of
from .records import Note
from .references import image_ids

Examples = Sequence[Example]
MAX_HELD_OUT = 32  # in all: every validation goes through each of them
MAX_MASKED = 6  # panels: each way to keep some of them is encoded beforehand


@dataclass(frozen=True)
class Batch:
    """Examples of one grid and panel size, encoded.

    z: (B, 16, h, w) their latents
    txt: (B, T, C), vec: (B, V) their captions
    known: (B, 16, h, w) latents of the composites whose generated panels are grey; None trains all panels
    generate_mask: (B, I, 1) True where tokens are generated; None without known
    attention_mask: (L, L) which tokens see which, from iclora.layout.panel_attention_mask; None lets all see all
    references: (B, R, 64) clean tokens of their references; None if they have none
    ref_std: (B, R, 64) the standard deviation of those, whose mean references is
    ids: (1, I + R, 3) positions of their tokens and the references'; None without references
    isolate_refs: whether references see each other only
    z_std: (B, 16, h, w) the standard deviation of the latents, whose mean z is; None where they are not sampled
    """

    z: Tensor
    txt: Tensor
    vec: Tensor
    known: Tensor | None = None
    generate_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    references: Tensor | None = None
    ref_std: Tensor | None = None
    ids: Tensor | None = None
    isolate_refs: bool = False
    z_std: Tensor | None = None

    def sample_posterior(self, ref_noise: Tensor | None, z_noise: Tensor | None = None) -> "Batch":
        """Draw references and latents from their posterior.

        ref_noise: (B, R, 64), z_noise: (B, 16, h, w); None takes the mean
        """
        batch = self if ref_noise is None else replace(self, references=self.references + self.ref_std * ref_noise)
        return batch if z_noise is None else replace(batch, z=self.z + self.z_std * z_noise)

    def to(self, device: str | torch.device) -> "Batch":
        """Copy all tensors to a device."""
        return Batch(*(value.to(device) if isinstance(value, Tensor) else value for value in vars(self).values()))


class Loader:
    """Encoded examples, in buckets of one grid, panel size and references.

    The cache lies beside the run's folder, so that trials on the same data share it.

    config: with all defaults resolved
    Errors: ValueError for too large composites, too narrow references, or too many ways to keep panels
    """

    def __init__(self, config: TrainConfig, examples: Examples, files: ModelFiles):
        self.config, self.files, self.defaults = config, files, model_defaults(files.flux.config)
        sizes = parse_sides(config.composite_size) or config.panel_size
        self.buckets = bucket(examples, sizes, self.defaults.long_sides(config.ref_size))
        trained, self.held_out = hold_out(self.buckets, config.holdout)
        self.layouts, self.trained = list(trained), list(trained.values())
        self.batches = Batches([len(members) for members in self.trained], config.batch, config.seed)
        shared = Path(config.out).absolute().parent / ".cache"  # by runs that lie beside each other
        place = shared if shared.exists() else shared.parent
        self.cache = Cache(shared if os.access(place, os.W_OK) or not place.exists() else Path(config.out, ".cache"))
        self.autoencoder_fingerprint = fingerprint(files.autoencoder.paths, dated=True)
        self.encoders_fingerprint = fingerprint(text_encoder_paths(files), dated=True)
        self.masks = {layout: every_mask(layout) if config.condition == "clean" else [()] for layout in self.buckets}

    def encode(self, note: Note, prompts: Sequence[str] = (), text_device: str | None = None) -> None:
        """Encode examples as far as they are not in the cache, and free the encoders again.

        note: is told what was done, and what is doubtful
        prompts: of the first bucket's grid, that `prompt` will be asked for
        text_device: of the text encoders, if it is another
        Errors: ValueError for captions that cannot be taken apart, or encoders of another model;
            OSError if the disk is full
        """
        config, files, buckets = self.config, self.files, self.buckets
        pairs = [(layout, example) for layout, examples in buckets.items() for example in examples]
        captions = [(e.caption, layout) for layout, e in pairs] + [(text, self.layouts[0]) for text in ("", *prompts)]
        texts = [entry for caption in captions for entry in self._texts(*caption)]
        load = partial(load_text_encoders, files, text_device or config.device, getattr(torch, config.dtype))
        read = self.cache.fill(texts, load, "encoding texts")
        check_widths(*self._read_texts([""], self.layouts[0])[:2], files.flux.config, files.name)
        pictures = [self._latents(e, layout, masked) for layout, e in pairs for masked in self.masks[layout]]
        pictures += [entry for _, example in pairs for entry in self._references(example)]
        load = partial(load_autoencoder, files.autoencoder, config.device)
        made = self.cache.fill(pictures, load, "encoding pictures")
        count = len({example for _, example in pairs})
        note(f"{count} sets in {len(buckets)} buckets; {made} pictures and {read} texts encoded, others cached")
        if config.holdout and not self.held_out:
            note("too few sets to hold any out, so there will be no validation loss")
        if small := sum(len(members) < config.batch for members in self.trained):
            note(f"{small} buckets have fewer sets than the {config.batch} of a batch, which holds some of them twice")

    def batch(self, number: int) -> tuple[Layout, list[Example]]:
        """Return which examples are in a batch, all of one layout."""
        which, indices = self.batches[number]
        return self.layouts[which], [self.trained[which][index] for index in indices]

    def collate(self, layout: Layout, examples: Examples, kept: Sequence[Panels], dropped: Sequence[bool]) -> Batch:
        """Put together what the encoders made of examples.

        kept: the panels that each example keeps clean, from 1
        dropped: which captions are left out
        """
        latents = [self.cache.read(self._latents(example, layout)) for example in examples]
        z, sampled = torch.stack([tensors["z"] for tensors in latents]), self.config.target_posterior == "sample"
        z_std = torch.stack([tensors["spread"] for tensors in latents]) if sampled else None
        captions = ["" if drop else example.caption for example, drop in zip(examples, dropped, strict=True)]
        txt, vec, attention_mask = self._read_texts(captions, layout)
        if layout.references:
            read = [[self.cache.read(entry) for entry in self._references(example)] for example in examples]
            references, ref_std = (
                torch.stack([torch.cat([tensors[name] for tensors in example]) for example in read])
                for name in ("mean", "spread")
            )
            ids = image_ids(layout, self.config.offset, self.config.offset_scale)
            isolate_refs = self.config.reference_attention == ALONE
            about = {"references": references, "ref_std": ref_std, "ids": ids, "isolate_refs": isolate_refs}
            return Batch(z, txt, vec, **about, z_std=z_std)
        if self.config.condition == "none":
            return Batch(z, txt, vec, attention_mask=attention_mask, z_std=z_std)
        masks = [tuple(panel for panel in range(1, layout.panels + 1) if panel not in panels) for panels in kept]
        known = [
            self.cache.read(self._latents(example, layout, masked))["z"]
            if len(masked) < layout.panels
            else torch.zeros_like(z[0])
            for example, masked in zip(examples, masks, strict=True)
        ]
        generated = torch.cat([generate_mask(masked, layout).bool() for masked in masks])
        return Batch(z, txt, vec, torch.stack(known), generated, attention_mask, z_std=z_std)

    def prompt(self, text: str, layout: Layout) -> Batch:
        """Return what it takes to sample from a text alone, encoded before; the latents are empty."""
        txt, vec, attention_mask = self._read_texts([text], layout)
        z = torch.zeros(1, 16, 2 * layout.tokens_high, 2 * layout.tokens_wide)
        return Batch(z, txt, vec, attention_mask=attention_mask)

    # entries of the cache

    def _latents(self, example: Example, layout: Layout, masked: Panels = ()) -> Entry:
        config, sampled = self.config, not masked and self.config.target_posterior == "sample"
        return latent_entry(example, layout, masked, config.fit, config.concat, self.autoencoder_fingerprint, sampled)

    def _references(self, example: Example) -> list[Entry]:
        count = len(example.references)
        long_side = self.defaults.long_sides(self.config.ref_size)[count > 1]
        return [reference_entry(example, number, long_side, self.autoencoder_fingerprint) for number in range(count)]

    def _texts(self, caption: str, layout: Layout) -> list[Entry]:
        texts, dtype = texts_of(caption, layout.rows, layout.cols, self.config.text), getattr(torch, self.config.dtype)
        return [text_entry(text, self.defaults.text_length, dtype, self.encoders_fingerprint) for text in texts]

    def _read_texts(self, captions: Sequence[str], layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read txt and vec of captions, and the attention mask of panels that read texts of their own."""
        read = [[self.cache.read(entry) for entry in self._texts(caption, layout)] for caption in captions]
        by_panel = self.config.text == "panel"  # the first text is then for CLIP alone
        txt = torch.stack([torch.cat([tensors["txt"] for tensors in texts[by_panel:]]) for texts in read])
        vec = torch.stack([texts[0]["vec"] for texts in read])
        return txt, vec, panel_attention_mask(layout, txt.shape[1] // layout.panels) if by_panel else None


class Batches:
    """An endless order of full batches, each from one bucket. Any of them can be asked for; nothing is remembered.

    A bucket is an endless row of shuffled passes over its examples, cut into batches: the last batch of a pass is
    filled up from the next one, so in the long run every example counts the same. Epoch k holds, in random order, the
    batches that begin in pass k of their bucket. Batches are always full, so that processes can share them evenly.

    sizes: examples in each bucket
    batch: examples in a batch, of all processes together
    """

    def __init__(self, sizes: Sequence[int], batch: int, seed: int):
        self.sizes, self.batch, self.seed = tuple(sizes), batch, seed

    def before(self, epoch: int) -> int:
        """Count the batches before an epoch."""
        return sum(self._first(size, epoch) for size in self.sizes)

    def epoch_of(self, number: int) -> int:
        """Return in which epoch a batch is; both are numbered from 0."""
        epoch = number * self.batch // sum(self.sizes)
        while self.before(epoch) > number:
            epoch -= 1
        return epoch

    def __getitem__(self, number: int) -> tuple[int, list[int]]:
        """Return a batch: the number of its bucket, and which examples of it.

        number: from 0, without end
        """
        epoch = self.epoch_of(number)
        order = [
            (which, index)
            for which, size in enumerate(self.sizes)
            for index in range(self._first(size, epoch), self._first(size, epoch + 1))
        ]
        which, index = order[self._permute(len(order), 0, epoch)[number - self.before(epoch)]]
        size, places = self.sizes[which], range(index * self.batch, (index + 1) * self.batch)
        passes = {p // size: self._permute(size, 1 + which, p // size) for p in places}
        return which, [int(passes[p // size][p % size]) for p in places]

    def _first(self, size: int, epoch: int) -> int:
        """Return the first batch of a bucket that begins in a pass."""
        return -(-epoch * size // self.batch)

    def _permute(self, size: int, *numbers: int) -> np.ndarray:
        return np.random.default_rng([self.seed, *numbers]).permutation(size)


def hold_out(buckets: Buckets, part: float) -> tuple[Buckets, list[tuple[Layout, list[Example]]]]:
    """Split every bucket: the last ones of each are kept for validation, but never all of it, nor very many in all.

    An example of several sizes is counted at its first, and held out at all of them.

    part: of the examples, 0..1
    Returns what is trained, and what is held out, both of the buckets that have any
    """
    first = {example: layout for layout in reversed(buckets) for example in buckets[layout]}
    counted = {k: some for k, members in buckets.items() if (some := [e for e in members if first[e] == k])}
    wanted = {layout: min(len(examples) - 1, round(part * len(examples))) for layout, examples in counted.items()}
    for layout in sorted(counted, key=lambda layout: -len(counted[layout])):  # the largest give what rounding left over
        if sum(wanted.values()) < round(part * len(first)):
            wanted[layout] = min(len(counted[layout]) - 1, wanted[layout] + 1)
    turns = sorted(((turn, layout) for layout in counted for turn in range(wanted[layout])), key=itemgetter(0))
    most = MAX_HELD_OUT * len(first) // sum(map(len, buckets.values()))
    counts = Counter(layout for _, layout in turns[:most])
    held = {e for layout, examples in counted.items() for e in examples[len(examples) - counts[layout] :]}
    trained = {k: some for k, members in buckets.items() if (some := [e for e in members if e not in held])}
    return trained, [(k, some) for k, members in buckets.items() if (some := [e for e in members if e in held])]


def every_mask(layout: Layout) -> list[Panels]:
    """List the whole composite and every way to mask some panels, but not all: 2^panels - 1 entries.

    Errors: ValueError for grids where that would be absurdly many
    """
    if layout.panels > MAX_MASKED:
        raise ValueError(
            f"a {layout.rows}x{layout.cols} grid has {2**layout.panels - 2} ways to keep some of its panels, each to "
            f"be encoded beforehand; clean conditioning is possible up to {MAX_MASKED} panels"
        )
    return [masked for count in range(layout.panels) for masked in combinations(range(1, layout.panels + 1), count)]


def fingerprints(examples: Examples, files: ModelFiles, init_lora: LoraFile | None = None) -> dict[str, str]:
    """Identify what a run learns from by its content: the sets in their order, the base, its encoders, the LoRA before.

    Of files over 1 GB, name and size stand for the content.
    """
    sets = json.dumps([(e.grid, e.caption, e.sha256 + e.reference_sha256) for e in examples])
    lora = [init_lora.path, init_lora.path.with_name("adapter_config.json")] if init_lora else []
    return {
        "data": hashlib.sha256(sets.encode()).hexdigest(),
        "model": fingerprint(files.flux.paths),
        "encoders": fingerprint(files.autoencoder.paths) + fingerprint(text_encoder_paths(files)),
        "init_lora": fingerprint([path for path in lora if path.is_file()]) if init_lora else "",
    }
