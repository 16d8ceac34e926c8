"""The papers' experiments on the picture world: python -m toybox.experiments sparkle sketch walk

Each task's LoRA is trained with train.py on sets/<task>, then base and LoRA make sets of held-out subjects, which the
truth functions of toybox.tasks judge: from text alone, and with the first panel given. Intervals are 95 %,
bootstrapped over sets: they cover sampling, not training.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import train
from iclora.layout import Layout, stitch
from model.lora import load_lora, merge
from model.weights import find_model
from sampling.images import to_picture, to_tensor

from .generate import Networks, generate, load_networks
from .scores import interval, named_right, tiles
from .sets import PANEL
from .tasks import GRIDS, TaskSet, is_sketch, is_sparkled, is_walk, task_sets
from .truth import Reader, load_reader, read

SEED = 9_000_000  # of the sets that are judged
COLUMNS = 6


def to_tensors(sets: list[TaskSet]) -> Tensor:
    """The sets as composites: (N, 3, h, w) in -1..1."""
    layout = Layout(*sets[0].grid, PANEL, PANEL)
    return torch.cat([to_tensor(stitch(one.pictures, layout)) for one in sets])


def only_first(image: Tensor) -> Tensor:
    """Composites (N, 3, h, w) in which all but the first panel is 0."""
    kept = torch.zeros_like(image)
    kept[:, :, :PANEL, :PANEL] = image[:, :, :PANEL, :PANEL]
    return kept


def judge(task: str, reader: Reader, image: Tensor) -> list[float]:
    """Whether each composite (N, 3, h, w) shows the relation of the task: 1 or 0."""
    rows, cols = GRIDS[task]
    panels = tiles(image).unflatten(0, (-1, rows * cols))  # (N, panels, 3, 64, 64)
    if task == "walk":
        return [float(is_walk(read(reader, group))) for group in panels]
    relation = is_sparkled if task == "sparkle" else is_sketch
    return [float(relation(group[1], group[0])) for group in panels]


def identity(reader: Reader, image: Tensor, sets: list[TaskSet]) -> list[float]:
    """How many of the later panels show the subject's shape, colour and pattern, a mean for each set of a walk."""
    panels = read(reader, tiles(image))
    size = len(sets[0].panels)
    groups = [panels[i : i + size] for i in range(0, len(panels), size)]
    traits = ("shape", "colour", "pattern")
    return [
        sum(named_right(r, one.panels[0].placed[0].subject, traits) for r in group[1:]) / (size - 1)
        for group, one in zip(groups, sets, strict=True)
    ]


def compare(task: str, lora: Path | None, reader: Reader, count: int, model: str) -> tuple[list[str], Tensor]:
    """Rows of a table for the base (lora None) or the base with a LoRA; and sets from text, for a sheet."""
    networks, clean = with_lora(model, lora)
    sets = task_sets(task, count, SEED, held_out=True)
    true, seeds = to_tensors(sets), list(range(count))
    captions, silent = [one.caption for one in sets], [one.silent for one in sets]
    masked = tuple(range(2, len(sets[0].pictures) + 1))
    given = dict(kept=only_first(true), masked=masked, clean=clean)
    runs = {
        "from text": generate(networks, captions, GRIDS[task], seeds),
        "first panel given": generate(networks, captions, GRIDS[task], seeds, **given),
        "first panel given, caption silent about it": generate(networks, silent, GRIDS[task], seeds, **given),
    }
    name = "base" if lora is None else "LoRA"
    lines = [table_row(f"{task}, {name}, {how}", judge(task, reader, made)) for how, made in runs.items()]
    if task == "walk":
        made = runs["first panel given, caption silent about it"]
        other = only_first(true.roll(1, dims=0))  # another subject's panel
        wrong = generate(networks, silent, GRIDS[task], seeds, **{**given, "kept": other})
        lines.append(table_row(f"{task}, {name}, subject kept though unnamed", identity(reader, made, sets)))
        lines.append(table_row(f"{task}, {name}, the same from another's panel", identity(reader, wrong, sets)))
    return lines, torch.cat((runs["from text"][:COLUMNS], runs["first panel given"][:COLUMNS], true[:COLUMNS]))


def with_lora(model: str, lora: Path | None) -> tuple[Networks, bool]:
    """The networks of a model with a LoRA merged, and whether it was trained to see given panels clean."""
    networks = load_networks(model)
    clean = False
    if lora is not None:
        clean = load_lora(networks.flux, lora).metadata.get("iclora.condition") == "clean"
        merge(networks.flux)
    return networks, clean


def table_row(name: str, values: list[float]) -> str:
    mean, low, high = interval(values)
    return f"| {name} | {mean:.1%} | {low:.1%} to {high:.1%} |"


def sheet(image: Tensor, zoom: int = 2) -> Image.Image:
    """Composites in COLUMNS columns."""
    rows = [torch.cat(list(part), dim=2) for part in image.split(COLUMNS)]
    picture = to_picture(torch.cat(rows, dim=1).clamp(-1, 1))
    return picture.resize((zoom * picture.width, zoom * picture.height), Image.Resampling.NEAREST)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m toybox.experiments", description=__doc__)
    parser.add_argument("tasks", nargs="+", choices=tuple(GRIDS), help="what to train and judge")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--count", type=int, default=100, help="held-out sets that are judged")
    parser.add_argument("--condition", default="none", choices=("none", "clean"), help="as train.py")
    parser.add_argument("--steps", type=int, default=400, help="as train.py")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder for the sheets")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="folder of the trainings")
    args = parser.parse_args(argv)
    try:
        reader = load_reader(find_model(args.model).flux.parent / "truth" / "model.safetensors")
        args.out.mkdir(parents=True, exist_ok=True)
        print("| run | success | 95 % interval |\n|---|---|---|", flush=True)
        for task in args.tasks:
            run = args.work / f"{task}-{args.condition}"
            flags = ["--data", f"sets/{task}", "--model", args.model, "--condition", args.condition]
            if status := train.main([*flags, "--steps", str(args.steps), "--out", str(run)]):
                return status
            for lora in (None, run / train.RESULT):
                lines, made = compare(task, lora, reader, args.count, args.model)
                print("\n".join(lines), flush=True)
            sheet(made).save(args.out / f"{task}-{args.condition}.png", optimize=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
