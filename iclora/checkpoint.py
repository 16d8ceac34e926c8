"""What changes while training, and the file that holds it whole: train.py's and the lab's go on to the same bytes.

Everything random is drawn from (seed, step) and the order of the examples is a function of the step, so weights,
averages, the optimizers' moments and the number of steps are all there is to keep.
"""

import contextlib
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model.checkpoint import read_header, save_safetensors, write_atomic

from .cache import hash_tensors
from .cli import as_flags, read_record
from .config import TrainConfig, flag, saved
from .locks import lock

CHECKPOINT, RESULT, METRICS = "checkpoint.safetensors", "lora.safetensors", "metrics.jsonl"  # in the folder of a run
CONFIG, CURVE = "config.json", "loss.png"
SCRAP = re.compile(r"\.+(checkpoint|lora|metrics|config|loss|sheet)\b.*\.tmp|\.tmp\w{6}")  # left by kills
MAX_STEPS = 10**9
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # that AdamW keeps of a parameter; other optimizers say what they keep
ANEW = "remove it, and any beside it, to start anew, or give another --out"
# Settings that may change from one run to the next
FREE = ("steps", "save_every", "sample_every", "sample_prompt", "device", "accumulate", "checkpointing", "compile")
# Fingerprints by the option that names them: what may be called otherwise, but must hold the same
CONTENT = {"data": ("data",), "model": ("model", "encoders"), "init_lora": ("init_lora",)}


@dataclass
class State:
    """All that changes while training; a checkpoint holds it whole.

    parameters: what is trained; the lab's have the buffers of a module behind them
    average: of the parameters, in their order
    optimizers: train.py has one
    step: steps done
    """

    parameters: list[Tensor]
    average: list[Tensor]
    optimizers: list[torch.optim.Optimizer]
    step: int = 0


def new_state(parameters: list[nn.Parameter], eps: float = 1e-8) -> State:
    """Start training from the parameters as they are. eps: of AdamW's denominator"""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.999), eps=eps, weight_decay=0.01, fused=True)
    return State(parameters, [p.detach().clone() for p in parameters], [optimizer])


@torch.no_grad()
def update_average(average: list[Tensor], parameters: list[Tensor], ema: float, step: int) -> None:
    """Move the average: average <- d average + (1 - d) parameters, where the first steps are forgotten sooner.

    ema: the d of later steps
    step: steps done before this one
    """
    decay = min(ema, (1 + step) / (10 + step))
    torch._foreach_lerp_(average, parameters, 1 - decay)


@contextlib.contextmanager
def averaged(state: State) -> Iterator[None]:
    """Put the averaged weights in place of the trained ones for a while."""
    weights = [p.detach() for p in state.parameters]  # the same memory
    trained = [weight.clone() for weight in weights]
    torch._foreach_copy_(weights, state.average)
    try:
        yield
    finally:
        torch._foreach_copy_(weights, trained)


def save_checkpoint(path: Path, state: State, config: Mapping[str, Any], fingerprint: Mapping[str, str]) -> None:
    """Write a checkpoint, whole or not at all; the one before it is kept beside it.

    config: the settings that make the result
    fingerprint: of what is learnt from, by name
    Errors: OSError if the disk is full or read-only; last_good finds the earlier checkpoint then
    """
    tensors: dict[str, Tensor] = {}
    for i, (p, average) in enumerate(zip(state.parameters, state.average, strict=True)):
        tensors |= {f"{i}.weight": p.detach(), f"{i}.average": average.detach()}
        for optimizer in state.optimizers:
            tensors |= {f"{i}.optimizer.{name}": value for name, value in optimizer.state.get(p, {}).items()}
    config, fingerprint = json.dumps(dict(config)), json.dumps(dict(fingerprint))
    metadata = {"step": str(state.step), "config": config, "origin": fingerprint}
    about = {"digest": digest(tensors, metadata), "cpu": torch.backends.cpu.get_cpu_capability()}
    fresh = path.with_name(f".{path.name}.fresh.tmp")
    try:
        save_safetensors(tensors, fresh, metadata | about)
        with contextlib.suppress(ValueError):  # what was damaged meanwhile is not worth keeping
            if path.exists() and read_checkpoint(path)[2] < state.step:  # the same step, saved again, takes its place
                os.replace(path, earlier(path))
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def earlier(path: Path) -> Path:
    """Name the checkpoint before the last one."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def last_good(path: Path, note: Callable[[str], None]) -> Path | None:
    """Find the checkpoint that a run goes on from: the last one, or the one before it if the last one is damaged.

    path: of the last one
    note: is told of damage
    Returns None if there is neither
    Errors: ValueError if none of them is whole
    """
    problem = ""
    for each in filter(os.path.lexists, (path, earlier(path))):
        try:
            step = check_digest(each)
        except ValueError as error:
            problem = problem or str(error)
            continue
        if each != path:
            what = problem.partition(";")[0] or f"{path} is missing"
            note(f"{what}; going on from the one before it, step {step}")
        return each
    if problem:
        raise ValueError(problem)


def claim(folder: Path, planned: Path | None, rank: int) -> Path:
    """Make sure, in the first process, that a run begins where it was planned to, and replace a damaged checkpoint.

    planned: the checkpoint that it goes on from
    Returns the place of the last checkpoint
    Errors: ValueError if another run was here meanwhile
    """
    path = folder / CHECKPOINT
    if rank == 0 and planned != path and last_good(path, lambda line: None) != planned:
        raise ValueError(f"another run has written {path} meanwhile; the same command goes on from it")
    if rank == 0 and planned:
        os.replace(planned, path)
    return path


def check_digest(path: Path) -> int:
    """Refuse a checkpoint that does not hold what was written; those of old have no digest.

    Returns its step
    Errors: ValueError; or as read_checkpoint
    """
    step, metadata = read_checkpoint(path)[2], read_header(path)[1]
    if "digest" in metadata and metadata["digest"] != digest(load_file(path), metadata):
        raise ValueError(f"{path} is damaged: it does not hold what was written; {ANEW}")
    return step


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Hash all that a checkpoint says, so that a single flipped bit is told from it."""
    return hash_tensors(tensors, json.dumps([metadata[name] for name in ("step", "config", "origin")]))


