"""What FLUX.1-dev takes on a card: steps, training and budgets, with random weights of its size; one table.

    python -m lab.benchmarks.cards --minutes 8 --out runs/cards.jsonl      on a GPU; the same command goes on
    python -m lab.benchmarks.cards --size small --device cpu --ways eager "tables, offload"      to try it

    python -m lab.full_size runs/full --dtype bfloat16
    python -m lab.benchmarks.cards --model runs/full --parts loading first       how long a whole model lets one wait

Every row is a line of JSON with card, versions and commit, written when it is measured; a row that is there is not
measured again. What cannot be measured here has a reason instead of figures. Beside peers, all take turns on the same
weights, see lab/benchmarks/speed.py and requirements.txt.
"""

import argparse
import gc
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from iclora.cards import RESERVE, Config, MemoryPlan, Work, plan_memory
from iclora.config import SampleConfig, TrainConfig
from iclora.flops import Tokens, count_flops
from iclora.sizes import COPIES, forward_bytes, step_bytes, weigh
from iclora.training import checkpoint_blocks
from lab import entry
from model.autoencoder import AutoEncoder, AutoEncoderConfig, decode_tiled
from model.checkpoint import Checkpoint, Stored
from model.compiled import compile_blocks
from model.flux import Flux, FluxConfig
from model.offload import offload
from model.tables import AHEAD, make_tables
from sampling.denoise import denoise
from sampling.flow import times

from . import peers, speed, whole
from .fp8 import quantize
from .rounds import kernels, peak, spread, table, take_turns, times_as_fast, wait
from .whole import Missing, Row

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
FITTED = "eager", "compiled", "fp8, tables, compiled", "tables, offload"  # ways of training, those that must fit
TECHNIQUES = {"quantize": quantize, "tables": make_tables, "compile": compile_blocks}
PARTS = "ceiling", "steps", "beside", "training", "budgets", "exactness", "profile", "loading", "first"
GOALS = {  # of one H100, by what, way and size, or part of it
    ("forward", "tables, compiled", 1024): "118 ms", ("forward", "fp8, tables, compiled", 1024): "85 ms",
    ("forward", "tables, compiled", 512): "38 ms", ("training step", "compiled"): "495 TFLOP/s",
    ("loading", "transformer"): "5 s", ("first picture",): "15 s", ("next picture",): "3.5 s",
}  # fmt: skip
FUSED = "^(triton|cpp)_"  # kernels that the compiler made; their names list what they join
KINDS = {  # of the kernels of a forward, by their names; the first that fits
    "fused: gelu, and cat before linear2": FUSED + ".*gelu",
    "fused: norms of queries and keys, RoPE, heads": FUSED + ".*(scaled_dot_product|rms_norm|stack|rsqrt_[^s])",
    "fused: other norms, modulation, gates": FUSED + ".*(layer_norm|var_mean|add|mul)",
    "fused: everything else": FUSED,
    "attention": "attention|scaled_dot_product|flash|fmha|sdpa",
    "matrix products": "mm|gemm|cutlass|cublas|nvjet|linear",
    "copies": "copy|memcpy|memset|cat|clone",
    "everything else": "",
}
LARGEST = 8  # kernels that a profile names


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
        ((64, 1), (32, 1), (96, 1), (32, 4), (64, 4), (96, 4)), ((32, 4), (64, 1)), (80, 24, 16, 12), 128,
    ),
    "small": Setting(peers.flux_config(64, 2, 1, 2, 32, 16), (4,), 8, ((4, 2),), ((4, 2),), (0.5, 0.01), 32),
}  # fmt: skip


def apply(flux: Flux, techniques: tuple[str, ...], device: torch.device) -> None:
    """Prepare a transformer, in the order of iclora.fitted."""
    for name in techniques:
        try:
            offload(flux, device) if name == "offload" else TECHNIQUES[name](flux)
        except ValueError as error:  # no memory that can be locked
            raise Missing(str(error)) from None


def made(setting: Setting, techniques: tuple[str, ...], device: torch.device, on: torch.device | None = None) -> Flux:
    """Make a prepared transformer with random weights. on: where they are made, if not on the device"""
    shape = peers.Shape(setting.flux, setting.sides[0], setting.text, 1, 1)
    flux = peers.new_flux(shape, on or device, torch.bfloat16)
    apply(flux, techniques, device)
    return flux


# rows


