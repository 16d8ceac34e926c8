"""Plain English for the picture world: single prompts and In-Context LoRA joint captions, in a small vocabulary.

Captions name shape, colour, pattern, accessory, scene, position and size; never the exact hue, the pattern's angle and
spacing, or the face. `{who}` stands for subjects with their positions, `{scene}` for a scene with its preposition.
"""

import re
from dataclasses import replace

import numpy as np

from iclora.prompts import POSITIONS, markers_for
from lab.world import COLOURS, PATTERNS, SHAPES, SIZES, Panel, Placed, Subject

SCENE_WORDS = {
    "beach": ("on a beach", "at the beach"),
    "snow": ("in a snowy field", "in the snow"),
    "forest": ("in a forest", "in the woods"),
    "desert": ("in a desert", "in the dunes"),
    "night": ("at night", "under the moon"),
    "city": ("in a city", "on a street"),
    "mountains": ("in the mountains", "near the mountains"),
    "sea": ("under the sea", "under water"),
    "meadow": ("in a meadow", "on the grass"),
    "bedroom": ("in a bedroom", "in the bedroom"),
    "space": ("in space", "in outer space"),
    "sunset": ("at sunset", "in the evening"),
}
POSITION_WORDS = {"left": "on the left", "middle": "in the middle", "right": "on the right", "top": "at the top"}
ACCESSORY_WORDS = {
    "none": ("", ""),
    "hat": ("with a hat", "wearing a hat"),
    "scarf": ("with a scarf", "wearing a scarf"),
    "glasses": ("with glasses", "wearing glasses"),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
# What stands in front of the caption of one panel, and of several, if they are drawn in a domain of lab.domains.
DOMAIN_WORDS = {
    "pencil": (("a pencil drawing", "drawn in pencil"), ("pencil drawings", "drawn in pencil")),
    "dusk": (("at dusk with sparkles", "full of sparkles at dusk"),) * 2,
}

SINGLE = (
    "{who} {scene}",
    "{scene}, {who}",
    "a picture of {who} {scene}",
    "{scene} we see {who}",
    "an image with {who} {scene}",
)
SUMMARIES = (
    "{number} pictures of {cast}:",
    "a set of {number} images shows {cast}:",
    "{cast} in {number} scenes:",
    "the story of {cast}:",
    "the same {bare} in {number} places:",
    "we follow {cast} through {number} pictures:",
)
PANELS = ("{who} {scene}", "{scene} {who}", "we see {who} {scene}", "{scene} we see {who}")
PRONOUN_PANELS = {
    False: ("it is {place} {scene}", "{scene} it is {place}", "we see it {place} {scene}", "now it is {scene} {place}"),
    True: ("they are {scene}", "{scene} they meet", "we see them {scene}", "now they are {scene}"),
}
BETWEEN = (", ", "; ", ". ")  # panels
# The longest joint caption in words, punctuation marks and markers, for one subject and for several.
LIMITS = (62, 63)
ROOM = 57  # words of the longest caption that a domain is said in front of: 63 then, in 64 tokens of T5
# How much a phrase tells beside the name.
NOTHING, POSITION, POSITION_AND_SIZE = 0, 1, 2


def length(caption: str) -> int:
    """Words, punctuation marks and markers in a caption."""
    return len(re.findall(r"\[[A-Z0-9-]+\]|\w+|[^\w\s]", caption))


def _choose(rng: np.random.Generator | None, options):
    return options[0] if rng is None else options[int(rng.integers(len(options)))]


def _tidy(text: str) -> str:
    return re.sub(r" +([,:.]|$)", r"\1", re.sub(r" +", " ", text)).strip()


def _named(subject: Subject, wearing: int = 0, size: str = "") -> str:
    pattern = "" if subject.pattern == "plain" else subject.pattern
    words = (size, subject.colour, pattern, subject.shape, ACCESSORY_WORDS[subject.accessory][wearing])
    return " ".join(word for word in words if word)


def with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def name(subject: Subject) -> str:
    """The subject as captions call it, without an article: "red striped cat with a hat"; plain is not said."""
    return _named(subject)


def _join(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _who(placed: tuple[Placed, ...], telling: int, wearing: int, full: bool = True) -> str:
    """The subjects of a panel in a row, named in full or as "the cat", with as much beside the name as asked."""
    phrases = []
    for one in placed:
        size = one.size if telling == POSITION_AND_SIZE else ""
        if full:
            phrase = with_article(_named(one.subject, wearing, size))
        else:
            phrase = " ".join(("the", size, one.subject.shape))
        phrases.append(phrase + (" " + POSITION_WORDS[one.position] if telling else ""))
    return _join(phrases)


def reticent(panels: tuple[Panel, ...], rng: np.random.Generator) -> tuple[Panel, ...]:
    """The panels as a caption that tells less would have them: now and then a subject loses colour, pattern or hat.

    One subject in seven is left with nothing but its shape; a colour that is not told is "".
    """
    spoken = {}
    for one in panels[0].placed:
        bare = rng.random() < 1 / 7
        hidden = [bare or rng.random() < chance for chance in (0.06, 0.06, 0.1)]
        blank = {"colour": "", "pattern": "plain", "accessory": "none"}
        unsaid = {trait: value for (trait, value), hide in zip(blank.items(), hidden, strict=True) if hide}
        spoken[one.subject] = replace(one.subject, **unsaid)
    return tuple(
        replace(panel, placed=tuple(replace(one, subject=spoken[one.subject]) for one in panel.placed))
        for panel in panels
    )


def panel_prompt(panel: Panel, rng: np.random.Generator | None = None) -> str:
    """One panel described alone, subjects named in full: "a small red cat with a hat on the left in a snowy field".

    rng: varies the phrasing and now and then leaves out sizes or positions; None tells everything in one fixed way
    """
    telling = _choose(rng, (POSITION_AND_SIZE, POSITION_AND_SIZE, POSITION, POSITION, NOTHING))
    who = _who(panel.placed, telling, _choose(rng, (0, 1)))
    return _tidy(_choose(rng, SINGLE).format(who=who, scene=_choose(rng, SCENE_WORDS[panel.scene]))) + "."


def _summary(panels: tuple[Panel, ...], template: str, wearing: int) -> str:
    cast = [_named(one.subject, wearing) for one in panels[0].placed]
    articled = _join([with_article(phrase) for phrase in cast])
    return template.format(cast=articled, bare=_join(cast), number=NUMBERS.get(len(panels), "several"))


def _panel_phrase(panel: Panel, style: str, template: str, scene: str, telling: int, wearing: int) -> str:
    """One panel inside a joint caption; style: "full" repeats the description, "short" says the cat, "pronoun" it."""
    if style == "pronoun":
        place = POSITION_WORDS[panel.placed[0].position] if telling else ""
        return template.format(place=place, scene=scene)
    return template.format(who=_who(panel.placed, telling, wearing, full=style == "full"), scene=scene)


def _templates(style: str, several: bool) -> tuple[str, ...]:
    return PRONOUN_PANELS[several] if style == "pronoun" else PANELS


def joint_caption(
    panels: tuple[Panel, ...], rows: int, cols: int, rng: np.random.Generator | None = None, markers: str = "image"
) -> str:
    """An In-Context LoRA caption: a summary (now and then left out), then every panel after its marker.

    panels: rows * cols of one set, in reading order; a single one is captioned by panel_prompt, without a marker
    rng: varies phrasing and what is left out; None gives one fixed phrasing
    markers: as in iclora.prompts.markers_for
    Errors: ValueError if the panels do not fill the grid
    """
    _check_grid(panels, rows, cols)
    if len(panels) == 1:
        return panel_prompt(panels[0], rng)
    several = len(panels[0].placed) > 1
    style = _choose(rng, ("short", "short", "pronoun") if several else ("short", "pronoun", "full"))
    wearing = _choose(rng, (0, 1))
    # Without a summary the full names must stand in the panels: in every one, or in the first.
    summary = _summary(panels, _choose(rng, SUMMARIES), wearing)
    if style == "full" and _choose(rng, (True, True, False)):
        summary = ""
    introduce = style != "full" and rng is not None and rng.random() < 0.2
    templates = [_choose(rng, _templates(style, several)) for _ in panels]
    if introduce:
        summary, templates[0] = "", _choose(rng, PANELS)
    styles = ["full" if introduce and i == 0 else style for i in range(len(panels))]
    scenes = [_choose(rng, SCENE_WORDS[panel.scene]) for panel in panels]
    telling = [_choose(rng, (POSITION_AND_SIZE, POSITION, POSITION, NOTHING)) for _ in panels]
    between, shortest = _choose(rng, BETWEEN), False
    while True:
        phrases = [_panel_phrase(*row, wearing) for row in zip(panels, styles, templates, scenes, telling, strict=True)]
        caption = _marked(summary, phrases, between, rows, cols, markers)
        if length(caption) <= LIMITS[several] or shortest:
            return caption
        if max(telling):
            telling[telling.index(max(telling))] -= 1
        elif summary and style == "full":
            summary = ""
        elif style == "short":
            style = "pronoun"
            styles = [style if short == "short" else short for short in styles]
            templates = [
                _choose(rng, PRONOUN_PANELS[several]) if now == style else old
                for now, old in zip(styles, templates, strict=True)
            ]
        else:  # three or four subjects in four panels: the fewest words for all that has to be said
            summary = _summary(panels, "the story of {cast}:", wearing)
            templates = [PRONOUN_PANELS[several][0]] * len(panels)
            scenes = [min(SCENE_WORDS[panel.scene], key=length) for panel in panels]
            styles, shortest = ["pronoun"] * len(panels), True


def silent_caption(panels: tuple[Panel, ...], rows: int, cols: int, rng: np.random.Generator | None = None) -> str:
    """A joint caption that says the scene of every panel, and of who is there "it" or "they" and perhaps a place.

    panels, rng: as for joint_caption
    Errors: ValueError if the panels do not fill the grid
    """
    _check_grid(panels, rows, cols)
    several, between = len(panels[0].placed) > 1, _choose(rng, BETWEEN)
    phrases = [
        _panel_phrase(
            panel, "pronoun", _choose(rng, PRONOUN_PANELS[several]), _choose(rng, SCENE_WORDS[panel.scene]),
            _choose(rng, (POSITION, POSITION, NOTHING)), 0,
        )
        for panel in panels
    ]  # fmt: skip
    return _marked("", phrases, between, rows, cols, "image")


def say_domain(caption: str, domain: str, panels: int, rng: np.random.Generator) -> str:
    """Say in front of a caption what its panels are drawn in: "pencil drawings, two pictures of a red cat: ...".

    domain: a key of DOMAIN_WORDS
    """
    return f"{_choose(rng, DOMAIN_WORDS[domain][panels > 1])}, {caption}"


def _check_grid(panels: tuple[Panel, ...], rows: int, cols: int) -> None:
    if len(panels) != rows * cols:
        raise ValueError(f"{len(panels)} panels given, but a {rows}x{cols} grid has {rows * cols}; pass one per cell")


def _marked(summary: str, phrases: list[str], between: str, rows: int, cols: int, markers: str) -> str:
    """A caption of a summary, and a phrase behind the marker of every panel."""
    marked = [f"{m} {phrase}" for m, phrase in zip(markers_for(markers, rows, cols), phrases, strict=True)]
    return _tidy(summary + " " + between.join(marked)) + "."


def vocabulary() -> list[str]:
    """Every word and marker that a caption of up to four panels can hold; the punctuation beside them is , : ; ."""
    texts = [*SINGLE, *SUMMARIES, *PANELS, *PRONOUN_PANELS[False], *PRONOUN_PANELS[True], *SHAPES, *COLOURS, *SIZES]
    texts += [*PATTERNS[1:], *POSITION_WORDS.values(), *NUMBERS.values(), "a an and the several"]
    domains = [phrases for both in DOMAIN_WORDS.values() for phrases in both]
    texts += [text for group in (*SCENE_WORDS.values(), *ACCESSORY_WORDS.values(), *domains) for text in group]
    words = {word for text in texts for word in re.findall(r"\w+", re.sub(r"\{\w+\}", " ", text))}
    marks = {mark for group in POSITIONS.values() for mark in group}
    marks.update(markers_for("image", 2, 2), markers_for("scene", 2, 2))
    return sorted(words) + sorted(marks)
