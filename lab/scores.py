"""Scores of panels as the reader sees them, and tables of them with bootstrap intervals."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .sets import PANEL, composite
from .truth import SHOWN, Reader, Reading, Seen, read, same_hidden, same_traits
from .world import Panel, Subject

ALL = "all traits"


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


# tables


def interval(values: Sequence[float], rounds: int = 1000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval; a value is the mean of one set."""
    values = np.asarray(values, dtype=float)
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(rounds, len(values)))].mean(axis=1)
    return float(values.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def ratio(values: Sequence[float], most: Sequence[float], rounds: int = 1000) -> tuple[float, float, float]:
    """Mean of values over the mean of the most that the same sets allow, and its 95 % bootstrap interval."""
    both = np.asarray([values, most], dtype=float)
    picks = np.random.default_rng(0).integers(both.shape[1], size=(rounds, both.shape[1]))
    means = np.concatenate((both.mean(axis=1)[:, None], both[:, picks].mean(axis=2)), axis=1)  # (2, 1 + rounds)
    shares = means[0] / np.where(means[1] > 0, means[1], np.nan)
    return float(shares[0]), float(np.nanquantile(shares[1:], 0.025)), float(np.nanquantile(shares[1:], 0.975))


def above_chance(own, none, ceiling, rounds: int = 1000):
    """Stand-in until the branch that has it is merged."""
    all_ = np.asarray([own, none, ceiling], dtype=float)
    picks = np.random.default_rng(0).integers(all_.shape[1], size=(rounds, all_.shape[1]))
    m = np.concatenate((all_.mean(axis=1)[:, None], all_[:, picks].mean(axis=2)), axis=1)
    if m[2, 0] <= m[1, 0]:
        return None
    shares = (m[0] - m[1]) / np.where(m[2] > m[1], m[2] - m[1], np.nan)
    return float(shares[0]), float(np.nanquantile(shares[1:], 0.025)), float(np.nanquantile(shares[1:], 0.975))


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
    cells = ["" if one is None else "{} ({} to {})".format(*(f"{100 * v:{sign}.1f}" for v in one)) for one in found]
    return "| " + " | ".join((first, second, *cells, *(last or ("",)))) + " |"


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
