"""What a LoRA for references (UNO) is judged by: whose traits appear, who is taken for whom, and in which scene.

Every figure is measured on pairs of held-out subjects, from the same noise with their references and with none. What
prompts do not tell and references do not give can only be right by chance, and the latter run says how often that is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iclora.config import REFERENCE_GUIDANCE
from iclora.references import TRAINED_WITH
from sampling.images import to_tensor

from .eyes import Eyes, clip_image_features, dino_features
from .generate import Networks, Options, generate
from .judge import Figures, Found, Judge, Ruler
from .pairs import Pair, make_pairs
from .scores import above_chance, difference, hidden_agreement, interval, line, verdict
from .tasks import is_pencil
from .train_truth import tensors_after
from .truth import Reading, Seen, read
from .world import Placed, Subject

SEED = 9_100_000  # of the pairs that are judged
COLUMNS = 8  # pairs on a sheet
TOLD = {"recolour": "colour", "hat": "accessory", "try-on": "accessory"}  # by kind, the trait that prompts ask for
NAMED = ("colour", "pattern", "accessory")
LOOK = ("colour", "pattern", "hue", "face")
MARKS = (*NAMED, "face")  # traits that every subject has, and that tell one from another
NONE = "no references"
CONTROLLED = (
    "asked for", "traits", "look", "all right", "swapped", "scene", "pasted", "DINO", "CLIP-I",
)  # fmt: skip
FEWER = ("swapped", "pasted")  # of which fewer are better; what no references give is taken off
PLAIN = ("scene",)  # that prompts tell, so that references need not
BARS = {("one", "look"): 0.8, ("one", "scene"): 0.95, ("two", "all right"): 0.65, ("two", "swapped"): 0.05}


def measure(kind: str, networks: Networks, metadata: dict[str, str], ruler: Ruler, count: int) -> Found:
    """Make pictures with the networks of an arm, as its LoRA was trained, and judge them.

    kind: of lab.pairs
    metadata: of the LoRA; the base has none
    """
    pairs = make_pairs(kind, count, SEED, held_out=True)
    make = partial(make_pictures, networks, metadata, [pair.prompt for pair in pairs])
    made = make([pair.references for pair in pairs])
    chance = judge(kind, ruler, make(()), pairs)
    figures = judge(kind, ruler, made, pairs) | {f"{name}, {NONE}": values for name, values in chance.items()}
    return figures, [made[:COLUMNS]]


def make_pictures(
    networks: Networks, metadata: dict[str, str], prompts: Sequence[str], references: Sequence[Sequence[Image.Image]]
) -> Tensor:
    """Make a picture for every prompt, with the options that a LoRA was trained with."""
    trained = {name: kind for name, kind in TRAINED_WITH.items() if f"iclora.{name}" in metadata}
    options = {name: kind(metadata[f"iclora.{name}"]) for name, kind in trained.items()}
    options = Options(guidance=REFERENCE_GUIDANCE, **options)
    return generate(networks, prompts, (1, 1), range(len(prompts)), options, references=references)


def measure_truth(kind: str, networks: Networks, ruler: Ruler, count: int) -> Found:
    """The same figures of the true pictures, as the autoencoder gives them back: more cannot be reached."""
    pairs = make_pairs(kind, count, SEED, held_out=True)
    after = tensors_after(networks.autoencoder, to_tensors([pair.target for pair in pairs]))
    shown = [to_tensors(pictures) for pictures in zip(*(pair.references for pair in pairs[:COLUMNS]), strict=True)]
    return judge(kind, ruler, after, pairs), [*shown, after[:COLUMNS]]


def to_tensors(pictures: Sequence[Image.Image]) -> Tensor:
    return torch.cat([to_tensor(picture) for picture in pictures])


# scores


def judge(kind: str, ruler: Ruler, image: Tensor, pairs: list[Pair]) -> Figures:
    """All figures of pictures (N, 3, 64, 64); each has a value for every pair that it can be told of."""
    if kind == "sketch":  # the reader has never seen a drawing
        figures = {"asked for": [float(is_pencil(one)) for one in image]}
    else:
        figures = {}
        for reading, pair in zip(read(ruler.reader, image), pairs, strict=True):
            for name, value in score(reading, pair, TOLD.get(kind)).items():
                figures.setdefault(name, []).append(value)
    return figures | (likeness(ruler.eyes, image, pairs) if ruler.eyes else {})


def score(reading: Reading, pair: Pair, told: str | None = None) -> dict[str, float]:
    """What one picture gets; traits that no subject of the pair has are left out.

    told: the trait that the prompt asks for, and the reference does not show
    """
    subjects = [one.subject for one in pair.panel.placed]
    found = [next((seen for seen in reading.seen if seen.shape == s.shape), None) for s in subjects]
    agree = [agreement(reading, seen, s) for seen, s in zip(found, subjects, strict=True)]
    got = {"asked for": float(np.mean([one.pop(told) for one in agree]))} if told else {}
    got["traits"] = float(np.mean([np.mean(list(one.values())) for one in agree]))
    got["look"] = float(np.mean([one[trait] for one in agree for trait in LOOK if trait in one]))
    for trait in (*NAMED, "face", "hue"):
        if values := [one[trait] for one in agree if trait in one]:
            got[trait] = float(np.mean(values))
    got["missing"] = float(np.mean([seen is None for seen in found]))
    got["scene"] = float(reading.scene == pair.panel.scene)
    got["copied"] = float(reading.scene in {panel.scene for panel in pair.shown})
    drawn = zip(found, pair.panel.placed, (panel.placed[0] for panel in pair.shown), strict=False)
    if pasted := [place_of(seen) == place_of(shown) for seen, one, shown in drawn if place_of(one) != place_of(shown)]:
        got["pasted"] = float(np.mean(pasted))
    if len(subjects) > 1:
        right = [all(one[trait] for trait in NAMED) for one in agree]
        got |= {"right": float(np.mean(right)), "all right": float(all(right))}
    cast = [*subjects, *(panel.placed[0].subject for panel in pair.shown[len(subjects) :])]
    if len(cast) > 1:
        rest = [[s for s in cast if s is not own] for own in subjects]
        everyone = list(zip(found, subjects, rest, strict=True))
        taken = [is_another(*one) for one in everyone]
        got |= {"swapped": float(any(taken)), "mistaken": float(np.mean(taken))}
        got["confused"] = float(np.mean([borrowed(*one) for one in everyone]))
    return got


def agreement(reading: Reading, seen: Seen | None, subject: Subject) -> dict[str, bool]:
    """Which traits of a subject the one of its shape has; none if nobody has it."""
    named = {trait: seen is not None and getattr(seen, trait) == getattr(subject, trait) for trait in NAMED}
    hidden = hidden_agreement(reading, subject)
    return named | {trait: hidden[trait] for trait in ("face", "hue")}


def place_of(one: Seen | Placed | None) -> tuple[str, str] | None:
    """Where somebody stands, and how large; nobody stands nowhere."""
    return (one.position, one.size) if one else None


def is_another(seen: Seen | None, own: Subject, others: list[Subject]) -> bool:
    """Whether somebody has most of the marks in which another subject differs from the one that it should be."""
    for one in others:
        differ = [mark for mark in MARKS if getattr(own, mark) != getattr(one, mark)]
        if seen and 2 * sum(getattr(seen, mark) == getattr(one, mark) for mark in differ) > len(differ):
            return True
    return False


def borrowed(seen: Seen | None, own: Subject, others: list[Subject]) -> float:
    """Which share of somebody's marks is another subject's and not its own."""
    if seen is None:
        return 0.0
    wrong = [mark for mark in MARKS if getattr(seen, mark) != getattr(own, mark)]
    return sum(any(getattr(seen, mark) == getattr(one, mark) for one in others) for mark in wrong) / len(MARKS)


def likeness(eyes: Eyes, image: Tensor, pairs: list[Pair]) -> Figures:
    """The paper's scores of likeness: cosines to the references, a mean over those of a picture.

    Its third score, CLIP-T, is left out: it ranks true pictures below those made without any references.
    """
    seen = clip_image_features(eyes.clip, image)
    references = to_tensors([picture for pair in pairs for picture in pair.references])

    def mean(made: Tensor, shown: Tensor) -> list[float]:
        return torch.einsum("nd,nrd->nr", made, shown.unflatten(0, (len(pairs), -1))).mean(dim=1).tolist()

    return {
        "DINO": mean(dino_features(eyes.dino, image), dino_features(eyes.dino, references)),
        "CLIP-I": mean(seen, clip_image_features(eyes.clip, references)),
    }


# tables

HEAD = (
    "What the references add: the share above chance, (own - none) / (ceiling - none); of what should be rare, the "
    "difference own - none; of the prompt's scene, the figure itself.",
    "",
    "| arm | figure | with references | none | ceiling | above chance | bar | |",
    "|---|---|---|---|---|---|---|---|",
)


def controls(
    kind: str, name: str, figures: Figures, most: Figures, bars: Mapping[tuple[str, str], float] = MappingProxyType({})
) -> list[str]:
    """Lines of an arm beside the same without references, what the references add to chance, and whether it is enough.

    bars: by kind and figure
    """
    lines = []
    for figure in CONTROLLED:
        if figure not in figures:  # not told of this kind
            continue
        own, none, fewer = figures[figure], figures[f"{figure}, {NONE}"], figure in FEWER
        cells = [interval(values) for values in (own, none, most[figure])]
        if fewer:
            reached = difference(own, none)
        else:
            reached = interval(own) if figure in PLAIN else above_chance(own, none, most[figure])
        wanted = bars.get((kind, figure))
        told = ("", "") if wanted is None or reached is None else verdict(reached[0], wanted, fewer)
        lines.append(line(f"{kind}: {name}", figure, [*cells, reached], *told))
    return lines


UNO = Judge(
    "uno", measure, measure_truth, ("traits", "scene", "copied"), HEAD, controls,
    notes=(
        "traits: colour, pattern, accessory, face and hue that the subject of the right shape shares with its "
        "reference; prompts tell none of them, but for what is asked for; look: all but the accessory. right: its "
        "colour, pattern and accessory are all its reference's; all right: every subject is. mistaken: the share of "
        "subjects with most of the marks (colour, pattern, accessory, face) in which another's reference differs from "
        "their own; swapped: there is one. confused: the share of marks that are another's. scene: the prompt's; "
        "copied: that of a reference; pasted: of the subjects that the true picture has in another place or size than "
        "their reference, those that stand as in the reference. The paper's cells are DINO / CLIP-I / CLIP-T on "
        "DreamBench, times 100; CLIP-T is not measured here: it ranked true pictures below those without references.",
    ),
    sheet="references, true pictures after the autoencoder, then every arm (its first seed) from the same noise",
    eyes=True,
)  # fmt: skip
UNO_WITH_BARS = replace(UNO, details=partial(controls, bars=BARS))
