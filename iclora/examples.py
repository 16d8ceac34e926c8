"""Data sets: drafts -> examples, each a set of panels with one joint caption -> buckets of one shape -> batches."""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sampling.images import fit, open_picture
from sampling.latents import TOKEN

from .forms import SETTINGS, Draft, Findings, read_drafts
from .layout import Layout
from .prompts import build, clean, lint, markers_for
from .references import fitted

WRITE_GRID = f'give --grid, or write {SETTINGS} into the folder of --data, such as {{"grid": "2x1"}}'


@dataclass(frozen=True)
class Example:
    """One set to learn from. A pair of UNO's is a set of one panel, the target, with reference pictures.

    name: for messages
    grid: (rows, cols)
    files: one composite, or the panels in reading order
    sizes: (width, height) of each file in pixels
    sha256: of each file's pixels
    references, reference_sizes, reference_sha256: the same of its reference pictures
    """

    name: str
    grid: tuple[int, int]
    caption: str
    files: tuple[Path, ...]
    sizes: tuple[tuple[int, int], ...]
    sha256: tuple[str, ...]
    references: tuple[Path, ...] = ()
    reference_sizes: tuple[tuple[int, int], ...] = ()
    reference_sha256: tuple[str, ...] = ()

    def panel_sizes(self) -> list[tuple[float, float]]:
        """Gives width and height of each panel in pixels; those of a composite may be fractions."""
        if len(self.files) > 1:
            return list(self.sizes)
        (width, height), (rows, cols) = self.sizes[0], self.grid
        return [(width / cols, height / rows)] * (rows * cols)


def find_examples(
    folder: str | Path, grid: tuple[int, int] | None = None, note: Callable[[str], None] = lambda line: None
) -> list[Example]:
    """Reads a data set, and refuses it if any of it cannot be used: nothing is dropped silently.

    folder: of all sets, or one .jsonl file of them, or one .json file of pairs
    grid: (rows, cols) for everything, whatever the files say
    note: is told, in one line, of what is doubtful
    Errors: ValueError for anything broken, or if there are no sets
    """
    examples, found = look(folder, grid)
    check = f"`python -m iclora.data {folder}` lists everything"
    if found.broken:
        more = f" (the first of {len(found.broken)} things that are broken)" if len(found.broken) > 1 else ""
        raise ValueError(f"{found.broken[0]}{more}; {check}")
    if not examples:
        raise ValueError(f"{folder} holds no sets, only other files; it takes pictures with captions. {check}")
    if found.notes:
        note(f"{found.notes[0]} (note 1 of {len(found.notes)}); {check}")
    return examples


def look(folder: str | Path, grid: tuple[int, int] | None = None) -> tuple[list[Example], Findings]:
    """Reads a data set: what is usable, and what is broken or doubtful. Every picture is decoded once.

    grid: as for find_examples
    Errors: ValueError if there is no such folder
    """
    root = Path(folder)
    file = root.suffix.lower() in (".jsonl", ".json") and os.path.isfile(root)
    if not file and not os.path.isdir(root):  # False where Path.is_dir raises: a name too long
        shown, what = ascii(str(root)[-80:]), "file" if root.suffix.lower() in (".jsonl", ".json") else "folder"
        problem = f"{shown} is no folder" if os.path.exists(root) else f"there is no {what} {shown}"
        raise ValueError(f"{problem}; --data takes one with pictures and captions, a .jsonl, or a .json of pairs")
    found = Findings()
    examples = [example for draft in read_drafts(root, grid, found) if (example := _finish(draft, found))]
    _note_duplicates(examples, found)
    return examples, found


def read_panels(example: Example, layout: Layout, rule: str = "crop") -> list[Image.Image]:
    """Reads the panels of an example, each fitted by itself, so that its borders are those of the layout.

    rule: as for sampling.images.fit
    Errors: ValueError if a file cannot be read any more
    """
    pictures = [open_picture(path) for path in example.files]
    if len(pictures) == 1:
        pictures = _cut(pictures[0], *example.grid)
    return [fit(picture, layout.panel_width, layout.panel_height, rule) for picture in pictures]


def _cut(picture: Image.Image, rows: int, cols: int) -> list[Image.Image]:
    """Cuts a composite of any size along its grid; borders between pixels are rounded."""
    x = [round(picture.width * col / cols) for col in range(cols + 1)]
    y = [round(picture.height * row / rows) for row in range(rows + 1)]
    return [picture.crop((x[c], y[r], x[c + 1], y[r + 1])) for r in range(rows) for c in range(cols)]


