"""What the autoencoder keeps: error in decibels, hidden traits told apart by pixels, and what tiles change; how far
kept panels' latents move beside grey ones, and what merging in bfloat16 loses of a LoRA.
"""

import dataclasses
import math
from collections.abc import Collection

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from iclora.layout import Layout, encode_by_panel, generate_mask
from model.autoencoder import CELL, AutoEncoder, decode_tiled
from model.lora import Adapter, LoraLinear
from model.lora_formats import Delta
from sampling.images import to_tensor

from .sets import composite
from .world import FACES, Panel, Placed, Subject, draw, random_set

SEED = 7_000_000  # far from the seeds of pretraining
TILE, OVERLAP = 8, 2  # latent cells; --tile overlaps by a quarter too, but its tiles are 64


def psnr(got: Tensor, want: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in -1..1."""
    return 10 * math.log10(4 / float((got.clamp(-1, 1) - want).square().mean()))


# a hidden trait -> the values that it is told apart by
TRAITS = {
    "hue": [{"hue": value} for value in (-1.0, 1.0)],
    "angle": [{"angle": value} for value in (0.0, 45.0, 90.0, 135.0)],
    "spacing": [{"spacing": value} for value in (0.0, 1.0)],
    "face": [{"face": value} for value in range(len(FACES))],
}


@torch.no_grad()
def survival(autoencoder: AutoEncoder, count: int) -> list[str]:
    """How often a hidden trait of a big single subject can be told after the autoencoder.

    A subject is drawn with every value of one trait; a decoded panel counts if the original nearest to it in
    squared error has its own value. Only striped and checked subjects have angles.
    """
    lines = []
    for trait, values in TRAITS.items():
        rng, right = np.random.default_rng(SEED), 0
        for _ in range(count):
            panel = random_set(rng, 1, 1, held_out=None)[0]
            subject = dataclasses.replace(panel.placed[0].subject, accessory="none")
            if trait in ("angle", "spacing"):
                subject = dataclasses.replace(subject, pattern="striped")
            image = torch.cat([to_tensor(draw(placed(panel, dataclasses.replace(subject, **v)))) for v in values])
            decoded = autoencoder.decode(autoencoder.encode(image))
            distance = (decoded[:, None] - image[None]).square().mean(dim=(2, 3, 4))
            right += int((distance.argmin(dim=1) == torch.arange(len(values))).sum())
        total = count * len(values)
        lines.append(f"{trait}: {right / total:.1%} of {total} panels, {len(values)} values")
    return lines


def placed(panel: Panel, subject: Subject) -> Panel:
    return dataclasses.replace(panel, placed=(Placed(subject, "middle", "big"),))


@torch.no_grad()
def tiling(autoencoder: AutoEncoder, count: int) -> list[str]:
    """What decoding 2x2 composites in tiles changes: the error, and the step at tile borders against elsewhere."""
    rng = np.random.default_rng(SEED)
    image = torch.cat([to_tensor(Image.fromarray(composite(random_set(rng, 2, 2), 2, 2))) for _ in range(count)])
    z = autoencoder.encode(image)
    whole, tiled = autoencoder.decode(z), decode_tiled(autoencoder, z, TILE, OVERLAP)
    change = (tiled - whole).diff(dim=-1).abs().mean(dim=(0, 1, 2))  # steps between columns that tiling adds
    starts = range(TILE - OVERLAP, z.shape[3] - TILE + 1, TILE - OVERLAP)
    starts = {*starts, z.shape[3] - TILE}
    ends = sorted({8 * cell - 1 for start in starts for cell in (start, start + OVERLAP)})
    return [
        f"tiled against whole decoding ({TILE} cells, overlap {OVERLAP}): {psnr(tiled, whole):.2f} dB, "
        f"mean difference {127.5 * float((tiled - whole).abs().mean()):.2f} of 255",
        f"PSNR against the picture: whole {psnr(whole, image):.2f} dB, tiled {psnr(tiled, image):.2f} dB",
        f"step where tiles begin and end {127.5 * float(change[ends].mean()):.2f} of 255, "
        f"all columns {127.5 * float(change.mean()):.2f}",
    ]


@torch.no_grad()
def kept_latents(autoencoder: AutoEncoder, layout: Layout, masked: Collection[int], count: int) -> dict[str, float]:
    """How far kept panels' latents are from those inside the full composite, which training without --condition sees.

    masked: panels to generate
    count: composites
    Returns root mean squares over the kept panels: "grey" has grey in place of the masked ones, as sampling encodes;
        "beside" is the same of cells that touch a masked panel; "alone" encodes every panel by itself, as --concat
        tokens does in training and sampling, where nothing moves; "latents" is the full composites' own deviation
    """
    rng, grid = np.random.default_rng(SEED), (layout.rows, layout.cols)
    image = torch.cat([to_tensor(Image.fromarray(composite(random_set(rng, *grid), *grid))) for _ in range(count)])
    grey = generate_mask(masked, layout).reshape(1, 1, layout.tokens_high, layout.tokens_wide)
    grey = F.interpolate(grey, (layout.height // CELL, layout.width // CELL))  # of the cells
    touched = F.max_pool2d(grey, (1, 3), 1, (0, 1)).maximum(F.max_pool2d(grey, (3, 1), 1, (1, 0))) - grey
    full = autoencoder.encode(image)
    beside = autoencoder.encode(image * (1 - F.interpolate(grey, image.shape[2:])))
    alone = encode_by_panel(autoencoder.encode, image, layout, "tokens")

    def rms(difference: Tensor, cells: Tensor) -> float:
        return float(difference.square().mean(dim=(0, 1))[cells[0, 0] > 0].mean().sqrt())

    kept = 1 - grey
    figures = {"grey": (beside - full, kept), "beside": (beside - full, touched), "alone": (alone - full, kept)}
    return {name: rms(*figure) for name, figure in figures.items()} | {"latents": float(full.std())}


@torch.no_grad()
def merging_error(change: float, width: int = 3072, rank: int = 16, dtype: torch.dtype = torch.bfloat16) -> float:
    """What merging in a dtype gets wrong, over what the LoRA changes; both as root mean squares.

    change: deviation of B A, beside weights of 0.02, which is about FLUX.1-dev's
    """
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(width, width).to(dtype)
    base.weight = nn.Parameter((0.02 * torch.randn(width, width, generator=generator)).to(dtype))
    down = torch.randn(rank, width, generator=generator) / rank**0.5
    up, before = change * torch.randn(width, rank, generator=generator), base.weight.float()
    layer = LoraLinear(base)
    layer.adapters.append(Adapter(Delta("", slice(0, width), down, up, 1.0)))
    error = layer.merged().weight.float() - before - up @ down
    return float((error.square().mean() / (up @ down).square().mean()).sqrt())