def check_tensors(path: Path, state: State) -> None:
    """Demand exactly the tensors that a state has after as many steps: their names, shapes and types.

    state: a fresh one; it may be on the meta device
    Errors: ValueError that names the first that is missing, too much or another
    """
    wanted = {f"{i}.weight": p for i, p in enumerate(state.parameters)}
    wanted |= {f"{i}.average": p for i, p in enumerate(state.average)}
    numbers = {id(p): i for i, p in enumerate(state.parameters)}
    for optimizer in state.optimizers if read_checkpoint(path)[2] else ():
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            for name in getattr(optimizer, "moments", MOMENTS):
                wanted[f"{numbers[id(p)]}.optimizer.{name}"] = torch.zeros(()) if name == "step" else p
    kinds = [{name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (wanted, load_file(path))]
    if odd := {name for name, _ in kinds[0].items() ^ kinds[1].items()}:
        raise ValueError(f"{path} does not hold what this run trains ({min(odd)[:40]!a}); {ANEW}")


def load_checkpoint(path: Path, state: State, note: Callable[[str], None] = lambda line: None) -> None:
    """Put a checkpoint into a fresh state; whether it is one of this run is asked before.

    note: is told where the CPU has other features than the one that wrote it, as sums are ordered otherwise then
    Errors: ValueError if the file is damaged, or does not hold exactly what the state does
    """
    step, cpu = check_digest(path), torch.backends.cpu.get_cpu_capability()
    if (wrote := read_header(path)[1].get("cpu", cpu)) != cpu:
        note(f"the run was on a CPU with {wrote} and goes on with {cpu}; it may end in slightly other numbers")
    check_tensors(path, state)
    tensors = load_file(path)  # mapped, so what is kept of it is copied
    numbers = {id(p): i for i, p in enumerate(state.parameters)}
    with torch.no_grad():
        for i, (p, average) in enumerate(zip(state.parameters, state.average, strict=True)):
            p.copy_(tensors[f"{i}.weight"])
            average.copy_(tensors[f"{i}.average"])
    for optimizer in state.optimizers if step else ():  # which numbers its parameters by itself
        of_file = [numbers[id(p)] for group in optimizer.param_groups for p in group["params"]]
        names = getattr(optimizer, "moments", MOMENTS)
        loaded = {n: {name: tensors[f"{i}.optimizer.{name}"].clone() for name in names} for n, i in enumerate(of_file)}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": loaded})
    state.step = step


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Read a checkpoint's configuration, fingerprint and step.

    Errors: ValueError if it is damaged or something else
    """
    try:
        _, metadata = read_header(path)  # compares the size with the header
    except ValueError as error:
        raise ValueError(f"{str(error).partition(';')[0]}; {ANEW}") from None
    try:
        config, origin, step = json.loads(metadata["config"]), json.loads(metadata["origin"]), int(metadata["step"])
        if isinstance(config, dict) and isinstance(origin, dict) and 0 <= step <= MAX_STEPS:
            return config, origin, step
    except (KeyError, ValueError, RecursionError):
        pass
    raise ValueError(f"{path} is no checkpoint of train.py; {ANEW}")


def first_change(
    path: Path, config: Mapping[str, Any], fingerprint: Mapping[str, str], free: Iterable[str] = ()
) -> tuple[str, Any, Any] | None:
    """Find the first setting that makes a checkpoint one of another run: its name, the value before, the value now.

    free: names of settings that may change
    Errors: as read_checkpoint
    """
    before, learnt, _ = read_checkpoint(path)
    before = TrainConfig.BEFORE | before
    for name, value in json.loads(json.dumps(dict(config))).items():
        known = [key for key in CONTENT.get(name, ()) if key in learnt]  # old runs have fewer
        changed = any(learnt[key] != fingerprint[key] for key in known) if known else before.get(name) != value
        if changed and name not in free:
            return name, before.get(name), value
    return None


def as_begun(config: TrainConfig, note: Callable[[str], None]) -> tuple[TrainConfig, Path | None]:
    """Give options that are left open the values of the run: those younger than it, and fp8 if memory made it so.

    Returns the configuration, and the checkpoint that the run goes on from, None where it begins
    Errors: as last_good
    """
    begun = last_good(Path(config.out) / CHECKPOINT, note)
    known = read_checkpoint(begun)[0] if begun else TrainConfig.BEFORE
    then = {k: v for k, v in TrainConfig.BEFORE.items() if k not in known} | {"quantize": known.get("quantize")}
    return replace(config, **{k: v for k, v in then.items() if getattr(config, k) is None}), begun


def refuse_other_run(
    path: Path | None, config: TrainConfig, fingerprint: Mapping[str, str], more: str = "", fresh: State | None = None
) -> None:
    """Refuse to go on from a checkpoint with what would make it another run, before anything is loaded.

    path: of the checkpoint; None where anything may begin, unless the folder is somebody else's
    more: the command that trains on from its result, which is said where only that is possible
    fresh: what is to be trained, perhaps on the meta device
    Errors: ValueError that names the first setting that differs, with both values; or as check_tensors
    """
    free = FREE[1:] if config.decay else FREE  # the rate falls towards the last step
    if path is None:
        return refuse_foreign(Path(config.out))
    if not {"data", "model"} <= read_checkpoint(path)[1].keys():
        raise ValueError(f"{path} does not say what it was trained on; {ANEW}")
    if not (change := first_change(path, saved(config), fingerprint, free)):
        return check_tensors(path, fresh) if fresh else None
    name, before, value = change
    line = f"{path.parent} holds a run with {flag(name)} {before}, not {value}"
    if name == "steps" and read_checkpoint(path)[2] == before:
        raise ValueError(f"{line}, and its rate has fallen to 0; to train on from it: {more}")
    same = " with other content" if before == value else ""
    raise ValueError(f"{line}{same}; give the same settings to go on, or another --out")


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder where files of somebody else have the names that a run writes. Errors: ValueError"""
    taken = [name for name in (CONFIG, RESULT, METRICS, CURVE) if os.path.lexists(folder / name)]
    if not taken:
        return
    with contextlib.suppress(ValueError):
        if {"method", "rank", "steps"} <= read_record(folder / CONFIG)["config"].keys():
            return  # a run that was killed before its first checkpoint
    raise ValueError(f"{folder} has a {taken[0]} that is not train.py's and would be overwritten; give another --out")


def train_command(config: TrainConfig) -> str:
    """Write the command that trains on from a run's LoRA in a new folder, with the flags as they were given."""
    out = next(out for n in count(2) if not Path(out := f"{Path(config.out)}-{n}").exists())
    config = replace(config, init_lora=str(Path(config.out) / RESULT), out=out, config=None)
    return shlex.join(["python", "train.py", *as_flags(config)])


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder for as long as this one works.

    A folder in which nothing was written is removed again.

    Errors: ValueError if another run works there; OSError if the folder cannot be made
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder) as alone:
        if alone is False:
            raise ValueError(f"another run works in {folder}; wait until it has ended, or give another --out")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # unless something is in it


def start_folder(folder: Path, config: TrainConfig) -> None:
    """Make the folder of a run with its config.json, and clear away what a kill left half written.

    Errors: OSError if that is impossible
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*tmp*"):
        if SCRAP.fullmatch(left.name):
            left.unlink(missing_ok=True)
    write_atomic(folder / CONFIG, json.dumps({"config": saved(config)}, indent=2) + "\n")
