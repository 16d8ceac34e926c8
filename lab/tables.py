"""Tables and sheets of lab.experiments: means with 95 % intervals, bootstrapped over sets, and pictures."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lab.benchmarks.rounds import spread, times_as_fast
from sampling.images import to_picture

from .arms import Experiment
from .judge import Figures
from .scores import interval, line


def tables(
    experiment: Experiment, truth: dict[str, Figures], found: Sequence[Sequence[Figures]], seconds: Sequence,
    paces: Sequence[Sequence[float]] = (),
) -> list[str]:  # fmt: skip
    """Figures of every arm, how far they are from those of the first arm of its task, and the judge's own table.

    truth: by task
    found: of every arm and every seed
    seconds: that the trainings of every arm took, None if that is unknown
    paces: of every arm, the seconds of a set in each round; none are not shown
    """
    judge, means = experiment.judge, [over_seeds(figures) for figures in found]
    columns = [c for c in experiment.columns or judge.columns if any(c in figures for figures in means)]
    seeds, paper = experiment.seeds > 1, any(arm.paper for arm in experiment.arms)
    heads = [*columns, *[f"{columns[0]} by seed"] * seeds, *["paper"] * paper, *["seconds a set"] * bool(paces)]
    lines = [f"| task | arm | {' | '.join(heads)} | training |", "|---|---|" + "---|" * (len(heads) + 1)]
    more, first, empty = [], {}, [""] * (seeds + paper)
    for i, (arm, each, figures, took) in enumerate(zip(experiment.arms, found, means, seconds, strict=True)):
        most, base = truth[arm.task], first.setdefault(arm.task, i)
        pace = [spread(paces[i]).show()] if paces else []
        if base == i:
            truths = [*empty, *[""] * len(pace), ""]
            lines.append(line(arm.task, "true sets after the autoencoder", cells(most, columns), *truths))
        by_seed = [", ".join(f"{100 * np.mean(one[columns[0]]):.1f}" for one in each if columns[0] in one)] * seeds
        last = [*by_seed, *[arm.paper] * paper, *pace, training_time(took, *experiment.minutes)]
        lines.append(line(arm.task, arm.name, cells(figures, columns), *last))
        if base != i:
            both = [c for c in columns if c in figures and c in means[base]]  # what was judged earlier may lack some
            apart = {c: np.subtract(figures[c], means[base][c]) for c in both}
            pace = [f"{times_as_fast(paces[i], paces[base]).show()} times as fast"] if paces else []
            lines.append(
                line(arm.task, f"{arm.name}, difference", cells(apart, columns), *empty, *pace, "", sign="+")
            )  # fmt: skip
        more += judge.details(arm.task, arm.name, figures, most)
    return [*lines, *(["", *judge.head, *more] if more else [])]


def training_time(took: float | None, least: float, most: float) -> str:
    """The minutes of a training, and whether they are fewer or more than they should be."""
    if took is None:
        return ""
    minutes = took / 60
    outside = f", **under {least:g}**" if minutes < least else f", **over {most:g}**" if minutes > most else ""
    return f"{minutes:.1f} min{outside}"


def cells(figures: Figures, columns: Sequence[str]) -> list[tuple[float, float, float] | None]:
    return [interval(figures[c]) if c in figures else None for c in columns]


def over_seeds(found: Sequence[Figures]) -> Figures:
    """The mean over trainings, set by set."""
    return {name: np.mean([figures[name] for figures in found], axis=0).tolist() for name in found[0]}


def what_intervals_cover(experiment: Experiment) -> str:
    """A sentence on what the intervals of an experiment hold, and what they do not."""
    if experiment.seeds == 1:
        return "Intervals cover sampling only: every arm was trained once."
    return (
        f"Every arm was trained {experiment.seeds} times, with --seed 0 to {experiment.seeds - 1}; figures are means "
        "over the trainings. Intervals cover sampling only; the spread that training adds shows between the means of "
        "the single trainings (by seed)."
    )


def sheet(rows: list[Tensor], zoom: int = 2) -> Image.Image:
    """Rows of composites (N, 3, h, w), one below the other."""
    picture = to_picture(torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).clamp(-1, 1))
    return picture.resize((zoom * picture.width, zoom * picture.height), Image.Resampling.NEAREST)
