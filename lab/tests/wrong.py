"""Pictures that a judge must not let pass, each wrong in one way and otherwise true."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
from PIL import Image, ImageFilter

from lab import world
from lab.domains import with_pencil, with_sparkles
from lab.tasks import WALK
from lab.truth import Seen
from lab.world import SCENES, Panel, draw, random_subject

KINDS = ("subject removed", "somebody else", "another place", "another scene", "blurred")
BLUR = 4  # pixels


def wrong(panel: Panel, kind: str, rng: np.random.Generator, size: int = 64) -> Image.Image:
    """Draw a panel of one subject wrongly. kind: of KINDS, or "true" """
    (one,) = panel.placed
    if kind == "subject removed":
        with patch.object(world, "_draw_subject"):
            return draw(panel, size)
    if kind == "blurred":
        return draw(panel, size).filter(ImageFilter.GaussianBlur(BLUR))
    changed = {}
    if kind == "somebody else":
        while (subject := random_subject(rng, None)).shape == one.subject.shape:
            pass
        changed = {"subject": subject}
    if kind == "another place":
        changed = {"position": str(rng.choice([place for place in WALK if place != one.position]))}
    panel = replace(panel, placed=(replace(one, **changed),))
    if kind == "another scene":
        panel = replace(panel, scene=str(rng.choice([scene for scene in SCENES if scene != panel.scene])))
    return draw(panel, size)


def with_effect(task: str, panel: Panel, kind: str, rng: np.random.Generator) -> Image.Image:
    """The second panel of sparkle or sketch, drawn of a wrong picture; blurred at last, not before the effect."""
    effect = with_pencil if task == "sketch" else lambda picture: with_sparkles(picture, panel.seed)
    if kind == "blurred":
        return effect(draw(panel)).filter(ImageFilter.GaussianBlur(BLUR))
    return effect(wrong(panel, kind, rng))


def seen(subject, **other):
    """What a reader without mistakes sees of a subject; other: traits that are wrong."""
    traits = {name: getattr(subject, name) for name in ("shape", "colour", "pattern", "accessory", "face", "hue")}
    traits |= {"position": "left", "size": "big", "angle": subject.angle, "spacing": subject.spacing}
    return Seen(**{**traits, **other})
