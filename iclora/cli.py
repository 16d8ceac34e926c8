"""One frozen dataclass <-> one command line; the only place that knows argparse. And what every command does alike."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import Field, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from .config import SHARED, flag
from .lists import read_rows
from .prompts import nearest

Config = TypeVar("Config")
MAX_RECORD = 100_000_000  # bytes of a JSON or PNG to replay
NO_MEMORY = re.compile(
    "(out of|not enough) memory|(an't|annot) (allocate|start new)|unable to mmap|ALLOC_|bad_?alloc|could not .*a prim"
)
TYPES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", tuple: "a list of texts"}
PNG = b"\x89PNG"


def guard(work: Callable[[], int | None], memory_advice: str = "use a machine with more") -> int:
    """Run a command and turn what it raises into one line and its exit status.

    work: gives the status; None is 0
    memory_advice: what helps when memory runs out
    Returns 0 done, 2 a mistake or no memory, 130 interrupted
    """
    status = 0
    try:
        with suppress(SystemExit):  # after --help
            status = work() or 0
        sys.stdout.flush()
        return status
    except (Exception, KeyboardInterrupt) as error:
        return _explain(error, memory_advice)


def _explain(error: BaseException, memory_advice: str) -> int:
    """Write one line about what ended a command, and give its exit status; bugs are raised again."""
    if isinstance(error, KeyboardInterrupt):
        tell(str(error) or "interrupted; what was finished is saved")
        return 130
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return complain(f"{where}{error.strerror}; mend that, or name another file or folder")
    if isinstance(error, ValueError | OSError | ImportError) or "Too many open files" in str(error):
        return complain(str(error))
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)):
        return complain(f"memory ran out; {memory_advice}")
    raise error


def complain(line: str) -> int:
    """Write one line about a mistake. Returns exit status 2"""
    tell(f"error: {line}")
    return 2


def note(line: str) -> None:
    """Tell the user something that is no mistake, once where torchrun has started several processes."""
    if os.environ.get("RANK", "0") == "0":
        tell(f"note: {line}")


def tell(line: str) -> None:
    """Write a plain line to stderr."""
    print(plain(line), file=sys.stderr, flush=True)


def plain(text: str) -> str:
    """Join lines and escape control characters, which names in a downloaded file might have."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def as_flags(config: Any) -> list[str]:
    """Write a configuration as the flags that make it, those with their defaults left out."""
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
    """Refuse a place for the files that cannot work, without making anything there yet.

    Errors: ValueError; OSError for an impossible name
    """
    if "\0" in str(folder):
        raise ValueError(f"--out {ascii(str(folder))[:80]} has a character that no name may have; choose another")
    with suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(folder)
    exists = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not exists.is_dir():
        raise ValueError(f"--out {folder}: {exists} is not a folder; choose another")
    if not os.access(exists, os.W_OK | os.X_OK):
        raise ValueError(f"--out {folder}: {exists} cannot be written to; choose another")


def parse(kind: type[Config], argv: Sequence[str] | None, description: str, program: str | None = None) -> Config:
    """Read a command line into a configuration.

    kind: a dataclass whose fields come from iclora.config.option
    argv: without the script's name; None takes the process's own
    description: the text of --help above the flags
    program: how it is called, up to the flags; None takes the script's name
    Errors: ValueError in one line for whatever is wrong; SystemExit(0) after --help
    """
    flags = _parse_flags(kind, argv, description, program)
    if "config" not in flags:
        return kind(**flags)
    path = flags["config"]
    voids = {name for given in flags for name in kind.VOIDS.get(given, ())}
    recorded = kind.BEFORE | typed(kind, read_record(path)["config"], path)
    return kind(**{**{k: v for k, v in recorded.items() if k not in voids}, **flags})


def typed(kind: type, values: dict[str, Any], source: str) -> dict[str, Any]:
    """Check the names and types of options that a JSON or Python gives.

    source: what gives them, for messages
    Errors: ValueError naming the option, its value and what is right
    """
    types = _types(kind)
    others = {f.name: (*f.metadata.get("words", ()), *[None] * (f.default is None)) for f in fields(kind)}
    for name, value in values.items():
        if name not in types:
            raise ValueError(
                f"{source} sets {ascii(name[:40])}, which is unknown; {nearest(name, types)}remove it there"
            )
        if value not in others[name] and not _is(value, types[name]):
            shown = ascii(str(value)[:40])
            raise ValueError(f"{source} sets {name} to {shown}, which is not {TYPES[types[name]]}; correct it there")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def read_jobs(config: Config) -> dict[str, Config]:
    """Read a list of requests in any form of iclora.lists; each is laid over the command line's options.

    Returns each by what messages call it
    Errors: ValueError naming the line or item
    """
    jobs = {}
    for source, row in read_rows(Path(config.jobs)).items():
        if shared := row.keys() & {*SHARED, "out", "jobs", "config"}:
            raise ValueError(f"{source} sets {min(shared)}, which holds for the whole job; give {flag(min(shared))}")
        options = typed(type(config), row, source)
        try:
            jobs[source] = replace(config, **options)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    return jobs


