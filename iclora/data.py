"""Data sets: records -> examples -> buckets of one shape; and their check, before a training:

python -m iclora.data sets/                                 what a training would use, what is doubtful, what broken
python -m iclora.data photos/ --grid 2x2 --panel-size 512   the same for other data; the folder comes first
python -m iclora.data pairs.json --model flux-dev           the same for UNO's pairs
"""

import hashlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from model.weights import ModelFiles, find_model
from sampling.images import fit, open_picture
from sampling.latents import TOKEN

from .buckets import composite_layouts, nearest_panel
from .cli import guard, parse, plain
from .config import IN_CONTEXT, METHODS, UNO, check, model_defaults, option
from .data_forms import SETTINGS, count_forms, count_sizes, name_doubles
from .layout import Layout, parse_grid
from .prompts import build, clean, has_markers, lint, markers_for
from .records import Findings, Grid, Note, Record, collect, read_records
from .references import reference_size

Size = tuple[int, int]  # width, height in pixels
Buckets = dict[Layout, list["Example"]]
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
    form: how it is written down
    """

    name: str
    grid: Grid
    caption: str
    files: tuple[Path, ...]
    sizes: tuple[Size, ...]
    sha256: tuple[str, ...]
    references: tuple[Path, ...] = ()
    reference_sizes: tuple[Size, ...] = ()
    reference_sha256: tuple[str, ...] = ()
    form: str = ""

    def panel_sizes(self) -> list[tuple[float, float]]:
        """Return width and height of each panel in pixels; those of a composite may be fractions."""
        if len(self.files) > 1:
            return list(self.sizes)
        (width, height), (rows, cols) = self.sizes[0], self.grid
        return [(width / cols, height / rows)] * (rows * cols)


def load(
    data: str | Path, grid: Grid | None = None, note: Note = lambda line: None, method: str | None = None
) -> list[Example]:
    """Read a data set, and refuse it if any of it cannot be used: nothing is dropped silently.

    data, grid, method: as for scan
    note: is told, in one line, of what is doubtful
    Errors: ValueError for anything broken, or if there are no sets
    """
    examples, findings = scan(data, grid, method)
    flags = f"{f' --method {method}' if method else ''}{f' --grid {grid[0]}x{grid[1]}' if grid else ''}"
    advice = f"`python -m iclora.data {data}{flags}` lists everything"
    if findings.broken:
        more = f" (the first of {count} things that are broken)" if (count := len(findings.broken)) > 1 else ""
        raise ValueError(f"{findings.broken[0]}{more}; {advice}")
    if not examples:
        raise ValueError(f"{data} holds no sets, only other files; it takes pictures with captions. {advice}")
    if findings.notes:
        note(f"{findings.notes[0]} (note 1 of {len(findings.notes)}); {advice}")
    return examples


def scan(data: str | Path, grid: Grid | None = None, method: str | None = None) -> tuple[list[Example], Findings]:
    """Read a data set: what is usable, and what is broken or doubtful. Every picture is decoded once.

    data: a folder of all sets, one .jsonl or .csv file of them, or one .json file of pairs
    grid: (rows, cols) for everything, whatever the files say
    method: that is to learn from it, if any; to In-Context LoRA, control pictures are the first panels of a set
    Errors: ValueError if there is no such folder, or it is for another method
    """
    root, quoted = Path(data), ascii(str(data)[-80:])
    kind = "file" if root.suffix.lower() in (".jsonl", ".json", ".csv") else "folder"
    if not os.path.isdir(root) and not (kind == "file" and os.path.isfile(root)):  # Path's raise for too long names
        problem = f"{quoted} is no folder" if os.path.exists(root) else f"there is no {kind} {quoted}"
        raise ValueError(f"{problem}; --data takes one with pictures and captions, a .jsonl, or a .json of pairs")
    if method == IN_CONTEXT and root.suffix.lower() == ".json":
        raise ValueError(f"--data {quoted} is not for --method {method}, which takes sets; pairs are for --method uno")
    findings, examples = Findings(), []
    records = read_records(root, grid, findings)
    for file, record in findings.bare.items():
        place = "beside" if record.composite else "into"
        findings.broken.append(f"{record.name} has no caption; write {file.name} {place} it")
    if method == UNO and records and not any(record.references for record in records):
        takes = (
            f"a .json of pairs or control pictures; {records[0].name} and all else has no references: add image_path"
        )
        raise ValueError(f"--data {quoted} is not for --method {method}, which takes {takes}")
    with tqdm(records, "reading sets", leave=False, disable=None) as bar:
        for record in bar:
            examples += _open(record, findings, method)
    findings.broken = list(dict.fromkeys(findings.broken))
    bare = [example.name for example in examples if not example.references]
    if 0 < len(bare) < len(examples):
        findings.notes.append(f"{len(bare)} of {len(examples)} sets have no references, to learn from text ({bare[0]})")
    findings.notes += name_doubles((e.name, e.caption, (e.grid, e.sha256, e.reference_sha256)) for e in examples)
    return examples, findings


def read_panels(example: Example, layout: Layout, rule: str = "crop") -> list[Image.Image]:
    """Read the panels of an example, each fitted by itself, so that its borders are those of the layout.

    rule: as for sampling.images.fit
    Errors: ValueError if a file cannot be read any more
    """
    pictures = [open_picture(path) for path in example.files]
    if len(pictures) == 1:  # cut along the grid, between whole pixels
        (picture,), (rows, cols) = pictures, example.grid
        x = [round(picture.width * col / cols) for col in range(cols + 1)]
        y = [round(picture.height * row / rows) for row in range(rows + 1)]
        pictures = [picture.crop((x[c], y[r], x[c + 1], y[r + 1])) for r in range(rows) for c in range(cols)]
    return [fit(picture, layout.panel_width, layout.panel_height, rule) for picture in pictures]


# from records to examples


def _open(record: Record, findings: Findings, method: str | None) -> list[Example]:
    """Open the pictures of a record and make its caption; nothing, and lines about it, if something is broken."""
    problems: list[str] = []
    record = record.as_set() if (joined := method == IN_CONTEXT and bool(record.references)) else record
    with collect(problems):
        grid = _choose_grid(record, method)
        caption = _make_caption(record, grid)
    pictures = []
    for path in (*record.files, *record.references):
        with collect(problems, f"{record.name}: " if record.references else ""):
            picture = open_picture(path)
            pictures.append((picture.size, hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()))
    if problems:
        findings.broken += problems
        return []
    (sizes, sha256), count = zip(*pictures, strict=True), len(record.files)
    references = record.references, sizes[count:], sha256[count:], record.form
    example = Example(record.name, grid, caption, record.files, sizes[:count], sha256[:count], *references)
    if any(min(size) < 1 for size in example.panel_sizes()):
        shape = f"{grid[0]}x{grid[1]}"
        findings.broken.append(f"{record.name} has fewer pixels than its {shape} grid has panels; correct it")
        return []
    if has_markers(caption) or not joined:  # else it tells of the target alone
        notes = lint(caption, *grid, record.settings.markers, record.settings.tag)
        findings.notes += [f"{record.name}: {line}" for line in notes]
    return [example]


def _choose_grid(record: Record, method: str | None) -> Grid:
    """Say which grid a record has; a single panel needs none, for anything else a guess could be wrong silently."""
    grid, count = record.settings.grid, len(record.files)
    if record.references or grid is None and count == 1 and (method == UNO or not record.composite):
        grid = 1, 1
    if grid is None:
        what = f"composites in {record.files[0].parent}" if record.composite else f"sets of {count} panels"
        raise ValueError(f"nothing tells the grid of the {what}; {WRITE_GRID}")
    Layout(*grid, TOKEN, TOKEN)  # refuses absurd grids
    if method == UNO and grid != (1, 1):
        raise ValueError(f"{record.name} has a {grid[0]}x{grid[1]} grid, but --method uno learns single pictures")
    if not record.composite and count != math.prod(grid):
        takes = f"but its {grid[0]}x{grid[1]} grid takes {math.prod(grid)}"
        raise ValueError(f"{record.name} has {count} panels, {takes}; add or remove panels, or correct the grid")
    return grid


def _make_caption(record: Record, grid: Grid) -> str:
    """Make the one caption of a record."""
    try:
        caption = clean(record.caption or "")
        if record.caption is None:
            markers = markers_for(record.settings.markers, *grid)
            if empty := [number for number, text in enumerate(record.prompts, start=1) if not clean(text)]:
                raise ValueError(f"the text of panel {empty[0]} is empty; say what the panel shows")
            caption = build(record.summary, record.prompts, markers, record.settings.tag)
    except ValueError as error:
        raise ValueError(f"{record.name}: {error}") from None
    if not caption:
        raise ValueError(f"{record.name} has an empty caption; describe the set, as it is learnt from its text")
    return caption


# from examples to buckets


def bucket(
    examples: Sequence[Example], sizes: int | tuple[int, ...], long_sides: Size, broken: list[str] | None = None
) -> Buckets:
    """Sort examples by grid, panel size, and number and sizes of references; a batch is formed within one bucket.

    sizes: the resolution of choose_layout, or the sides of composite_layouts: an example is in several buckets then
    long_sides: as for choose_layout
    broken: gets a line for each example that has no bucket
    Returns the buckets in a fixed order, whatever the order of the examples' shapes
    Errors: ValueError for the first example that has none, without a list for such lines
    """
    buckets: Buckets = {}
    for example in examples:
        try:
            if isinstance(sizes, int):
                layouts = [choose_layout(example, sizes, long_sides)]
            else:
                layouts = composite_layouts(*example.grid, *_shape(example), sizes)
            for layout in layouts:
                buckets.setdefault(layout, []).append(example)
        except ValueError as error:
            if broken is None:
                raise ValueError(f"{example.name}: {error}") from None
            broken.append(f"{example.name}: {error}")
    return {layout: buckets[layout] for layout in sorted(buckets, key=astuple)}


def choose_layout(example: Example, resolution: int, long_sides: Size) -> Layout:
    """Choose the panel size for an example: its own aspect, in multiples of a token, and about the area asked for.

    Panels are never enlarged, but for rounding. Of panels of different shapes the middle is taken. References get the
    size that sampling gives them.

    resolution: pixels; a panel is to have about resolution x resolution of them, and at most a tenth more
    long_sides: two numbers, pixels of the longer side of a single reference, and of each of several
    Errors: ValueError if the composite would be too large, or a reference is too narrow
    """
    aspect, own = _shape(example)
    size = nearest_panel(aspect, max(TOKEN, min(resolution, math.sqrt(own))) ** 2)
    long_side = long_sides[len(example.references) > 1]
    references = zip(example.references, example.reference_sizes, strict=True)
    return Layout(*example.grid, *size, tuple(reference_size(size, long_side, path.name) for path, size in references))


def _shape(example: Example) -> tuple[float, float]:
    """Give the middle of the panels' aspects, width through height, and the area of the smallest in pixels."""
    sizes = example.panel_sizes()
    aspect = math.exp(sum(math.log(width / height) for width, height in sizes) / len(sizes))
    return aspect, min(width * height for width, height in sizes)


