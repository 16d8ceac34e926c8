"""Joint captions for panel sets: markers, the ten published tasks, a linter.

A joint caption is one paragraph: an optional fixed beginning, a sentence about the whole set, then each panel's text
behind its marker. Sources: arXiv:2410.23775 ([IMAGE1]...) and the model zoo of ali-vilab/In-Context-LoRA (the rest).
"""

import difflib
import re
import unicodedata
from collections import Counter
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
    Errors: ValueError for another kind, or a grid whose panels have no position names
    """
    if kind == "image":
        return tuple(f"[IMAGE{number}]" for number in range(1, rows * cols + 1))
    if kind == "scene":
        return tuple(f"[SCENE-{number}]" for number in range(1, rows * cols + 1))
    if kind != "position":
        raise ValueError(f"marker kind {ascii(kind)} is unknown; choose one of {', '.join(MARKER_KINDS)}")
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
    if len(panels) != len(markers):
        raise ValueError(f"{len(panels)} panel texts for {len(markers)} panels; give one for each, in reading order")
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

    kind: of markers to advise where there are none, as for markers_for
    tag: that it should begin with, of its preset
    """
    if not prompt.strip():
        return ["the prompt is empty; the model will draw what it likes"]
    findings = [] if prompt.startswith(tag) else [f"it does not begin with {tag}"]
    matches = list(_MARKER.finditer(prompt))
    if not matches:
        return findings if rows * cols == 1 else [*findings, _advise_markers(rows, cols, kind)]
    names, kinds = zip(*map(_canonical, matches), strict=True)
    findings += [
        f"{' '.join(match[0].split())} is not how the marker is written; write {name}"
        for match, name in zip(matches, names, strict=True)
        if match[0] != name
    ]
    if len(set(kinds)) > 1:
        return [*findings, f"{' and '.join(sorted(set(kinds)))} markers are mixed; use one kind"]
    if kinds[0] == "position" and (rows, cols) not in POSITIONS:
        return [*findings, f"a {rows}x{cols} grid has no position markers; use [IMAGE1] to [IMAGE{rows * cols}]"]
    if names != (expected := markers_for(kinds[0], rows, cols)):
        findings += _compare(names, expected, f"{rows}x{cols}")
    ends = [match.start() for match in matches[1:]] + [len(prompt)]
    for match, name, end in zip(matches, names, ends, strict=True):
        if not any(character.isalnum() for character in prompt[match.end() : end]):
            findings.append(f"{name} has no text after it; say what its panel shows")
    return findings


def _advise_markers(rows: int, cols: int, kind: str) -> str:
    """Say which markers a caption without any should have."""
    markers = markers_for("image" if kind == "position" and (rows, cols) not in POSITIONS else kind, rows, cols)
    panels = f"the {rows * cols} panels of the {rows}x{cols} grid"
    return f"no markers for {panels}; introduce each panel by its own, {markers[0]} to {markers[-1]}"


def texts_of(prompt: str, rows: int, cols: int, text_mode: str) -> list[str]:
    """Say what the text encoders read of a caption.

    text_mode: "joint" for the caption as it is, "panel" if every panel reads a text of its own
    Returns the caption alone; or what stands before its first marker, then for each panel the same and its own part
    Errors: ValueError if panels read their own parts, but the markers are not those of the grid, each once and in order
    """
    return [prompt] if text_mode == "joint" else _panel_texts(prompt, rows, cols)


def _panel_texts(prompt: str, rows: int, cols: int) -> list[str]:
    """Give what stands before the first marker, then for each panel the same and its own part."""
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


def _canonical(match: re.Match) -> tuple[str, str]:
    """Give a marker's proper spelling and its kind."""
    if match["place"]:
        place = "-".join(re.split(r"[\s_-]+", match["place"].upper()))
        return f"[{place}]", "position"
    word, number = match["word"].upper(), int(match["number"])
    return (f"[IMAGE{number}]", "image") if word == "IMAGE" else (f"[SCENE-{number}]", "scene")


def _compare(names: Sequence[str], expected: Sequence[str], grid: str) -> list[str]:
    """Compare the markers of a prompt, in order, with those of its grid."""
    findings, counts = [], Counter(names)
    if len(counts) != len(expected):
        findings.append(f"{len(counts)} markers, but the {grid} grid has {len(expected)} panels")
    findings += [f"{name} is missing" for name in expected if name not in counts]
    findings += [f"{name} stands {count} times; once is enough" for name, count in counts.items() if count > 1]
    findings += [
        f"{name} does not fit the {grid} grid, whose markers are {' '.join(expected)}"
        for name in counts
        if name not in expected
    ]
    order = [name for name in counts if name in expected]
    if order != sorted(order, key=expected.index):
        findings.append(f"the order {' '.join(order)} is not reading order; panels go row by row from the left")
    return findings