def ceiling(setting: Setting, device: torch.device) -> Iterator[Row]:
    """The rate of a large matrix product, which the others are a share of."""
    side = 8192 if device.type == "cuda" else 256

    def measure() -> dict:
        a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
        seconds = spread(take_turns({"mm": lambda: a @ a}, 5, device, seconds=0.05)["mm"]).median
        return {"ms": 1e3 * seconds, "tflops": 2 * side**3 / seconds / 1e12}

    yield {"what": "matrix product", "way": f"{side}^3", "size": side}, measure


def steps(setting: Setting, device: torch.device, profile: bool = False) -> Iterator[Row]:
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
        return by_kind({name: 1e3 * kernel.seconds for name, kernel in kernels(call, device).items()})
    standing = torch.cuda.memory_allocated() if device.type == "cuda" else None
    seconds = take_turns({"step": call}, 7, device, seconds=0.1)["step"]
    flops = count_flops(flux.config, 1, tokens).forward
    figures = {"ms": 1e3 * spread(seconds).median, "tflops": flops / spread(seconds).median / 1e12}
    predicted = forward_bytes(flux.config, torch.bfloat16, tokens)
    return {**figures, "standing GB": standing and standing / 1e9, **against(peak(call, device), predicted)}


def kind_of(name: str) -> str:
    """Say what a kernel does."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower()))


def by_kind(took: dict[str, float]) -> dict:
    """Add up what kernels took, and name the largest. took: ms by name"""
    sums = {kind: round(sum(ms for name, ms in took.items() if kind_of(name) == kind), 3) for kind in KINDS}
    largest = sorted(took, key=lambda name: -took[name])[:LARGEST]
    return {"ms by kind": sums, "largest": {name[:80]: round(took[name], 3) for name in largest}}


def against(measured: float, predicted: float) -> dict:
    """Put a peak beside what iclora/sizes.py says."""
    return {"peak GB": measured / 1e9, "predicted GB": predicted / 1e9}


def trainings(setting: Setting, device: torch.device) -> Iterator[Row]:
    """Steps of training, with no block computed again and with all; the first size in all ways that fit small cards."""
    blocks = setting.flux.depth + setting.flux.depth_single_blocks
    for number, (side, batch) in enumerate(setting.training):
        for again in (0, blocks):
            for way in FITTED if again and not number else FITTED[:2]:
                key = {"what": "training step", "way": way, "size": 16 * side, "batch": batch, "again": again}
                yield key, partial(training, setting, WAYS[way], side, batch, again, device)


def training(
    setting: Setting, techniques: tuple[str, ...], side: int, batch: int, again: int, device: torch.device,
    on: torch.device | None = None,
) -> dict:  # fmt: skip
    """Measure one step of training with a LoRA of rank RANK. on: where the transformer is made, if not on the device"""
    flux, tokens = made(setting, techniques[: techniques.count("quantize")], device, on), Tokens(setting.text, side**2)
    parameters = peers.attach(flux, RANK)
    apply(flux, techniques[techniques.count("quantize") :], device)  # behind the adapters, as the commands do
    if "offload" not in techniques:
        flux.to(device)
    checkpoint_blocks(flux, again)
    shape = peers.Shape(flux.config, side, setting.text, 1, batch)
    run = peers.Training(flux, parameters, peers.new_batch(flux.config, shape, device, torch.bfloat16))
    seconds = spread(take_turns({"step": run.step}, 5, device, seconds=0.1)["step"]).median
    flops = count_flops(flux.config, batch, tokens, flux).step
    predicted = step_bytes(flux.config, torch.bfloat16, batch, tokens, "all-linear", RANK, again)
    predicted += 6 * sum(p.numel() for p in parameters)  # gradients, and the adapters in bfloat16
    return {"ms": 1e3 * seconds, "tflops": flops / seconds / 1e12, **against(peak(run.step, device), predicted)}


def beside(setting: Setting, device: torch.device) -> Iterator[Row]:
    """Forwards and training steps in turns with the official code, diffusers and PEFT, on the same weights."""
    for side, batch in setting.forwards:
        for way in ("eager", "compiled"):
            key = {"what": "forward beside peers", "way": way, "size": 16 * side, "batch": batch}
            yield key, partial(turns, setting, speed.forward, side, batch, device, way == "compiled")
    what = "training step beside peers"
    for side, batch in setting.training:
        for way in ("eager", "recomputed"):
            key = {"what": what, "way": way, "size": 16 * side, "batch": batch}
            yield key, partial(turns, setting, speed.train, side, batch, device, way == "recomputed")
    side = setting.sides[0]
    key = {"what": what, "way": f"recomputed, rank {UNO[0]}, a reference", "size": 16 * side, "batch": 1}
    yield key, partial(turns, setting, speed.train, side, 1, device, True, UNO[0], "attn", UNO[1])


def turns(setting: Setting, measure: Callable, side: int, batch: int, device: torch.device, *options) -> dict:
    """Measure ours and peers, whose answers are compared first.

    measure: forward or train of lab.benchmarks.speed; options: what else it takes, first whether something is not plain
    """
    shape, kind = peers.Shape(setting.flux, side, setting.text, batch, batch), measure.__name__
    chosen = list(peers.PEERS) if kind == "forward" and not options[0] else ["diffusers"]  # only that has a way
    try:
        contestants = measure(shape, chosen, device, torch.bfloat16, *options)
        speed.compare(contestants, speed.TOLERANCES[kind][torch.bfloat16])
    except (ValueError, ImportError) as error:
        raise Missing(str(error)) from None
    took = take_turns({name: c.call for name, c in contestants.items()}, 7, device, seconds=0.1)
    peaks = {name: peak(c.call, device) / 1e9 for name, c in contestants.items()}
    ours, flops = took.pop(speed.OURS), count_flops(setting.flux, batch, Tokens(setting.text, side**2)).forward
    figures = {"ms": 1e3 * spread(ours).median, "peak GB": peaks[speed.OURS]}
    figures |= {"tflops": flops / spread(ours).median / 1e12} if kind == "forward" else {}
    for name, seconds in took.items():
        figures |= {
            f"{name} ms": 1e3 * spread(seconds).median,
            f"times as fast as {name}": times_as_fast(ours, seconds).median,
            f"{name} peak GB": peaks[name],
        }
    return figures


def exactness(setting: Setting, device: torch.device) -> Iterator[Row]:
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


def budgets(setting: Setting, device: torch.device) -> Iterator[Row]:
    """Pictures and training steps on smaller cards: what the planner chooses, and its peaks beside the measured."""
    for vram in setting.budgets:
        for side in setting.sides:
            count = WHOLE if vram >= WHOLE_CARD else STEPS
            key = {"what": f"picture in {count} steps", "way": f"{vram:g} GB", "size": 16 * side}
            yield key, partial(picture, setting, side, count, vram, device)
    side = setting.sides[0]
    for vram in setting.budgets:
        key = {"what": "training step in a budget", "way": f"{vram:g} GB", "size": 16 * side}
        yield key, partial(training_in, setting, side, vram, device)


@contextmanager
def only(vram: float, device: torch.device) -> Iterator[None]:
    """Have the allocator give no more than a budget. vram: GB"""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 * vram * (1 - RESERVE / 2) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def planned(setting: Setting, config: Config, work: Work) -> tuple[MemoryPlan, tuple[str, ...], torch.device | None]:
    """Plan a run. Returns the plan, its techniques, and where the transformer is made, if not on the device"""
    known = headers(setting)
    weights = weigh(known.transformer, known.autoencoder, 0, torch.bfloat16)  # text encoders are not there
    try:
        plan = plan_memory(config, setting.flux, weights, work, 0)
    except ValueError as error:
        raise Missing(str(error)) from None
    names = tuple(name for name in ("quantize", "tables", "offload") if getattr(plan, name))
    return plan, names, torch.device("cpu") if plan.load_on_cpu else None


def training_in(setting: Setting, side: int, vram: float, device: torch.device) -> dict:
    """Take a step of training as planned, batch 1, while the allocator gives no more than the budget."""
    tokens = Tokens(setting.text, side**2)
    held = partial(step_bytes, setting.flux, torch.bfloat16, 1, tokens, "all-linear", RANK)
    with torch.device("meta"):
        trained = sum(p.numel() for p in peers.attach(Flux(setting.flux), RANK))
    flops = count_flops(setting.flux, 1, tokens).step
    work = Work(len(tokens), flops, held, trained * (4 * COPIES + 2), AHEAD, (16 * side) ** 2, 0, 0)
    config = TrainConfig(vram=vram, device=device.type, dtype="bfloat16", checkpointing="auto")
    plan, names, on = planned(setting, config, work)
    with only(vram, device):
        figures = training(setting, names, side, 1, plan.checkpointing, device, on)
    return {**figures, "with": plan.techniques}


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
    tokens = Tokens(setting.text, side**2)
    held, flops = forward_bytes(setting.flux, torch.bfloat16, tokens), count_flops(setting.flux, 1, tokens).forward
    work = Work(len(tokens), flops, lambda again: held, 0, count, (16 * side) ** 2, 0, 0)
    plan, names, on = planned(setting, SampleConfig(vram=vram, device=device.type, dtype="bfloat16"), work)
    with only(vram, device):
        flux = made(setting, names, device, on)
        flux, decoder = flux if plan.offload else flux.to(device), autoencoder(setting).to(device)
        shape = peers.Shape(flux.config, side, setting.text, 1, 1)
        given = peers.new_inputs(flux.config, shape, device, torch.bfloat16)
        ids, x = given["img_ids"], torch.randn(1, side**2, 64, device=device)
        text = given["txt"], given["y"], 3.5
        steps = torch.inference_mode()(lambda count: denoise(flux, x, times(count, side**2, True), ids, *text))
        decode = decode_tiled if plan.tile else AutoEncoder.decode
        z = torch.randn(1, 16, 2 * side, 2 * side, device=device)
        image = torch.inference_mode()(lambda: decode(decoder, z))
        start = time.perf_counter()
        steps(count), image(), wait(device)
        figures = {"ms": 1e3 * (time.perf_counter() - start), "with": plan.techniques}
        standing = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        for name, call in (("sampling", partial(steps, min(count, STEPS))), ("decoding", image)):
            figures |= {f"{name} {k}": v for k, v in against(standing + peak(call, device), plan.phases[name]).items()}
        figures |= {"reserved GB": torch.cuda.max_memory_reserved(device) / 1e9} if device.type == "cuda" else {}
        return figures


# the command


def machine(device: torch.device) -> dict:
    """Say what the figures hold for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    git = ["git", "rev-parse", "--short", "HEAD"] if shutil.which("git") else ["true"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    return {"card": name, **versions, "commit": commit}


def measure_all(args: argparse.Namespace) -> list[dict]:
    """Measure what is not in the file yet, add it there row by row, and give all rows."""
    setting, device = SIZES[args.size], torch.device(args.device)
    if args.budgets:
        setting = replace(setting, budgets=tuple(args.budgets))
    parts = {
        "ceiling": ceiling(setting, device), "beside": beside(setting, device), "steps": steps(setting, device),
        "training": trainings(setting, device), "budgets": budgets(setting, device),
        "exactness": exactness(setting, device), "profile": steps(setting, device, profile=True),
        "loading": whole.loading(args.model, device), "first": whole.first(args.model, device),
    }  # fmt: skip
    lines = args.out.read_text().splitlines() if args.out and args.out.is_file() else []
    rows, about = [json.loads(line) for line in lines], {**machine(device), "model": args.model or args.size}
    wanted = [(key | about, measure) for part in args.parts for key, measure in parts[part]]
    wanted = [(key, measure) for key, measure in wanted if key["way"] not in {*WAYS} - {*args.ways}]
    missing = [(key, measure) for key, measure in wanted if not any(key.items() <= row.items() for row in rows)]
    began = time.monotonic()
    for left, (key, measure) in zip(range(len(missing), 0, -1), missing, strict=True):
        if args.minutes and time.monotonic() - began > 60 * args.minutes:
            print(f"time is up; {left} rows are left, which the same command measures", file=sys.stderr)
            break
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
            torch.cuda.reset_peak_memory_stats(device)
        rows.append({**key, **figures})
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        print(f"{key['what']}, {key['way']}, {key['size']}", file=sys.stderr, flush=True)
    return rows


def goal_of(row: dict) -> str:
    """Say what a row is to reach, if anything."""
    names = row["what"], row["way"], row["size"]
    return next((goal for key, goal in GOALS.items() if names[: len(key)] == key), "")


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
        known |= {"card", "torch", "cuda", "python", "commit", "model"}
        rest = {k: v for k, v in row.items() if k not in known}
        said = "; ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k}: {v}" for k, v in rest.items())
        first = [row["what"], row["way"], str(row["size"]), str(row.get("batch", 1))]
        return [*first, *plain, goal_of(row), share, *memory, said]

    columns = "what way pixels batch ms TFLOP/s goal share_of_a_product standing_GB more_at_the_peak predicted also"
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
    parser.add_argument("--model", help="a whole model, for the parts loading and first")
    parser.add_argument("--minutes", type=float, help="after which no further row is begun")
    parser.add_argument("--out", type=Path, help="rows as JSON, a line each; what is there is not measured again")
    return entry.run(parser, lambda args: print("\n".join(show(measure_all(args)))), argv)


if __name__ == "__main__":
    sys.exit(main())
