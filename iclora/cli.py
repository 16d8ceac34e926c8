"""One frozen dataclass <-> one command line; the only place that knows argparse. And what both scripts say and draw."""

import argparse
import io
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from tqdm import tqdm

from .knobs import flag, nearest

Config = TypeVar("Config")
INTERRUPTED = 130  # exit status
MAX_RECORD = 10_000_000  # bytes of a JSON to replay
NO_MEMORY = re.compile("out of memory|not enough memory|(an't|annot) allocate memory|unable to mmap|ALLOC_")
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", tuple: "a list of texts"}


def parse(kind: type[Config], argv: Sequence[str] | None, about: str, program: str | None = None) -> Config:
    """Reads a command line into a configuration.

    kind: a dataclass whose fields come from iclora.knobs.knob
    argv: without the script's name; None takes the process's own
    about: the text of --help above the flags
    program: how it is called, up to the flags; None takes the script's name
    Errors: ValueError in one line for whatever is wrong; SystemExit(0) after --help
    """
    given = _given(kind, argv, about, program)
    recorded = _recorded(kind, given["config"], given) if "config" in given else {}
    return kind(**{**recorded, **given})


def read_record(path: str | Path) -> dict[str, Any]:
    """Reads the JSON that a script saved beside its output.

    Errors: ValueError if it is missing, damaged or something else
    """
    path = Path(path)
    advice = "--config takes a JSON that a run saved, such as out/0001.json or runs/lora/config.json"
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if path.stat().st_size > MAX_RECORD:
            raise ValueError("it is too large")
        record = json.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        known = str(error) if type(error) is ValueError else getattr(error, "strerror", None)
        reason = known or "it is damaged or no JSON"
        raise ValueError(f"cannot read {ascii(str(path)[-80:])}: {reason[:80]}; {advice}") from None
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ValueError(f"{path} holds no configuration; {advice}")
    return record


