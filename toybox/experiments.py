"""The papers' experiments on the picture world: python -m toybox.experiments tasks condition

An experiment is a table of arms. Each arm trains its LoRA with train.py, or is the base alone, and then makes sets of
held-out subjects: the same sets from the same noise in every arm, which truth functions judge. Trainings are found
again in --work and go on there. Intervals are 95 %, bootstrapped over sets: they cover sampling, not training.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import train
from iclora.restart import write_whole
from model.lora import load_lora, merge
from model.weights import find_model
from sampling.images import to_picture

from . import entry
from .generate import Networks, load_networks
from .judge import KINDS, SUCCESS, Figures, Found, measure, measure_truth
from .report import put_between
from .scores import interval, ratio
from .tasks import COUNT, GRIDS, write_tasks
from .truth import load_reader

ONE_EPOCH = ("--steps", "2", "--batch", "5", "--holdout", "0", "--warmup", "0", "--ema", "0")


@dataclass(frozen=True)
class Arm:
    """One line of a table.

    task: what is judged, and taught
    flags: of train.py; None is the base without a LoRA
    sets: to learn from, the first of the task's; None is the committed ones of all tasks together
    """

    task: str
    name: str
    flags: tuple[str, ...] | None = ()
    sets: int | None = COUNT


@dataclass(frozen=True)
class Experiment:
    """Arms, each compared with the first one of its task.

    columns: the figures that its table shows
    """

    title: str
    arms: tuple[Arm, ...]
    columns: tuple[str, ...] = SUCCESS
    measure: Callable[..., Found] = measure
    measure_truth: Callable[..., Found] = measure_truth


def of_every_task(*arms: tuple) -> tuple[Arm, ...]:
    """The same arms for each task."""
    return tuple(Arm(task, *about) for task in GRIDS for about in arms)


EXPERIMENTS = {
    "tasks": Experiment(
        "What a LoRA teaches the base (bars: the base at most 20 %, the LoRA at least 85 %)",
        of_every_task(("base", None), ("LoRA",), ("one LoRA of all tasks", (), None)),
    ),
    "condition": Experiment(
        "Given panels noised along (SDEdit) or clean, in training as in sampling",
        of_every_task(("SDEdit",), ("clean", ("--condition", "clean"))),
    ),
    "concat": Experiment(
        "Panels as one picture or as one row of tokens", of_every_task(("pixels",), ("tokens", ("--concat", "tokens")))
    ),
    "text": Experiment(
        "One caption for all panels, or each reads its own part",
        of_every_task(("joint",), ("panel", ("--text", "panel"))),
    ),
    "few": Experiment(
        "Ten sets", of_every_task((f"{COUNT} sets",), ("10 sets", (), 10), ("10 sets, one epoch", ONE_EPOCH, 10))
    ),
}


# the runner


def run_all(args: argparse.Namespace) -> None:
    """Run the experiments that are asked for, one after the other; arms that they share are judged once."""
    reader = load_reader(find_model(args.model).flux.parent / "truth" / "model.safetensors")
    args.out.mkdir(parents=True, exist_ok=True)

    @functools.cache
    def judged(measure: Callable[..., Found], task: str, lora: Path | None) -> Found:
        return measure(task, *with_lora(args.model, lora), reader, args.count)

    @functools.cache
    def judged_truth(measure: Callable[..., Found], task: str) -> Found:
        return measure(task, load_networks(args.model), reader, args.count)

    for name in args.experiments:
        experiment = EXPERIMENTS[name]
        truth = {arm.task: judged_truth(experiment.measure_truth, arm.task) for arm in experiment.arms}
        loras, seconds = zip(*(train_arm(arm, args) for arm in experiment.arms), strict=True)
        found = [judged(experiment.measure, arm.task, lora) for arm, lora in zip(experiment.arms, loras, strict=True)]
        write(name, args, truth, found, seconds)


def train_arm(arm: Arm, args: argparse.Namespace) -> tuple[Path | None, float | None]:
    """Train the LoRA of an arm as far as it is not yet.

    Returns its file, None for the base; and the seconds that it took, None if it was not trained at one go
    Errors: ValueError if train.py fails, which has said why
    """
    if arm.flags is None:
        return None, None
    data = Path("sets") if arm.sets is None else Path("sets", arm.task)
    if arm.sets not in (None, COUNT):
        write_tasks(args.work / f"sets-{arm.sets}", arm.sets)
        data = args.work / f"sets-{arm.sets}" / arm.task
    words = (args.model, *data.parts[-2:], str(args.steps), *arm.flags)
    folder = args.work / "-".join(word.strip("-").replace("/", "-") for word in words)
    begun, clock = (folder / train.CHECKPOINT).exists(), time.monotonic()
    flags = ["--data", str(data), "--model", args.model, "--steps", str(args.steps), *arm.flags]
    if train.main([*flags, "--out", str(folder)]):
        raise ValueError(f"the training in {folder} did not end well")
    if not begun:
        write_whole(folder / "seconds.json", json.dumps(time.monotonic() - clock))
    clocked = folder / "seconds.json"
    return folder / train.RESULT, json.loads(clocked.read_text()) if clocked.exists() else None


def with_lora(model: str, lora: Path | None) -> tuple[Networks, dict[str, str]]:
    """The networks of a model with a LoRA merged, and its metadata, which say how it wants to be sampled."""
    networks = load_networks(model)
    if lora is None:
        return networks, {}
    about = load_lora(networks.flux, lora).metadata
    merge(networks.flux)
    return networks, about


# tables and sheets


def write(name: str, args: argparse.Namespace, truth: dict[str, Found], found: list[Found], seconds: Sequence) -> None:
    """Print the tables of an experiment; write them, the values of every set, and a sheet of each task."""
    experiment = EXPERIMENTS[name]
    lines = [f"### {experiment.title}", "", f"{args.count} held-out sets; {args.steps} steps.", ""]
    lines += tables(experiment, {task: figures for task, (figures, _) in truth.items()}, [f for f, _ in found], seconds)
    rows = [{"task": task, "name": "true sets", "figures": figures} for task, (figures, _) in truth.items()]
    for arm, (figures, _), took in zip(experiment.arms, found, seconds, strict=True):
        rows.append({**vars(arm), "seconds": took, "figures": figures})
    write_whole(args.out / f"{name}.json", json.dumps({"count": args.count, "steps": args.steps, "rows": rows}) + "\n")
    for task, (_, parts) in truth.items():
        made = [row for arm, (_, more) in zip(experiment.arms, found, strict=True) if arm.task == task for row in more]
        sheet([*parts, *made]).save(args.out / f"{name}-{task}.png", optimize=True)
        lines += ["", f"{task}: true sets, then for every arm sets from text and with their first panel given", ""]
        lines += [f"![{name}, {task}]({args.out.name}/{name}-{task}.png)"]
    print("\n".join(lines) + "\n", flush=True)
    if args.document:
        put_between(args.document, f"toybox.experiments {name}", "\n".join(lines) + "\n")


def tables(experiment: Experiment, truth: dict[str, Figures], found: list[Figures], seconds: Sequence) -> list[str]:
    """Task success of every arm, and how far it is from the first one of its task; then the traits that are kept."""
    columns, shown, first = experiment.columns, [], {}
    lines = [f"| task | arm | {' | '.join(columns)} | training |", "|---|---|" + "---|" * (len(columns) + 1)]
    for arm, figures, took in zip(experiment.arms, found, seconds, strict=True):
        most, base = truth[arm.task], first.setdefault(arm.task, figures)
        if base is figures:
            lines.append(line(arm.task, "true sets after the autoencoder", [interval(most[c]) for c in columns]))
        minutes = "" if took is None else f"{took / 60:.1f} min"
        lines.append(line(arm.task, arm.name, [interval(figures[c]) for c in columns], minutes))
        if base is not figures:
            apart = [interval(np.subtract(figures[c], base[c])) for c in columns]
            lines.append(line(arm.task, f"{arm.name}, difference", apart, sign="+"))
        shown += [kept_traits(arm.name, kind, figures, most) for kind in KINDS if f"{kind}, own panel" in figures]
    return [*lines, *(IDENTITY + shown if shown else [])]


IDENTITY = [
    "",
    "The given subject's traits in the generated panels, with captions silent about it (bar: 80 % of the ceiling):",
    "",
    "| arm | traits | own panel given | another's given | difference | ceiling | own / ceiling | |",
    "|---|---|---|---|---|---|---|---|",
]


def kept_traits(name: str, kind: str, figures: Figures, most: Figures) -> str:
    """One line of traits that reappear, against the same run with another subject's panel."""
    own, other, ceiling = figures[f"{kind}, own panel"], figures[f"{kind}, another's panel"], most[f"{kind}, own panel"]
    cells = [*map(interval, (own, other, np.subtract(own, other), ceiling)), ratio(own, ceiling)]
    return line(name, kind, cells)


