"""Joint captions for panel sets: markers, the ten published tasks, a linter.

A joint caption is one paragraph: an optional fixed beginning, a sentence about the whole set, then each panel's text
behind its marker. Sources: arXiv:2410.23775 ([IMAGE1]...) and the model zoo of ali-vilab/In-Context-LoRA (the rest).
"""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MARKER_KINDS = ("image", "position", "scene")
MAX_CHARACTERS = 20_000  # ten times what 512 text tokens hold
POSITIONS = {  # (rows, cols) -> panels in reading order
    (1, 2): ("[LEFT]", "[RIGHT]"),
    (2, 1): ("[TOP]", "[BOTTOM]"),
    (1, 3): ("[LEFT]", "[MIDDLE]", "[RIGHT]"),
    (3, 1): ("[TOP]", "[MIDDLE]", "[BOTTOM]"),
    (2, 2): ("[TOP-LEFT]", "[TOP-RIGHT]", "[BOTTOM-LEFT]", "[BOTTOM-RIGHT]"),
}

_PLACE = "TOP|BOTTOM|MIDDLE|CENTER|LEFT|RIGHT"
_MARKER = re.compile(
    rf"\[\s*(?:(?P<word>IMAGE|SCENE)[\s_-]*(?P<number>[0-9]{{1,9}})|(?P<place>(?:{_PLACE})(?:[\s_-]+(?:{_PLACE}))?))\s*\]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Task:
    """One published In-Context LoRA task.

    width, height: the composite's pixels
    markers: kind of marker, one of MARKER_KINDS
    tag: how its captions begin, where they begin alike
    """

    width: int
    height: int
    rows: int
    cols: int
    markers: str
    tag: str = ""

    @property
    def panel_size(self) -> tuple[int, int]:
        """Width and height of one panel in pixels."""
        return self.width // self.cols, self.height // self.rows


# Source: model zoo of ali-vilab/In-Context-LoRA, which gives size and caption; the grid follows from the markers.
TASKS: dict[str, Task] = {
    "couple-profile": Task(2048, 1024, 1, 2, "position", "This two-part image"),
    "film-storyboard": Task(1024, 1536, 3, 1, "scene", "[MOVIE-SHOTS]"),
    "font-design": Task(1792, 1216, 2, 2, "position"),
    "home-decoration": Task(1344, 1728, 2, 2, "position"),
    "portrait-illustration": Task(1152, 1088, 1, 2, "position"),  # photo left, illustration right
    "portrait-photography": Task(1344, 1728, 2, 2, "position", "This [FOUR-PANEL] image"),
    "ppt-templates": Task(1984, 1152, 2, 2, "position"),
    "sandstorm-visual-effect": Task(1408, 1600, 2, 1, "position", "[SANDSTORM-PSA]"),
    "sparklers-visual-effect": Task(960, 1088, 2, 1, "position", "[REAL-SPARKLERS-OVERLAYS]"),
    "visual-identity-design": Task(1472, 1024, 1, 2, "position"),
}


def nearest(word: str, words: Iterable[str]) -> str:
    """Suggest what may have been meant, as the beginning of a sentence, or nothing."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {near[0]}? " if near else ""


def preset(name: str) -> Task:
    """Find a published task by name.

    Errors: ValueError with the nearest name and all choices
    """
    if name in TASKS:
        return TASKS[name]
    near = nearest(name.lower(), TASKS)
    raise ValueError(f"preset {ascii(name[:40])} is unknown; {near}choose one of {', '.join(TASKS)}")


def markers_for(kind: str, rows: int, cols: int) -> tuple[str, ...]:
    """Name the panels of a grid in reading order.

    kind: "image" ([IMAGE1]...), "scene" ([SCENE-1]...) or "position" ([TOP-LEFT]...)
    Errors: ValueError for a grid whose panels have no position names
    """
    if kind == "image":
        return tuple(f"[IMAGE{number}]" for number in range(1, rows * cols + 1))
    if kind == "scene":
        return tuple(f"[SCENE-{number}]" for number in range(1, rows * cols + 1))
    if (rows, cols) not in POSITIONS:
        named = ", ".join(f"{r}x{c}" for r, c in POSITIONS)
        raise ValueError(f"a {rows}x{cols} grid has no position markers, only {named} have; use image markers")
    return POSITIONS[rows, cols]


def has_markers(prompt: str) -> bool:
    """Tell whether a prompt introduces panels."""
    return bool(_MARKER.search(prompt))


def build(summary: str, panels: Sequence[str], markers: Sequence[str], tag: str = "") -> str:
    """Join a summary and panel instructions into one caption.

    summary: about the whole set; may be empty
    panels: one instruction for each panel, kept ones too, in reading order
    markers: as markers_for gives them
    tag: fixed beginning, such as [MOVIE-SHOTS]
    Errors: ValueError if the numbers differ or a text is not clean
    """
    marked = [part for marker, panel in zip(markers, panels, strict=True) for part in (marker, clean(panel))]
    return clean(" ".join(part for part in (clean(tag), clean(summary), *marked) if part))


def clean(prompt: str) -> str:
    """Check that a prompt is text and make it one paragraph with single spaces.

    Errors: ValueError for control characters, undecodable bytes, or more than MAX_CHARACTERS
    """
    if not isinstance(prompt, str):
        raise ValueError(f"the prompt is {type(prompt).__name__}, not text; put it in quotes")
    if len(prompt) > MAX_CHARACTERS:
        raise ValueError(f"the prompt has {len(prompt)} characters; shorten it to {MAX_CHARACTERS} at most")
    for place, character in enumerate(prompt):
        # Cc: control characters; Cs: lone surrogates, which stand for bytes that are not UTF-8
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n\r":
            where = f"character {place + 1} is U+{ord(character):04X}"
            raise ValueError(f"the prompt is not plain text: {where}; give it as UTF-8 text")
    return " ".join(prompt.split())


def lint(prompt: str, rows: int, cols: int, kind: str = "image", tag: str = "") -> list[str]:
    """Say where a joint caption does not match its grid, one line a finding; nothing if all is well.

    Tags such as [MOVIE-SHOTS] and names such as <Anna> are not markers.

    kind: of markers to take where there are none yet, as for markers_for
    tag: that it should begin with, of its preset
    """
    if not prompt.strip():
        return ["the prompt is empty; the model will draw what it likes"]
    findings = [] if prompt.startswith(tag) else [f"it does not begin with {tag}"]
    matches = list(_MARKER.finditer(prompt))
    if matches:
        kind = "position" if matches[0]["place"] else matches[0]["word"].lower()
    if kind == "position" and (rows, cols) not in POSITIONS:
        kind = "image"
    written, expected = tuple(match[0] for match in matches), markers_for(kind, rows, cols)
    if written != expected and (matches or rows * cols > 1):
        wanted = " ".join(expected) if kind == "position" else f"{expected[0]} to {expected[-1]}"
        shown = " ".join(" ".join(written).split())[:100] or "no markers"
        findings.append(f"it has {shown}, but the {rows}x{cols} grid takes {wanted}, each once, in this order")
    starts = [*(match.start() for match in matches), len(prompt)]
    for match, end in zip(matches, starts[1:], strict=True):
        if not any(character.isalnum() for character in prompt[match.end() : end]):
            findings.append(f"{match[0]} has no text after it; say what its panel shows")
    return findings


def texts_of(prompt: str, rows: int, cols: int, text_mode: str) -> list[str]:
    """Say what the text encoders read of a caption.

    text_mode: "joint" for the caption as it is, "panel" if every panel reads a text of its own
    Returns the caption alone; or what stands before its first marker, then for each panel the same and its own part
    Errors: ValueError if panels read their own parts, but the markers are not those of the grid, each once and in order
    """
    if text_mode == "joint":
        return [prompt]
    if not prompt:  # left out, as training does now and then
        return [""] * (1 + rows * cols)
    if findings := lint(prompt, rows, cols):
        raise ValueError(
            f"each panel is to read its own part of {ascii(prompt[:60])}: {findings[0]}; correct the caption, or train "
            "with --text joint"
        )
    starts = [match.start() for match in _MARKER.finditer(prompt)] or [len(prompt)]
    shared = prompt[: starts[0]].strip()
    own = [prompt[start:end].strip() for start, end in zip(starts, [*starts[1:], len(prompt)], strict=True)]
    return [shared, *(f"{shared} {words}".strip() for words in own)]