def plain(text: str) -> str:
    """Makes one line that commands no terminal, as names in a downloaded file might."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def complain(line: str, status: int) -> int:
    """Writes one line and gives the exit status; 130, an interruption, is no error."""
    sys.stderr.write(f"{'' if status == INTERRUPTED else 'error: '}{plain(line)}\n")
    return status


def as_flags(config: Any) -> list[str]:
    """Writes a configuration as the flags that make it, those with their defaults left out."""
    words = []
    for field in fields(config):
        value, name = getattr(config, field.name), flag(field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(name if value else name.replace("--", "--no-", 1))
        else:
            words += [name, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def check_folder(folder: Path) -> None:
    """Refuses a place for the files that cannot work, without making anything there yet.

    Errors: ValueError
    """
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # an impossible name; ValueError: a NUL in it
        raise unusable(folder, error) from None
    exists = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not exists.is_dir():
        raise ValueError(f"--out {folder}: {exists} is not a folder; choose another")
    if not os.access(exists, os.W_OK | os.X_OK):
        raise ValueError(f"--out {folder}: {exists} cannot be written to; choose another")


def unusable(folder: Path, error: Exception) -> ValueError:
    """Says what the system has against a folder."""
    return ValueError(f"--out {str(folder)[-80:]}: {getattr(error, 'strerror', None) or error}; choose another")


class Bar:
    """A progress bar on stderr, where that is a terminal: how far, how fast, time left.

    label: what is being done
    before: steps that were done before, which tell nothing of the pace
    every: elsewhere, such as in a log, a line is written every so many steps and at the end; 0 writes none
    total: steps in all; a bar that knows them is there before the first one is done
    """

    def __init__(self, label: str, before: int = 0, every: int = 0, total: int | None = None):
        self.label, self.before, self.every, self.total = label, before, every, total
        self.bar: tqdm | None = None

    def __enter__(self) -> "Bar":
        self.shown, self.start = sys.stderr.isatty(), time.time()
        if self.total is not None:
            self._open(self.total)
        return self

    def __call__(self, done: int, total: int, more: str = "") -> None:
        """Show a step. more: is said behind the steps, such as the loss"""
        bar = self.bar or self._open(total)
        bar.set_postfix_str(more, refresh=False)
        bar.update(done - bar.n)
        if not self.shown and self.every and (done % self.every == 0 or done == total):
            sys.stderr.write(f"{bar}\n")

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def _open(self, total: int) -> tqdm:
        file = sys.stderr if self.shown else io.StringIO()  # a log gets whole lines, which no bar has written over
        options = {"ascii": True, "unit": " steps", "miniters": 1, "dynamic_ncols": self.shown}
        self.bar = tqdm(desc=self.label, total=total, initial=self.before, file=file, **options)
        self.bar.start_t = self.start  # the first step counts too
        return self.bar


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; see --help")


def _given(kind: type, argv: Sequence[str] | None, about: str, program: str | None) -> dict[str, Any]:
    """Reads the flags that stand on the command line, and no defaults."""
    parser = _Parser(
        program,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    types = _types(kind)
    for field in fields(kind):
        more = {
            bool: {"action": argparse.BooleanOptionalAction if field.default is None else "store_true"},
            tuple: {"action": "extend", "nargs": "+"},  # several after one flag, or the flag several times
        }.get(types[field.name], {})
        if types[field.name] is not bool:
            more["metavar"] = _metavar(field, types[field.name])
        parser.add_argument(flag(field.name), help=_help(field), **more)
    found, rest = parser.parse_known_args(argv)
    if rest:
        name = rest[0].partition("=")[0]
        if not name.startswith("-"):
            raise ValueError(f"{ascii(name[:40])} follows no flag; put texts with spaces in quotes, see --help")
        meant = nearest(name, map(flag, types))
        raise ValueError(f"{ascii(name[:40])[1:-1]} is unknown; {meant}see --help for all flags")
    return {name: _from_text(name, types[name], value) for name, value in vars(found).items()}


def _recorded(kind: type, path: str, given: dict[str, Any]) -> dict[str, Any]:
    """Takes the values of a saved JSON, but not those that a flag given beside it makes void."""
    types, known, recorded = _types(kind), {field.name: field for field in fields(kind)}, {}
    for name, value in read_record(path)["config"].items():
        if name not in types:
            raise ValueError(f"{path} sets {ascii(name[:40])}, which is unknown; {nearest(name, types)}remove it there")
        undecided = value is None and known[name].default is None
        if not undecided and not _is(value, types[name]):
            shown = ascii(str(value)[:40])
            raise ValueError(f"{path} sets {name} to {shown}, which is not {KINDS[types[name]]}; correct it there")
        if not any(other in given for other in known[name].metadata.get("follows", ())):
            recorded[name] = tuple(value) if isinstance(value, list) else value
    return recorded


def _types(kind: type) -> dict[str, type]:
    """Names the plain type of every field: int, float, str, bool or tuple (of texts), None left aside."""
    hints = {
        name: next((h for h in get_args(hint) if h is not type(None) and h is not ...), hint)
        if type(None) in get_args(hint)
        else hint
        for name, hint in get_type_hints(kind).items()
    }
    return {name: tuple if get_args(hint) else hint for name, hint in hints.items()}


def _from_text(name: str, kind: type, value: Any) -> Any:
    """Turns what was typed into the type of its field."""
    if kind is tuple:
        return tuple(value)
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{flag(name)} {ascii(value[:40])} is not {KINDS[kind]}; see --help") from None


def _is(value: Any, kind: type) -> bool:
    """Tells whether a JSON value is of the type; whole numbers are numbers, true and false are not."""
    if kind is tuple:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)


def _metavar(field: Field, kind: type) -> str:
    """Stands for the value in --help."""
    choices = field.metadata.get("choices", ())
    if "metavar" in field.metadata:
        return field.metadata["metavar"]
    if 0 < len(choices) <= 4:
        return "{" + ",".join(choices) + "}"
    if kind in (int, float):
        return "N"
    return field.name.upper().replace("_", "-")


def _help(field: Field) -> str:
    """Gives the line of --help with the default, where a plain one exists."""
    text, default = field.metadata["help"], field.default
    if default is not None and default is not False and default != ():
        text += f" (default: {default})"
    return text.replace("%", "%%")
