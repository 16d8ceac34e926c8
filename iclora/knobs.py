"""Knobs: the fields of configurations, each with its default, its help and what is valid."""

import difflib
from dataclasses import field, fields
from typing import Any


def knob(default: Any, help: str, **more: Any) -> Any:
    """Makes one field of a configuration.

    help: one line for --help; the default is added to it unless that is None, False or empty
    metavar: stands for the value in --help
    choices: the valid texts
    valid: (least, most) of a number
    path: True if it says where something lies, which is kept out of pictures
    saved: False if it has no influence on the result and is not replayed
    follows: names of other knobs; where one of them is given beside a replayed file, the file's value is forgotten
    """
    return field(default=default, metadata={"help": help, **more})


def saved(config: Any, paths: bool = True) -> dict[str, Any]:
    """Lists the knobs that make the result, to be written beside it and replayed.

    paths: False leaves out what says where something lies
    """
    kept = [f for f in fields(config) if f.metadata.get("saved", True) and (paths or not f.metadata.get("path"))]
    return {f.name: getattr(config, f.name) for f in kept}


def flag(name: str) -> str:
    """Writes a knob's name as its flag."""
    return "--" + name.replace("_", "-")


def nearest(word: str, words: Any) -> str:
    """Suggests what may have been meant, as the beginning of a sentence, or nothing."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {near[0]}? " if near else ""


def check(config: Any) -> None:
    """Refuses unknown choices and numbers outside their ranges; NaN is outside of every range.

    Errors: ValueError with the flag, its value and what is valid
    """
    for knob_field in fields(config):
        value, about = getattr(config, knob_field.name), knob_field.metadata
        if value is None:
            continue
        if "choices" in about and value not in about["choices"]:
            raise ValueError(
                f"{flag(knob_field.name)} {ascii(value[:40])} is unknown; {nearest(value, about['choices'])}"
                f"choose one of {', '.join(about['choices'])}"
            )
        if "valid" in about:
            least, most = about["valid"]
            if not least <= value <= most:
                raise ValueError(f"{flag(knob_field.name)} {str(value)[:40]} is out of range; use {least} to {most}")
