"""Look at a model on held-out subjects and measure its autoencoder: python -m toybox.measure --out docs/pictures

Prints the reconstruction error by number of subjects, how well hidden traits survive, and what tiled decoding
changes, and writes two contact sheets:
sets made from text alone, and sets with one panel generated from the others (outlined), each above the true set.
"""

import argparse
import dataclasses
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from iclora.config import SampleConfig
from iclora.pipeline import Pipeline, resolve
from model.autoencoder import AutoEncoder, decode_tiled
from model.weights import find_model, load_autoencoder
from sampling.images import to_tensor

from .captions import joint_caption
from .sets import composite
from .world import FACES, Panel, Placed, Subject, draw, random_set

SEED = 7_000_000  # far from the seeds of pretraining
TILE, OVERLAP = 8, 2  # latent cells; --tile overlaps by a quarter too, but its tiles are 64


def psnr(got: Tensor, want: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in -1..1."""
    return 10 * math.log10(4 / float((got.clamp(-1, 1) - want).square().mean()))


@torch.no_grad()
def reconstruction(autoencoder: AutoEncoder, count: int) -> list[str]:
    """One line per number of subjects: PSNR of panels after encoding and decoding."""
    lines = []
    for subjects in range(1, 5):
        rng = np.random.default_rng(SEED + subjects)
        panels = [random_set(rng, 1, 1, subjects, held_out=None)[0] for _ in range(count)]
        image = torch.cat([to_tensor(draw(panel)) for panel in panels])
        lines.append(f"{subjects} subjects  {psnr(autoencoder.decode(autoencoder.encode(image)), image):.2f} dB")
    return lines


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


def generate(model: str, panels: tuple[Panel, ...], mask: str, seed: int) -> Image.Image:
    """Make a 2x2 set for the caption of these panels, keeping those that the mask does not name."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / f"{i}.png") for i in range(1, 5)]
        for path, panel in zip(paths, panels, strict=True):
            draw(panel).save(path)
        prompt = joint_caption(panels, 2, 2)
        config = SampleConfig(model=model, grid="2x2", mask=mask, panels=tuple(paths), prompt=prompt)
        return Pipeline(resolve(config, lambda note: None), lambda note: None).sample(seed, lambda *_: None).composite


def sheet(model: str, mask: str, columns: int, zoom: int = 2) -> Image.Image:
    """A contact sheet: columns of generated sets, each above the set that its caption was written for."""
    side, gap = 128 * zoom, 8
    page = Image.new("RGB", (columns * (side + gap) - gap, 2 * side + gap), "white")
    pen = ImageDraw.Draw(page)
    for column in range(columns):
        rng = np.random.default_rng(SEED + 100 + column)
        panels = random_set(rng, 2, 2, subjects=2 if column % 3 == 2 else 1, held_out=True)
        made, true = generate(model, panels, mask, seed=column), Image.fromarray(composite(panels, 2, 2))
        for row, picture in enumerate((made, true)):
            place = column * (side + gap), row * (side + gap)
            page.paste(picture.resize((side, side), Image.Resampling.NEAREST), place)
            if mask != "all" and row == 0:
                k = int(mask) - 1
                x, y = place[0] + k % 2 * side // 2, place[1] + k // 2 * side // 2
                pen.rectangle((x, y, x + side // 2 - 1, y + side // 2 - 1), outline="white", width=2)
    return page


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m toybox.measure", description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder for the contact sheets")
    parser.add_argument("--count", type=int, default=64, help="panels and composites measured")
    parser.add_argument("--columns", type=int, default=6, help="sets on a contact sheet")
    args = parser.parse_args(argv)
    autoencoder = load_autoencoder(find_model(args.model).autoencoder)
    lines = reconstruction(autoencoder, args.count) + survival(autoencoder, args.count)
    print("\n".join(lines + tiling(autoencoder, max(1, args.count // 4))), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, mask in (("text-to-set", "all"), ("panel-3-from-the-others", "3")):
        sheet(args.model, mask, args.columns).save(args.out / f"{name}.png", optimize=True)
        print(f"wrote {args.out / name}.png", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
