"""How long a whole model takes: to load, to the first picture of a process, to the next one of a pipeline.

Rows of lab/benchmarks/cards.py. What is measured twice has its files in the page cache the second time.
"""

import gc
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from iclora.pipeline import Pipeline
from model.loading import move
from model.text import load_text_encoders
from model.weights import find_model, load_autoencoder, load_flux

from .commands import measure as run_command
from .rounds import wait

Row = tuple[dict, Callable[[], dict]]  # what is measured, and a call that gives its figures
STEPS = 20  # sample.py's
GRID = {"grid": "2x2", "mask": "3"}


class Missing(Exception):
    """What is to be measured is not there, or does not fit."""


def loading(model: str | None, device: torch.device) -> Iterator[Row]:
    """Seconds until networks stand on the device."""

    def load(name: str) -> dict:
        files, seconds = find_model(needed(model)), []
        for _ in range(2):
            start = time.perf_counter()
            if name == "text encoders":
                encoders = load_text_encoders(files, "cpu", torch.bfloat16)
                networks: list[Any] = [move(encoders.t5, device), move(encoders.clip, device)]  # as iclora/fitted.py
            else:
                networks = [
                    load_flux(files.flux, device)
                    if name == "transformer"
                    else load_autoencoder(files.autoencoder, device)
                ]
            wait(device)
            seconds.append(time.perf_counter() - start)
            size = sum(p.nbytes for network in networks for p in network.parameters())
            encoders = networks = None
            gc.collect()
        return {"ms": 1e3 * seconds[1], "first ms": 1e3 * seconds[0], "GB": size / 1e9, "GB/s": size / seconds[1] / 1e9}

    for name in ("transformer", "text encoders", "autoencoder"):
        yield {"what": "loading", "way": name, "size": 0}, partial(load, name)


def first(model: str | None, device: torch.device) -> Iterator[Row]:
    """The first picture of a process, from sample.py's start to its end; and the next ones of one pipeline."""

    def cold() -> dict:
        command = f"sample.py --model {shlex.quote(needed(model))} --device {device} --grid 2x2 --mask 3 --out"
        with tempfile.TemporaryDirectory() as folder:
            seconds = [run_command([*shlex.split(command), str(Path(folder) / str(i))])[0] for i in range(2)]
        return {"ms": 1e3 * seconds[1], "first ms": 1e3 * seconds[0]}

    def warm() -> dict:
        pipeline, seconds = Pipeline.load(needed(model), device=device.type), []
        for seed in range(3):
            start = time.perf_counter()
            result = pipeline(**GRID, steps=STEPS, seed=seed)
            seconds.append(time.perf_counter() - start)
        parts = {f"{name} ms": 1e3 * took for name, took in result.seconds.items()}
        return {"ms": 1e3 * seconds[-1], "first ms": 1e3 * seconds[0], **parts}

    yield {"what": "first picture", "way": "sample.py, page cache warm", "size": 0}, cold
    yield {"what": "next picture", "way": f"one pipeline, {STEPS} steps", "size": 0}, warm


def needed(model: str | None) -> str:
    if model is None:
        raise Missing("no --model was given")
    return model
