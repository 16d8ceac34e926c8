"""What --quantize fp8 loses: the relative error of the velocity, the PSNR of pictures, and the loss of a training.

    python -m lab.benchmarks.fp8 --out lab/results/fp8.md

On the bundled model, along the way of pictures of its bundled captions and by LoRAs of its bundled sets, and on random
weights of FLUX.1-dev's width. All on a CPU: what a card does, whose codes are multiplied, is emulated by a product in
float32 of both rounded factors.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from iclora.config import SampleConfig
from iclora.pipeline import Pipeline
from iclora.plan import Plan, make_plan
from lab import entry
from model.checkpoint import write_atomic
from model.flux import Flux
from model.quantize import Fp8Linear, dequantize, load_quantized, quantize_rows
from model.tables import is_modulation
from model.weights import load_flux

from . import peers
from .rounds import table
from .speed import machine

CPU = torch.device("cpu")
GRIDS = ("1x2", "2x1", "2x2", "3x1")
PLAIN, NARROW = (
    ("float32", "bfloat16"),
    ("fp8 weights, float32", "fp8 weights, bfloat16", "fp8 weights and activations"),
)
TRAINED = {  # the base's weights, and how activations are rounded: flags of train.py
    PLAIN[0]: (),
    PLAIN[1]: ("--dtype", "bfloat16"),
    NARROW[0]: ("--quantize", "fp8"),
    NARROW[1]: ("--quantize", "fp8", "--dtype", "bfloat16"),
}
SHAPES = {  # random weights; the second has all the blocks of FLUX.1-dev
    "3072 wide, 1 + 1 blocks": peers.Shape(peers.flux_config(3072, 24, 1, 1, 4096, 768), 12, 128, 1, 1),
    "384 wide, 19 + 38 blocks": peers.Shape(peers.flux_config(384, 3, 19, 38, 256, 128), 12, 128, 1, 1),
}


@torch.no_grad()
def quantize(flux: nn.Module) -> None:
    """Put fp8 Linears in place of those of the blocks, modulation excepted, one by one; adapters stay beside them."""
    for name, linear in list(flux.named_modules()):
        if type(linear) is nn.Linear and "_blocks." in name and not is_modulation(name):
            flux.set_submodule(name, Fp8Linear(*quantize_rows(linear.weight.float()), linear.bias))


def multiply_codes(linear: Fp8Linear, x: Tensor) -> Tensor:
    """Do what a card does: round x by rows, and multiply both factors as they are then. Returns (..., N)"""
    codes, scale = quantize_rows(x.flatten(0, -2))
    weight = dequantize(linear.weight, linear.scale, torch.float32)
    y = F.linear(codes.float() * scale, weight, linear.bias.float())
    return y.to(x.dtype).unflatten(0, x.shape[:-1])


def on_a_card(flux: Flux) -> Flux:
    """Let all fp8 Linears compute as on a card, however few the rows."""
    for linear in (module for module in flux.modules() if isinstance(module, Fp8Linear)):
        linear.forward = partial(multiply_codes, linear)
    return flux


def variants(plain: Callable[[torch.dtype], Flux], narrow: Callable[[torch.dtype], Flux]) -> dict[str, Flux]:
    """Make one transformer in all forms, the most exact first. plain, narrow: load it in a dtype"""
    dtypes = torch.float32, torch.bfloat16
    fluxes = [*map(plain, dtypes), *map(narrow, dtypes), on_a_card(narrow(torch.bfloat16))]
    return dict(zip(PLAIN + NARROW, fluxes, strict=True))


class Together:
    """Several transformers at the same points: the first one leads, and how far the others are from it is kept."""

    def __init__(self, models: dict[str, Flux]):
        self.models = models
        self.velocities: list[list[Tensor]] = []

    def prefill(self, *args) -> list:
        return [flux.prefill(*args) for flux in self.models.values()]

    def conditioning(self, *args) -> list[Tensor]:
        return [flux.conditioning(*args) for flux in self.models.values()]

    def velocity(self, x: Tensor, conds: list, vecs: list[Tensor]) -> Tensor:
        """Returns the velocity of the first (B, I, 64)"""
        own = zip(self.models.values(), conds, vecs, strict=True)
        self.velocities.append([flux.velocity(x, cond, vec).float() for flux, cond, vec in own])
        return self.velocities[-1][0]

    def errors(self, wanted: str) -> dict[str, float]:
        """Give the relative error of each against one of them, over all points."""
        totals = [torch.cat([v.flatten() for v in each]) for each in zip(*self.velocities, strict=True)]
        by_name = dict(zip(self.models, totals, strict=True))
        return {name: peers.far(total, by_name[wanted]) for name, total in by_name.items()}


def draw(flux: Flux | Together, plans: list[Plan]) -> np.ndarray:
    """Make the generated panels of several plans. Returns their pixels, in a row"""
    pixels = []
    for plan in plans:
        pipeline = Pipeline(plan.config)
        pipeline.flux, pipeline.load_transformer = flux, lambda plan: None
        for result in pipeline.run(plan):
            pixels += [np.asarray(picture, dtype=np.float64).ravel() for picture in result.panels.values()]
    return np.concatenate(pixels)


def decibels(got: np.ndarray, want: np.ndarray) -> str:
    error = np.square(got - want).mean()
    return f"{10 * np.log10(255**2 / error):.1f}" if error else "the same"


def bundled(num: int, steps: int) -> list[str]:
    """Measure on the bundled model. num: pictures of each grid"""
    config = SampleConfig(num=num, steps=steps, device="cpu", dtype="float32")
    plans = [make_plan(replace(config, grid=grid), lambda line: None) for grid in GRIDS]
    files = plans[0].files.flux
    models = variants(lambda dtype: load_flux(files, dtype=dtype), lambda dtype: load_quantized(files, dtype=dtype))
    together = Together(models)
    draw(together, plans)
    errors = {wanted: together.errors(wanted) for wanted in PLAIN}
    pictures = {}
    for name, flux in models.items():
        dtype = "bfloat16" if flux.img_in.weight.dtype == torch.bfloat16 else "float32"  # rounds the noise, too
        pictures[name] = draw(flux, [replace(p, config=replace(p.config, dtype=dtype)) for p in plans])
    lines = []
    for name in PLAIN[1:] + NARROW:
        far = [f"{100 * errors[wanted][name]:.2f} %" if name != wanted else "" for wanted in PLAIN]
        lines.append([name, *far, *(decibels(pictures[name], pictures[w]) if name != w else "" for w in PLAIN)])
    header = ["bundled model", *(f"velocity against {w}" for w in PLAIN), *(f"dB against {w}" for w in PLAIN)]
    what = f"{len(GRIDS) * num} pictures, {', '.join(GRIDS)}, {steps} steps each; velocities along float32's way."
    return [what, "", *table(header, lines), ""]


def random(name: str) -> list[str]:
    """Measure one forward with random weights, which are drawn in bfloat16."""
    shape, outputs = SHAPES[name], {}

    def plain(dtype: torch.dtype) -> Flux:
        return peers.new_flux(shape, CPU, torch.bfloat16).to(dtype)

    def narrow(dtype: torch.dtype) -> Flux:
        flux = plain(dtype)
        quantize(flux)
        return flux

    given = peers.new_inputs(shape.read_config(), shape, CPU, torch.float32)
    given["guidance"] = torch.full(
        (1,), 4.0
    )  # 1000 times 3.5 is rounded to 3504 in bfloat16, which is another question
    steps = [partial(make, dtype) for make in (plain, narrow) for dtype in (torch.float32, torch.bfloat16)]
    for form, make in zip(PLAIN + NARROW, [*steps, lambda: on_a_card(narrow(torch.bfloat16))], strict=True):
        with torch.no_grad():
            outputs[form] = make()(**given)  # one at a time, as they are large
    lines = []
    for form in PLAIN[1:] + NARROW:
        far = [f"{100 * peers.far(outputs[form], outputs[w]):.2f} %" if form != w else "" for w in PLAIN]
        lines.append([form, *far])
    return [*table([f"random, {name}", *(f"velocity against {w}" for w in PLAIN)], lines), ""]


def training(steps: int) -> list[str]:
    """Train a LoRA of the walk beside each form of the base: the same draws, and so curves that can be compared."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for form, flags in TRAINED.items():
            out = Path(folder, form)
            if train.main(["--data", "sets/walk", "--batch", "2", "--steps", str(steps), *flags, "--out", str(out)]):
                raise ValueError(f"training on {form} did not end well")
            metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            parts = np.array_split([entry["loss"] for entry in metrics if "loss" in entry], 4)
            (*_, held_out) = [entry["validation"] for entry in metrics if "validation" in entry]
            lines.append([form, *(f"{part.mean():.4f}" for part in parts), f"{held_out:.4f}"])
    header = ["training on", *(f"loss, quarter {n}" for n in range(1, 5)), "loss of held-out sets"]
    return [f"A LoRA of `sets/walk`, {steps} steps of train.py with `--batch 2`.", "", *table(header, lines), ""]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.benchmarks.fp8",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = ["bundled", "training", *SHAPES]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--num", type=entry.positive, default=4, help="pictures of each grid")
    parser.add_argument("--steps", type=entry.positive, default=20, help="of sampling")
    parser.add_argument("--train-steps", type=entry.positive, default=60)
    parser.add_argument("--out", type=Path, help="also write everything to this file")
    return entry.run(parser, write, argv)


def write(args: argparse.Namespace) -> None:
    """Print each part's tables as they come, and write them to a file if one is asked for."""
    text = ["# What fp8 loses", "", f"{machine(CPU)}.", ""]
    print("\n".join(text))
    for part in args.parts:
        ways = {"bundled": lambda: bundled(args.num, args.steps), "training": lambda: training(args.train_steps)}
        section = ways.get(part, partial(random, part))()
        print("\n".join(section), flush=True)
        text += section
    if args.out:
        write_atomic(args.out, "\n".join(text))


if __name__ == "__main__":
    sys.exit(main())
