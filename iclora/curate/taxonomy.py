"""What pairs are to show: classes -> subjects in three moods -> scenes, put into captions of diptychs.

Words come from lists, or a language model writes subjects and scenes for the classes of a list. A list is a JSON:
  classes    kind -> classes, such as animals -> cat, horse
  subjects   mood -> kind -> patterns of a subject, such as "{colour} {class}"
  scenes     with their preposition; slots: name -> words that a {name} stands for
  templates  of diptychs: grid, caption, prompt of the second panel, and perhaps "alone", of a single subject
  alone      a prompt for one subject in a scene; sizes: of panels
  moods      mood -> what a language model is told of it; ask: what it is asked for subjects and scenes
  parts      for CLIP as a judge: part -> options; {class} stands for every class in turn
"""

import re
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from model.checkpoint import read_json

from ..layout import parse_grid, parse_size
from ..prompts import clean
from .catalogue import Item

Writer = Callable[[str], str]  # what is asked -> what a language model writes
HERE = Path(__file__).parent
SLOT = re.compile(r"\{(\w+?)(\d*)\}")
SUBJECTS, SCENES = 50, 8  # asked of a language model
WORDS, LONGEST = 12, 60  # of a subject, of a scene


def read_words(path: Path) -> dict[str, Any]:
    """Read a list of words. Errors: ValueError naming the file and what is wrong with it"""
    words = read_json(path)
    try:
        for number in range(50):
            make_item(number, 0, words)
        for size, template in product(words["sizes"], words["templates"]):
            parse_size(size), parse_grid(template["grid"]), make_item(0, 0, words | {"templates": [template]})
        alone("cat", "on a beach", words), judge_texts(words)
    except (LookupError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is no list of words ({error!r:.80}); {HERE.name}/words.json is an example") from None
    return words


def judge_texts(words: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Write out the texts of every part's options, for CLIP as a judge."""
    classes = [name for names in words["classes"].values() for name in names]
    parts = words.get("parts", {}).items()
    return {
        part: [list({o.replace("{class}", name): 0 for name in classes}) for o in options] for part, options in parts
    }


def make_item(id_: int, seed: int, words: Mapping[str, Any], write: Writer | None = None) -> Item:
    """Decide what one pair shows; the same arguments give the same item.

    Classes come in turn, and all of them before one comes again; everything else is drawn.

    write: asks a language model, which writes the same to the same question; None takes all words from the lists
    """
    rng = np.random.default_rng([seed, id_])
    kinds = [(kind, name) for kind, names in words["classes"].items() for name in names]
    kinds = [kinds[place] for place in np.random.default_rng(seed).permutation(len(kinds))]
    kind, category = kinds[id_ % len(kinds)]
    mood, template = _pick(rng, sorted(words["subjects"])), _pick(rng, words["templates"])
    subject = make_subject(rng, mood, kind, category, words, write)
    second = ""
    if "second}" in template["caption"]:
        others = [(kind, name) for kind, name in kinds if name != category]
        second = make_subject(rng, mood, *_pick(rng, others), words, write)
    scenes = words["scenes"]
    if write:
        scenes = _lines(write(words["ask"]["scenes"].format(count=SCENES, subject=subject)), LONGEST) or scenes
    scene1, scene2, scene3 = (scenes[place % len(scenes)] for place in rng.permutation(max(3, len(scenes)))[:3])
    known = {"subject": subject, "second": second, "scene1": scene1, "scene2": scene2}
    caption, prompt = (_fill(template[text], rng, words, known) for text in ("caption", "prompt"))
    grid, size = template["grid"], _pick(rng, words["sizes"])
    return Item(id_, category, mood, subject, second, scene1, scene2, scene3, grid, size, caption, prompt)


def make_subject(
    rng: np.random.Generator, mood: str, kind: str, category: str, words: Mapping[str, Any], write: Writer | None
) -> str:
    """Choose a subject of a class: one that a language model wrote, else one by a pattern of the lists."""
    if write:
        asked = {"count": SUBJECTS, "class": category, "mood": words["moods"][mood], "words": WORDS}
        if written := _lines(write(words["ask"]["subjects"].format(**asked)), WORDS):
            return _pick(rng, written)
    return _fill(_pick(rng, words["subjects"][mood][kind]), rng, words, {"class": category})


def alone(subject: str, scene: str, words: Mapping[str, Any]) -> str:
    """Write the prompt of one subject in a scene."""
    return _fill(words["alone"], np.random.default_rng(0), words, {"subject": subject, "scene": scene})


def _fill(text: str, rng: np.random.Generator, words: Mapping[str, Any], known: dict[str, str]) -> str:
    """Put words for slots, the same ones for the same slot; {a_x} is x behind its article. known: gets what is drawn"""

    def word(match: re.Match) -> str:
        name = match[1] + match[2]
        if name.startswith("a_"):
            word = known[name[2:]]
            return ("an " if word[:1].lower() in "aeiou" else "a ") + word
        if name not in known:
            slots = words["slots"]
            known[name] = _pick(rng, slots[name] if name in slots else slots[match[1]])
        return known[name]

    return clean(SLOT.sub(word, text))


def _lines(text: str, longest: int) -> list[str]:
    """Take the lines of what was written that can be used, each once, without numbers, bullets and full stops.

    longest: words of a line
    """
    lines = [re.sub(r"^\s*(?:[-*\u2022]|\d+[.)])\s*|\s*\.?\s*$", "", line)[:300] for line in text.splitlines()]
    return [line for line in dict.fromkeys(lines) if line.isprintable() and 0 < len(line.split()) <= longest]


def _pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]
