"""What FLUX.1-dev takes on a card: steps, training and budgets, with random weights of its size; one table.

    python -m lab.benchmarks.cards --out runs/cards.jsonl            on a GPU; goes on where it was stopped
    python -m lab.benchmarks.cards --size small --device cpu --ways eager "tables, offload"      to try it

Every row is a line of JSON with card, versions and commit, written when it is measured; a row that is there is not
measured again. What cannot be measured here has a reason instead of figures. Beside peers, all take turns on the same
weights, see lab/benchmarks/speed.py and requirements.txt; --model adds the time that a whole model takes to load.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from iclora.cards import RESERVE, Work, plan_memory
from iclora.config import SampleConfig
from iclora.flops import Tokens, count_flops
from iclora.sizes import forward_bytes, step_bytes, weigh
from iclora.training import checkpoint_blocks
from lab import entry
from model.autoencoder import AutoEncoder, AutoEncoderConfig, decode_tiled
from model.checkpoint import Checkpoint, Stored
from model.compiled import compile_blocks
from model.flux import Flux, FluxConfig
from model.offload import offload
from model.position import grid_ids, reference_ids
from model.quantize import quantize
from model.tables import make_tables
from model.weights import find_model, load_autoencoder, load_flux
from sampling.denoise import denoise
from sampling.flow import times

from . import peers, speed
from .rounds import operators, peak, spread, table, take_turns, times_as_fast, wait

RANK = 16
STEPS, WHOLE = 4, 28  # of a picture under a budget, as memory does not grow with them; and on a card of WHOLE_CARD GB
WHOLE_CARD = 80
UNO = 512, 32  # rank, and side of a reference in tokens
WAYS = {
    "eager": (),
    "compiled": ("compile",),
    "tables": ("tables",),
    "tables, compiled": ("tables", "compile"),
    "fp8, tables, compiled": ("quantize", "tables", "compile"),
    "fp8, tables": ("quantize", "tables"),
    "tables, offload": ("tables", "offload"),
}
TECHNIQUES = {"quantize": quantize, "tables": make_tables, "compile": compile_blocks}
PARTS = "ceiling", "beside", "steps", "training", "budgets", "exactness", "profile", "loading"
KINDS = {  # of the kernels of a compiled forward, by what their names hold; the first that fits
    "matrix products": ("mm", "gemm", "cutlass", "cublas", "nvjet"),
    "attention": ("attention", "flash", "fmha", "cudnn"),
    "gelu": ("gelu", "tanh"),
    "norms": ("norm", "mean", "rsqrt", "var"),
    "cat before linear2, text with image": ("cat",),
    "RoPE": ("stack", "cos", "sin"),
    "qkv to heads, other copies": ("clone", "copy", "permute", "contiguous"),
    "everything else": ("",),
}


@dataclass(frozen=True)
class Setting:
    """What is measured: a model, sides of pictures and lengths of text in tokens."""

    flux: FluxConfig
    sides: tuple[int, ...]
    text: int
    forwards: tuple[tuple[int, int], ...]  # side and batch, beside peers
    training: tuple[tuple[int, int], ...]  # likewise
    budgets: tuple[float, ...]  # GB
    channels: int  # of the autoencoder


SIZES = {  # a square of 96 has 2 % more tokens than a 2x2 grid of 1344x1728
    "dev": Setting(
        peers.flux_config(3072, 24, 19, 38, 4096, 768), (32, 64), 512,
        ((32, 1), (32, 4), (64, 1), (64, 4), (96, 1)), ((32, 4), (64, 1)), (80, 24, 16, 12), 128,
    ),
    "small": Setting(peers.flux_config(64, 2, 1, 2, 32, 16), (4,), 8, ((4, 2),), ((4, 2),), (0.5, 0.01), 32),
}  # fmt: skip


class Missing(Exception):
    """What is to be measured is not there, or does not fit."""


def apply(flux: Flux, techniques: tuple[str, ...], device: torch.device) -> None:
    """Prepare a transformer, in the order of iclora.fitted."""
    for name in techniques:
        offload(flux, device) if name == "offload" else TECHNIQUES[name](flux)


def made(setting: Setting, techniques: tuple[str, ...], device: torch.device, on: torch.device | None = None) -> Flux:
    """Make a prepared transformer with random weights. on: where they are made, if not on the device"""
    shape = peers.Shape(setting.flux, setting.sides[0], setting.text, 1, 1)
    flux = peers.new_flux(shape, on or device, torch.bfloat16)
    apply(flux, techniques, device)
    return flux


# rows


def ceiling(setting: Setting, device: torch.device) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """The rate of a large matrix product, which the others are a share of."""
    side = 8192 if device.type == "cuda" else 256

    def measure() -> dict:
        a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
        seconds = spread(take_turns({"mm": lambda: a @ a}, 5, device, seconds=0.05)["mm"]).median
        return {"ms": 1e3 * seconds, "tflops": 2 * side**3 / seconds / 1e12}

    yield {"what": "matrix product", "way": f"{side}^3", "size": side}, measure


def steps(setting: Setting, device: torch.device, profile: bool = False) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """Forwards without gradients, of every way and size; or where the time of a compiled one goes."""
    for way, techniques in WAYS.items():
        for side in setting.sides:
            if profile and (way != "tables, compiled" or side != setting.sides[-1]):
                continue
            key = {"what": "profile" if profile else "forward", "way": way, "size": 16 * side}
            yield key, partial(forward, setting, techniques, side, device, profile)


def forward(setting: Setting, techniques: tuple[str, ...], side: int, device: torch.device, profile: bool) -> dict:
    """Measure or profile one forward."""
    flux, tokens = made(setting, techniques, device), Tokens(setting.text, side**2)
    given = peers.new_inputs(flux.config, peers.Shape(flux.config, side, setting.text, 1, 1), device, torch.bfloat16)
    call = torch.inference_mode()(lambda: flux(**given))
    if profile:
        took = {kind: 0.0 for kind in KINDS}
        for name, operator in operators(call, device).items():
            took[next(k for k, parts in KINDS.items() if any(part in name.lower() for part in parts))] += (
                operator.seconds
            )
        return {"ms by kind": {kind: round(1e3 * seconds, 3) for kind, seconds in took.items()}}
    standing = torch.cuda.memory_allocated() if device.type == "cuda" else None
    seconds = take_turns({"step": call}, 7, device, seconds=0.1)["step"]
    flops = count_flops(flux.config, 1, tokens).forward
    figures = {"ms": 1e3 * spread(seconds).median, "tflops": flops / spread(seconds).median / 1e12}
    predicted = forward_bytes(flux.config, torch.bfloat16, tokens)
    return {**figures, "standing GB": standing and standing / 1e9, **against(peak(call, device), predicted)}


def against(measured: float, predicted: float) -> dict:
    """Put a peak beside what iclora/sizes.py says."""
    return {"peak GB": measured / 1e9, "predicted GB": predicted / 1e9}


def trainings(setting: Setting, device: torch.device) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """Steps of training, with all blocks computed again and with none; and UNO's, with a reference."""
    for side, batch in setting.training:
        for again in (setting.flux.depth + setting.flux.depth_single_blocks, 0):
            for way in ("eager", "compiled"):
                key = {"what": "training step", "way": way, "size": 16 * side, "batch": batch, "again": again}
                yield key, partial(training, setting, WAYS[way], side, batch, again, device)
    side, again = setting.sides[0], setting.flux.depth + setting.flux.depth_single_blocks
    key = {"what": f"training step, UNO, rank {UNO[0]}", "way": "eager", "size": 16 * side, "batch": 1, "again": again}
    yield key, partial(training, setting, (), side, 1, again, device, "uno", *UNO)


