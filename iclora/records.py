"""How sets are written down: files in folders -> records, whose pictures are not opened yet.

Four forms are understood, in the folder that is given and in all below it:
  composites    a picture of the whole grid and a text of the same name: 0001.jpg, 0001.txt
  panels        a folder per set with 1.png, 2.png, ... and caption.txt, or 1.txt, 2.txt, ... and perhaps summary.txt
  rows          *.jsonl with {"panels": [...] or "image": ..., "grid": ..., "prompt": ... or "summary" and "prompts"}
  control       a set.json with {"targets": "images", "control": ["edges", ...]}, folders beside it: of targets with
                texts, and of the pictures of the same names that they are made from, their references
A set.json, such as {"grid": "2x1", "preset": ..., "markers": ...}, holds for its folder and all below it.

Pairs are a single file as UNO has it: a list of {"prompt": ..., "image_path": ... or "image_paths": [...],
"image_tgt_path": ...}, all named relative to the file. What other tools write instead is in iclora.data_forms.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from . import data_forms as forms
from .data_forms import SETTINGS, Matches, compose_accents, find
from .layout import parse_grid
from .prompts import MARKER_KINDS, MAX_CHARACTERS, clean, preset

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
JUNK = ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir")  # besides names that begin with a dot
NUMBER = re.compile("[0-9]{1,4}")
MAX_LIST = 3 * 10**8  # characters of a list of rows or pairs
MAX_DEPTH, MAX_FOLDERS = 32, 500_000  # folders in folders, and in all
Grid = tuple[int, int]  # rows, columns
Note = Callable[[str], None]  # takes one line for the user


@dataclass
class Findings:
    """What there is to say about a data set, a line each.

    broken: what cannot be used; notes: what is used, but doubtful, or is no part of a data set
    bare: sets that are whole but for their caption, by the file that it would stand in
    """

    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bare: dict[Path, "Record"] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What the set.json of a folder, or of one above it, says.

    forced: True if the grid was given on the command line, which no file overrules
    control: the folder of the targets, then those of their control pictures
    root: which of them this folder is, or lies in
    """

    grid: Grid | None = None
    markers: str = "image"
    tag: str = ""
    forced: bool = False
    control: tuple[Path, ...] = ()
    root: Path | None = None


Paths, Texts = list[Path], dict[str, list[Path]]  # files of texts by the stems of their names
Folder = tuple[Path, Paths, Settings]  # its files, and what its set.json or one above it says


@dataclass(frozen=True)
class Record:
    """A set as it is written down.

    files: the composite, the panels, or the target of a pair
    composite: True if the one file shows the whole grid
    caption: the joint caption; None if it is built from prompts, one a panel, behind the summary
    form: how it is written down
    """

    name: str
    files: tuple[Path, ...]
    composite: bool
    settings: Settings
    caption: str | None
    summary: str = ""
    prompts: tuple[str, ...] = ()
    references: tuple[Path, ...] = ()
    form: str = ""

    def as_set(self) -> "Record":
        """Make one set of a target and its references, which stand before it; in a row, unless a grid is given."""
        files, grid = (*self.references, *self.files), self.settings.grid
        settings = replace(self.settings, grid=(1, len(files)) if grid in (None, (1, 1)) else grid)
        return replace(self, files=files, references=(), settings=settings)


@dataclass(frozen=True)
class PanelSet:
    """Panel files in reading order and perhaps a joint caption.

    bundled: True for an example of the repository, False for what the user gave
    """

    paths: tuple[Path, ...] = ()
    caption: str | None = None
    bundled: bool = False


def read_records(root: Path, grid: Grid | None, findings: Findings) -> list[Record]:
    """Read everything but pictures. Errors: ValueError for too many folders

    root: a folder, or one file of rows, for which a set.json beside it holds, or of pairs
    grid: (rows, cols) of all sets, whatever the files say
    """
    settings = Settings(grid, forced=grid is not None)
    if root.suffix.lower() == ".json" and root.is_file():
        return _read_rows(root, Settings(), findings)
    if root.is_dir():
        folders = list(islice(walk(root, settings, findings, set()), MAX_FOLDERS + 1))
        if len(folders) > MAX_FOLDERS:
            raise ValueError(f"{root} holds more than {MAX_FOLDERS} folders; name one of them")
    else:
        beside = islice(walk(root.parent, settings, findings, set()), 1)
        folders = [(root.parent, [root], settings) for _, _, settings in beside]
    matches = _match(folders, findings)
    folders = [folder for folder in folders if folder[2].root in (None, *folder[2].control[:1])]
    records = []
    for _, files, settings in folders:
        for path in files:
            if forms.is_list(path) or path == root:
                records += _read_rows(path, settings, findings)
    shown = (file for record in records for file in (*record.files, *record.references))
    listed = {os.path.join(os.path.realpath(file.parent), file.name) for file in shown}  # their captions are in rows
    for folder, files, settings in folders:
        place = os.path.realpath(folder)
        rest = [file for file in files if os.path.join(place, file.name) not in listed]
        pictures = {compose_accents(file.stem) for file in rest if file.suffix.lower() in PICTURES}
        captioned = {compose_accents(file.stem) for file in set(files) - set(rest)} - pictures
        void = {file for file in rest if forms.is_text(file) and compose_accents(file.stem) in captioned}
        findings.notes += [f"{file} is passed over, as a row has the caption of its picture" for file in sorted(void)]
        records += _read_folder(folder, [file for file in rest if file not in void], settings, matches, findings)
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

    limit: characters; -1 is none
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


