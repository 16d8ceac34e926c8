"""How fast this project's transformer is beside the official one and diffusers with PEFT, and what memory it takes.

    python -m lab.benchmarks.speed --out lab/results/benchmarks.md
    python -m lab.benchmarks.speed --measure train --shapes tiny --profile

All run in one process, on the same weights in the same memory, and take turns in every round. Their outputs, and in
training their gradients, are compared first; if they disagree, nothing is timed. A forward is one step of sampling; a
training step is loss, gradient, clipping and AdamW, LoRA on all Linears of the blocks, without averaged weights.
"""

import argparse
import itertools
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from iclora.training import checkpoint_blocks
from lab import entry
from model.checkpoint import write_atomic
from model.compiled import compile_blocks

from . import peers
from .rounds import collector_off, operator_table, operators, peak, size, spread, table, take_turns, times_as_fast

OURS = "this project"
RANK = 16
# How far an output, or all gradients, may be from ours, relative to their length
TOLERANCES = {
    "forward": {torch.float32: 5e-5, torch.bfloat16: 5e-2},
    "train": {torch.float32: 1e-4, torch.bfloat16: 5e-2},
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MB = 1e6


@dataclass
class Contestant:
    """One implementation, ready to run.

    call: what is timed
    answer: what must agree
    standing: tensors that it holds between calls
    """

    call: Callable[[], object]
    answer: Callable[[], Tensor]
    standing: Callable[[], list[Tensor]]


Case = tuple[str, str, torch.dtype]  # forward or train, name of the shape, dtype


def forward(
    shape: peers.Shape, chosen: list[str], device: torch.device, dtype: torch.dtype, compiled: bool = False
) -> dict[str, Contestant]:
    """Set up one forward of every implementation, without gradients. compiled: ours and diffusers' blocks are"""
    flux = peers.new_flux(shape, device, dtype)
    given = peers.new_inputs(flux.config, shape, device, dtype)
    models = {OURS: flux}
    for name in chosen:
        distribution, build = peers.PEERS[name]
        title = peers.package(distribution)
        models["official: " + title if name == "official" else title] = peer = build(flux.config, flux.state_dict())
        if compiled:
            peer.compile_blocks()
    if compiled:
        compile_blocks(flux)

    def contestant(model: torch.nn.Module) -> Contestant:
        run = torch.no_grad()(lambda: model(**given))
        return Contestant(run, run, lambda: list(model.parameters()))

    return {name: contestant(model) for name, model in models.items()}


def train(
    shape: peers.Shape, chosen: list[str], device: torch.device, dtype: torch.dtype, recompute: bool = False,
    rank: int = RANK, targets: str = "all-linear", reference: int = 0,
) -> dict[str, Contestant]:  # fmt: skip
    """Set up a training step of this project and of PEFT on diffusers, from equal adapters.

    Ours are float32 whatever the model is. PEFT's are either of the model's dtype, which is fastest, or float32 under
    autocast, which is how diffusers' scripts train; both compute in the model's dtype, as we do.

    recompute: blocks keep their inputs only, and compute the rest again in the backward pass
    reference: side of one beside each example, in tokens
    """
    if "diffusers" not in chosen:
        raise ValueError("training is compared with PEFT on diffusers only; add diffusers to --peers")
    title = f"{peers.package('diffusers')} + {peers.package('peft')}"
    flux = peers.new_flux(shape, device, dtype)
    state = flux.state_dict()  # before adapters change the names
    given = peers.new_batch(flux.config, shape, device, dtype, reference)
    runs = {OURS: peers.Training(flux, peers.attach(flux, rank, targets), given)}
    ways = {title: (False, dtype)}
    if dtype != torch.float32:
        ways = {f"{title}, {str(dtype).removeprefix('torch.')} adapters": (False, dtype)}
        ways[f"{title}, autocast"] = (True, torch.float32)
    for name, (autocast, adapters) in ways.items():
        model = peers.Diffusers(flux.config, state, autocast)
        runs[name] = peers.Training(model, peers.attach_peft(model, flux, adapters), given)
        if recompute:
            model.transformer.enable_gradient_checkpointing()
    if recompute:
        checkpoint_blocks(flux)
    return {name: Contestant(run.step, run.gradient, run.standing) for name, run in runs.items()}


SETTINGS = {"forward": forward, "train": train}


def compare(contestants: dict[str, Contestant], tolerance: float) -> str:
    """Say how far the peers' answers are from ours. Errors: ValueError if further than the tolerance"""
    ours = contestants[OURS].answer()
    distances = {name: peers.far(other.answer(), ours) for name, other in contestants.items() if name != OURS}
    for name, distance in distances.items():
        if not distance <= tolerance:
            raise ValueError(f"{name} is {distance:.1e} from {OURS}, more than {tolerance:.0e}; nothing is timed")
    listed = "; ".join(f"{name} {distance:.1e}" for name, distance in distances.items())
    return f"Relative distance from {OURS} (tolerance {tolerance:.0e}): {listed}."


def speeds(
    contestants: dict[str, Contestant], rounds: int, device: torch.device, clock: Callable[[], float]
) -> list[str]:
    """Time all of them and write the table, ours first."""
    calls = {name: contestant.call for name, contestant in contestants.items()}
    measured = take_turns(calls, rounds, device, clock)
    lines = []
    for name, contestant in contestants.items():
        ratio = "" if name == OURS else times_as_fast(measured[OURS], measured[name]).show()
        needed = peak(contestant.call, device)
        held = size(contestant.standing())
        memory = [f"{held / MB:.1f}", f"{needed / MB:.1f}", f"{(held + needed) / MB:.1f}"]
        lines.append([name, spread(measured[name]).show(1e3), ratio, *memory])
    header = ["", "ms (quartiles)", "ours is times as fast", "MB standing", "MB more in a call", "MB in all"]
    return table(header, lines)


def report(case: Case, args: argparse.Namespace) -> list[str]:
    """Measure one case and write its section."""
    device = torch.device(args.device)
    measure, name, dtype = case
    shape = peers.SHAPES[name]
    config = shape.read_config()
    batch = shape.forward_batch if measure == "forward" else shape.train_batch
    title = "Forward" if measure == "forward" else f"Training step, LoRA rank {RANK} on all Linears of the blocks"
    contestants = SETTINGS[measure](shape, args.peers, device, dtype)
    agreement = compare(contestants, TOLERANCES[measure][dtype])
    if args.profile:
        with collector_off():
            body = operator_table({n: operators(c.call, device) for n, c in contestants.items()})
    else:
        body = speeds(contestants, args.rounds, device, CLOCKS[args.clock])
    return [
        f"## {title}: {name}, {str(dtype).removeprefix('torch.')}",
        "",
        f"Width {config.hidden_size}, {config.num_heads} heads, {config.depth} + {config.depth_single_blocks} blocks, "
        f"{shape.side**2} image and {shape.text} text tokens, batch {batch}. {agreement}",
        "",
        *body,
        "",
    ]


def machine(device: torch.device) -> str:
    """Name what the figures hold for."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    name = names[0] if names else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def measure_all(args: argparse.Namespace) -> None:
    """Print every case's section as it comes, and write them to a file if one is asked for.

    Errors: ValueError for the clock of a CPU on another device
    """
    device = torch.device(args.device)
    if args.clock == "cpu" and device.type != "cpu":
        raise ValueError("--clock cpu does not see what another device does; leave it out there")
    if args.threads:
        torch.set_num_threads(args.threads)
    large = device.type == "cuda"
    shapes = args.shapes or ["tiny", "small", *(["dev"] if large else [])]
    dtypes = args.dtypes or (["bfloat16"] if large else ["float32", "bfloat16"])
    how = "Operators" if args.profile else f"{args.rounds} rounds in which all take turns, {args.clock} clock"
    text = [f"# Speed: {machine(device)}", "", f"{how}; one process, one copy of the weights.", ""]
    print("\n".join(text))
    for measure, shape, dtype in itertools.product(args.measure, shapes, dtypes):
        section = report((measure, shape, getattr(torch, dtype)), args)
        print("\n".join(section), flush=True)
        text += section
    if args.out:
        write_atomic(args.out, "\n".join(text))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--shapes", nargs="+", choices=peers.SHAPES, help="dev is the size of FLUX.1-dev, for a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"))
    parser.add_argument("--peers", nargs="+", choices=peers.PEERS, default=list(peers.PEERS))
    parser.add_argument("--rounds", type=entry.positive, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: of this process only, for a CPU with other work to do"
    )
    parser.add_argument("--threads", type=entry.positive, help="of the CPU")
    parser.add_argument("--profile", action="store_true", help="show where the time goes instead of measuring it")
    parser.add_argument("--out", type=Path, help="also write everything to this file")
    return entry.run(parser, measure_all, argv)


if __name__ == "__main__":
    sys.exit(main())
