"""Scores of panels as the reader sees them, their means with 95 % intervals, and lines of tables."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from iclora.intervals import bonett_price, wilson

from .sets import PANEL, composite
from .truth import SHOWN, Reader, Reading, Seen, read, same_hidden, same_traits
from .world import Panel, Subject

ALL = "all traits"
ROOM = 0.05  # above chance, below which a share of it tells nothing


# pictures and tensors


def to_tensors(sets: Sequence[tuple[Panel, ...]], rows: int = 2, cols: int = 2) -> Tensor:
    """Draw sets: (N, 3, 64 rows, 64 cols) in -1..1."""
    drawn = np.stack([composite(panels, rows, cols) for panels in sets])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def tiles(image: Tensor) -> Tensor:
    """The panels of composites, in reading order: (N, 3, 64 rows, 64 cols) to (N * rows * cols, 3, 64, 64)."""
    cut = image.unflatten(3, (-1, PANEL)).unflatten(2, (-1, PANEL))  # (N, 3, rows, 64, cols, 64)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def read_sets(reader: Reader, image: Tensor) -> list[list[Reading]]:
    """Read the panels of each composite (N, 3, 64 rows, 64 cols)."""
    found = read(reader, tiles(image))
    size = len(found) // len(image)
    return [found[i : i + size] for i in range(0, len(found), size)]


# scores of one panel, each 0 or 1


def named_right(reading: Reading, subject: Subject, traits: Sequence[str]) -> bool:
    """Whether somebody in the panel has these traits of the subject."""
    return any(all(getattr(one, t) == getattr(subject, t) for t in traits) for one in reading.seen)


def position_right(reading: Reading, panel: Panel) -> bool:
    """Whether every subject stands where it should; of several, subjects are told apart by shape."""
    if len(panel.placed) == 1:
        return [one.position for one in reading.seen] == [panel.placed[0].position]
    where = {one.shape: one.position for one in reading.seen}
    return all(where.get(placed.subject.shape) == placed.position for placed in panel.placed)


def hidden_agreement(reading: Reading, subject: Subject) -> dict[str, bool]:
    """Which hidden traits of the subject the panel shows; all are missed if nobody has its shape."""
    for one in reading.seen:
        if one.shape == subject.shape:
            return same_hidden(one, subject)
    return {"face": False, "hue": False}


def traits_shown(reading: Reading, subject: Subject | Seen) -> dict[str, float]:
    """Which traits of a subject somebody in the panel has, each by itself, and their mean as "all traits"."""
    agree = [same_traits(one, subject) for one in reading.seen]
    shown = {trait: float(any(one[trait] for one in agree)) for trait in SHOWN}
    return shown | {ALL: float(np.mean(list(shown.values())))}


# means and their intervals

ROUNDS, ENDS = 1000, (0.025, 0.975)  # of resampling; 95 %
Values = Sequence[float] | np.ndarray  # (N,) of every set, or (S, N) of S trainings; NaN where a set cannot tell
Interval = tuple[float, float, float]  # mean, lower and upper end
Figures = dict[str, list[float]]  # name -> a value of every set


def interval(values: Values) -> Interval:
    """Mean and 95 % interval of a figure: Wilson's of a rate (all values 0 or 1), else bootstrapped.

    What is alike in all sets counts as a rate. Trainings are resampled beside sets, and a rate spans both intervals.
    """
    return _interval(np.atleast_2d(np.asarray(values, dtype=float)), (0, 1), wilson)


def difference(values: Values, others: Values) -> Interval:
    """Mean and 95 % interval of values minus others, paired by set, and by training as far as both have several.

    Of rates it is Bonett and Price's.
    """
    values, others = (np.atleast_2d(np.asarray(figure, dtype=float)) for figure in (values, others))
    both = min(len(values), len(others))
    if both > 1:
        values, others = values[:both], others[:both]
    return _interval(values - others, (-1, 0, 1), bonett_price)


def above_chance(own: Values, none: Values, ceiling: Values) -> Interval | None:
    """Which share of what can be added to chance is added, and its 95 % interval: (own - none) / (ceiling - none).

    none: the figure of the same sets by chance, such as without references
    ceiling: that of true pictures
    Returns None where the ceiling is not ROOM above chance
    """
    mine, chance, most = _means(own, none, ceiling)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(most > chance, (mine - chance) / (most - chance), np.nan)
    if not most[0] - chance[0] >= ROOM:
        return None
    low, high = np.nanquantile(shares[1:], ENDS)
    if _is_discrete(np.asarray(own, dtype=float), (0, 1)):  # no resampling of sets that are all right has a wrong one
        ends = [(end - chance[0]) / (most[0] - chance[0]) for end in interval(own)[1:]]
        low, high = min(low, ends[0]), max(high, ends[1])
    return float(shares[0]), float(low), float(high)


def _interval(values: np.ndarray, steps: tuple[int, ...], closed: Callable[[np.ndarray], Sequence[float]]) -> Interval:
    """The mean, the least lower end and the greatest upper one of the intervals that suit the values (S, N).

    steps: what values are of which a formula knows more than resampling
    closed: that formula, of the means of sets
    """
    of_sets = _average(values, 0)
    of_sets = of_sets[~np.isnan(of_sets)]
    if not of_sets.size:
        return (np.nan,) * 3
    mean, *drawn = _means(values)[0]
    discrete = _is_discrete(values, steps)
    ends = [closed(of_sets)] if discrete else []
    if len(values) > 1 or not discrete:
        ends.append(np.nanquantile(drawn, ENDS))
    lows, highs = zip(*ends, strict=True)
    return float(mean), float(min(lows)), float(max(highs))


def _is_discrete(values: np.ndarray, steps: tuple[int, ...]) -> bool:
    """Whether there are only these steps among the values, or a single value between the first and the last."""
    values = values[~np.isnan(values)]
    alike = np.ptp(values) < 1e-9 and steps[0] <= values[0] <= steps[-1]
    return bool(alike or np.isin(values, steps).all())


def _means(*figures: Values) -> np.ndarray:
    """Means of figures of the same sets, and those of ROUNDS resamplings: (figures, 1 + ROUNDS).

    Sets and trainings are drawn, the same ones for all figures. Of S trainings S - 1 are drawn: the mean of S drawn
    ones would have only (S - 1) / S of the variance that the mean of S trainings has.
    """
    wide = [np.atleast_2d(np.asarray(figure, dtype=float)) for figure in figures]
    values = np.stack(np.broadcast_arrays(*wide))  # (figures, S, N)
    rng, (trainings, sets) = np.random.default_rng(0), values.shape[1:]
    drawn_sets = rng.integers(sets, size=(ROUNDS, 1, sets))
    drawn_trainings = rng.integers(trainings, size=(ROUNDS, max(1, trainings - 1), 1))
    drawn = _average(values[:, drawn_trainings, drawn_sets], (2, 3))
    return np.concatenate((_average(values, (1, 2))[:, None], drawn), axis=1)


def _average(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """The mean of what is not NaN, and NaN where nothing is."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0).sum(axis) / there.sum(axis)