def training(
    setting: Setting, techniques: tuple[str, ...], side: int, batch: int, again: int, device: torch.device,
    targets: str = "all-linear", rank: int = RANK, reference: int = 0,
) -> dict:  # fmt: skip
    """Measure one step of training. reference: side of one in tokens"""
    flux, tokens = made(setting, (), device), Tokens(setting.text, side**2, reference**2)
    parameters = peers.attach(flux, rank, targets)
    apply(flux, techniques, device)
    checkpoint_blocks(flux, again)
    shape = peers.Shape(flux.config, side, setting.text, 1, batch)
    encoded, *drawn = peers.new_batch(flux.config, shape, device, torch.bfloat16)
    if reference:
        ids = torch.cat((grid_ids(side, side), *reference_ids((side, side), [(reference, reference)])))[None].to(device)
        encoded = replace(encoded, references=torch.randn(batch, reference**2, 64, device=device), ids=ids)
    run = peers.Training(flux, parameters, (encoded, *drawn))
    seconds = spread(take_turns({"step": run.step}, 5, device, seconds=0.1)["step"]).median
    flops = count_flops(flux.config, batch, tokens, flux).step
    predicted = step_bytes(flux.config, torch.bfloat16, batch, tokens, targets, rank, again)
    predicted += 6 * sum(p.numel() for p in parameters)  # gradients, and the adapters in bfloat16
    return {"ms": 1e3 * seconds, "tflops": flops / seconds / 1e12, **against(peak(run.step, device), predicted)}


