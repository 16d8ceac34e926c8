"""Latents and text features on disk, one file each, named by the sha256 of all that they depend on.

The encoders run once, before the transformer is loaded, and only for what is missing: the text encoders, the
autoencoder and the transformer are never in memory together then. A damaged entry counts as missing.
Letters: T text tokens, R reference tokens, C, V widths of the text features; h, w in latent cells.
"""

import gc
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from tqdm import tqdm

from model.autoencoder import AutoEncoder
from model.checkpoint import read_header, save_safetensors
from model.text import TextEncoders
from model.weights import ModelFiles, open_checkpoint
from sampling.images import open_picture, to_tensor
from sampling.latents import pack

from .data import Example, read_panels
from .layout import Layout, compose, encode_by_panel
from .locks import lock
from .references import encode_posterior, fit_reference

Panels = tuple[int, ...]  # numbers of panels
MEMORY = 4 * 2**30  # bytes of entries that stay in memory; the others are read whenever they are needed


@dataclass(frozen=True)
class Entry:
    """What lies under a key, or will.

    key: the sha256 of everything that the tensors depend on
    name: for messages
    make: takes the network that encodes, and returns the tensors by name
    """

    key: str
    name: str
    make: Callable[[Any], dict[str, Tensor]]


class Cache:
    """Named tensors under keys, in <folder>/ab/cd/abcd....safetensors; written whole, and checked when read."""

    def __init__(self, folder: str | Path):
        self.folder, self.memory, self.room = Path(folder), {}, MEMORY

    def path(self, key: str) -> Path:
        """Return where an entry lies, or would."""
        return self.folder / key[:2] / key[2:4] / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Read an entry; None if there is none, or it is cut short or changed."""
        path = self.path(key)
        try:
            _, metadata = read_header(path)  # compares the size with the header
            tensors = load(path.read_bytes())  # not mapped: a file that shrinks under a map kills the process
        except (ValueError, OSError, SafetensorError):
            return None
        return tensors if metadata.get("sha256") == hash_tensors(tensors, key) else None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry. Errors: OSError if the disk is full or read-only"""
        self.path(key).parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(tensors, self.path(key), {"sha256": hash_tensors(tensors, key)})

    @torch.no_grad()
    def fill(self, entries: Iterable[Entry], load: Callable[[], Any], label: str) -> int:
        """Make what is missing, and free the network again; it is not even loaded if nothing is missing.

        load: loads the network that encodes
        label: of the progress bar; in a log it is a line a minute
        Returns how many entries were missing
        Errors: those of load and of making an entry; OSError if the disk is full
        """
        network, missing = None, 0
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock(self.folder) as alone:  # else another process fills it now
            for left in self.folder.glob("*/*/.*tmp*") if alone else ():
                left.unlink(missing_ok=True)  # of processes that were killed
        pace = {} if sys.stderr.isatty() else {"mininterval": 60, "delay": 60}
        bar = tqdm({entry.key: entry for entry in entries}.values(), label, leave=False, **pace)
        with lock(self.folder, shared=True), bar:
            for entry in bar:
                if self.get(entry.key) is None:
                    network = network or load()
                    self.put(entry.key, entry.make(network))
                    missing += 1
        if missing:
            del network
            gc.collect()  # transformers' modules hold each other in cycles
            torch.cuda.empty_cache()
        return missing

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """Read an entry that was made before, and keep it in memory as long as there is room.

        Errors: ValueError if it is gone or damaged since
        """
        if entry.key not in self.memory:
            if (tensors := self.get(entry.key)) is None:
                advice = "is gone or damaged; run again, it is made anew then"
                raise ValueError(f"the cached {entry.name} in {self.folder} {advice}")
            if (size := sum(tensor.nbytes for tensor in tensors.values())) > self.room:
                return tensors
            self.memory[entry.key], self.room = tensors, self.room - size
        return self.memory[entry.key]


def latent_entry(
    example: Example, layout: Layout, masked: Panels, rule: str, concat: str, autoencoder: str, spread: bool = False
) -> Entry:
    """Describe the latents of an example, the mean of their posterior; what is masked is grey and never leaks in.

    masked: numbers of panels; () for the whole composite
    rule: how pictures come to the panel size, as for sampling.images.fit
    concat: whether the composite or each panel is encoded, as for iclora.layout.encode_by_panel
    autoencoder: its fingerprint
    spread: whether the standard deviation of the posterior is kept too
    Returns an entry of z: (C, h, w) in float32, and perhaps spread of the same shape
    """

    def make(network: AutoEncoder) -> dict[str, Tensor]:
        panels = enumerate(read_panels(example, layout, rule), start=1)
        image = compose({number: panel for number, panel in panels if number not in masked}, layout)
        image = image.to(next(network.parameters()).device)
        if not spread:
            return {"z": encode_by_panel(network.encode, image, layout, concat)[0].float()}
        both = encode_by_panel(lambda part: torch.cat(encode_posterior(network, part), dim=1), image, layout, concat)
        z, std = both[0].float().chunk(2)
        return {"z": z, "spread": std}

    shape = (layout.rows, layout.cols, layout.panel_width, layout.panel_height)
    key = hash_values("latents", example.sha256, shape, rule, sorted(masked), autoencoder, concat, *["spread"] * spread)
    return Entry(key, f"entry of {example.name}", make)


def reference_entry(example: Example, number: int, long_side: int, autoencoder: str) -> Entry:
    """Describe the posterior of a reference picture, from which training draws anew in every step.

    number: of the reference, from 0
    long_side: pixels
    autoencoder: its fingerprint
    Returns an entry of mean and spread: (R, 64) in float32
    """

    def make(network: AutoEncoder) -> dict[str, Tensor]:
        picture = fit_reference(open_picture(example.references[number]), long_side)
        mean, spread = map(pack, encode_posterior(network, to_tensor(picture)))
        return {"mean": mean[0].float(), "spread": spread[0].float()}

    key = hash_values("reference", example.reference_sha256[number], long_side, autoencoder)
    return Entry(key, f"references of {example.name}", make)


def text_entry(text: str, length: int | None, dtype: torch.dtype, encoders: str) -> Entry:
    """Describe what the text encoders make of a text, which may be the empty one.

    length: T5 tokens T; None is the tokenizer's own limit
    dtype: of the encoders, which changes what they give
    encoders: their fingerprint
    Returns an entry of txt: (T, C) and vec: (V,)
    """

    def make(network: TextEncoders) -> dict[str, Tensor]:
        txt, vec = network.encode([text], length)
        return {"txt": txt[0], "vec": vec[0]}

    return Entry(hash_values("text", text, length, str(dtype), encoders), f"caption {text[:40]!a}", make)


def text_encoder_paths(files: ModelFiles) -> list[Path]:
    """List all files of a model's text encoders and tokenizers. Errors: ValueError for damaged ones, by name"""
    shards = open_checkpoint(files.clip, "clip").paths + open_checkpoint(files.t5, "t5").paths
    settings = [folder / "config.json" for folder in (files.clip, files.t5)]
    tokenizers = [path for folder in (files.clip_tokenizer, files.t5_tokenizer) for path in sorted(folder.glob("*.*"))]
    return [*shards, *(path for path in (*settings, *tokenizers) if path.is_file())]


def hash_values(*values: object) -> str:
    """Hash plain values; their JSON tells apart what text alone would run together."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Hash a text and the names, types, shapes and bytes of tensors, so that a single flipped bit is told."""
    hashed = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()
