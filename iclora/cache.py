"""Latents and text features on disk, one file each, named by the sha256 of all that they depend on.

The encoders run once, before the transformer is loaded, and only for what is missing: the text encoders, the
autoencoder and the transformer are never in memory together then. A damaged entry counts as missing.
Letters: C channels and T tokens of one entry; h, w in latent cells.
"""

import gc
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from model.autoencoder import AutoEncoder
from model.checkpoint import open_checkpoint, read_header
from model.text import TextEncoders
from model.weights import ModelFiles, save_safetensors
from sampling.images import open_picture

from .examples import Example, read_panels
from .layout import Layout, compose, through
from .references import encode_posterior, fit_reference

HASHED = 10**9  # bytes; of larger files, name, size and time of change stand for the content
Progress = Callable[[int, int], None]  # entries done, entries in all
Make = Callable[[Any, Any], dict[str, Tensor]]  # network, what an entry is made of -> its tensors


class Cache:
    """Named tensors under keys, in <folder>/ab/cd/abcd....safetensors; written whole, and checked when read."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """Says where an entry lies, or would."""
        return self.folder / key[:2] / key[2:4] / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Reads an entry; None if there is none, or it is cut short or changed."""
        path = self.path(key)
        try:
            _, metadata = read_header(path)  # compares the size with the header
            tensors = load(path.read_bytes())  # not mapped: a file that shrinks under a map kills the process
        except (ValueError, OSError, SafetensorError):
            return None
        return tensors if metadata.get("sha256") == _digest(tensors) else None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes an entry. Errors: OSError if the disk is full or read-only"""
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self.path(key).parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(ready, self.path(key), {"sha256": _digest(ready)})

    def need(self, key: str, what: str) -> dict[str, Tensor]:
        """Reads an entry that was written before. Errors: ValueError if it is gone or damaged since"""
        if (found := self.get(key)) is None:
            raise ValueError(f"the cached {what} in {self.folder} is gone or damaged; run again, it is made anew then")
        return found

    def fill(self, wanted: Mapping[str, Any], load: Callable[[], Any], make: Make, progress: Progress) -> int:
        """Writes what is missing, and frees the network again; it is not even loaded if nothing is missing.

        wanted: key -> what the entry is made of
        returns: how many were missing
        Errors: those of load and make; OSError if the disk is full
        """
        missing = {key: what for key, what in wanted.items() if self.get(key) is None}
        network = load() if missing else None
        for done, (key, what) in enumerate(missing.items(), start=1):
            self.put(key, make(network, what))
            progress(done, len(missing))
        del network
        gc.collect()  # transformers' modules hold each other in cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return len(missing)


class LatentCache:
    """Latents of examples: of whole composites, and of composites in which some panels are grey.

    cache: a Cache, or the folder of one
    autoencoder: the autoencoder's mark, from file_mark
    rule: how pictures come to the panel size, as for sampling.images.fit
    concat: whether composites or single panels are encoded, as for iclora.layout.through
    """

    def __init__(self, cache: Cache | str | Path, autoencoder: str, rule: str = "crop", concat: str = "pixels"):
        self.cache = cache if isinstance(cache, Cache) else Cache(cache)
        self.autoencoder, self.rule, self.concat = autoencoder, rule, concat

    def key(self, example: Example, layout: Layout, masked: Sequence[int] = ()) -> str:
        """Names an entry by everything that its values depend on.

        masked: numbers of the grey panels
        """
        shape = (layout.rows, layout.cols, layout.panel_width, layout.panel_height)
        return _key("latents", example.sha256, shape, self.rule, sorted(masked), self.autoencoder, self.concat)

    def get(self, example: Example, layout: Layout, masked: Sequence[int] = ()) -> Tensor:
        """Reads the latents of a composite; with masked panels, those to keep in it: what is masked never leaks in.

        Returns z: (C, h, w) in float32, the mean of the posterior
        Errors: ValueError if they are gone
        """
        return self.cache.need(self.key(example, layout, masked), f"entry of {example.name}")["z"]

    def encode(
        self, buckets: Mapping[Layout, Sequence[Example]], load: Callable[[], AutoEncoder],
        masks: Callable[[Layout], Iterable[tuple[int, ...]]] = lambda layout: ((),),
        progress: Progress = lambda done, total: None,
    ) -> int:  # fmt: skip
        """Writes what is missing, see Cache.fill.

        load: loads the autoencoder onto its device
        masks: which panels to mask, for a grid: () for the whole composite, every_mask for clean conditioning
        returns: how many were missing
        Errors: ValueError if a picture cannot be read any more, OSError if the disk is full
        """
        wanted = {
            self.key(example, layout, masked): (example, layout, masked)
            for layout, examples in buckets.items()
            for example in examples
            for masked in masks(layout)
        }
        return self.cache.fill(wanted, load, self._make, progress)

    def _make(self, autoencoder: AutoEncoder, what: tuple[Example, Layout, tuple[int, ...]]) -> dict[str, Tensor]:
        example, layout, masked = what
        kept = {i: panel for i, panel in enumerate(read_panels(example, layout, self.rule), 1) if i not in masked}
        image = compose(kept, layout).to(next(autoencoder.parameters()).device)
        with torch.no_grad():
            return {"z": through(autoencoder.encode, image, layout, self.concat)[0].float()}


class ReferenceCache:
    """The posteriors of reference pictures, mean and spread, from which training draws anew in every step.

    autoencoder: the autoencoder's mark, from file_mark
    long_sides: pixels of the longer side of a single reference, and of each of several
    """

    def __init__(self, cache: Cache, autoencoder: str, long_sides: tuple[int, int]):
        self.cache, self.autoencoder, self.long_sides = cache, autoencoder, long_sides

    def keys(self, example: Example) -> list[str]:
        """Names the entries of an example by everything that their values depend on."""
        long_side = self.long_sides[len(example.references) > 1]
        return [_key("reference", sha256, long_side, self.autoencoder) for sha256 in example.reference_sha256]

    def get(self, example: Example) -> tuple[Tensor, Tensor]:
        """Reads the references of an example, one behind the other.

        returns: mean and spread, both (R, 64) tokens in float32
        Errors: ValueError if they are gone
        """
        found = [self.cache.need(key, f"references of {example.name}") for key in self.keys(example)]
        return torch.cat([one["mean"] for one in found]), torch.cat([one["spread"] for one in found])

    def encode(self, examples: Iterable[Example], load: Callable[[], AutoEncoder], progress: Progress) -> int:
        """Writes what is missing, as LatentCache.encode does; a picture that many pairs share is encoded once."""
        wanted = {
            key: (path, self.long_sides[len(example.references) > 1])
            for example in examples
            for key, path in zip(self.keys(example), example.references, strict=True)
        }

        def make(autoencoder: AutoEncoder, shown: tuple[Path, int]) -> dict[str, Tensor]:
            path, long_side = shown
            with torch.no_grad():
                mean, spread = encode_posterior(autoencoder, fit_reference(open_picture(path), long_side))
            return {"mean": mean[0].float(), "spread": spread[0].float()}

        return self.cache.fill(wanted, load, make, progress)


class TextCache:
    """What the text encoders make of captions.

    cache: a Cache, or the folder of one
    encoders: their mark, from text_mark
    length: T5 tokens T; None is the tokenizer's own limit
    dtype: of the encoders, which changes what they give
    """

    def __init__(self, cache: Cache | str | Path, encoders: str, length: int | None, dtype: torch.dtype):
        self.cache = cache if isinstance(cache, Cache) else Cache(cache)
        self.encoders, self.length, self.dtype = encoders, length, dtype

    def key(self, caption: str) -> str:
        """Names an entry by everything that its values depend on."""
        return _key("text", caption, self.length, str(self.dtype), self.encoders)

    def get(self, caption: str) -> tuple[Tensor, Tensor]:
        """Reads the features of one caption, which may be the empty one.

        returns: txt of T tokens, vec; both without a batch axis
        Errors: ValueError if they are gone
        """
        found = self.cache.need(self.key(caption), f"caption {caption[:40]!a}")
        return found["txt"], found["vec"]

    def encode(
        self, captions: Iterable[str], load: Callable[[], TextEncoders], progress: Progress = lambda done, total: None
    ) -> int:
        """Writes what is missing, see Cache.fill.

        captions: with "" among them, if captions are left out now and then
        load: loads the encoders onto their device
        returns: how many were missing
        Errors: OSError if the disk is full
        """

        def make(encoders: TextEncoders, caption: str) -> dict[str, Tensor]:
            txt, vec = encoders.encode([caption], self.length)
            return {"txt": txt[0], "vec": vec[0]}

        return self.cache.fill({self.key(text): text for text in captions}, load, make, progress)


def every_mask(layout: Layout) -> list[tuple[int, ...]]:
    """Lists the whole composite and every way to mask some panels, but not all: 2^panels - 1 entries.

    Errors: ValueError for grids where that would be absurdly many
    """
    if layout.panels > 6:
        raise ValueError(
            f"a {layout.rows}x{layout.cols} grid has {2**layout.panels - 2} ways to keep some of its panels, each to "
            "be encoded beforehand; clean conditioning is possible up to 6 panels"
        )
    return [masked for count in range(layout.panels) for masked in combinations(range(1, layout.panels + 1), count)]


def file_mark(paths: Iterable[str | Path], dated: bool = True) -> str:
    """Marks files by the sha256 of their content; of those over 1 GB, by name, size and, if dated, time of change."""
    marks = []
    for path in map(Path, paths):
        about = path.stat()
        if about.st_size > HASHED:
            marks.append([path.name, about.st_size, *[about.st_mtime_ns] * dated])
        else:
            with open(path, "rb") as file:
                marks.append(hashlib.file_digest(file, "sha256").hexdigest())
    return _key("files", marks)


def text_mark(files: ModelFiles, dated: bool = True) -> str:
    """Marks the text encoders of a model and their tokenizers. Errors: ValueError for damaged files, by name"""
    opened = [open_checkpoint(files.clip, "clip"), open_checkpoint(files.t5, "t5")]
    paths = {stored.path: None for checkpoint in opened for stored in checkpoint.tensors.values()}
    settings = [folder / "config.json" for folder in (files.clip, files.t5)]
    tokenizers = [path for folder in (files.clip_tokenizer, files.t5_tokenizer) for path in sorted(folder.glob("*.*"))]
    return file_mark([*paths, *(path for path in (*settings, *tokenizers) if path.is_file())], dated)


def _key(*parts: object) -> str:
    """The sha256 of plain values; their JSON tells apart what text alone would run together."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()