def line(first: str, second: str, found: list[tuple[float, float, float]], last: str = "", sign: str = "") -> str:
    """One line of a table: means and their intervals, in percent."""
    cells = ["{} ({} to {})".format(*(f"{100 * value:{sign}.1f}" for value in cell)) for cell in found]
    return f"| {first} | {second} | {' | '.join(cells)} | {last} |"


def sheet(rows: list[Tensor], zoom: int = 2) -> Image.Image:
    """Rows of composites (N, 3, h, w), one below the other."""
    picture = to_picture(torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).clamp(-1, 1))
    return picture.resize((zoom * picture.width, zoom * picture.height), Image.Resampling.NEAREST)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m toybox.experiments", description=__doc__)
    parser.add_argument("experiments", nargs="+", choices=tuple(EXPERIMENTS), help="what to train and judge")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--count", type=int, default=100, help="held-out sets that are judged")
    parser.add_argument("--steps", type=int, default=400, help="of every training that does not say otherwise")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"), help="folder of the trainings")
    parser.add_argument("--out", type=Path, default=Path("docs/experiments"), help="folder for values and sheets")
    parser.add_argument("--document", type=Path, help="also write the tables between their marks in this file")
    return entry.run(parser, run_all, argv)


if __name__ == "__main__":
    sys.exit(main())