def share_cropped(example: Example, layout: Layout) -> float:
    """Return which share of the most cropped panel is cut off in a layout: 0..1."""
    target = layout.panel_width / layout.panel_height
    return max(1 - math.exp(-abs(math.log(width / height / target))) for width, height in example.panel_sizes())


# the check


@dataclass(frozen=True)
class DataConfig:
    """What the check is asked for."""

    data: str = option("sets", "folder with sets, a .jsonl that lists them, or a .json of pairs", metavar="PATH")
    grid: str | None = option(
        None, "of every set, 3x1 being three rows (default: what each set.json says)", metavar="ROWSxCOLS"
    )
    panel_size: int | None = option(
        None, "train at about so many pixels squared a panel (default: 512, for tiny 64)", valid=(16, 8192)
    )
    ref_size: int | None = option(None, "longer side of a reference in pixels, as train.py's", valid=(16, 2048))
    model: str = option("tiny", "the model that is to learn, for its text length", metavar="NAME|PATH")
    method: str | None = option(None, "that is to learn, as train.py's (default: what fits the data)", choices=METHODS)

    def __post_init__(self) -> None:
        check(self)


def main(argv: Sequence[str] | None = None) -> int:
    """Check a data set. Returns the exit status: 0 all usable, 2 anything broken or a mistake, 130 interrupted"""
    argv = sys.argv[1:] if argv is None else argv
    flags = ["--data", *argv] if argv and argv[0][:1] != "-" else argv
    return guard(lambda: run(parse(DataConfig, flags, __doc__, "python -m iclora.data [PATH]")))


