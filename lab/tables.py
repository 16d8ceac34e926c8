"""Tables of lab.experiments: means with 95 % intervals, and what these cover."""

from collections.abc import Sequence

import numpy as np

from .arms import Experiment
from .judge import Figures
from .scores import difference, interval, line


def tables(
    experiment: Experiment, truth: dict[str, Figures], found: Sequence[Sequence[Figures]], seconds: Sequence
) -> list[str]:
    """Figures of every arm, how far they are from those of the first arm of its task, and the judge's own table.

    truth: by task
    found: of every arm and every training
    seconds: that the trainings of every arm took, None if that is unknown
    """
    judge, arms = experiment.judge, [by_training(each) for each in found]
    columns = [c for c in experiment.columns or judge.columns if any(c in figures for figures in arms)]
    seeds, paper = any(len(each) > 1 for each in found), any(arm.paper for arm in experiment.arms)
    heads = [*columns, *[f"{columns[0]} by seed"] * seeds, *["paper"] * paper]
    lines = [f"| task | arm | {' | '.join(heads)} | training |", "|---|---|" + "---|" * (len(heads) + 1)]
    more, first, empty = [], {}, [""] * (seeds + paper)
    for i, (arm, each, figures, took) in enumerate(zip(experiment.arms, found, arms, seconds, strict=True)):
        most, base = truth[arm.task], first.setdefault(arm.task, i)
        if base == i:
            lines.append(line(arm.task, "true sets after the autoencoder", cells(most, columns), *empty, ""))
        single = [f"{100 * np.nanmean(one[columns[0]]):.1f}" for one in each if columns[0] in one]
        by_seed = [", ".join(single) if len(single) > 1 else ""] * seeds
        last = [*by_seed, *[arm.paper] * paper, training_time(took, experiment.minutes)]
        lines.append(line(arm.task, arm.name, cells(figures, columns), *last))
        if base != i:
            apart = [difference(figures[c], arms[base][c]) if c in figures else None for c in columns]
            lines.append(line(arm.task, f"{arm.name}, difference", apart, *empty, "", sign="+"))
        more += judge.details(arm.task, arm.name, figures, most)
    return [*lines, *(["", *judge.head, *more] if more else [])]


def training_time(took: float | None, most: float) -> str:
    """The minutes of a training, and whether they are more than they should be."""
    if took is None:
        return ""
    minutes = took / 60
    return f"{minutes:.1f} min" + (f", **over {most:g}**" if minutes > most else "")


def cells(figures: Figures, columns: Sequence[str]) -> list[tuple[float, float, float] | None]:
    return [interval(figures[c]) if c in figures else None for c in columns]


def by_training(found: Sequence[Figures]) -> Figures:
    """The values of every set in every training: (S, N) of each figure; of a single training (N,)."""
    if len(found) == 1:
        return found[0]
    return {name: np.array([figures[name] for figures in found]) for name in found[0]}


def what_intervals_cover(trainings: Sequence[int]) -> str:
    """A sentence on what intervals hold, and what they do not.

    trainings: of every arm that is trained
    """
    method = "Intervals are 95 %: Wilson's of what a set shows or does not, else bootstrapped over sets"
    most = max(trainings, default=0)
    if most < 2:
        return f"{method}. They cover sampling only: {'every arm was trained once' if most else 'nothing was trained'}."
    once = "; arms without means by seed were trained once, and theirs cover sampling only" if 1 in trainings else ""
    return (
        f"{method} and, of arms that were trained {most} times (--seed 0 to {most - 1}), over trainings too. Their "
        f"figures are means over the trainings, whose own means stand beside them (by seed). These intervals cover "
        f"training as well, as far as {most} trainings can tell of it{once}."
    )
