"""How sets are written down: files in folders -> records, whose pictures are not opened yet.

Of sets of panels three forms are understood, in the folder that is given and in all below it:
  composites    a picture of the whole grid and a text of the same name: 0001.jpg, 0001.txt
  panels        a folder per set with 1.png, 2.png, ... and caption.txt, or 1.txt, 2.txt, ... and perhaps summary.txt
  rows          *.jsonl with {"panels": [...] or "image": ..., "grid": ..., "prompt": ... or "summary" and "prompts"}
A set.json, such as {"grid": "2x1", "preset": ..., "markers": ...}, holds for its folder and all below it.

Pairs are a single file as UNO has it: a list of {"prompt": ..., "image_path": ... or "image_paths": [...],
"image_tgt_path": ...}, references and target being named relative to the file.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from .layout import parse_grid
from .prompts import MARKER_KINDS, MAX_CHARACTERS, clean, preset

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
JUNK = ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir")  # besides names that begin with a dot
SETTINGS = "set.json"
NUMBER = re.compile("[0-9]{1,4}")
MAX_LIST = 10**9  # characters of a list of rows or pairs
Grid = tuple[int, int]  # rows, columns


@dataclass
class Findings:
    """What there is to say about a data set, a line each.

    broken: what cannot be used
    notes: what is used, but doubtful, or is no part of a data set
    """

    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """What the set.json of a folder, or of one above it, says.

    forced: True if the grid was given on the command line, which no file overrules
    """

    grid: Grid | None = None
    markers: str = "image"
    tag: str = ""
    forced: bool = False


Paths, Texts = list[Path], dict[str, Path]  # texts by the stems of their names
Folder = tuple[Path, Paths, Settings]  # its files, and what its set.json or one above it says


@dataclass(frozen=True)
class Record:
    """A set as it is written down.

    files: the composite, the panels, or the target of a pair
    composite: True if the one file shows the whole grid
    caption: the joint caption; None if it is built from prompts, one a panel, behind the summary
    """

    name: str
    files: tuple[Path, ...]
    composite: bool
    settings: Settings
    caption: str | None
    summary: str = ""
    prompts: tuple[str, ...] = ()
    references: tuple[Path, ...] = ()


@dataclass(frozen=True)
class PanelSet:
    """Panel files in reading order and perhaps a joint caption.

    bundled: True for an example of the repository, False for what the user gave
    """

    paths: tuple[Path, ...] = ()
    caption: str | None = None
    bundled: bool = False


def read_records(root: Path, grid: Grid | None, findings: Findings) -> list[Record]:
    """Read everything but pictures.

    root: a folder, or one file of rows, for which a set.json beside it holds, or of pairs
    grid: (rows, cols) of all sets, whatever the files say
    """
    if root.suffix.lower() == ".json" and root.is_file():
        return _read_pairs(root, findings)
    settings = Settings(grid, forced=grid is not None)
    if root.is_dir():
        folders = list(_walk(root, settings, findings, {root.resolve()}))
    else:
        beside = islice(_walk(root.parent, settings, findings, set()), 1)
        folders = [(root.parent, [root], settings) for _, _, settings in beside]
    records = []
    for _, files, settings in folders:
        for path in files:
            if path.suffix.lower() == ".jsonl":
                records += _read_rows(path, settings, findings)
    listed = {file for record in records for file in record.files}  # their captions stand in the rows
    for folder, files, settings in folders:
        rest = [file for file in files if Path(os.path.realpath(file)) not in listed]
        pictures = {file.stem for file in rest if file.suffix.lower() in PICTURES}
        captioned = {file.stem for file in set(files) - set(rest)} - pictures
        void = [file for file in rest if file.suffix.lower() == ".txt" and file.stem in captioned]
        findings.notes += [f"{file} is passed over, as a row has the caption of its picture" for file in void]
        records += _read_folder(folder, [file for file in rest if file not in void], settings, findings)
    return records


def read_set(folder: Path) -> PanelSet:
    """List the pictures 1.png, 2.png, ... 10.png of a folder in the order of their numbers, and read caption.txt.

    Errors: ValueError if the folder or the pictures are missing, a number stands twice, or the caption is no text
    """
    if not os.path.isdir(folder):  # False where Path.is_dir raises: a name too long
        raise ValueError(f"there is no folder {ascii(str(folder)[-80:])}; --set takes one with 1.png, 2.png, ...")
    if (folder / SETTINGS).exists() and not {"1", "caption", "summary"} & {path.stem for path in folder.iterdir()}:
        raise ValueError(f"{folder} holds many sets, for train.py; --set takes a folder with 1.png, 2.png, ... of one")
    numbered: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if NUMBER.fullmatch(path.stem) and path.suffix.lower() in PICTURES:
            other = numbered.setdefault(int(path.stem), path)
            if other is not path:
                raise ValueError(f"{folder} holds {other.name} and {path.name}, the same number twice; remove one")
    if not numbered:
        raise ValueError(f"{folder} holds no pictures named 1.png, 2.png, ...; rename them, or list them with --panels")
    caption = folder / "caption.txt"
    text = read_text(caption) if caption.is_file() else None
    return PanelSet(tuple(numbered[number] for number in sorted(numbered)), text and clean(text))


def read_text(path: Path, limit: int = MAX_CHARACTERS + 1) -> str:
    """Read a text file; of a caption that is too long, enough for clean to refuse it.

    limit: characters
    Errors: ValueError in one line if it cannot be read or is no UTF-8
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "it is no file")  # a pipe would never end
        with open(path, encoding="utf-8-sig") as file:
            return file.read(limit)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"cannot read {path}: {reason}; correct or remove it") from None


