"""Lists of requests: what sample.py --jobs makes, one after the other, and iclora.evaluate scores.

Three forms are read:
  rows        a .jsonl with a JSON object of sample.py's options a line
  UNO's       a .json with [{"prompt": ..., "image_paths": [...]}, ...], references named relative to the file
  DreamBench  the folder dataset/ of google/dreambooth, whose prompts_and_classes.txt names 30 subjects and 25 prompts
              for each; a subject's first picture is its reference
Source: bytedance/UNO@d305981 inference.py --eval_json_path, uno/dataset/uno.py
"""

import os
import re
from pathlib import Path
from typing import Any

from .data_forms import parse_json

DREAMBENCH = "prompts_and_classes.txt"
LIVE = ("cat", "dog")  # classes that get the prompts of live subjects
PICTURE = re.compile(r"[0-9]+\.(?:jpe?g|png|webp)", re.IGNORECASE)  # of a subject, in its folder
TOKEN = "{0} "  # the rare word for a subject that DreamBooth learnt; a reference stands for it here
Rows = dict[str, dict[str, Any]]  # options by what messages call their request


def read_rows(path: Path) -> Rows:
    """Read a list of requests as options of sample.py, which are not checked yet.

    Errors: ValueError naming the line or item
    """
    from .records import read_text  # imports torch in the end, for which a typo does not wait

    if (bench := path / DREAMBENCH).is_file():
        return _read_dreambench(path, read_text(bench, -1))
    uno = path.suffix.lower() == ".json"
    rows = (_read_uno if uno else _read_lines)(path, read_text(path, -1) if path.is_file() else "")
    if not rows:
        advice = (
            f"write a JSON object of options a row into a .jsonl, or give UNO's .json or the folder of {DREAMBENCH}"
        )
        raise ValueError(f"--jobs {path} is no file with requests; {advice}")
    return rows


def _read_lines(path: Path, text: str) -> Rows:
    rows = {f"{path} line {i}": parse_json(line) for i, line in enumerate(text.split("\n"), 1) if line.strip()}
    for source, row in rows.items():
        if not isinstance(row, dict):
            raise ValueError(f'{source} is no JSON object of options; write {{"prompt": ..., "seed": ...}} on one line')
    return rows


def _read_uno(path: Path, text: str) -> Rows:
    items, rows = parse_json(text) if text else [], {}
    if not isinstance(items, list):
        raise ValueError(f'{path} is no list as UNO has it; write [{{"prompt": ..., "image_paths": [...]}}]')
    for number, item in enumerate(items, 1):
        source = f"{path} item {number}"
        names = item.get("image_paths", [item.get("image_path")]) if isinstance(item, dict) else None
        texts = [item.get("prompt"), *names] if names and isinstance(names, list) else [None]
        if not all(text and isinstance(text, str) for text in texts):
            form = '{"prompt": "...", "image_paths": ["a.png"]}'
            raise ValueError(f"{source} is no text with references; write {form}, as UNO has it")
        rows[source] = {"prompt": item["prompt"], "ref": [os.path.join(path.parent, name) for name in names]}
    return rows


def _read_dreambench(folder: Path, text: str) -> Rows:
    path, rows = folder / DREAMBENCH, {}
    classes, _, rest = text.partition("Object Prompts")
    subjects = re.findall(r"^(\w+),(?!class$)([\w ]+)$", classes, re.MULTILINE)
    objects, live = (re.findall(r"^'(.+)'\.format\(", part, re.MULTILINE) for part in rest.partition("Live")[::2])
    if not (subjects and objects and live):
        raise ValueError(f"{path} lacks subjects or prompts; take it from google/dreambooth again")
    for name, kind in subjects:
        place = folder / name
        pictures = sorted(p for p in place.iterdir() if PICTURE.fullmatch(p.name)) if place.is_dir() else []
        if not pictures:
            raise ValueError(f"{place} has no pictures such as 00.jpg; take it from google/dreambooth again")
        for number, prompt in enumerate(live if kind in LIVE else objects, 1):
            words = prompt.replace(TOKEN, "").replace("{1}", kind)
            rows[f"{folder} {name} prompt {number}"] = {"prompt": words, "ref": [str(pictures[0])]}
    return rows