def beside(setting: Setting, device: torch.device) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """Forwards and training steps in turns with the official code, diffusers and PEFT, on the same weights."""
    for side, batch in setting.forwards:
        for way in ("eager", "compiled"):
            key = {"what": "forward beside peers", "way": way, "size": 16 * side, "batch": batch}
            yield key, partial(turns, setting, "forward", way == "compiled", side, batch, device)
    for side, batch in setting.training:
        key = {"what": "training step beside peers", "way": "eager", "size": 16 * side, "batch": batch}
        yield key, partial(turns, setting, "train", False, side, batch, device)


def turns(setting: Setting, measure: str, compiled: bool, side: int, batch: int, device: torch.device) -> dict:
    """Measure ours and peers, whose answers are compared first."""
    shape = peers.Shape(setting.flux, side, setting.text, batch, batch)
    chosen = list(peers.PEERS) if measure == "forward" and not compiled else ["diffusers"]  # only that has a way
    try:
        given = shape, chosen, device, torch.bfloat16
        contestants = speed.train(*given) if measure == "train" else speed.forward(*given, compiled)
        speed.compare(contestants, speed.TOLERANCES[measure][torch.bfloat16])
    except (ValueError, ImportError) as error:
        raise Missing(str(error)) from None
    took = take_turns({name: c.call for name, c in contestants.items()}, 7, device, seconds=0.1)
    ours, flops = took.pop(speed.OURS), count_flops(setting.flux, batch, Tokens(setting.text, side**2)).forward
    figures = {"ms": 1e3 * spread(ours).median}
    figures |= {"tflops": flops / spread(ours).median / 1e12} if measure == "forward" else {}
    for name, seconds in took.items():
        figures |= {
            f"{name} ms": 1e3 * spread(seconds).median,
            f"times as fast as {name}": times_as_fast(ours, seconds).median,
        }
    return figures


def exactness(setting: Setting, device: torch.device) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """How far every way's answer is from the eager one's."""
    for way, techniques in WAYS.items():
        key = {"what": "distance from eager", "way": way, "size": 16 * setting.sides[0]}
        yield key, partial(distance, setting, techniques, device)


def distance(setting: Setting, techniques: tuple[str, ...], device: torch.device) -> dict:
    """Compare one forward with the plain path's."""
    answers = []
    for chosen in ((), techniques):
        flux = made(setting, chosen, device)
        shape = peers.Shape(flux.config, setting.sides[0], setting.text, 1, 1)
        given = peers.new_inputs(flux.config, shape, device, torch.bfloat16)
        answers.append(torch.inference_mode()(lambda flux=flux, given=given: flux(**given).cpu())())
        del flux
        gc.collect()
    return {"equal": torch.equal(*answers), "relative": peers.far(answers[1], answers[0])}


