"""How sets are written down: files in folders -> drafts, whose pictures are not opened yet.

Of sets of panels three forms are understood, in the folder that is given and in all below it:
  composites    a picture of the whole grid and a text of the same name: 0001.jpg, 0001.txt
  panels        a folder per set with 1.png, 2.png, ... and caption.txt, or 1.txt, 2.txt, ... and perhaps summary.txt
  rows          *.jsonl with {"panels": [...] or "image": ..., "grid": ..., "prompt": ... or "summary" and "prompts"}
A set.json, such as {"grid": "2x1", "preset": ..., "markers": ...}, holds for its folder and all below it.

Pairs are a single file as UNO has it: a list of {"prompt": ..., "image_path": ... or "image_paths": [...],
"image_tgt_path": ...}, references and target being named relative to the file.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from .data import PICTURES, read_text
from .layout import parse_grid
from .prompts import MARKER_KINDS, preset

JUNK = ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir")  # besides names that begin with a dot
SETTINGS = "set.json"


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

    grid: tuple[int, int] | None = None
    markers: str = "image"
    tag: str = ""
    forced: bool = False


@dataclass(frozen=True)
class Draft:
    """A set as it is written down, before its pictures are opened.

    files: the composite, the panels, or the target of a pair
    composite: True if the one file shows the whole grid
    prompt: the joint caption; None if it is built from prompts, one a panel, behind the summary
    """

    name: str
    files: tuple[Path, ...]
    composite: bool
    settings: Settings
    prompt: str | None
    summary: str = ""
    prompts: tuple[str, ...] = ()
    references: tuple[Path, ...] = ()


def read_drafts(root: Path, grid: tuple[int, int] | None, found: Findings) -> list[Draft]:
    """Reads everything but pictures.

    root: a folder, or one file of rows, for which a set.json beside it holds, or of pairs
    grid: (rows, cols) of all sets, whatever the files say
    """
    settings = Settings(grid=grid, forced=grid is not None)
    if root.suffix.lower() == ".json" and root.is_file():
        return _read_pairs(root, found)
    if root.is_dir():
        places = list(_places(root, settings, found, {root.resolve()}))
    else:
        beside = _places(root.parent, settings, found, set())
        places = [(root.parent, [root], settings) for _, _, settings in islice(beside, 1)]
    drafts = [
        row
        for _, files, settings in places
        for path in files
        if path.suffix.lower() == ".jsonl"
        for row in _read_rows(path, settings, found)
    ]
    taken = {file for row in drafts for file in row.files}  # their captions stand in the rows
    for place, files, settings in places:
        left = [file for file in files if Path(os.path.realpath(file)) not in taken]
        told = {f.stem for f in files if f not in left} - {f.stem for f in left if f.suffix.lower() in PICTURES}
        void = [file for file in left if file.suffix.lower() == ".txt" and file.stem in told]
        found.notes += [f"{file} is passed over, as a row has the caption of its picture" for file in void]
        drafts += _read_folder(place, [file for file in left if file not in void], settings, found)
    return drafts


def _places(
    folder: Path, settings: Settings, found: Findings, seen: set[Path]
) -> Iterator[tuple[Path, list[Path], Settings]]:
    """Walks through a folder and all below it, junk left out: folder, its files, what set.json says."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if entry.name[0] != "." and entry.name not in JUNK)
        if folder / SETTINGS in entries:
            settings = _read_settings(folder / SETTINGS, settings)
    except OSError as error:
        found.broken.append(f"{folder} cannot be read: {error.strerror}; correct its permissions")
        return
    except ValueError as error:
        found.broken.append(str(error))
        return
    yield folder, [entry for entry in entries if not os.path.isdir(entry)], settings
    for entry in filter(os.path.isdir, entries):
        if entry.resolve() in seen:
            found.notes.append(f"{entry} leads to a folder that is read already; passed over")
            continue
        seen.add(entry.resolve())
        yield from _places(entry, settings, found, seen)


def _read_settings(path: Path, above: Settings) -> Settings:
    """Reads set.json over what the folders above say."""
    keys = ("grid", "preset", "markers")
    try:
        given = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError):
        given = None
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise ValueError(f'{path} is not a JSON object of texts; write for example {{"grid": "2x1"}}')
    if unknown := [key for key in given if key not in keys]:
        raise ValueError(f"{path} sets {ascii(unknown[0][:40])}, which is unknown; it takes {', '.join(keys)}")
    settings = above
    try:
        if "preset" in given:
            task = preset(given["preset"])
            settings = replace(settings, markers=task.markers, tag=task.tag)
            settings = settings if settings.forced else replace(settings, grid=(task.rows, task.cols))
        if "markers" in given:
            if given["markers"] not in MARKER_KINDS:
                raise ValueError(f"markers {ascii(given['markers'][:40])} are not one of {', '.join(MARKER_KINDS)}")
            settings = replace(settings, markers=given["markers"])
        if "grid" in given:
            grid = parse_grid(given["grid"])
            settings = settings if settings.forced else replace(settings, grid=grid)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return settings


