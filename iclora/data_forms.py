"""Forms of data sets that other tools write, said in the words of iclora.records; nothing here opens a file.

captions   NAME.txt, NAME.caption (kohya's), or NAME.json with {"caption": ...} (XLabs') beside NAME.png
rows       of JSONL or metadata.csv: "file_name" and "text" (Hugging Face), "image_path" and "caption", and perhaps
           "control_path", or "control_path_0", "control_path_1", ... (musubi-tuner); and UNO's pairs
control    a folder of targets with captions, and one or several of what they are made from, under the same names
           (ai-toolkit's control_path, musubi-tuner's control_directory, SimpleTuner's conditioning_data)
"""

import csv
import io
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

SIDECARS = (".txt", ".caption", ".json")
SETTINGS = "set.json"
TABLE = "metadata.csv"  # the only table that is read where a folder is given
MAX_SIDECAR = 1_000_000  # characters
MAX_NAME = 4096  # characters of a path
MAX_CONTROLS = 8  # folders
CONTROL = re.compile("control_path(?:_([0-9]{1,4}))?")
NUMBERED = re.compile("(.*)_([0-9]{1,4})", re.DOTALL)
KINDS = {"panels": list, "image": str, "grid": str, "prompt": str, "summary": str, "prompts": list}
Row = dict[str, Any]
Group = tuple[Path, Sequence[Path]]  # a folder, and files in it and below it
Matches = dict[Path, tuple[Path, ...]]  # control pictures by target


# names


def is_text(path: Path) -> bool:
    """Tell whether a file may be the caption of a picture."""
    return path.suffix.lower() in SIDECARS and path.name != SETTINGS


def is_list(path: Path) -> bool:
    """Tell whether a file lists pictures and their captions, where a folder is given."""
    return path.suffix.lower() == ".jsonl" or path.name.lower() == TABLE


def compose_accents(name: str) -> str:
    """Compose accents, which a Mac's archives decompose, so that names that look alike are alike."""
    return unicodedata.normalize("NFC", name)


def find(folder: Path, name: str) -> Path:
    """Find what a row names, in the row's folder or below it; nowhere else, as data sets are downloaded.

    Links are followed, as a hub's cache is made of them; a backslash is a slash; accents may be composed in any way.
    Errors: ValueError if the name leads out of the folder
    """
    parts = PureWindowsPath(name)  # knows both slashes, and drives
    if parts.anchor or ".." in parts.parts or "\0" in name:
        raise ValueError(f"{ascii(name[-80:])} leads out of its folder; put the pictures beside the rows")
    if name.isascii() or len(name) > MAX_NAME:
        return folder.joinpath(*parts.parts)
    path = folder
    for part in parts.parts:
        spellings = [path / form for form in (part, compose_accents(part), unicodedata.normalize("NFD", part))]
        path = next(filter(os.path.lexists, spellings), spellings[0])
    return path


# texts