def budgets(setting: Setting, device: torch.device) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """Pictures on smaller cards: what the planner chooses, and its peaks beside the measured ones."""
    for side in setting.sides:
        for vram in setting.budgets:
            count = WHOLE if vram >= WHOLE_CARD else STEPS
            key = {"what": f"picture in {count} steps", "way": f"{vram:g} GB", "size": 16 * side}
            yield key, partial(picture, setting, side, count, vram, device)


def headers(setting: Setting) -> SimpleNamespace:
    """Give the headers that files of this size would have."""
    with torch.device("meta"):
        networks = {"transformer": Flux(setting.flux), "autoencoder": autoencoder(setting)}
    stored = {
        kind: {name: Stored(Path(), "BF16", tuple(t.shape)) for name, t in network.state_dict().items()}
        for kind, network in networks.items()
    }
    return SimpleNamespace(**{kind: Checkpoint(Path(), kind, tensors, []) for kind, tensors in stored.items()})


def autoencoder(setting: Setting) -> AutoEncoder:
    return AutoEncoder(AutoEncoderConfig(setting.channels, (1, 2, 4, 4), 2)).eval().requires_grad_(False)


def picture(setting: Setting, side: int, count: int, vram: float, device: torch.device) -> dict:
    """Make one picture as planned, while the allocator gives no more than the budget."""
    known, tokens = headers(setting), Tokens(setting.text, side**2)
    weights = weigh(known.transformer, known.autoencoder, 0, torch.bfloat16)  # text encoders are not there
    held, flops = forward_bytes(setting.flux, torch.bfloat16, tokens), count_flops(setting.flux, 1, tokens).forward
    work = Work(len(tokens), flops, lambda again: held, 0, count, (16 * side) ** 2, False)
    config = SampleConfig(vram=vram, device=device.type, dtype="bfloat16")
    try:
        plan = plan_memory(config, setting.flux, weights, work, 0)
    except ValueError as error:
        raise Missing(str(error)) from None
    chosen = [name for name in ("quantize", "tables", "offload") if getattr(plan, name)]
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 * vram * (1 - RESERVE / 2) / total))
    try:
        flux = made(setting, tuple(chosen), device, torch.device("cpu") if plan.load_on_cpu else device)
        flux, decoder = flux if plan.offload else flux.to(device), autoencoder(setting).to(device)
        given = peers.new_inputs(
            flux.config, peers.Shape(flux.config, side, setting.text, 1, 1), device, torch.bfloat16
        )
        ids, x = given["img_ids"], torch.randn(1, side**2, 64, device=device)
        step = torch.inference_mode()(
            lambda: denoise(flux, x, times(count, side**2, True), ids, given["txt"], given["y"], 3.5)
        )
        decode = decode_tiled if plan.tile else AutoEncoder.decode
        z = torch.randn(1, 16, 2 * side, 2 * side, device=device)
        image = torch.inference_mode()(lambda: decode(decoder, z))
        start = time.perf_counter()
        step(), image(), wait(device)
        figures = {"ms": 1e3 * (time.perf_counter() - start), "with": plan.techniques}
        standing = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        for name, call in (("sampling", step), ("decoding", image)):
            figures |= {f"{name} {k}": v for k, v in against(standing + peak(call, device), plan.phases[name]).items()}
        return figures
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)


