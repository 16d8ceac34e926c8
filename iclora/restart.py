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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoint import save_safetensors

from .config import TrainConfig, flag, saved
from .training import State

FREE = ("steps", "save_every", "sample_every", "device", "data", "model", "accumulate", "checkpointing")  # may change


def save_state(path: Path, state: State, config: TrainConfig) -> None:
    """Write a checkpoint, whole or not at all."""
    moments = state.optimizer.state_dict()["state"]
    tensors: dict[str, Tensor] = {}
    for i, (p, average) in enumerate(zip(state.parameters, state.average, strict=True)):
        tensors |= {f"{i}.weight": p, f"{i}.average": average}
        tensors |= {f"{i}.optimizer.{name}": value for name, value in moments.get(i, {}).items()}
    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"step": str(state.step), "config": json.dumps(saved(config))}
    save_safetensors(kept, path, metadata)


def load_state(path: Path, state: State, config: TrainConfig) -> None:
    """Put a checkpoint into a fresh state of the same shape.

    Errors: ValueError if the file is damaged, or belongs to a run with other settings
    """
    tensors, metadata = read(path)
    refuse_other_settings(json.loads(metadata["config"]), config, path)
    shapes = [tuple(p.shape) for p in state.parameters]
    found = [tuple(tensors[f"{i}.weight"].shape) for i in range(len(shapes)) if f"{i}.weight" in tensors]
    if shapes != found:
        raise ValueError(f"{path} holds adapters of another shape; give another --out, or remove the file")
    with torch.no_grad():
        for i, (p, average) in enumerate(zip(state.parameters, state.average, strict=True)):
            p.copy_(tensors[f"{i}.weight"])
            average.copy_(tensors[f"{i}.average"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"(\d+)\.optimizer\.(\w+)", name):
            moments.setdefault(int(match[1]), {})[match[2]] = value
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
    state.step = int(metadata["step"])


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint's tensors and metadata.

    Errors: ValueError if it is damaged or something else
    """
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the checkpoint {path}: {str(error)[:80]}; remove it to start anew") from None
    if not {"step", "config"} <= metadata.keys():
        raise ValueError(f"{path} is no checkpoint of train.py; give another --out, or remove it")
    return tensors, metadata


def refuse_other_settings(before: dict[str, Any], config: TrainConfig, path: Path) -> None:
    """Refuse to go on with settings that would make it another run.

    Errors: ValueError that names the first setting that differs
    """
    now = json.loads(json.dumps(saved(config)))
    for name, value in now.items():
        if name not in FREE and before.get(name) != value:
            raise ValueError(
                f"{path.parent} holds a run with {flag(name)} {before.get(name)}, not {value}; "
                "give the same settings to go on, or another --out"
            )


def refuse_other_run(folder: Path, config: TrainConfig) -> None:
    """Refuse a folder that holds a run with other settings, before anything is loaded; else write config.json there.

    Errors: ValueError as refuse_other_settings
    """
    path = folder / "config.json"
    if path.exists():
        refuse_other_settings(json.loads(path.read_text())["config"], config, path)
    else:
        write_json({"config": saved(config)}, path)


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, path)