@contextmanager
def collect(problems: list[str], prefix: str = "") -> Iterator[None]:
    """Add what is refused to a list, so that the rest is read as well."""
    try:
        yield
    except ValueError as error:
        problems.append(f"{prefix}{error}")


def _walk(folder: Path, settings: Settings, findings: Findings, visited: set[Path]) -> Iterator[Folder]:
    """Go through a folder and all below it, junk left out."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if entry.name[0] != "." and entry.name not in JUNK)
        if folder / SETTINGS in entries:
            settings = _read_settings(folder / SETTINGS, settings)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None)
        findings.broken.append(f"{folder} cannot be read: {reason}; correct its permissions" if reason else str(error))
        return
    yield folder, [entry for entry in entries if not os.path.isdir(entry)], settings
    for entry in filter(os.path.isdir, entries):
        if entry.resolve() in visited:
            findings.notes.append(f"{entry} leads to a folder that is read already; passed over")
        else:
            visited.add(entry.resolve())
            yield from _walk(entry, settings, findings, visited)


def _read_settings(path: Path, above: Settings) -> Settings:
    """Read set.json over what the folders above say."""
    keys = ("grid", "preset", "markers")
    values = _parse_json(read_text(path))
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ValueError(f'{path} is not a JSON object of texts; write for example {{"grid": "2x1"}}')
    if unknown := [key for key in values if key not in keys]:
        raise ValueError(f"{path} sets {ascii(unknown[0][:40])}, which is unknown; it takes {', '.join(keys)}")
    grid, markers, tag = above.grid, above.markers, above.tag
    try:
        if "preset" in values:
            task = preset(values["preset"])
            grid, markers, tag = (task.rows, task.cols), task.markers, task.tag
        markers = values.get("markers", markers)
        if markers not in MARKER_KINDS:
            raise ValueError(f"markers {ascii(markers[:40])} are not one of {', '.join(MARKER_KINDS)}")
        grid = parse_grid(values["grid"]) if "grid" in values else grid
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return replace(above, grid=above.grid if above.forced else grid, markers=markers, tag=tag)


def _read_folder(folder: Path, files: Paths, settings: Settings, findings: Findings) -> list[Record]:
    """Sort the files of one folder into a set of panels, or into composites."""
    pictures = [file for file in files if file.suffix.lower() in PICTURES]
    texts = {file.stem: file for file in files if file.suffix.lower() == ".txt"}
    for file in files:
        if file.suffix.lower() not in (*PICTURES, ".txt", ".jsonl") and file.name != SETTINGS:
            findings.notes.append(f"{file} is no picture or caption; passed over")
    stems, panels = Counter(picture.stem for picture in pictures), math.prod(settings.grid or (0,))
    numbered = panels > 1 and stems == Counter(str(number) for number in range(1, panels + 1))
    if not numbered and not {"caption", "summary"} & (texts.keys() - stems.keys()):
        return _read_composites(pictures, texts, settings, findings)
    if texts.keys() == stems.keys() and folder / SETTINGS in files:  # elsewhere it is meant so
        findings.notes.append(f"{folder} is read as one set of {panels} panels; name composites 01, 02, ... instead")
    with collect(findings.broken):
        return [_read_panels(folder, pictures, texts, settings, findings.broken)]
    return []


def _read_composites(pictures: Paths, texts: Texts, settings: Settings, findings: Findings) -> list[Record]:
    """Read composites and the texts of the same names."""
    records, names = [], {}
    for picture in pictures:
        names.setdefault(picture.stem, []).append(picture.name)
    for picture in pictures:
        if len(same := names[picture.stem]) > 1:
            findings.broken.append(f"{picture} shares its caption with {' and '.join(same)}; rename or remove one")
        elif picture.stem not in texts:
            findings.broken.append(f"{picture} has no caption; write {picture.stem}.txt beside it")
        else:
            with collect(findings.broken):
                records.append(Record(str(picture), (picture,), True, settings, read_text(texts[picture.stem])))
    for text in [texts[stem] for stem in texts if stem not in names]:
        findings.broken.append(f"{text} is a caption without a picture of the same name; add that, or remove it")
    return records


def _read_panels(folder: Path, pictures: Paths, texts: Texts, settings: Settings, broken: list[str]) -> Record:
    """Read a folder of numbered panels. Errors: ValueError if no set comes of it"""
    panels = sorted((p for p in pictures if NUMBER.fullmatch(p.stem)), key=lambda path: int(path.stem))
    broken += [f"{p} is not numbered; panels are 1.png, 2.png, ..." for p in pictures if p not in panels]
    if not panels:
        raise ValueError(f"{folder} has a caption, but no pictures named 1.png, 2.png, ...; add them")
    if [int(panel.stem) for panel in panels] != list(range(1, len(panels) + 1)):
        names = ", ".join(panel.name for panel in panels)
        raise ValueError(f"{folder} has the panels {names}; number them from 1, each number once")
    stems = [panel.stem for panel in panels]
    used = ["caption"] if "caption" in texts else [*stems, *{"summary"} & texts.keys()]
    if lacking := [stem for stem in used if stem not in texts]:
        raise ValueError(f"{folder} lacks {lacking[0]}.txt; write caption.txt for all panels, or a text for each")
    for stem in sorted(texts.keys() - set(used)):
        instead = "; caption.txt is used, so keep one of both" if "caption" in texts else ", or remove it"
        broken.append(f"{texts[stem]} belongs to no panel{instead}")
    words = {stem: read_text(texts[stem]) for stem in used}
    prompts = tuple(words[stem] for stem in stems) if "caption" not in words else ()
    return Record(str(folder), tuple(panels), False, settings, words.get("caption"), words.get("summary", ""), prompts)


def _read_rows(path: Path, settings: Settings, findings: Findings) -> list[Record]:
    """Read the rows of a JSONL file; a broken one is named by its line."""
    records, lines = [], []
    with collect(findings.broken):
        lines = read_text(path, MAX_LIST).split("\n")
    for number, line in enumerate(lines, start=1):
        name, row = f"{path} line {number}", _parse_json(line)
        if row is None and line.strip():
            findings.broken.append(f"{name} is no JSON; a row is one object on one line")
        elif row is not None:
            with collect(findings.broken, f"{name}: "):
                records.append(_read_row(row, name, path.parent, settings))
    return records


def _read_row(row: Any, name: str, folder: Path, settings: Settings) -> Record:
    """Turn a row into a record; keys that are not ours are left alone, as other tools keep their own in a row."""
    kinds = {"panels": list, "image": str, "grid": str, "prompt": str, "summary": str, "prompts": list}
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object; write {...}")
    for key, kind in kinds.items():
        values = row.get(key, []) if kind is list else [row.get(key, "")]
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{key} is not {'a list of texts' if kind is list else 'a text'}; correct it")
    if ("panels" in row) == ("image" in row):
        raise ValueError('it needs either "panels", a list of pictures, or "image", a composite')
    if ("prompt" in row) == ("prompts" in row):
        raise ValueError('it needs either "prompt", the joint caption, or "prompts", one a panel')
    if "prompt" in row and "summary" in row:
        raise ValueError('"summary" stands before "prompts"; with "prompt", put its words there')
    if "grid" in row and not settings.forced:
        settings = replace(settings, grid=parse_grid(row["grid"]))
    files = tuple(_inside(folder, file) for file in row.get("panels", [row.get("image")]))
    words = row.get("prompt"), row.get("summary", ""), tuple(row.get("prompts", ()))
    return Record(name, files, "image" in row, settings, *words)


def _read_pairs(path: Path, findings: Findings) -> list[Record]:
    """Read UNO's JSON; a broken row is named by its number."""
    records = []
    with collect(findings.broken):
        rows = _parse_json(read_text(path, MAX_LIST))
        if rows is None:
            raise ValueError(f"cannot read {path}: it is damaged or no JSON; correct it")
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{path} is no list of pairs; write [{{...}}, ...]")
        for number, row in enumerate(rows, start=1):
            name = f"{path} row {number}"
            with collect(findings.broken, f"{name}: "):
                records.append(_read_pair(row, name, path.parent))
    return records