# from examples to batches


def bucket_of(example: Example, resolution: int, long_sides: tuple[int, int] = (512, 320)) -> Layout:
    """Chooses the panel size for an example: its own aspect, in multiples of a token, and about the area asked for.

    Panels are never enlarged, but for rounding. Of panels of different shapes the middle is taken. References get the
    size that sampling gives them.

    resolution: pixels; a panel is to have about resolution x resolution of them, and at most a tenth more
    long_sides: pixels of the longer side of a single reference, and of each of several
    Errors: ValueError if the composite would be too large, or a reference is too narrow
    """
    sizes = example.panel_sizes()
    aspect = math.exp(sum(math.log(width / height) for width, height in sizes) / len(sizes))
    area = max(TOKEN, min(resolution, *(math.sqrt(width * height) for width, height in sizes))) ** 2
    best, least = (TOKEN, TOKEN), math.inf
    for width in range(TOKEN, TOKEN + int(math.sqrt(1.1 * area * aspect)) + 1, TOKEN):
        below = max(1, int(width / aspect / TOKEN)) * TOKEN
        for height in (below, below + TOKEN):
            cost = abs(math.log(width / height / aspect)) + abs(math.log(width * height / area)) / 2
            if width * height <= 1.1 * area and cost < least:
                best, least = (width, height), cost
    long_side = long_sides[len(example.references) > 1]
    shown = zip(example.references, example.reference_sizes, strict=True)
    return Layout(*example.grid, *best, tuple(fitted(size, long_side, path.name) for path, size in shown))


def cropped(example: Example, layout: Layout) -> float:
    """Says which share of the most cropped panel is cut off in its bucket: 0..1."""
    target = layout.panel_width / layout.panel_height
    return max(1 - math.exp(-abs(math.log(width / height / target))) for width, height in example.panel_sizes())


def refuse(line: str) -> None:
    """Ends it with the first broken example. Errors: ValueError with the line"""
    raise ValueError(line)


def buckets(
    examples: Sequence[Example], resolution: int, long_sides: tuple[int, int] = (512, 320),
    broken: Callable[[str], None] = refuse,
) -> dict[Layout, list[Example]]:  # fmt: skip
    """Sorts examples by grid, panel size, and number and sizes of references; a batch is formed within one bucket.

    resolution, long_sides: as for bucket_of
    broken: is told of examples that have no bucket, and why
    returns: in a fixed order, whatever the order of the examples' shapes
    """
    sorted_out: dict[Layout, list[Example]] = {}
    for example in examples:
        try:
            sorted_out.setdefault(bucket_of(example, resolution, long_sides), []).append(example)
        except ValueError as error:
            broken(f"{example.name}: {error}")
    return {layout: sorted_out[layout] for layout in sorted(sorted_out, key=astuple)}


