"""Checkpoints of a training run: one file, replaced whole, from which the run goes on to the same bytes.

Everything random is drawn from (seed, step) and the order of the examples is a function of the step, so weights,
averages, the optimizer's moments and the number of steps are all there is to keep.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.checkpoint import read_header, save_safetensors

from .config import TrainConfig
from .knobs import flag, saved
from .training import State

ANEW = "remove it to start anew, or give another --out"
FREE = ("steps", "save_every", "sample_every", "device", "accumulate", "checkpointing")  # may change
# Marks by the knob that names them: what may be called otherwise, but must hold the same, as it is compared by content
ORIGIN = {"data": ("data",), "model": ("model", "encoders"), "init_lora": ("init_lora",)}


def save_state(path: Path, state: State, config: TrainConfig, origin: dict[str, str]) -> None:
    """Write a checkpoint, whole or not at all.

    origin: marks of what is learnt from, from iclora.loader
    Errors: OSError if the disk is full or read-only; an earlier checkpoint is still there then
    """
    moments = state.optimizer.state_dict()["state"]
    tensors: dict[str, Tensor] = {}
    for i, (p, average) in enumerate(zip(state.parameters, state.average, strict=True)):
        tensors |= {f"{i}.weight": p, f"{i}.average": average}
        tensors |= {f"{i}.optimizer.{name}": value for name, value in moments.get(i, {}).items()}
    metadata = {"step": str(state.step), "config": json.dumps(saved(config)), "origin": json.dumps(origin)}
    save_safetensors(tensors, path, metadata)


def load_state(path: Path, state: State) -> None:
    """Put a checkpoint into a fresh state of the same shape; refuse_other_run comes first.

    Errors: ValueError if the file is damaged, or of another shape
    """
    _, _, step = read_about(path)
    tensors = load_file(path)  # mapped, so what is kept of it is copied
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
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
    state.step = step


def read_about(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Read a checkpoint's configuration, origin and step.

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


def refuse_other_run(path: Path, config: TrainConfig, origin: dict[str, str]) -> None:
    """Refuse to go on from a checkpoint with what would make it another run, before anything is loaded.

    path: of the checkpoint; if there is none, anything may begin
    Errors: ValueError that names the first setting that differs, with both values; or as read_about
    """
    if not path.exists():
        return
    before, learnt, _ = read_about(path)
    for name, value in json.loads(json.dumps(saved(config))).items():
        marks = [mark for mark in ORIGIN.get(name, ()) if mark in learnt]  # old runs have fewer
        other = any(learnt[mark] != origin[mark] for mark in marks) if marks else before.get(name) != value
        if other and name not in (FREE[1:] if config.decay else FREE):  # the rate falls towards the last step
            same = " with other content" if before.get(name) == value else ""
            raise ValueError(
                f"{path.parent} holds a run with {flag(name)} {before.get(name)}, not {value}{same}; "
                "give the same settings to go on, or another --out"
            )


def start_folder(folder: Path, config: TrainConfig) -> None:
    """Make the folder of a run with its config.json, and clear away what a kill left half written.

    Errors: OSError if that is impossible
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in [*folder.glob(".*.tmp"), *folder.glob(".*.part")]:
        left.unlink(missing_ok=True)
    write_whole(folder / "config.json", json.dumps({"config": saved(config)}, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all, in place of an earlier one.

    Errors: OSError if the disk is full or read-only
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
