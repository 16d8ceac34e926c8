"""Panel sets on disk, and the check of a data set:

python -m iclora.data sets/                                 what a training would use, what is doubtful, what broken
python -m iclora.data photos/ --grid 2x2 --panel-size 512   the same for other data; the folder comes first
python -m iclora.data pairs.json --model flux-dev           the same for UNO's pairs
"""

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from model.weights import ModelFiles, find_model, read_flux_config
from sampling.images import fit, open_picture

from .cli import complain, parse, plain
from .config import ModelRow, model_row
from .knobs import check, knob
from .layout import parse_grid
from .prompts import MAX_CHARACTERS, clean

if TYPE_CHECKING:  # they are made of what is here
    from .examples import Example

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class PanelSet:
    """Panel files in reading order and perhaps a joint caption.

    bundled: True for an example of the repository, False for what the user gave
    """

    paths: tuple[Path, ...] = ()
    caption: str | None = None
    bundled: bool = False


@dataclass(frozen=True)
class Source:
    """One panel or reference read from a file.

    picture: of its final size
    drafted: True if a masked panel starts from it, False if it is kept or a reference
    """

    path: Path
    sha256: str
    picture: Image.Image
    drafted: bool = False


def read_set(folder: Path) -> PanelSet:
    """Lists the pictures 1.png, 2.png, ... 10.png of a folder in the order of their numbers, and reads caption.txt.

    Errors: ValueError if the folder or the pictures are missing, a number stands twice, or the caption is no text
    """
    if not os.path.isdir(folder):  # False where Path.is_dir raises: a name too long
        raise ValueError(f"there is no folder {ascii(str(folder)[-80:])}; --set takes one with 1.png, 2.png, ...")
    if (folder / "set.json").exists() and not {"1", "caption", "summary"} & {path.stem for path in folder.iterdir()}:
        raise ValueError(f"{folder} holds many sets, for train.py; --set takes a folder with 1.png, 2.png, ... of one")
    numbered: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if re.fullmatch("[0-9]{1,4}", path.stem) and path.suffix.lower() in PICTURES:
            other = numbered.setdefault(int(path.stem), path)
            if other is not path:
                raise ValueError(f"{folder} holds {other.name} and {path.name}, the same number twice; remove one")
    if not numbered:
        raise ValueError(f"{folder} holds no pictures named 1.png, 2.png, ...; rename them, or list them with --panels")
    caption = folder / "caption.txt"
    text = read_text(caption) if caption.is_file() else None
    return PanelSet(tuple(numbered[number] for number in sorted(numbered)), text and clean(text))


def read_text(path: Path) -> str:
    """Reads a caption; of one that is too long, enough for clean to refuse it.

    Errors: ValueError in one line if it cannot be read or is no UTF-8
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "it is no file")  # a pipe would never end
        with open(path, encoding="utf-8-sig") as file:
            return file.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"cannot read {path}: {reason}; correct or remove it") from None


def read_source(path: Path, size: tuple[int, int], rule: str, drafted: bool) -> Source:
    """Reads one panel and fits it.

    size: width, height in pixels
    rule: as for sampling.images.fit
    Errors: ValueError in one line if it cannot be read
    """
    picture = fit(open_picture(path), *size, rule)
    return Source(path.absolute(), hashlib.sha256(path.read_bytes()).hexdigest(), picture, drafted)


# the check


@dataclass(frozen=True)
class DataConfig:
    """What the check is asked for."""

    data: str = knob("sets", "folder with sets, a .jsonl that lists them, or a .json of pairs", metavar="PATH")
    grid: str | None = knob(
        None, "of every set, 3x1 being three rows (default: what each set.json says)", metavar="ROWSxCOLS"
    )
    panel_size: int | None = knob(
        None, "train at about so many pixels squared a panel (default: 512, for tiny 64)", valid=(16, 8192)
    )
    ref_size: int | None = knob(None, "longer side of a reference in pixels, as train.py's", valid=(16, 2048))
    model: str = knob("tiny", "the model that is to learn, for its text length", metavar="NAME|PATH")

    def __post_init__(self) -> None:
        check(self)


def main(argv: Sequence[str] | None = None) -> int:
    """Checks a data set and returns the exit status: 0 if all of it is usable, 2 if anything is broken."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        flags = ["--data", *argv] if argv and argv[0][:1] != "-" else argv
        config = parse(DataConfig, flags, __doc__, "python -m iclora.data [PATH]")
        lines, usable = report(config)
    except SystemExit:  # after --help
        return 0
    except (ValueError, OSError) as error:
        return complain(str(error), 2)
    for line in lines:
        sys.stdout.write(plain(line) + "\n")
    return 0 if usable else 2