def run(config: DataConfig) -> int:
    """Print the report. Returns 0 if all is usable, else 2"""
    lines, usable = report(config)
    sys.stdout.write("".join(f"{plain(line)}\n" for line in lines))
    return 0 if usable else 2


def report(config: DataConfig) -> tuple[list[str], bool]:
    """Say what a training would make of a data set, line by line, and whether all of it is usable.

    Errors: ValueError if the folder or the model is missing
    """
    files = find_model(config.model)
    defaults = model_defaults(files.flux.config)
    resolution = config.panel_size or defaults.panel
    examples, findings = scan(config.data, None if config.grid is None else parse_grid(config.grid), config.method)
    sizes = [size for example in examples for size in example.sizes]
    lines = [f"{config.data}: {len(examples)} sets in {len(sizes)} pictures of {count_sizes(sizes)}"]
    if sizes := [size for example in examples for size in example.reference_sizes]:
        lines.append(f"references: {len(sizes)} pictures of {count_sizes(sizes)}")
    buckets = bucket(examples, resolution, defaults.long_sides(config.ref_size), findings.broken)
    lines += count_forms((e.form, share_cropped(e, layout)) for layout, members in buckets.items() for e in members)
    lines += [_describe_bucket(layout, members) for layout, members in buckets.items()]
    pixels = f"{resolution}x{resolution}"
    if small := [e.name for e in examples if min(w * h for w, h in e.panel_sizes()) < 0.9 * resolution**2]:
        findings.notes.append(f"{len(small)} sets have panels of fewer pixels than {pixels} ({small[0]})")
    if examples:
        lines.append(_count_tokens(examples, files, defaults.text_length, findings.notes))
    lines += [f"note: {note}" for note in findings.notes] + [f"broken: {line}" for line in findings.broken]
    usable = bool(examples) and not findings.broken
    verdict = "usable" if usable else "not usable" if examples else "not usable, there are no sets"
    return [*lines, f"{verdict} (broken: {len(findings.broken)}, notes: {len(findings.notes)})"], usable


