"""Look at a model on held-out subjects and measure its autoencoder: python -m toybox.measure --out docs/pictures

Prints the reconstruction error by number of subjects and what tiled decoding changes, and writes two contact sheets:
sets made from text alone, and sets with one panel generated from the others (outlined), each above the true set.
"""

import argparse
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
from .world import Panel, draw, random_set

SEED = 7_000_000  # far from the seeds of pretraining
TILE, OVERLAP = 8, 4  # latent cells


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


@torch.no_grad()
def tiling(autoencoder: AutoEncoder, count: int) -> list[str]:
    """What decoding 2x2 composites in tiles changes: the error, and the step at tile borders against elsewhere."""
    rng = np.random.default_rng(SEED)
    image = torch.cat([to_tensor(stitched(random_set(rng, 2, 2), 2, 2)) for _ in range(count)])
    z = autoencoder.encode(image)
    whole, tiled = autoencoder.decode(z), decode_tiled(autoencoder, z, TILE, OVERLAP)
    change = (tiled - whole).diff(dim=-1).abs().mean(dim=(0, 1, 2))  # steps between columns that tiling adds
    ends = [8 * x - 1 for x in (TILE - OVERLAP, TILE, 2 * (TILE - OVERLAP), 2 * TILE - OVERLAP)]
    return [
        f"tiled against whole decoding ({TILE} cells, overlap {OVERLAP}): {psnr(tiled, whole):.2f} dB, "
        f"mean difference {127.5 * float((tiled - whole).abs().mean()):.2f} of 255",
        f"PSNR against the picture: whole {psnr(whole, image):.2f} dB, tiled {psnr(tiled, image):.2f} dB",
        f"step where tiles begin and end {127.5 * float(change[ends].mean()):.2f} of 255, "
        f"all columns {127.5 * float(change.mean()):.2f}",
    ]


def stitched(panels: tuple[Panel, ...], rows: int, cols: int, size: int = 64) -> Image.Image:
    sheet = Image.new("RGB", (cols * size, rows * size))
    for i, panel in enumerate(panels):
        sheet.paste(draw(panel, size), (i % cols * size, i // cols * size))
    return sheet


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
        for row, picture in enumerate((generate(model, panels, mask, seed=column), stitched(panels, 2, 2))):
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
    print("\n".join(reconstruction(autoencoder, args.count) + tiling(autoencoder, max(1, args.count // 4))), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, mask in (("text-to-set", "all"), ("panel-3-from-the-others", "3")):
        sheet(args.model, mask, args.columns).save(args.out / f"{name}.png", optimize=True)
        print(f"wrote {args.out / name}.png", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
