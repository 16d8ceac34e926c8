"""What the autoencoder keeps: error in decibels, hidden traits told apart by pixels, and what tiles change."""

import dataclasses
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.autoencoder import AutoEncoder, decode_tiled
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