# tables


def row(name: str, values: Sequence[float], bar: float | None = None, ceiling: float | None = None) -> str:
    """One row of a table; the ceiling is what the reader says of true panels after the autoencoder."""
    mean, low, high = interval(values)
    cells = [name, f"{mean:.1%}", f"{low:.1%} to {high:.1%}", "" if ceiling is None else f"{ceiling:.1%}"]
    cells += ("", "") if bar is None else (f"{bar:.0%}", verdict(mean, bar)[1])
    return "| " + " | ".join(cells) + " |"


def verdict(mean: float, bar: float, most: bool = False) -> tuple[str, str]:
    """A bar in words, and whether a mean reaches it; most: it is one to stay below."""
    reached = mean <= bar if most else mean >= bar
    return f"at {'most' if most else 'least'} {bar:.0%}", "reached" if reached else "**missed**"


def line(first: str, second: str, found: Sequence, *last: str, sign: str = "") -> str:
    """One line of a table: means and their intervals, in percent; None leaves a cell empty."""
    cells = ["" if one is None else percent(one, sign) for one in found]
    return "| " + " | ".join((first, second, *cells, *(last or ("",)))) + " |"


def percent(found: Interval, sign: str = "") -> str:
    """A mean and its interval in percent; nothing if nothing was told."""
    return "" if np.isnan(found[0]) else "{} ({} to {})".format(*(f"{100 * value:{sign}.1f}" for value in found))


HEAD = ["| figure | reached | 95 % interval | ceiling | bar | |", "|---|---|---|---|---|---|"]


def per_set(readings: list[list[Reading]], sets: Sequence, score: Callable[[Reading, Panel], float]) -> list[float]:
    """The mean score of each set's panels."""
    return [
        float(np.mean([score(r, p) for r, p in zip(found, panels, strict=True)]))
        for found, panels in zip(readings, sets, strict=True)
    ]


# what is scored in sets from text, by the number of subjects


def unmixed(reading: Reading, panel: Panel) -> bool:
    return all(named_right(reading, one.subject, ("shape", "colour")) for one in panel.placed)


TEXT_SCORES: dict[int, dict[str, Callable[[Reading, Panel], float]]] = {
    1: {
        "colour and shape": lambda r, p: named_right(r, p.placed[0].subject, ("shape", "colour")),
        "pattern": lambda r, p: named_right(r, p.placed[0].subject, ("shape", "pattern")),
        "accessory": lambda r, p: named_right(r, p.placed[0].subject, ("shape", "accessory")),
        "scene": lambda r, p: r.scene == p.scene,
        "position": position_right,
    },
    2: {"colours unmixed": unmixed, "scene": lambda r, p: r.scene == p.scene, "position": position_right},
}  # fmt: skip