def _read_pair(row: Any, name: str, folder: Path) -> Record:
    """Turn a row of UNO's JSON into a record; other keys are left alone, such as the scores of its filters."""
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object; write {...}")
    if "image_path" in row and "image_paths" in row:
        raise ValueError('it has both "image_path" and "image_paths"; keep the one with the references')
    references = [row["image_path"]] if "image_path" in row else row.get("image_paths", [])
    if not isinstance(references, list) or not all(isinstance(reference, str) for reference in references):
        raise ValueError("image_path is not a text, or image_paths not a list of texts; correct it")
    if not references:
        raise ValueError('it has no references; name one as "image_path" or several as "image_paths"')
    for key in ("prompt", "image_tgt_path"):
        if not isinstance(row.get(key), str):
            raise ValueError(f'it has no "{key}", a text; training needs prompt, references and target')
    target, *paths = (_inside(folder, file) for file in (row["image_tgt_path"], *references))
    return Record(name, (target,), False, Settings(grid=(1, 1)), row["prompt"], references=tuple(paths))


def _parse_json(text: str) -> Any:
    """Parse JSON; None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _inside(folder: Path, name: str) -> Path:
    """Find a file that a row names, in the row's folder or below it; nowhere else, as data sets are downloaded."""
    try:
        path = Path(os.path.realpath(folder / name))
    except (OSError, ValueError):  # a name too long; a NUL in it
        path = Path("/")
    if not path.is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{ascii(name[-80:])} leads out of its folder; put the pictures beside the rows")
    return path