def parse_json(text: str) -> Any:
    """Parse JSON; None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def join_captions(texts: dict[Path, str]) -> str:
    """Give the one caption of a picture. Errors: ValueError if its files differ, or a .json holds none

    texts: what stands in each of its files
    """
    captions = dict(texts)
    for path, text in texts.items():
        if path.suffix.lower() == ".json":
            row = parse_json(text)
            captions[path] = row.get("caption") if isinstance(row, dict) else None
        if not isinstance(captions[path], str):
            raise ValueError(f'{path} holds no caption; write {{"caption": "..."}}, or remove it')
    if len({" ".join(caption.split()) for caption in captions.values()}) > 1:
        raise ValueError(f"{' and '.join(map(str, captions))} say different things; keep one of them")
    return next(iter(captions.values()))


# rows


def read_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Read the rows of a list, each with the number of its line, or of the row in a .json; None is no JSON.

    Errors: ValueError for a file that is no list
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        rows = parse_json(text)
        if rows is None:
            raise ValueError(f"cannot read {path}: it is damaged or no JSON; correct it")
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{path} is no list of pairs; write [{{...}}, ...]")
        yield from enumerate(rows, start=1)
    elif suffix == ".csv":
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in table:
                yield table.line_num, {key: value for key, value in row.items() if value}  # an empty cell says nothing
        except csv.Error as error:
            raise ValueError(f"{path} line {table.reader.line_num}: {error}; correct the table") from None
    else:
        yield from ((n, parse_json(line)) for n, line in enumerate(text.split("\n"), start=1) if line.strip())


def translate(row: Any, pair: bool) -> Row:
    """Say a row in our words: "panels" or "image", "prompt" or "prompts", "references", and the "form".

    Keys that nobody here knows are left alone, as other tools keep their own in a row.

    pair: it stands in a list of UNO's
    Errors: ValueError for a row that cannot be meant
    """
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object; write {...}")
    if None in row:
        raise ValueError("it has more cells than the table has columns; put texts with commas in double quotes")
    row = {key: value for key, value in row.items() if value is not None}
    row = _translate_pair(row) if pair or "image_tgt_path" in row else _translate_set(row)
    for key, kind in KINDS.items():
        values = row.get(key, []) if kind is list else [row.get(key, "")]
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{key} is not {'a list of texts' if kind is list else 'a text'}; correct it")
    if ("panels" in row) == ("image" in row):
        raise ValueError('it needs either "panels", a list of pictures, or "image", a composite')
    if ("prompt" in row) == ("prompts" in row):
        raise ValueError('it needs either "prompt", the joint caption, or "prompts", one a panel')
    if "prompt" in row and "summary" in row:
        raise ValueError('"summary" stands before "prompts"; with "prompt", put its words there')
    return row


def _translate_set(row: Row) -> Row:
    """Say a row of Hugging Face's or musubi-tuner's in our words; one in ours may have control pictures as well."""
    own = bool({"image", "panels"} & row.keys())
    for key in ("image_path", "file_name"):
        if key in row and not own:
            row["image"] = _text_of(row, key)
    if not (own and {"prompt", "prompts"} & row.keys()):
        said = {key: _text_of(row, key) for key in ("prompt", "text", "caption") if key in row}
        if len(set(said.values())) > 1:
            raise ValueError(f"{' and '.join(said)} say different things; keep one of them")
        row |= {"prompt": next(iter(said.values()))} if said else {}
    controls = sorted((int(found[1] or -1), key) for key in row if (found := CONTROL.fullmatch(key)))
    if controls and "image" in row and "panels" not in row:
        row["panels"] = [row.pop("image")]  # a single picture, which needs no grid
    form = "rows with control pictures" if controls else "rows"
    return {**row, "references": [_text_of(row, key) for _, key in controls], "form": form}


def _translate_pair(row: Row) -> Row:
    """Say a pair of UNO's in our words; without references it is a picture and its text."""
    if "image_path" in row and "image_paths" in row:
        raise ValueError('it has both "image_path" and "image_paths"; keep the one with the references')
    references = [row["image_path"]] if "image_path" in row else row.get("image_paths", [])
    if not isinstance(references, list) or not all(isinstance(reference, str) for reference in references):
        raise ValueError("image_path is not a text, or image_paths not a list of texts; correct it")
    for key in ("prompt", "image_tgt_path"):
        if not isinstance(row.get(key), str):
            raise ValueError(f'it has no "{key}", a text; training needs prompt, references and target')
    panels, prompt = [row["image_tgt_path"]], row["prompt"]
    return {"panels": panels, "prompt": prompt, "references": references, "grid": "1x1", "form": "pairs"}


def _text_of(row: Row, key: str) -> str:
    """Read a text of a row. Errors: ValueError if it is none"""
    if not isinstance(row[key], str):
        raise ValueError(f"{key} is not a text; correct it")
    return row[key]


# control folders