def report(config: DataConfig) -> tuple[list[str], bool]:
    """Says what a training would make of a data set, line by line, and whether all of it is usable.

    Errors: ValueError if the folder or the model is missing
    """
    from .examples import buckets, cropped, look

    files = find_model(config.model)
    row = model_row(read_flux_config(files.flux))
    resolution, long_sides = config.panel_size or row.panel, row.long_sides(config.ref_size)
    examples, found = look(config.data, config.grid and parse_grid(config.grid))
    sizes = Counter(f"{wide}x{high}" for example in examples for wide, high in example.sizes)
    lines = [f"{config.data}: {len(examples)} sets in {sum(sizes.values())} pictures of {_most(sizes)}"]
    shown = Counter(f"{wide}x{high}" for example in examples for wide, high in example.reference_sizes)
    lines += [f"references: {sum(shown.values())} pictures of {_most(shown)}"] if shown else []
    for layout, members in buckets(examples, resolution, long_sides, found.broken.append).items():
        shape = f"{layout.rows}x{layout.cols} panels of {layout.panel_width}x{layout.panel_height}"
        loss = max(cropped(example, layout) for example in members)
        cut = f", cropped by up to {loss:.0%}" if loss > 0.005 else ""
        tokens = f"{layout.tokens_wide * layout.tokens_high} tokens"
        if layout.references:
            beside = ", ".join(f"{wide}x{high}" for wide, high in layout.references)
            tokens += f", references of {beside}, {layout.reference_tokens} tokens"
        lines.append(f"bucket: {shape}, {tokens}: {len(members)} sets{cut}")
    small = [e.name for e in examples if min(wide * high for wide, high in e.panel_sizes()) < 0.9 * resolution**2]
    if small:
        found.notes.append(f"{len(small)} sets have panels of fewer pixels than {resolution}x{resolution} ({small[0]})")
    if examples:
        lines += _text_lengths(examples, files, row, found.notes)
    lines += [f"note: {note}" for note in found.notes] + [f"broken: {line}" for line in found.broken]
    usable = bool(examples) and not found.broken
    verdict = "usable" if usable else "not usable" if examples else "not usable, there are no sets"
    return [*lines, f"{verdict} (broken: {len(found.broken)}, notes: {len(found.notes)})"], usable


def _most(counts: Counter[str]) -> str:
    """Lists the commonest."""
    shown = [f"{name} ({count})" for name, count in counts.most_common(5)]
    return ", ".join(shown) + (f" and {len(counts) - 5} other sizes" if len(counts) > 5 else "") or "any size"


def _text_lengths(examples: "list[Example]", files: ModelFiles, row: ModelRow, notes: list[str]) -> list[str]:
    """Counts the tokens of the captions with the model's T5 tokenizer, and notes those that lose their end."""
    from transformers.models.t5.tokenization_t5 import T5Tokenizer  # takes seconds to import

    from model.text import load_tokenizer

    tokenizer = load_tokenizer(T5Tokenizer, files.t5_tokenizer)
    limit = row.text or tokenizer.model_max_length
    lengths = [len(tokenizer(example.caption, verbose=False).input_ids) for example in examples]
    for example, length in zip(examples, lengths, strict=True):
        if length > limit:
            notes.append(f"{example.name}: T5 reads {limit} of the caption's {length} tokens; shorten it")
    return [f"captions: {min(lengths)} to {max(lengths)} T5 tokens; {files.name} reads {limit}"]


if __name__ == "__main__":
    sys.exit(main())
