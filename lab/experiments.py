"""The papers' experiments on the picture world: python -m lab.experiments tasks condition

An experiment is a table of arms (lab.arms). Each arm trains its LoRA with train.py, or is the base alone, and then
makes pictures of held-out subjects: the same ones from the same noise in every arm, which judges look at. Trainings
and what was judged are kept in --work, so that a run goes on where it was stopped, and what arms share is done once.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

import train
from iclora.checkpoint import CHECKPOINT, RESULT
from model.checkpoint import fingerprint, save_safetensors, write_atomic
from model.lora import load_lora, merge
from model.weights import find_model
from sampling.images import to_picture

from . import circle, entry, judge_uno
from .arms import EXPERIMENTS, Experiment, Training
from .captions import panel_prompt
from .eyes import load_eyes
from .generate import Networks, load_networks
from .judge import Found, Judge, Ruler
from .pages import TRUE, base_mark, save_picture, save_values, sheet
from .pairs import Pair, bare, make_pairs, write_pairs
from .panels import write_sets
from .tables import tables, what_intervals_cover
from .tasks import COUNT, write_tasks
from .truth import load_reader


def run_all(args: argparse.Namespace) -> None:
    """Run the experiments that are asked for, one after the other; what they share is trained and judged once."""
    ruler = load_ruler(args.model)
    args.out.mkdir(parents=True, exist_ok=True)

    @functools.cache
    def trained(training: Training | str | None, steps: int, seed: int) -> tuple[Path | None, float | None]:
        if not isinstance(training, Training):
            return training and find_model(args.model).root / training, None
        start, before = trained(training.start, steps, seed) if training.start else (None, 0.0)
        lora, took = train_one(training, start, steps, seed, args)
        return lora, None if took is None or before is None else took + before

    for name in args.experiments:
        experiment = EXPERIMENTS[name]
        steps, judge = args.steps or experiment.steps, experiment.judge
        truth = {arm.task: judge_truth(judge, arm.task, ruler, args) for arm in experiment.arms}
        found, seconds, files = [], [], []
        for arm in experiment.arms:
            seeds = arm.seeds if isinstance(arm.training, Training) else 1
            loras = [trained(arm.training, steps, seed) for seed in range(seeds)]
            found.append([judge_one(judge, arm.task, lora, ruler, args) for lora, _ in loras])
            files.append([lora for lora, _ in loras])
            known = [took for _, took in loras if took is not None]
            seconds.append(sum(known) / len(known) if len(known) == len(loras) else None)
        write(name, steps, args, truth, found, seconds, files)


# training


def train_one(
    training: Training, start: Path | None, steps: int, seed: int, args: argparse.Namespace
) -> tuple[Path, float | None]:
    """Train a LoRA as far as it is not yet.

    start: the LoRA that it goes on from
    Returns its file, and the seconds that it took, None if it was not trained at one go
    Errors: ValueError if train.py fails, which has said why
    """
    steps = round(steps * training.length)
    flags = ["--data", str(draw_data(training, start, args)), "--model", args.model, "--steps", str(steps)]
    flags += ["--method", "uno", "--stage", str(training.stage)] if training.stage else []
    flags += [
        *(["--init-lora", str(start)] if start else []),
        *training.flags,
        *(["--seed", str(seed)] if seed else []),
    ]
    before = [start.parent.name] if start else [args.model]
    stage = [f"stage-{training.stage}"] if training.stage else []
    words = [*before, *stage, data_name(training), str(steps), *training.flags, *([f"seed-{seed}"] if seed else [])]
    folder = args.work / "-".join(word.strip("-").replace("/", "-") for word in words)
    begun, clock = (folder / CHECKPOINT).exists(), time.monotonic()
    if train.main([*flags, "--out", str(folder)]):
        raise ValueError(f"the training in {folder} did not end well")
    if not begun:
        write_atomic(folder / "seconds.json", json.dumps(time.monotonic() - clock))
    clocked = folder / "seconds.json"
    return folder / RESULT, json.loads(clocked.read_text()) if clocked.exists() else None


def data_name(training: Training) -> str:
    return "+".join(f"{kind}-{count}" for kind, count in training.data) or "sets"


def draw_data(training: Training, start: Path | None, args: argparse.Namespace) -> Path:
    """Where the sets or pairs of a training lie; they are drawn into --work unless they are committed ones.

    start: the LoRA of stage I, which draws the pairs of the kind "redrawn"
    """
    work = args.work
    if training.stage:
        if training.data[0][0] in (*circle.FILTERS, *circle.SECOND):
            return circle.made_pairs(training.data[0][0], start, work, args.model)
        by = f"-{start.parent.name}" if "redrawn" in dict(training.data) else ""
        path = work / "pairs" / f"{data_name(training)}{by}.json"
        if not path.exists():
            drawn = [
                redrawn(count, start, args) if kind == "redrawn" else make_pairs(kind, count, seed=0)
                for kind, count in training.data
            ]
            write_pairs([pair for pairs in drawn for pair in pairs], path)
        return path
    ((task, count),) = training.data or (("", COUNT),)
    if task == "panels":
        path = work / data_name(training) / "sets.jsonl"
        return path if path.exists() else write_sets(path.parent, count)
    if count == COUNT:
        return Path("sets", task)
    write_tasks(work / f"sets-{count}", count)
    return work / f"sets-{count}" / task


def redrawn(count: int, lora: Path, args: argparse.Namespace) -> list[Pair]:
    """Pairs of two subjects whose second reference the stage-I model drew from its crop, in another scene (UNO, 3.2).

    lora: of stage I
    """
    pairs, (networks, metadata) = make_pairs("cropped", count, seed=0), with_lora(args.model, lora)
    prompts = [panel_prompt(bare(pair.shown[1])) for pair in pairs]
    crops = [[pair.references[1]] for pair in pairs]
    made = judge_uno.make_pictures(networks, metadata, prompts, crops)
    pictures = [to_picture(image[None]) for image in made]
    return [
        dataclasses.replace(pair, references=(pair.references[0], picture))
        for pair, picture in zip(pairs, pictures, strict=True)
    ]


# judging


def load_ruler(model: str) -> Ruler:
    """The reader of a model, and CLIP and DINOv2 where it has them."""
    root = find_model(model).root
    eyes = load_eyes(model) if (root / "clip").is_dir() and (root / "dinov2").is_dir() else None
    return Ruler(load_reader(model), eyes)


def judge_one(judge: Judge, task: str, lora: Path | None, ruler: Ruler, args: argparse.Namespace) -> Found:
    """What a judge finds of the base with a LoRA, or without."""
    measure = functools.partial(judge.measure, task)
    return remembered(judge, task, lora, args, lambda: measure(*with_lora(args.model, lora), ruler, args.count))


def judge_truth(judge: Judge, task: str, ruler: Ruler, args: argparse.Namespace) -> Found:
    """What a judge finds of true pictures."""
    measure = functools.partial(judge.measure_truth, task)
    return remembered(judge, task, "truth", args, lambda: measure(load_networks(args.model), ruler, args.count))


def remembered(
    judge: Judge, task: str, what: Path | str | None, args: argparse.Namespace, find: Callable[[], Found]
) -> Found:
    """Find something, or read what was found before with the same files; remove judged/ when judges have changed."""
    unused = {"loras"} if judge.eyes else {"loras", "clip", "dinov2"}
    files = sorted(find_model(args.model).root.rglob("*.safetensors"))
    weights = [path for path in files if path.parent.name not in unused]
    mark = fingerprint([*weights, *([what] if isinstance(what, Path) else [])])[:16]
    kind = "truth" if what == "truth" else "made"
    path = args.work / "judged" / f"{judge.name}-{task}-{args.count}-{kind}-{mark}.safetensors"
    if not path.exists():
        figures, rows = find()
        tensors = {f"figure:{name}": torch.tensor(values, dtype=torch.float64) for name, values in figures.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(tensors | {f"row:{i:03d}": row.clone() for i, row in enumerate(rows)}, path)
    tensors = load_file(path)
    figures = {k.removeprefix("figure:"): t.tolist() for k, t in tensors.items() if k.startswith("figure:")}
    return figures, [tensors[k] for k in sorted(tensors) if k.startswith("row:")]


def with_lora(model: str, lora: Path | None) -> tuple[Networks, dict[str, str]]:
    """The networks of a model with a LoRA merged, and its metadata, which say how it wants to be sampled."""
    networks = load_networks(model)
    if lora is None:
        return networks, {}
    report = load_lora(networks.flux, lora)
    merge(networks.flux)
    return networks, report.metadata


# what is written


def write(
    name: str, steps: int, args: argparse.Namespace, truth: dict[str, Found], found: list[list[Found]],
    seconds: Sequence[float | None], files: Sequence[Sequence[Path | None]],
) -> None:  # fmt: skip
    """Write and print the page of an experiment; beside it the values of every set, and a sheet of each task.

    files: the LoRAs of every arm, by seed; their marks stand beside the values
    """
    experiment, model = EXPERIMENTS[name], Path(args.model).name
    trainings = [len(each) for each, arm in zip(files, experiment.arms, strict=True) if arm.training]
    about = f"{args.count} held-out sets; {told_steps(experiment, steps)}; on the base {model}."
    lines = [f"# {experiment.title}", "", f"{about} {what_intervals_cover(trainings)}", ""]
    lines += [note for words in experiment.judge.notes for note in (words, "")]
    of_arms = [[figures for figures, _ in each] for each in found]
    lines += tables(experiment, {task: figures for task, (figures, _) in truth.items()}, of_arms, seconds)
    rows = [{"task": task, "name": TRUE, "figures": [figures]} for task, (figures, _) in truth.items()]
    for i, (arm, figures, took) in enumerate(zip(experiment.arms, of_arms, seconds, strict=True)):
        marks = [lora and fingerprint([lora]) for lora in files[i]]
        rows.append({**dataclasses.asdict(arm), "seconds": took, "loras": marks, "figures": figures})
    base = {"model": model, "base": base_mark(args.model)}
    save_values({**base, "count": args.count, "steps": steps, "rows": rows}, args.out / f"{name}.json")
    for task, (_, parts) in truth.items():
        made = [row for arm, each in zip(experiment.arms, found, strict=True) if arm.task == task for row in each[0][1]]
        picture = save_picture(sheet([*parts, *made]), args.out / f"{name}-{task}".replace(", ", "-").replace(" ", "-"))
        lines += ["", f"{task}: {experiment.judge.sheet}", "", f"![{name}, {task}]({picture.name})"]
    command = f"python -m lab.experiments {name} --model {args.model} --count {args.count} --steps {steps}"
    page = "\n".join([*lines, "", f"Made by `{command}`."]) + "\n"
    write_atomic(args.out / f"{name}.md", page)
    print(page, flush=True)


def told_steps(experiment: Experiment, steps: int) -> str:
    """Say how long trainings were: "trainings of 1500 or 750 steps"."""
    chain = [arm.training for arm in experiment.arms]
    chain += [training.start for training in chain if isinstance(training, Training)]
    lengths = {round(steps * training.length) for training in chain if isinstance(training, Training)}
    return f"trainings of {' or '.join(map(str, sorted(lengths, reverse=True)))} steps" if lengths else "no training"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.experiments", description=__doc__)
    parser.add_argument("experiments", nargs="+", choices=tuple(EXPERIMENTS), help="what to train and judge")
    parser.add_argument("--model", default="tiny", help="the base, as for train.py")
    parser.add_argument("--count", type=entry.positive, default=100, help="held-out sets that are judged")
    of_each = "of a training or stage (default: the experiment's)"
    parser.add_argument("--steps", type=entry.positive, help=of_each)
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"), help="folder of the trainings")
    parser.add_argument("--out", type=Path, default=Path("lab/results"), help="folder for pages, values and sheets")
    return entry.run(parser, run_all, argv)


if __name__ == "__main__":
    sys.exit(main())