def loading(setting: Setting, device: torch.device, model: str | None) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """Seconds until networks stand on the device; twice, as the second time files are in the page cache."""

    def measure(load: Callable[[], Any]) -> dict:
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            network = load()
            wait(device)
            seconds.append(time.perf_counter() - start)
            size = sum(p.nbytes for p in network.parameters())
            del network
            gc.collect()
        return {"ms": 1e3 * seconds[1], "first ms": 1e3 * seconds[0], "GB/s": size / seconds[1] / 1e9}

    for name, load in (("transformer", load_flux), ("autoencoder", load_autoencoder)):
        key = {"what": "loading", "way": name, "size": 0}
        if model is None:
            yield key, partial(refuse, "no --model was given")
        else:
            checkpoint = getattr(find_model(model), "flux" if name == "transformer" else name)
            yield key, partial(measure, partial(load, checkpoint, device))


def refuse(reason: str) -> dict:
    raise Missing(reason)


# the command


def machine(device: torch.device) -> dict:
    """Say what the figures hold for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"card": name, "torch": torch.__version__, "commit": commit}


def measure_all(args: argparse.Namespace) -> list[dict]:
    """Measure what is not in the file yet, add it there row by row, and give all rows."""
    setting, device = SIZES[args.size], torch.device(args.device)
    if args.budgets:
        setting = replace(setting, budgets=tuple(args.budgets))
    parts = {
        "ceiling": ceiling(setting, device), "beside": beside(setting, device), "steps": steps(setting, device),
        "training": trainings(setting, device), "budgets": budgets(setting, device),
        "exactness": exactness(setting, device), "profile": steps(setting, device, profile=True),
        "loading": loading(setting, device, args.model),
    }  # fmt: skip
    lines = args.out.read_text().splitlines() if args.out and args.out.is_file() else []
    rows, about = [json.loads(line) for line in lines], {**machine(device), "model": args.size}
    for part in args.parts:
        for key, measure in parts[part]:
            key = {**key, **about}
            if any(key.items() <= row.items() for row in rows) or key["way"] in {*WAYS} - {*args.ways}:
                continue
            try:
                figures = measure()
            except Missing as reason:
                figures = {"not available": str(reason)}
            except RuntimeError as error:  # no memory, or a compiler that is not there
                figures = {"not available": str(error).strip().partition("\n")[0][:160]}
            gc.collect()
            if "compiled" in key["way"]:
                torch._dynamo.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            rows.append({**key, **figures})
            if args.out:
                with open(args.out, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            print(f"{key['what']}, {key['way']}, {key['size']}", file=sys.stderr, flush=True)
    return rows


def show(rows: list[dict]) -> list[str]:
    """Write rows as a table; a cell that was not measured stays blank."""
    best = max((row["tflops"] for row in rows if row["what"] == "matrix product" and "tflops" in row), default=None)

    def cells(row: dict) -> list[str]:
        share = f"{row['tflops'] / best:.0%}" if best and "tflops" in row else ""
        plain = [f"{row[name]:.3g}" if row.get(name) is not None else "" for name in ("ms", "tflops")]
        memory = [
            f"{row[name]:.3f}" if row.get(name) is not None else ""
            for name in ("standing GB", "peak GB", "predicted GB")
        ]
        known = {"what", "way", "size", "batch", "ms", "tflops", "standing GB", "peak GB", "predicted GB"}
        rest = {k: v for k, v in row.items() if k not in known | {"card", "torch", "commit", "model"}}
        said = "; ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k}: {v}" for k, v in rest.items())
        return [row["what"], row["way"], str(row["size"]), str(row.get("batch", 1)), *plain, share, *memory, said]

    columns = "what way pixels batch ms TFLOP/s share_of_a_product standing_GB more_at_the_peak predicted also"
    header = [name.replace("_", " ") for name in columns.split()]
    return table(header, [cells(row) for row in rows])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.benchmarks.cards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="dev")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of forwards and training steps")
    parser.add_argument("--budgets", nargs="+", type=float, help="GB of cards to keep to")
    parser.add_argument("--model", help="a whole model, whose loading is timed")
    parser.add_argument("--out", type=Path, help="rows as JSON, a line each; what is there is not measured again")
    return entry.run(parser, lambda args: print("\n".join(show(measure_all(args)))), argv)


if __name__ == "__main__":
    sys.exit(main())
