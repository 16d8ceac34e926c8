"""What changes while training, and the file that holds it whole: train.py's and the lab's go on to the same bytes.

Everything random is drawn from (seed, step) and the order of the examples is a function of the step, so weights,
averages, the optimizers' moments and the number of steps are all there is to keep.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model.checkpoint import read_header, save_safetensors, write_atomic

from .cli import as_flags
from .config import TrainConfig, flag, saved

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

CHECKPOINT, RESULT, METRICS = "checkpoint.safetensors", "lora.safetensors", "metrics.jsonl"  # in the folder of a run
ANEW = "remove it to start anew, or give another --out"
FREE = ("steps", "save_every", "sample_every", "sample_prompt", "device", "accumulate", "checkpointing")  # may change
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
    """Write a checkpoint, whole or not at all.

    config: the settings that make the result
    fingerprint: of what is learnt from, by name
    Errors: OSError if the disk is full or read-only; an earlier checkpoint is still there then
    """
    tensors: dict[str, Tensor] = {}
    for i, (p, average) in enumerate(zip(state.parameters, state.average, strict=True)):
        tensors |= {f"{i}.weight": p.detach(), f"{i}.average": average.detach()}
        for optimizer in state.optimizers:
            tensors |= {f"{i}.optimizer.{name}": value for name, value in optimizer.state.get(p, {}).items()}
    config, fingerprint = json.dumps(dict(config)), json.dumps(dict(fingerprint))
    metadata = {"step": str(state.step), "config": config, "origin": fingerprint}
    save_safetensors(tensors, path, metadata | {"digest": digest(tensors, metadata)})


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Hash all that a checkpoint says, so that a single flipped bit is told from it."""
    hashed = hashlib.sha256(json.dumps([metadata[name] for name in ("step", "config", "origin")]).encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def load_checkpoint(path: Path, state: State) -> None:
    """Put a checkpoint into a fresh state of the same shape; whether it is one of this run is asked before.

    Errors: ValueError if the file is damaged, or of another shape
    """
    step = read_checkpoint(path)[2]
    tensors = load_file(path)  # mapped, so what is kept of it is copied
    metadata = read_header(path)[1]
    if metadata.get("digest", whole := digest(tensors, metadata)) != whole:  # old ones have none
        raise ValueError(f"{path} is damaged: it does not hold what was written; {ANEW}")
    shapes = {f"{i}.{kind}": p.shape for i, p in enumerate(state.parameters) for kind in ("weight", "average")}
    if any(name not in tensors or tensors[name].shape != shape for name, shape in shapes.items()):
        raise ValueError(f"{path} holds adapters of another shape; {ANEW}")
    with torch.no_grad():
        for i, (p, average) in enumerate(zip(state.parameters, state.average, strict=True)):
            p.copy_(tensors[f"{i}.weight"])
            average.copy_(tensors[f"{i}.average"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"(\d+)\.optimizer\.(\w+)", name):
            moments.setdefault(int(match[1]), {})[match[2]] = value.clone()
    numbers = {id(p): i for i, p in enumerate(state.parameters)}
    for optimizer in state.optimizers:  # which numbers its parameters by itself
        of_file = [numbers[id(p)] for group in optimizer.param_groups for p in group["params"]]
        loaded = {number: moments[i] for number, i in enumerate(of_file) if i in moments}
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
        return json.loads(metadata["config"]), json.loads(metadata["origin"]), int(metadata["step"])
    except (KeyError, ValueError):
        raise ValueError(f"{path} is no checkpoint of train.py; {ANEW}") from None


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


def as_begun(config: TrainConfig, path: Path) -> TrainConfig:
    """Give options that are younger than a run the values that they had then, where they are left open.

    path: of the run's checkpoint; if there is none, it begins now
    Errors: as read_checkpoint
    """
    if not path.exists():
        return config
    known, before = read_checkpoint(path)[0], TrainConfig.BEFORE.items()
    return replace(config, **{k: v for k, v in before if k not in known and getattr(config, k) is None})


def refuse_other_run(path: Path, config: TrainConfig, fingerprint: Mapping[str, str], more: str = "") -> None:
    """Refuse to go on from a checkpoint with what would make it another run, before anything is loaded.

    path: of the checkpoint; if there is none, anything may begin
    more: the command that trains on from its result, which is said where only that is possible
    Errors: ValueError that names the first setting that differs, with both values; or as read_checkpoint
    """
    free = FREE[1:] if config.decay else FREE  # the rate falls towards the last step
    if not path.exists() or not (change := first_change(path, saved(config), fingerprint, free)):
        return
    name, before, value = change
    line = f"{path.parent} holds a run with {flag(name)} {before}, not {value}"
    if name == "steps" and read_checkpoint(path)[2] == before:
        raise ValueError(f"{line}, and its rate has fallen to 0; to train on from it: {more}")
    same = " with other content" if before == value else ""
    raise ValueError(f"{line}{same}; give the same settings to go on, or another --out")


def train_command(config: TrainConfig) -> str:
    """Write the command that trains on from a run's LoRA in a new folder, with the flags as they were given."""
    out = next(out for n in count(2) if not Path(out := f"{Path(config.out)}-{n}").exists())
    config = replace(config, init_lora=str(Path(config.out) / RESULT), out=out, config=None)
    return shlex.join(["python", "train.py", *as_flags(config)])


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder for as long as this one works; the lock dies with the process.

    A folder in which nothing was written is removed again.

    Errors: ValueError if another run works there; OSError if the folder cannot be made
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"another run works in {folder}; wait until it has ended, or give another --out") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # unless something is in it
        if fcntl:
            os.close(handle)


def start_folder(folder: Path, config: TrainConfig) -> None:
    """Make the folder of a run with its config.json, and clear away what a kill left half written.

    Errors: OSError if that is impossible
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in [*folder.glob(".*.tmp"), *folder.glob(".*.part")]:
        left.unlink(missing_ok=True)
    write_atomic(folder / "config.json", json.dumps({"config": saved(config)}, indent=2) + "\n")