def _describe_bucket(layout: Layout, examples: Sequence[Example]) -> str:
    """Say what the examples of a bucket become."""
    panels = f"{layout.rows}x{layout.cols} panels of {layout.panel_width}x{layout.panel_height}"
    tokens = f"{layout.image_tokens} tokens"
    if layout.references:
        sizes = ", ".join(f"{width}x{height}" for width, height in layout.references)
        tokens += f", references of {sizes}, {layout.reference_tokens} tokens"
    share = max(share_cropped(example, layout) for example in examples)
    cropped = f", cropped by up to {share:.0%}" if share > 0.005 else ""
    return f"bucket: {panels}, {tokens}: {len(examples)} sets{cropped}"


def _count_tokens(examples: Sequence[Example], files: ModelFiles, limit: int | None, notes: list[str]) -> str:
    """Count the tokens of the captions with the model's T5 tokenizer; note lost ends and unknown words."""
    from transformers.models.t5.tokenization_t5 import T5Tokenizer  # takes seconds to import

    from model.text import load_tokenizer, unknown_words

    tokenizer = load_tokenizer(T5Tokenizer, files.t5_tokenizer)
    limit = limit or tokenizer.model_max_length
    lengths = [len(tokenizer(example.caption, verbose=False).input_ids) for example in examples]
    if count := sum(length > limit for length in lengths):
        longest = examples[lengths.index(max(lengths))].name
        more = f"; it is the longest of {count} that are too long" if count > 1 else ""
        notes.append(f"{longest}: T5 reads {limit} of the caption's {max(lengths)} tokens; shorten it{more}")
    if words := unknown_words(tokenizer, (example.caption for example in examples)):
        notes.append(f"{files.name} does not know {', '.join(words[:6])}; it learns nothing of what such words mean")
    return f"captions: {min(lengths)} to {max(lengths)} T5 tokens; {files.name} reads {limit}"


if __name__ == "__main__":
    sys.exit(main())