def read_record(path: str | Path) -> dict[str, Any]:
    """Read the JSON that a script saved beside its output, or inside a picture.

    Errors: ValueError if it is missing, damaged or something else
    """
    path = Path(path)
    advice = "--config takes a JSON that a run saved, such as out/0001.json or runs/lora/config.json, or its picture"
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if path.stat().st_size > MAX_RECORD:
            raise ValueError("it is too large")
        data = path.read_bytes()
        record = {"config": json.loads(_png_config(data))} if data.startswith(PNG) else json.loads(data.decode())
    except (OSError, ValueError, RecursionError) as error:
        known = str(error) if type(error) is ValueError else getattr(error, "strerror", None)
        reason = known or "it is damaged or no JSON"
        raise ValueError(f"cannot read {ascii(str(path)[-80:])}: {reason[:80]}; {advice}") from None
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ValueError(f"{path} holds no configuration; {advice}")
    return record


def _png_config(data: bytes) -> str:
    """Find the configuration in a PNG of sample.py. Errors: ValueError if it has none"""
    from PIL import Image

    with Image.open(BytesIO(data), formats=["PNG"]) as picture:
        config = picture.info.get("config")
    if not isinstance(config, str):
        raise ValueError("it is a picture without a configuration")
    return config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; see --help")


class _Switch(argparse.BooleanOptionalAction):
    """--name, --no-name, or --name auto."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.nargs, self.choices, self.metavar = "?", ("auto",), "auto"

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string.startswith("--no-") and values:
            parser.error(f"{option_string} {values} says two things; leave one out")
        setattr(namespace, self.dest, values or not option_string.startswith("--no-"))


def _parse_flags(kind: type, argv: Sequence[str] | None, description: str, program: str | None) -> dict[str, Any]:
    """Read the flags that stand on the command line, and no defaults."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(program, None, description, formatter_class=raw, allow_abbrev=False)
    types = _types(kind)
    actions = {
        bool: {"action": "store_true"},
        tuple: {"action": "extend", "nargs": "+"},  # several after one flag, or the flag several times
    }
    for field in fields(kind):
        settings = dict(actions.get(types[field.name], {}))
        if types[field.name] is bool and field.default is None:
            settings["action"] = _Switch
        if types[field.name] is not bool:
            settings["metavar"] = _metavar(field, types[field.name])
        parser.add_argument(flag(field.name), help=_help(field), default=argparse.SUPPRESS, **settings)
    namespace, rest = parser.parse_known_args(argv)
    if rest:
        name = rest[0].partition("=")[0]
        if not name.startswith("-"):
            raise ValueError(f"{ascii(name[:40])} follows no flag; put texts with spaces in quotes, see --help")
        advice = f"{nearest(name, map(flag, types))}see --help for all flags"
        raise ValueError(f"{ascii(name[:40])[1:-1]} is unknown; {advice}")
    return {name: _from_text(name, types[name], value) for name, value in vars(namespace).items()}


def _types(kind: type) -> dict[str, type]:
    """Name the plain type of every field: int, float, str, bool or tuple (of texts), None left aside."""
    types = {}
    for name, hint in get_type_hints(kind).items():
        if type(None) in get_args(hint):
            hint = next(part for part in get_args(hint) if part is not type(None))
        types[name] = tuple if get_args(hint) else hint
    return types


def _from_text(name: str, kind: type, value: Any) -> Any:
    """Turn what was typed into the type of its field."""
    if kind in (tuple, bool):
        return tuple(value) if kind is tuple else value
    value = "--" if value == [] else value  # which argparse drops, as in --rank=--
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{flag(name)} {ascii(value[:40])} is not {TYPES[kind]}; see --help") from None


def _is(value: Any, kind: type) -> bool:
    """Tell whether a value is of the type; whole numbers are numbers, true and false are not."""
    if kind is tuple:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, {float: (int, float), str: (str, Path)}.get(kind, kind))


def _metavar(field: Field, kind: type) -> str:
    """Stand for the value in --help."""
    choices = field.metadata.get("choices", ())
    if "metavar" in field.metadata:
        return field.metadata["metavar"]
    if 0 < len(choices) <= 4:
        return "{" + ",".join(choices) + "}"
    return "N" if kind in (int, float) else field.name.upper().replace("_", "-")


def _help(field: Field) -> str:
    """Give the line of --help with the default, where a plain one exists."""
    text, default = field.metadata["help"], field.default
    if default is not None and default is not False and default != ():
        text += f" (default: {default})"
    return text.replace("%", "%%")
