"""What is saved beside a picture: what made it, so that it can be made again, and what differs when it is."""

import json
import math
import os
import platform
import re
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from model.checkpoint import file_sha256, write_atomic
from model.weights import weight_files
from sampling.images import to_png

from .config import SampleConfig, saved
from .pipeline import Result
from .plan import Plan
from .records import Note

LABEL = 14  # pixels above each picture of a contact sheet
SHEET = 8_192  # pixels of a sheet's side, beyond which its pictures are shrunk
PATHS = {option.name for option in fields(SampleConfig) if option.metadata.get("path")}  # kept out of pictures


def describe(plan: Plan) -> dict[str, Any]:
    """List what makes the pictures of a plan: configuration, files of weights, pictures, versions."""
    root = plan.files.root
    files = [_file(path, path.relative_to(root).as_posix()) for path in weight_files(plan.files)]
    files += [{**_file(lora.path, lora.path.name), "strength": strength} for lora, strength in plan.loras]
    versions = {name: version(name) for name in ("torch", "transformers", "pillow")}
    versions |= {"python": platform.python_version(), "threads": torch.get_num_threads()}
    gpu = torch.cuda.get_device_name() if plan.config.device == "cuda" else None
    versions |= {"cpu": torch.backends.cpu.get_cpu_capability(), "gpu": gpu}
    used = [(panel, "kept", source) for panel, source in plan.kept.items()]
    used = sorted(used + [(panel, "draft", source) for panel, source in plan.drafts.items()], key=lambda use: use[0])
    used += [(None, "reference", source) for source in plan.references]
    return {
        "config": saved(replay(plan)),
        "model": {"name": plan.files.name, "defaults": plan.defaults.name, "files": files},
        "inputs": [
            {"panel": panel, "use": use, "file": source.path, "sha256": source.sha256} for panel, use, source in used
        ],
        "versions": versions,
    }


def replay(plan: Plan) -> SampleConfig:
    """Write the configuration that makes the same pictures from anywhere: nothing left open, paths absolute."""
    config = plan.config
    loras = [f"{os.path.abspath(lora.path)}:{str(strength).removesuffix('.0')}" for lora, strength in plan.loras]
    return replace(
        config,
        mask=",".join(map(str, plan.generated)),
        panels=_absolute(config.panels),
        set=config.set and os.path.abspath(config.set),
        ref=_absolute(config.ref),
        lora=tuple(loras) if config.lora else (),
        prompt=plan.caption,
        panel_prompt=(),
        model=config.model if Path(config.model).name == config.model else os.path.abspath(config.model),
    )


def _absolute(items: tuple) -> tuple[str, ...]:
    return tuple(os.path.abspath(item) if isinstance(item, str | Path) else "a PIL image" for item in items)


def _file(path: Path, name: str) -> dict[str, Any]:
    return {"file": name, "bytes": path.stat().st_size, "sha256": _sha256(path, path.stat().st_mtime_ns)}


@cache
def _sha256(path: Path, written: int) -> str | None:
    """Hash a file once for all requests of a list. written: when"""
    return file_sha256(path)


def compare(record: dict[str, Any], old: dict[str, Any], name: str, note: Note) -> None:
    """Note where a replay starts from other pictures, weights or versions than the recorded run."""

    def hashes(record: dict[str, Any]) -> list[tuple]:
        return [(entry["panel"], entry["sha256"]) for entry in record["inputs"]]

    if old.keys() == {"config"}:
        return note(f"{name} does not say which panels, references and LoRAs it was made with; the JSON beside it does")
    try:
        others = {
            "pictures": hashes(old) != hashes(record),
            "weights": old["model"]["files"] != record["model"]["files"],
            "versions, threads or CPU features": record["versions"] | old["versions"] != record["versions"],
        }
    except (KeyError, TypeError, AttributeError):
        others = {"things, as it is not a whole record": True}
    if changed := [what for what, differs in others.items() if differs]:
        note(f"the result may differ from {name}, which was made with other {' and other '.join(changed)}")


def save(result: Result, record: dict[str, Any], folder: Path) -> list[Path]:
    """Save one set under the next free number: composite, generated panels, JSON; all of them or none.

    Returns the paths
    Errors: OSError if the folder cannot be written
    """
    record = {**record, "config": {**record["config"], "seed": result.seed, "num": 1}, "seconds": dict(result.seconds)}
    for number in count(next_number(folder)):
        with suppress(FileExistsError):  # another process was faster
            return save_as(f"{number:04d}", result, record, folder)


def next_number(folder: Path) -> int:
    """Make the folder and give the number behind the largest in it."""
    folder.mkdir(parents=True, exist_ok=True)
    matches = [re.match(r"(\d{4,9})[.-]", name) for name in os.listdir(folder)]
    return 1 + max((int(match[1]) for match in matches if match), default=0)


def save_as(stem: str, result: Result, record: dict[str, Any], folder: Path) -> list[Path]:
    """Save one set under a given number. The composite is first, so it reserves the number.

    Errors: FileExistsError if a name is taken, OSError if the folder cannot be written; no file is left then
    """
    paths = {f"{stem}.png": result.composite}
    paths |= {f"{stem}-panel-{panel}.png": picture for panel, picture in result.panels.items()}
    config = {name: value for name, value in record["config"].items() if name not in PATHS}
    text = {"prompt": config["prompt"], "config": json.dumps({"model": record["model"]["name"], **config})}
    names = {panel: f"{stem}-panel-{panel}.png" for panel in result.panels}
    record = {**record, "outputs": {"composite": f"{stem}.png", "panels": names}}
    files = {name: to_png(picture, text) for name, picture in paths.items()}
    files[f"{stem}.json"] = json.dumps(record, indent=2) + "\n"
    written: list[Path] = []
    try:
        for name, data in files.items():
            write_atomic(folder / name, data, overwrite=False)
            written.append(folder / name)
    except BaseException:  # Ctrl-C included
        for path in written:
            path.unlink()
        raise
    return written


def save_sheet(sets: dict[str, Image.Image], folder: Path) -> Path:
    """Save all pictures of a job on one contact sheet, under the next free number. Returns its path

    sets: by the name that stands above the picture
    """
    cols = math.ceil(math.sqrt(len(sets)))
    wide, high = (min(max(picture.size[i] for picture in sets.values()), SHEET // cols) for i in (0, 1))
    sheet = Image.new("RGB", (cols * wide, math.ceil(len(sets) / cols) * (high + LABEL)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (name, picture) in enumerate(sets.items()):
        left, top = place % cols * wide, place // cols * (high + LABEL)
        pen.text((left + 2, top), name, fill="black")
        picture = picture.copy()
        picture.thumbnail((wide, high))
        sheet.paste(picture, (left, top + LABEL))
    path = folder / f"{next_number(folder):04d}-sheet.png"
    write_atomic(path, to_png(sheet), overwrite=False)
    return path
