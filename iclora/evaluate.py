"""Score the pictures of a list of requests, of one system or of several beside each other:

python -m iclora.evaluate --jobs YOURS.json --made out/ours out/theirs

DINO, CLIP-I and CLIP-T are cosines of features, of a picture with its references and with its prompt, as UNO reports
them; of several subjects the mean, and whether each is told from the others. Of sets, how alike their panels are.

Letters: P panels, V views of a subject, D width of features.
"""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from model.checkpoint import read_json, write_atomic
from model.weights import find_model
from sampling.images import open_picture, picture_size

from .backbones import CLIP, DINO, SHAPE, UNO, Backbone
from .cli import guard, note, parse, plain, read_jobs
from .config import DEVICES, SampleConfig, check, choose_grid, model_defaults, option
from .intervals import bonett_price, wilson
from .layout import parse_grid
from .plan import pick_device
from .prompts import TASKS, clean, lint, texts_of
from .records import PICTURES

Values = dict[str, list[float | None]]  # by score, a value an item; None where it has no such score
Systems = Mapping[str, list[list[Path]]]  # by system, for every item, the pictures made of it
Eyes = tuple[Backbone, Backbone]  # DINO, CLIP
Features = tuple[Tensor, Tensor]  # of a subject's views, DINO's and CLIP's, (V, D)
Interval = tuple[float, float, float]  # mean, lower and upper end
NAME = re.compile(r"([0-9]{1,9})(?:_([0-9]{1,9}))?")
OURS = re.compile(r"[0-9]+-(?:panel-[0-9]+|sheet)")  # lies beside what sample.py makes
APART = "told apart"
GOALS = {  # of UNO's release, arXiv:2504.02160 tables 1 and 2: by the number of references
    1: {"DINO": 0.760, "CLIP-I": 0.835, "CLIP-T": 0.304},
    2: {"DINO": 0.542, "CLIP-I": 0.733, "CLIP-T": 0.322},
}
ROUNDS = 1000  # of resampling


@dataclass(frozen=True)
class EvaluateConfig:
    """What evaluate is asked for. Errors: ValueError for an unknown choice, or if a list or pictures are missing"""

    jobs: str | None = option(None, "the requests, as sample.py's --jobs", metavar="LIST", path=True)
    made: tuple[str, ...] = option((), "folders of pictures made of them, a system each", metavar="DIR", path=True)
    num: int = option(1, "pictures of each request, as sample.py's --num", valid=(1, 10_000))
    views: str = option("given", "folder: a subject is all pictures beside its reference", choices=("given", "folder"))
    dino: str | None = option(
        None, "folder of DINO or DINOv2, in transformers' form (default: the tiny one)", metavar="DIR", path=True
    )
    clip: str | None = option(None, "folder of CLIP, likewise", metavar="DIR", path=True)
    resize: str = option(
        "own", "how DINO gets pictures: as its folder says, or as UNO's script does it", choices=("own", "uno")
    )
    device: str = option("auto", "auto is cuda if there is one, else mps, else cpu", choices=DEVICES)
    out: str | None = option(None, "also write every value to this file", metavar="FILE.json", path=True)

    def __post_init__(self) -> None:
        check(self)
        if self.jobs is None or not self.made:
            raise ValueError("name a list with --jobs, and with --made folders of the pictures made of it")
        if missing := [name for name in self.made if not Path(name).is_dir()]:
            raise ValueError(f"--made {missing[0]!a:.80} is no folder; name one with pictures")
        if len(set(map(os.path.realpath, self.made))) < len(self.made):
            raise ValueError("--made names a folder twice; name each once")
        if self.out is not None and (os.path.lexists(self.out) or not Path(self.out).parent.is_dir()):
            problem = "exists and is not overwritten" if os.path.lexists(self.out) else "has no folder to lie in"
            raise ValueError(f"--out {self.out[-80:]!a} {problem}; choose another name")


# requests, and which picture belongs to which


@dataclass(frozen=True)
class Item:
    """A request to be scored.

    prompt: as it is recorded beside a picture; None if it is put together from several texts
    texts: what each panel is to show
    subjects: the pictures of each
    num: pictures made of it
    """

    source: str
    prompt: str | None
    texts: tuple[str, ...]
    grid: tuple[int, int]
    subjects: tuple[tuple[Path, ...], ...]
    num: int