def walk(folder: Path, settings: Settings, findings: Findings, visited: set[str], depth: int = 0) -> Iterator[Folder]:
    """Go through a folder and all below it, junk left out.

    visited: folders that were read, without links in their names
    depth: folders above that were read
    """
    try:
        entries = sorted(entry for entry in folder.iterdir() if entry.name[0] != "." and entry.name not in JUNK)
        if folder / SETTINGS in entries:
            settings = _read_settings(folder / SETTINGS, settings)
        if folder in settings.control:
            settings = replace(settings, root=folder)
        visited.add(os.path.realpath(folder))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None)
        findings.broken.append(f"{folder} cannot be read: {reason}; correct its permissions" if reason else str(error))
        return
    yield folder, [entry for entry in entries if not os.path.isdir(entry)], settings
    for entry in filter(os.path.isdir, entries):
        if os.path.realpath(entry) in visited:
            findings.notes.append(f"{entry} leads to a folder that is read already; passed over")
        elif depth == MAX_DEPTH:
            findings.broken.append(f"{entry} lies more than {MAX_DEPTH} folders deep; move it up, or remove it")
        else:
            yield from walk(entry, settings, findings, visited, depth + 1)


def _read_settings(path: Path, above: Settings) -> Settings:
    """Read set.json over what the folders above say."""
    keys = ("grid", "preset", "markers", "targets", "control")
    values = forms.parse_json(read_text(path))
    if not isinstance(values, dict) or not all(isinstance(values[key], str) for key in values if key != "control"):
        raise ValueError(f'{path} is not a JSON object of texts; write for example {{"grid": "2x1"}}')
    if unknown := [key for key in values if key not in keys]:
        raise ValueError(f"{path} sets {ascii(unknown[0][:40])}, which is unknown; it takes {', '.join(keys)}")
    grid, markers, tag, control, root = above.grid, above.markers, above.tag, above.control, above.root
    try:
        if "preset" in values:
            task = preset(values["preset"])
            grid, markers, tag = (task.rows, task.cols), task.markers, task.tag
        markers = values.get("markers", markers)
        if markers not in MARKER_KINDS:
            raise ValueError(f"markers {ascii(markers[:40])} are not one of {', '.join(MARKER_KINDS)}")
        grid = parse_grid(values["grid"]) if "grid" in values else grid
        if {"targets", "control"} & values.keys():
            folders = path.parent, values.get("targets", "."), values.get("control", [])
            control, root = forms.control_folders(*folders), None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    own = {"markers": markers, "tag": tag, "control": control, "root": root}
    return replace(above, grid=above.grid if above.forced else grid, **own)


def _match(folders: list[Folder], findings: Findings) -> Matches:
    """Find the control pictures of each target."""
    groups: dict[tuple[Path, ...], dict[Path, Paths]] = {}
    for _, files, settings in folders:
        if settings.root:
            pictures = [file for file in files if file.suffix.lower() in PICTURES]
            groups.setdefault(settings.control, {}).setdefault(settings.root, []).extend(pictures)
    matches: Matches = {}
    for roots, group in groups.items():
        targets, *controls = ((root, group.get(root, [])) for root in roots)
        matches |= forms.match_controls(targets, controls, findings.broken, findings.notes)
    return matches