def control_folders(folder: Path, targets: str, control: Any) -> tuple[Path, ...]:
    """Find the folder of the targets, and those of their control pictures, as a set.json names them.

    folder: of the set.json
    control: one or several
    Errors: ValueError
    """
    names = [control] if isinstance(control, str) else control
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError('"control" is not the name of a folder, or a list of such names; correct it')
    if not 1 <= len(names) <= MAX_CONTROLS:
        raise ValueError(f'it has {len(names)} "control" folders beside "targets"; name 1 to {MAX_CONTROLS}')
    folders = tuple(find(folder, name) for name in (targets, *names))
    if missing := [path for path in folders if not os.path.isdir(path)]:
        raise ValueError(f"there is no folder {ascii(str(missing[0])[-80:])}; name one beside {SETTINGS}, or below it")
    if len(set(folders)) < len(folders):
        raise ValueError("targets and their control pictures stand in the same folder; name different ones")
    return folders


def match_controls(targets: Group, controls: Sequence[Group], broken: list[str], notes: list[str]) -> Matches:
    """Find the control pictures of targets: those of the same name in each of the other folders, or NAME_0, NAME_1, ...

    Subfolders have to agree, suffixes may differ. A picture of the name of another target belongs to that alone.

    broken: gets a line about each target that lacks some
    notes: gets a line about each control picture without a target
    Returns those of each target that has some in every folder
    """
    names = {_name(path, targets[0]): path for path in targets[1]}
    found: Matches = {path: () for path in names.values()}
    for folder, files in controls:
        own: dict[str, list[tuple[int, Path]]] = {name: [] for name in names}
        for path in files:
            name = _name(path, folder)
            number = NUMBERED.fullmatch(name)
            if name in own:
                own[name].append((-1, path))
            elif number and number[1] in own:
                own[number[1]].append((int(number[2]), path))
            else:
                notes.append(f"{path} is the control picture of no target; passed over")
        for name, numbered in own.items():
            target, counts = names[name], Counter(number for number, _ in numbered)
            if not numbered:
                broken.append(f"{target} has no control picture in {folder}; add {target.stem}.png there")
            elif len(counts) < len(numbered):
                same = [str(path) for number, path in sorted(numbered) if counts[number] > 1]
                broken.append(f"{target} has {' and '.join(same)} as its control picture; keep one of them")
            elif target in found:
                found[target] += tuple(path for _, path in sorted(numbered))
                continue
            found.pop(target, None)
    return found


def _name(path: Path, folder: Path) -> str:
    """Name a picture for its partners in other folders."""
    return compose_accents(path.relative_to(folder).with_suffix("").as_posix())


# what there is


def count_forms(cropped: Iterable[tuple[str, float]]) -> list[str]:
    """Say how many sets are written down in each form, and how many of them are cropped.

    cropped: the form of each set, and which share of its most cropped panel is cut off
    """
    shares: dict[str, list[float]] = {}
    for form, share in cropped:
        shares.setdefault(form, []).append(share)
    lines = []
    for form, values in sorted(shares.items()):
        count = sum(value > 0.005 for value in values)
        lines.append(
            f"{form}: {len(values)} sets, " + (f"{count} cropped by up to {max(values):.0%}" if count else "uncropped")
        )
    return lines


def count_sizes(sizes: Iterable[tuple[int, int]]) -> str:
    """List the commonest sizes, width and height."""
    counts = Counter(f"{width}x{height}" for width, height in sizes)
    commonest = ", ".join(f"{size} ({count})" for size, count in counts.most_common(5)) or "any size"
    return commonest + (f" and {len(counts) - 5} other sizes" if len(counts) > 5 else "")


def name_doubles(shown: Iterable[tuple[str, str, tuple]]) -> Iterator[str]:
    """Give a line about each set that shows the same as one before it.

    shown: the name of each, its caption, and what it shows
    """
    first: dict[tuple, tuple[str, str]] = {}
    for name, caption, key in shown:
        other, words = first.setdefault(key, (name, caption))
        if other != name:
            same = "the same caption" if words == caption else "another caption"
            yield f"{name} shows the same as {other}, with {same}; it counts double"