def _read_folder(place: Path, files: list[Path], settings: Settings, found: Findings) -> list[Draft]:
    """Sorts the files of one folder into a set of panels, or into composites."""
    pictures = [file for file in files if file.suffix.lower() in PICTURES]
    texts = {file.stem: file for file in files if file.suffix.lower() == ".txt"}
    for file in files:
        if file not in pictures and file.suffix.lower() not in (".txt", ".jsonl") and file.name != SETTINGS:
            found.notes.append(f"{file} is no picture or caption; passed over")
    stems = [picture.stem for picture in pictures]
    panels = settings.grid[0] * settings.grid[1] if settings.grid else 0
    numbered = panels > 1 and sorted(stems) == sorted(str(number + 1) for number in range(panels))
    if numbered or {"caption", "summary"} & texts.keys() - set(stems):
        if texts.keys() == set(stems) and place / SETTINGS in files:  # elsewhere it is meant so
            found.notes.append(f"{place} is read as one set of {panels} panels; name composites 01, 02, ... instead")
        return _read_set(place, pictures, texts, settings, found)
    drafts = []
    for picture in pictures:
        same = [other.name for other in pictures if other.stem == picture.stem]
        if len(same) > 1:
            found.broken.append(f"{picture} shares its caption with {' and '.join(same)}; rename or remove one")
        elif picture.stem not in texts:
            found.broken.append(f"{picture} has no caption; write {picture.stem}.txt beside it")
        else:
            try:
                caption = read_text(texts[picture.stem])
                drafts.append(Draft(str(picture), (picture,), True, settings, caption))
            except ValueError as error:
                found.broken.append(str(error))
    found.broken += [
        f"{text} is a caption without a picture of the same name; add that, or remove it"
        for stem, text in texts.items()
        if stem not in stems
    ]
    return drafts


def _read_set(
    place: Path, pictures: list[Path], texts: dict[str, Path], settings: Settings, found: Findings
) -> list[Draft]:
    """Reads a folder of numbered panels; at most one draft comes of it."""
    panels = sorted((p for p in pictures if re.fullmatch("[0-9]{1,4}", p.stem)), key=lambda p: int(p.stem))
    found.broken += [f"{p} is not numbered; panels are 1.png, 2.png, ..." for p in pictures if p not in panels]
    numbers = [int(panel.stem) for panel in panels]
    each = [panel.stem for panel in panels]
    if not panels:
        found.broken.append(f"{place} has a caption, but no pictures named 1.png, 2.png, ...; add them")
        return []
    if numbers != list(range(1, len(panels) + 1)):
        shown = ", ".join(panel.name for panel in panels)
        found.broken.append(f"{place} has the panels {shown}; number them from 1, each number once")
        return []
    used = ["caption"] if "caption" in texts else [*each, *{"summary"} & texts.keys()]
    if lacking := [stem for stem in used if stem not in texts]:
        found.broken.append(f"{place} lacks {lacking[0]}.txt; write caption.txt for all panels, or a text for each")
        return []
    for stem in texts.keys() - set(used):
        instead = "; caption.txt is used, so keep one of both" if "caption" in texts else ", or remove it"
        found.broken.append(f"{texts[stem]} belongs to no panel{instead}")
    try:
        words = {stem: read_text(texts[stem]) for stem in used}
    except ValueError as error:
        found.broken.append(str(error))
        return []
    prompts = tuple(words[stem] for stem in each) if "caption" not in words else ()
    return [Draft(str(place), tuple(panels), False, settings, words.get("caption"), words.get("summary", ""), prompts)]


# from rows to drafts


def _read_rows(path: Path, settings: Settings, found: Findings) -> list[Draft]:
    """Reads the rows of a JSONL file; a broken one is named by its line."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        found.broken.append(f"cannot read {path}: {reason}; correct or remove it")
        return []
    drafts = []
    for number, line in enumerate(lines, start=1):
        name = f"{path} line {number}"
        try:
            if line.strip():
                drafts.append(_read_row(json.loads(line), name, path.parent, settings))
        except (json.JSONDecodeError, RecursionError):
            found.broken.append(f"{name} is no JSON; a row is one object on one line")
        except ValueError as error:
            found.broken.append(f"{name}: {error}")
    return drafts


def _read_row(row: Any, name: str, place: Path, settings: Settings) -> Draft:
    """Turns one row into a draft; keys that are not ours are left alone, as other tools keep their own in a row."""
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
    composite = "image" in row
    files = tuple(_inside(place, name) for name in ([row["image"]] if composite else row["panels"]))
    words = row.get("prompt"), row.get("summary", ""), tuple(row.get("prompts", ()))
    return Draft(name, files, composite, settings, *words)


def _read_pairs(path: Path, found: Findings) -> list[Draft]:
    """Reads UNO's JSON; a broken row is named by its number."""
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged or no JSON"
        found.broken.append(f"cannot read {path}: {reason}; correct it")
        return []
    if not isinstance(rows, list) or not rows:
        found.broken.append(f"{path} is no list of pairs; write [{{...}}, ...]")
        return []
    drafts = []
    for number, row in enumerate(rows, start=1):
        name = f"{path} row {number}"
        try:
            drafts.append(_read_pair(row, name, path.parent))
        except ValueError as error:
            found.broken.append(f"{name}: {error}")
    return drafts


def _read_pair(row: Any, name: str, place: Path) -> Draft:
    """Turns one row of UNO's JSON into a draft; other keys are left alone, such as the scores of its filters."""
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
    target, *shown = (_inside(place, file) for file in (row["image_tgt_path"], *references))
    return Draft(name, (target,), False, Settings(grid=(1, 1)), row["prompt"], references=tuple(shown))


def _inside(folder: Path, name: str) -> Path:
    """Finds a file that a row names, in the row's folder or below it; nowhere else, as data sets are downloaded."""
    try:
        path = Path(os.path.realpath(folder / name))
    except (OSError, ValueError):  # a name too long; a NUL in it
        path = Path("/")
    if not path.is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{ascii(name[-80:])} leads out of its folder; put the pictures beside the rows")
    return path