def _read_folder(folder: Path, files: Paths, settings: Settings, matches: Matches, findings: Findings) -> list[Record]:
    """Sort the files of one folder into a set of panels, or into composites or targets."""
    pictures = [file for file in files if file.suffix.lower() in PICTURES]
    stems, panels = Counter(compose_accents(picture.stem) for picture in pictures), math.prod(settings.grid or (0,))
    texts: Texts = {}
    for file in files:
        if forms.is_text(file) and (file.suffix.lower() != ".json" or compose_accents(file.stem) in stems):
            texts.setdefault(compose_accents(file.stem), []).append(file)
        elif not (file.suffix.lower() in PICTURES or forms.is_list(file) or file.name == SETTINGS):
            findings.notes.append(f"{file} is no picture or caption; passed over")
    numbered = len(pictures) == panels > 1 and stems == Counter(str(number) for number in range(1, panels + 1))
    if settings.root or not numbered and not {"caption", "summary"} & (texts.keys() - stems.keys()):
        return _read_composites(pictures, texts, settings, matches, findings)
    if texts.keys() == stems.keys() and folder / SETTINGS in files:  # elsewhere it is meant so
        findings.notes.append(f"{folder} is read as one set of {panels} panels; name composites 01, 02, ... instead")
    if numbered and not texts.keys() & {*stems, "caption", "summary"}:
        ordered = tuple(sorted(pictures, key=lambda picture: int(picture.stem)))
        findings.bare[folder / "caption.txt"] = Record(str(folder), ordered, False, settings, None)
        return []
    with collect(findings.broken):
        return [_read_panels(folder, pictures, texts, settings, findings.broken)]
    return []


def _read_composites(
    pictures: Paths, texts: Texts, settings: Settings, matches: Matches, findings: Findings
) -> list[Record]:
    """Read composites, or targets, and the texts of the same names."""
    records, names, form = [], {}, "targets with control pictures" if settings.root else "composites"
    for picture in pictures:
        names.setdefault(compose_accents(picture.stem), []).append(picture.name)
    for picture in pictures:
        stem = compose_accents(picture.stem)
        if len(same := names[stem]) > 1:
            findings.broken.append(f"{picture} shares its caption with {' and '.join(same)}; rename or remove one")
        elif stem not in texts:
            findings.bare[picture.with_suffix(".txt")] = Record(str(picture), (picture,), True, settings, None)
        elif not settings.root or picture in matches:
            with collect(findings.broken):
                references, caption = matches.get(picture, ()), _read_caption(texts[stem])
                target = str(picture), (picture,), not references, settings, caption
                records.append(Record(*target, references=references, form=form))
    for text in [text for stem in texts if stem not in names for text in texts[stem]]:
        findings.broken.append(f"{text} is a caption without a picture of the same name; add that, or remove it")
    return records


def _read_caption(files: Paths) -> str:
    """Read what stands beside a picture. Errors: ValueError if files differ or cannot be read"""
    return forms.join_captions({file: read_text(file, forms.MAX_SIDECAR) for file in files})[: MAX_CHARACTERS + 1]


def _read_panels(folder: Path, pictures: Paths, texts: Texts, settings: Settings, broken: list[str]) -> Record:
    """Read a folder of numbered panels. Errors: ValueError if no set comes of it"""
    panels = sorted((p for p in pictures if NUMBER.fullmatch(p.stem)), key=lambda path: int(path.stem))
    broken += [f"{p} is not numbered; panels are 1.png, 2.png, ..." for p in pictures if not NUMBER.fullmatch(p.stem)]
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
        broken.append(f"{texts[stem][0]} belongs to no panel{instead}")
    words = {stem: _read_caption(texts[stem]) for stem in used}
    prompts = tuple(words[stem] for stem in stems) if "caption" not in words else ()
    caption, summary = words.get("caption"), words.get("summary", "")
    return Record(str(folder), tuple(panels), False, settings, caption, summary, prompts, form="folders of panels")


def _read_rows(path: Path, settings: Settings, findings: Findings) -> list[Record]:
    """Read the rows of a list; a broken one is named by its line, or in a list of UNO's by its number."""
    records, pair = [], path.suffix.lower() == ".json"
    with collect(findings.broken):
        text = read_text(path, MAX_LIST + 1)
        if len(text) > MAX_LIST:
            raise ValueError(f"{path} has more than {MAX_LIST} characters; split it")
        for number, row in forms.read_rows(path, text):
            name = f"{path} {'row' if pair else 'line'} {number}"
            with collect(findings.broken, f"{name}: "):
                records.append(_read_row(forms.translate(row, pair), name, path.parent, settings))
    return records


def _read_row(row: dict[str, Any], name: str, folder: Path, settings: Settings) -> Record:
    """Turn a row in our words into a record. Errors: ValueError for a bad grid, or a file outside the folder"""
    if "grid" in row and not settings.forced:
        settings = replace(settings, grid=parse_grid(row["grid"]))
    files = tuple(find(folder, file) for file in row.get("panels", [row.get("image")]))
    references = tuple(find(folder, file) for file in row["references"])
    words = row.get("prompt"), row.get("summary", ""), tuple(row.get("prompts", ()))
    return Record(name, files, "image" in row, settings, *words, references, row["form"])