def read_items(config: EvaluateConfig) -> list[Item]:
    """Read what the requests of a list ask for. Errors: ValueError naming the line or item"""
    items = []
    for source, request in read_jobs(SampleConfig(jobs=config.jobs, num=config.num)).items():
        prompt, task = request.prompt, TASKS.get(request.preset)
        try:
            grid = parse_grid(choose_grid(request, task))
            texts = request.panel_prompt
            if not texts:
                if problems := ["there is no prompt"] if prompt is None else lint(prompt, *grid):
                    raise ValueError(f"{problems[0]}; correct the list")
                texts = texts_of(prompt, *grid, "panel")[1:]
            if len(texts) != grid[0] * grid[1]:
                raise ValueError(f"{len(texts)} texts for {grid[0] * grid[1]} panels; correct the list")
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        subjects = [(Path(name),) for name in request.ref]
        if config.views == "folder":
            subjects = [tuple(sorted(p for p in s.parent.iterdir() if _is_picture(p))) for (s,) in subjects]
        recorded = None if request.panel_prompt or task else clean(prompt)
        items.append(Item(source, recorded, tuple(texts), grid, tuple(subjects), request.num))
    return items


def match_pictures(folder: Path, items: Sequence[Item]) -> list[list[Path]]:
    """Find the pictures of each item by the number in their names, and refuse a folder that lacks or has others.

    0007.png is the seventh picture of the list, counted from 1 through all items, as sample.py names them in a new
    folder; 6_0.png is the first of the seventh item, both counted from 0, as UNO's inference.py names them.
    Errors: ValueError naming the picture
    """
    places = [(item, number) for item, entry in enumerate(items) for number in range(entry.num)]
    by_count, known = dict(enumerate(places, 1)), set(places)
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(p for p in folder.iterdir() if _is_picture(p) and not OURS.fullmatch(p.stem)):
        match = NAME.fullmatch(path.stem)
        if not match:
            raise ValueError(f"{path} has no number, so it belongs to no item; name it as 0001.png or 0_0.png")
        number, second = match.groups()
        place = (int(number), int(second)) if second else by_count.get(int(number))
        if place not in known or place in found:
            problem = f"stands for the same as {found[place].name}" if place in found else "belongs to no item"
            names = f"0001.png to {len(places):04d}.png, or 0_0.png to {'_'.join(map(str, places[-1]))}.png"
            raise ValueError(f"{path} {problem}; the list's {len(places)} pictures are called {names} (see --num)")
        found[place] = path
    if missing := [place for place in places if place not in found]:
        item, number = missing[0]
        name = f"{places.index(missing[0]) + 1:04d}.png or {item}_{number}.png"
        raise ValueError(f"{folder} lacks {name} of {items[item].source} ({len(missing)} of {len(places)} pictures)")
    return [[found[item, number] for number in range(entry.num)] for item, entry in enumerate(items)]


def cut(picture: Image.Image, grid: tuple[int, int]) -> list[Image.Image]:
    """Cut a composite into its panels, in reading order."""
    wide, high = picture.width // grid[1], picture.height // grid[0]
    corners = [(x * wide, y * high) for y in range(grid[0]) for x in range(grid[1])]
    return [picture.crop((x, y, x + wide, y + high)) for x, y in corners]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and not path.name.startswith(".")


# scores


def pairwise(features: Tensor) -> float:
    """Return the mean cosine of all pairs of features (P, D)."""
    return float(np.mean([float(features[i] @ features[j]) for i, j in combinations(range(len(features)), 2)]))


def margins(alike: Tensor) -> Tensor:
    """Say how far every subject is from being taken for another; below 0 it is nowhere more alike than the others.

    alike: (subjects, windows) cosines; the place of a subject is the window that is most alike
    Returns (subjects,), the cosine of each in its place, less the highest that it has in another's place or another
        has in its own
    """
    best = alike[:, alike.argmax(dim=1)]  # (subjects, whose place)
    wrong = best.masked_fill(torch.eye(len(best), dtype=torch.bool), -2)
    return best.diagonal() - torch.maximum(wrong.amax(dim=0), wrong.amax(dim=1))