class Batches:
    """An endless order of full batches, each from one bucket. Any of them can be asked for; nothing is remembered.

    A bucket is an endless row of shuffled passes over its examples, cut into batches: the last batch of a pass is
    filled up from the next one, so in the long run every example counts the same. Epoch k holds, in random order, the
    batches that begin in pass k of their bucket. Batches are always full, so that processes can share them evenly.

    sizes: examples in each bucket
    batch: examples in a batch, of all processes together
    Errors: ValueError if there is nothing to take from
    """

    def __init__(self, sizes: Sequence[int], batch: int, seed: int):
        if not sizes or min(sizes) < 1 or batch < 1:
            raise ValueError(f"batches of {batch} from buckets of {list(sizes)} examples are impossible; use 1 or more")
        self.sizes, self.batch, self.seed = tuple(sizes), batch, seed

    def before(self, epoch: int) -> int:
        """Counts the batches before an epoch."""
        return sum(self._first(bucket, epoch) for bucket in range(len(self.sizes)))

    def epoch_of(self, number: int) -> int:
        """Says in which epoch a batch is; both are numbered from 0."""
        epoch = number * self.batch // sum(self.sizes)
        while self.before(epoch) > number:
            epoch -= 1
        return epoch

    def __getitem__(self, number: int) -> tuple[int, list[int]]:
        """Gives a batch: the number of its bucket, and which examples of it.

        number: from 0, without end
        """
        epoch = self.epoch_of(number)
        order = [
            (bucket, index)
            for bucket in range(len(self.sizes))
            for index in range(self._first(bucket, epoch), self._first(bucket, epoch + 1))
        ]
        place = np.random.default_rng([self.seed, 0, epoch]).permutation(len(order))[number - self.before(epoch)]
        bucket, index = order[place]
        size = self.sizes[bucket]
        passes = {p // size for p in (index * self.batch, (index + 1) * self.batch - 1)}
        shuffled = {k: self._shuffled(bucket, k) for k in range(min(passes), max(passes) + 1)}
        places = range(index * self.batch, (index + 1) * self.batch)
        return bucket, [int(shuffled[p // size][p % size]) for p in places]

    def _first(self, bucket: int, epoch: int) -> int:
        """The first batch of a bucket that begins in a pass."""
        return -(-epoch * self.sizes[bucket] // self.batch)

    def _shuffled(self, bucket: int, number: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 1 + bucket, number]).permutation(self.sizes[bucket])


# from drafts to examples


def _finish(draft: Draft, found: Findings) -> Example | None:
    """Opens the pictures of a draft and joins its caption; None, and lines about it, if something is broken."""
    problems = []
    caption, measured, grid = "", [], draft.settings.grid
    try:
        grid = _settle_grid(draft)
        caption = _join(draft, grid)
    except ValueError as error:
        problems.append(str(error))
    for path in (*draft.files, *draft.references):
        try:
            measured.append(_measure(path))
        except ValueError as error:
            problems.append(f"{draft.name}: {error}" if draft.references else str(error))
    if problems:
        found.broken += [problem for problem in problems if problem not in found.broken]
        return None
    count = len(draft.files)
    (own, shown) = (tuple(zip(*some, strict=True)) or ((), ()) for some in (measured[:count], measured[count:]))
    example = Example(draft.name, grid, caption, draft.files, *own, draft.references, *shown)
    if any(min(size) < 1 for size in example.panel_sizes()):
        found.broken.append(f"{draft.name} has fewer pixels than its {grid[0]}x{grid[1]} grid has panels; correct it")
        return None
    found.notes += [f"{draft.name}: {finding}" for finding in lint(caption, *grid)]
    if not caption.startswith(draft.settings.tag):
        found.notes.append(f"{draft.name}: captions of its preset begin with {draft.settings.tag}; this one does not")
    return example


def _settle_grid(draft: Draft) -> tuple[int, int]:
    """Says which grid a draft has; a single panel needs none, for anything else a guess could be wrong silently."""
    grid, count = draft.settings.grid, len(draft.files)
    if grid is None and count == 1 and not draft.composite:
        return 1, 1
    if grid is None:
        what = f"composites in {draft.files[0].parent}" if draft.composite else f"sets of {count} panels"
        raise ValueError(f"nothing tells the grid of the {what}; {WRITE_GRID}")
    Layout(*grid, 16, 16)  # refuses absurd grids
    if not draft.composite and count != grid[0] * grid[1]:
        takes = f"{grid[0]}x{grid[1]} grid takes {grid[0] * grid[1]}"
        raise ValueError(f"{draft.name} has {count} panels, but its {takes}; add or remove panels, or correct the grid")
    return grid


def _join(draft: Draft, grid: tuple[int, int]) -> str:
    """Makes the one caption of a draft."""
    try:
        caption = clean(draft.prompt or "")
        if draft.prompt is None:
            markers = markers_for(draft.settings.markers, *grid)
            if empty := [str(number) for number, text in enumerate(draft.prompts, start=1) if not clean(text)]:
                raise ValueError(f"the text of panel {empty[0]} is empty; say what the panel shows")
            caption = build(draft.summary, draft.prompts, markers, draft.settings.tag)
    except ValueError as error:
        raise ValueError(f"{draft.name}: {error}") from None
    if not caption:
        raise ValueError(f"{draft.name} has an empty caption; describe the set, as it is learnt from its text")
    return caption


def _measure(path: Path) -> tuple[tuple[int, int], str]:
    """Decodes a picture: its size, and the sha256 of its pixels."""
    picture = open_picture(path)
    return picture.size, hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def _note_duplicates(examples: list[Example], found: Findings) -> None:
    """Notes examples with the pictures of an earlier one; they are used, but weigh double."""
    first: dict[tuple, Example] = {}
    for example in examples:
        other = first.setdefault((example.grid, example.sha256, example.reference_sha256), example)
        if other is not example:
            caption = "the same caption" if other.caption == example.caption else "another caption"
            found.notes.append(f"{example.name} shows the same as {other.name}, with {caption}; it counts double")
