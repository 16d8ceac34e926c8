"""What filling in a panel is judged by: panel 3 of 2x2 sets of held-out subjects, from the three others.

A case is how much the caption tells of the subject: all that captions can, its shape, or nothing. The same captions and
noise are also run with other sets' panels, whose subjects the caption fits as well and whose other traits are drawn
anew, and with no panels at all, which is what chance gives.
"""

from dataclasses import replace

import numpy as np
from torch import Tensor

from .eyes import drawn_anew, with_subject
from .generate import Networks, generate, without
from .judge import FIGURES, NONE, OTHERS, OWN, TRAITS, Figures, Found, Judge, Ruler, details, options_of
from .panels import caption
from .scores import read_sets, to_tensors, traits_shown
from .train_truth import tensors_after
from .truth import Reader
from .world import Panel, random_set, random_subject

SEED = 9_200_000  # of the sets that are judged
MASKED = 3
COLUMNS = 6  # sets on a sheet
Sets = list[tuple[Panel, ...]]


def measure(telling: str, networks: Networks, metadata: dict[str, str], ruler: Ruler, count: int) -> Found:
    """Make the panel with the networks of an arm, from its own set's others and from another's, and judge it.

    telling: of lab.panels
    metadata: of the LoRA; the base has none
    """
    sets = held_out(count)
    captions = [caption(panels, 2, 2, telling, None) for panels in sets]
    shown = {OWN: sets, OTHERS: others(sets, telling), NONE: None}
    figures, made = {}, []
    for whose, kept in shown.items():
        rest = {} if kept is None else {"kept": without(to_tensors(kept), MASKED), "masked": (MASKED,)}
        image = generate(networks, captions, (2, 2), range(count), options_of(metadata), **rest)
        figures |= judge(ruler.reader, image, sets, whose)
        made.append(image[:COLUMNS])
    return figures, made[:1]


def measure_truth(telling: str, networks: Networks, ruler: Ruler, count: int) -> Found:
    """The same figures of the true panels, as the autoencoder gives them back: more cannot be reached."""
    sets = held_out(count)
    after = tensors_after(networks.autoencoder, to_tensors(sets))
    return judge(ruler.reader, after, sets, OWN), [after[:COLUMNS]]


def held_out(count: int) -> Sets:
    rng = np.random.default_rng(SEED)
    return [random_set(rng, 2, 2, 1, held_out=True) for _ in range(count)]


def others(sets: Sets, telling: str) -> Sets:
    """The same scenes and places with subjects that a caption which tells this much fits as well."""
    rng, changed = np.random.default_rng(SEED), []
    for subject in (panels[0].placed[0].subject for panels in sets):
        if telling == "all":
            changed.append(drawn_anew(subject, rng))
        else:
            anybody = random_subject(rng, None)
            changed.append(replace(anybody, shape=subject.shape) if telling == "shapes" else anybody)
    return [
        tuple(with_subject(panel, subject) for panel in panels) for panels, subject in zip(sets, changed, strict=True)
    ]


def judge(reader: Reader, image: Tensor, sets: Sets, whose: str) -> Figures:
    """Whether the masked panel shows its own scene, and which traits of the subject of its own set."""
    figures: Figures = {f"{name}, {whose}": [] for name in ("scene", *FIGURES)}
    for readings, panels in zip(read_sets(reader, image), sets, strict=True):
        found, panel = readings[MASKED - 1], panels[MASKED - 1]
        figures[f"scene, {whose}"].append(float(found.scene == panel.scene))
        for trait, value in traits_shown(found, panel.placed[0].subject).items():
            figures[f"{trait}, {whose}"].append(value)
    return figures


KEPT = Judge(
    "kept", measure, measure_truth, tuple(f"{name}, {OWN}" for name in ("scene", *FIGURES)), TRAITS, details,
    notes=("A caption tells all that captions can of the subject, or its shape only, or nothing; always the scene.",),
    sheet="true sets, then for every arm panel 3 (bottom left) from the three others",
)  # fmt: skip