def score(panels: Sequence[Image.Image], texts: Tensor, subjects: Sequence[Features], eyes: Eyes) -> dict[str, float]:
    """Score one picture.

    texts: (P, D) what each panel is to show
    subjects: the views of each
    Returns its scores by name
    """
    dino, clip = eyes
    seen, known = dino.see(panels), clip.see(panels)  # (P, D)
    scores = {}
    if subjects:
        scores["DINO"] = float(np.mean([float((seen @ views.T).mean()) for views, _ in subjects]))
        scores["CLIP-I"] = float(np.mean([float((known @ views.T).mean()) for _, views in subjects]))
    scores["CLIP-T"] = float((known * texts).sum(dim=1).mean())
    if len(subjects) > 1:
        parts = dino.see([window for panel in panels for window in cut_windows(panel)])  # (windows, D)
        margin = float(margins(torch.stack([(parts @ views.T).mean(dim=1) for views, _ in subjects])).min())
        scores |= {"margin": margin, APART: float(margin > 0)}
    if len(panels) > 1:
        scores |= {"panels, DINO": pairwise(seen), "panels, CLIP-I": pairwise(known)}
    return scores


def cut_windows(picture: Image.Image) -> list[Image.Image]:
    """Cut the places where subjects are sought: nine overlapping quarters of a picture."""
    wide, high = picture.size
    corners = [(x * wide // 4, y * high // 4) for y in range(3) for x in range(3)]
    return [picture.crop((x, y, x + wide // 2, y + high // 2)) for x, y in corners]


def score_all(items: Sequence[Item], systems: Systems, eyes: Eyes) -> dict[str, Values]:
    """Score the pictures of every system. Returns for each, by score, a value an item: the mean of its pictures"""
    names = dict.fromkeys(path for item in items for views in item.subjects for path in views)
    known = {path: tuple(eye.see([open_picture(path)]) for eye in eyes) for path in tqdm(names, disable=None)}
    values: dict[str, Values] = {system: {} for system in systems}
    for number, item in enumerate(tqdm(items, unit="item", disable=None)):
        texts = eyes[1].read(item.texts)
        subjects = [
            tuple(map(torch.cat, zip(*(known[path] for path in views), strict=True))) for views in item.subjects
        ]
        for system, pictures in systems.items():
            scores = [score(cut(open_picture(path), item.grid), texts, subjects, eyes) for path in pictures[number]]
            for name in scores[0]:
                mean = float(np.mean([found[name] for found in scores]))
                values[system].setdefault(name, [None] * len(items))[number] = mean
    return values


# means, and the table


def by_subject(items: Sequence[Item], values: Mapping[str, Values]) -> dict[str, Values]:
    """Average what is of the same subjects, as prompts of one subject do not tell as much as other subjects would."""
    groups: dict[object, list[int]] = {}
    for number, item in enumerate(items):
        groups.setdefault(item.subjects or number, []).append(number)  # sets have none, and count each
    means: dict[str, Values] = {system: {} for system in values}
    for system, scores in values.items():
        for name, figures in scores.items():
            found = [[figures[n] for n in group if figures[n] is not None] for group in groups.values()]
            means[system][name] = [float(np.mean(group)) if group else None for group in found]
    return means


def interval(values: Sequence[float], rate: bool = True) -> Interval:
    """Return the mean and its 95 % interval, bootstrapped; of a rate, where all are 0 or 1, it is Wilson's."""
    values = np.asarray(values, dtype=float)
    if rate and {*values} <= {0, 1}:
        return float(values.mean()), *wilson(values)
    drawn = np.random.default_rng(0).integers(len(values), size=(ROUNDS, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def difference(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Return the mean of values less others, paired, and its 95 % interval; Bonett and Price's where all are 0 or 1."""
    less = np.subtract(values, others)
    rates = {*values, *others} <= {0, 1}
    return (float(less.mean()), *bonett_price(less)) if rates else interval(less, rate=False)


def summarise(values: Mapping[str, Values]) -> dict[str, dict[str, Interval]]:
    """Return mean and interval by score: of every system, and of the first less each other."""
    first, *others = values
    table: dict[str, dict[str, Interval]] = {}
    for name in values[first]:
        of = {system: [value for value in scores[name] if value is not None] for system, scores in values.items()}
        table[name] = {system: interval(figures) for system, figures in of.items()}
        table[name] |= {f"{first} - {other}": difference(of[first], of[other]) for other in others}
    return table


def unlike_uno(items: Sequence[Item], dino: Backbone, clip: Backbone) -> list[str]:
    """Say what differs from how UNO's figures were measured; nothing if they may be compared."""
    references, nums = {len(item.subjects) for item in items}, {item.num for item in items}
    vit = ["vit", 384, 12, 16]
    differences = {
        "DINO is not ViT-S/16, facebook/dino-vits16": [dino.about[n] for n in ("model", *SHAPE)] != vit,
        "its pictures are not resized to 256 and cut to 224 (--resize uno)": any(dino.about[n] != UNO[n] for n in UNO),
        "CLIP is not ViT-B/32": [clip.about[n] for n in SHAPE] != [768, 12, 32],
        "the list has not DreamBench's 750 items": len(items) != 750 or references not in ({1}, {2}),
        "pairs have not six pictures each (--num 6)": references == {2} and nums != {6},
    }
    return [text for text, differs in differences.items() if differs]


def as_table(table: Mapping[str, Mapping[str, Interval]], goals: Mapping[str, float]) -> list[str]:
    """Write a table, a line a score, with UNO's figures if there are any."""
    columns = list(next(iter(table.values())))
    rows = [["score", *columns, "UNO's release"], ["---"] * (len(columns) + 2)]
    for name, cells in table.items():
        figures = ["{:.3f} ({:.3f} to {:.3f})".format(*cells[column]) for column in columns]
        rows.append([name, *figures, f"{goals[name]:.3f}" if name in goals else ""])
    return ["| " + " | ".join(row if goals else row[:-1]) + " |" for row in rows]


def check_pictures(items: Sequence[Item], systems: Systems) -> None:
    """Refuse pictures that are missing, of another prompt or of no such grid. Errors: ValueError naming one"""
    for path in dict.fromkeys(path for item in items for views in item.subjects for path in views):
        picture_size(path)
    for pictures in systems.values():
        for item, paths in zip(items, pictures, strict=True):
            for path in paths:
                (wide, high), (rows, cols) = picture_size(path), item.grid
                if wide % cols or high % rows:
                    raise ValueError(f"{path} of {wide}x{high} pixels is no {rows}x{cols} grid of {item.source}")
                record = path.with_suffix(".json")
                recorded = read_json(record).get("config") if record.is_file() else None  # sample.py's
                if item.prompt and isinstance(recorded, dict) and recorded.get("prompt") != item.prompt:
                    raise ValueError(f"{path} was made from another prompt than {item.source}; give the list it is of")


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return the exit status: 0 done, 2 a mistake (one line on stderr), 130 interrupted."""
    return guard(lambda: run(parse(EvaluateConfig, argv, __doc__, "python -m iclora.evaluate")))


def run(config: EvaluateConfig) -> None:
    """Check everything, then score all pictures and write the table."""
    items = read_items(config)
    systems = {name: match_pictures(Path(name), items) for name in config.made}
    check_pictures(items, systems)
    tiny = find_model("tiny")
    device = pick_device(config.device, model_defaults(tiny.flux.config), note)
    preprocessing = UNO if config.resize == "uno" else None
    dino = Backbone(Path(config.dino or tiny.root / "dinov2"), DINO, device, preprocessing)
    clip = Backbone(Path(config.clip or tiny.root / "clip"), CLIP, device)
    lengths = map(len, clip.tokenizer([text for item in items for text in item.texts]).input_ids)
    if long := sum(length > clip.tokenizer.model_max_length for length in lengths):
        note(f"{long} texts are longer than the {clip.tokenizer.model_max_length} tokens that CLIP reads")
    values = score_all(items, systems, (dino, clip))
    means = by_subject(items, values)
    table, unlike = summarise(means), unlike_uno(items, dino, clip)
    counts = {len(item.subjects) for item in items}
    goals = GOALS.get(counts.pop(), {}) if len(counts) == 1 else {}
    lines = [*as_table(table, goals), "", f"DINO: {dino.describe()}", f"CLIP: {clip.describe()}"]
    count = len(next(iter(means[config.made[0]].values())))
    lines.append(f"{len(items)} requests; means and 95 % intervals are over {count} subjects or sets")
    if goals and unlike:
        lines.append(f"UNO's release was measured otherwise: {'; '.join(unlike)}")
    sys.stdout.write("".join(f"{plain(line)}\n" for line in lines))
    if config.out:
        content = {"config": asdict(config), "table": table, "goals": goals, "unlike UNO": unlike, "values": values}
        content |= {"DINO": dino.about, "CLIP": clip.about, "items": [asdict(item) for item in items]}
        write_atomic(Path(config.out), json.dumps(content, indent=1, default=str) + "\n", overwrite=False)


if __name__ == "__main__":
    sys.exit(main())
