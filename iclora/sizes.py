"""Bytes: of a model's parts, read off headers, and of what its networks hold while they work.

Constants are values as an allocator hands them out, counted on a CPU (tests/cli/test_cards.py counts again) for MLPs
four times as wide as the model. One H100 took 0.48 GB for a forward at 1024x1024 where 0.53 are computed here.
"""

import math
from dataclasses import dataclass

import torch

from model.checkpoint import Checkpoint
from model.flux import FluxConfig
from model.quantize import becomes_codes, has_codes
from model.tables import is_modulation
from model.weights import ModelFiles, open_checkpoint

from .flops import Tokens

# Values held at once, a token and unit of width, by the bytes of one: in a forward; and, beside what training keeps,
# at work on a double and on a single block
ACTIVATIONS = {2: 18.6, 4: 16.0}
STEP = {2: (7.5, 10.2), 4: (7.2, 13.1)}
# Values that training keeps of a double and of a single block, and where only attention is trained
KEPT = {2: (25.8, 23.4), 4: (24.1, 19.1)}
KEPT_ATTENTION = {2: (16.4, 21.2), 4: (15.1, 17.1)}
ADAPTERS = {"attn": 4, "uno": 2}  # that a token meets in a block; with other targets 6
INPUT = 1.02  # kept of a block that is computed again
DECODE = {"cpu": 7.8, "mps": 9.6, "cuda": 9.6}  # values a pixel and channel; of the H100, whose convolutions need room
ENCODE = 6.1
ALONE_KEPT = 2, 4  # of every block, for a token of references alone: keys and values; and, if recomputed, gradients too
COPIES = 5  # of what is trained, in float32: weights, gradients, averages, two moments
TILE = 512  # pixels, as decode_tiled's
TEXT_WORK = 0.03  # of the text encoders' bytes, beside them


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's parts in the types that they are used in."""

    modulation: int
    linears: int  # of the blocks, without modulation
    rest: int
    block: int  # of linears, those of the largest block
    fp8: int  # linears as such
    block_fp8: int
    modulation_fp8: int  # as such only where the file has it so
    row: int  # modulation outputs of one step
    merged: int  # copies of the largest Linear while a LoRA is merged
    text: int
    autoencoder: int
    channels: int  # of the autoencoder, at full resolution
    coded: bool  # whether the file has some of it in fp8

    @property
    def transformer(self) -> int:
        """All of it."""
        return self.modulation + self.linears + self.rest

    def standing(self, rows: int | None = None, offload: bool = False, fp8: bool = False) -> int:
        """Give what of the transformer stays on the device. rows: of tables that stand in place of the modulations"""
        linears, block = (self.fp8, self.block_fp8) if fp8 else (self.linears, self.block)
        linears = min(linears, 2 * block) if offload else linears
        modulation = self.modulation_fp8 if fp8 else self.modulation
        return linears + self.rest + (modulation if rows is None else rows * self.row)


def read_weights(files: ModelFiles, dtype: torch.dtype) -> Weights:
    """Add up the headers of a model. dtype: of transformer and text encoders; the autoencoder is float32"""
    encoders = open_checkpoint(files.t5, "t5"), open_checkpoint(files.clip, "clip")
    return weigh(files.flux, files.autoencoder, sum(stored_bytes(encoder, dtype) for encoder in encoders), dtype)


def weigh(flux: Checkpoint, autoencoder: Checkpoint, text: int, dtype: torch.dtype) -> Weights:
    """Add up headers. text: bytes of the text encoders; dtype: of the transformer"""
    sums, blocks, rows, largest = dict.fromkeys(("modulation", "linears", "rest", "modulation_fp8"), 0), {}, 0, 0
    for name, stored in flux.tensors.items():
        values, matrix = math.prod(stored.shape), len(stored.shape) == 2
        coded = values + 4 * stored.shape[0] if becomes_codes(name, stored) else dtype.itemsize * values
        kind = "modulation" if is_modulation(name) else "linears" if "_blocks." in name else "rest"
        sums[kind] += dtype.itemsize * values
        rows += stored.shape[0] * (matrix and kind == "modulation")
        sums["modulation_fp8"] += coded * (kind == "modulation")
        if kind == "linears":
            own, largest = blocks.setdefault(tuple(name.split(".")[:2]), [0, 0]), max(largest, values)
            own[:] = own[0] + dtype.itemsize * values, own[1] + coded
    plain, fp8 = zip(*blocks.values(), strict=True)
    of_blocks = {"block": max(plain), "fp8": sum(fp8), "block_fp8": max(fp8), "merged": 8 * largest}
    of_autoencoder = {"autoencoder": stored_bytes(autoencoder, torch.float32), "channels": autoencoder.config.ch}
    more = {"row": dtype.itemsize * rows, "text": text, "coded": any(map(has_codes, flux.tensors.values()))}
    return Weights(**sums, **of_blocks, **of_autoencoder, **more)


def stored_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Give the bytes of a checkpoint's tensors in a dtype."""
    return dtype.itemsize * sum(math.prod(stored.shape) for stored in checkpoint.tensors.values())


def forward_bytes(flux: FluxConfig, dtype: torch.dtype, tokens: Tokens, masked: bool = False) -> float:
    """Give what a forward without gradients holds at once.

    masked: whether a mask says who sees whom, which attention turns into numbers
    """
    size, blocks = dtype.itemsize, flux.depth + flux.depth_single_blocks
    values = ACTIVATIONS[size] * len(tokens) + 2 * blocks * tokens.refs * tokens.alone  # keys and values are kept
    return size * flux.hidden_size * values + masked * (1 + size) * len(tokens) ** 2


def step_bytes(
    flux: FluxConfig, dtype: torch.dtype, examples: int, tokens: Tokens, targets: str, rank: int, again: int
) -> float:
    """Give what a step of training holds at once, beside weights: what blocks keep, and the work on one of them.

    examples: at once; tokens: of each
    again: so many blocks, from the first, keep their input only; one of them at a time is computed again, and then
        the later ones have let go of theirs
    """
    size, kept = dtype.itemsize, (KEPT_ATTENTION if targets in ADAPTERS else KEPT)[dtype.itemsize]
    double, single = (values + ADAPTERS.get(targets, 6) * rank / flux.hidden_size for values in kept)
    each = [double] * flux.depth + [single] * flux.depth_single_blocks
    work = [STEP[size][0]] * flux.depth + [STEP[size][1]] * flux.depth_single_blocks
    redone = [one + more for one, more in zip(each, work, strict=True)][:again]
    values = again * INPUT + max(sum(each[again:]) + work[-1], *redone, 0.0)
    alone = ALONE_KEPT[again > 0] * len(each) * tokens.refs * tokens.alone
    return size * flux.hidden_size * examples * (values * len(tokens) + alone)
