"""The eyes of the experiments: CLIP and DINOv2 at tiny size, and how well they see held-out subjects.

Scores of pictures are cosines of their features: of two pictures (CLIP-I, DINO), and of picture and caption only to
measure CLIP itself. lab.train_eyes trains both; here they are loaded and measured: CLIP by zero-shot accuracy of every
trait that captions name, DINOv2 by how well its cosine tells a subject from others that the same caption describes.

Letters: N pictures or captions, D width of the features, O options of a trait.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, Dinov2Model

from iclora.backbones import load_network
from model.autoencoder import AutoEncoder
from model.weights import find_model

from .captions import panel_prompt
from .scores import interval
from .sets import PANEL, composite
from .train_truth import tensors_after
from .truth import HIDDEN, turn
from .world import ACCESSORIES, COLOURS, FACES, PATTERNS, SCENES, SHAPES, Panel, Subject, random_set, random_subject

SEED = 7_000_060  # far from the seeds of training
OPTIONS = {
    "shape": tuple(SHAPES), "colour": tuple(COLOURS), "pattern": PATTERNS, "accessory": ACCESSORIES,
    "scene": tuple(SCENES),
}  # fmt: skip
# Names inside DINOv2: transformers 5 changed its own, the files on the hub did not.
HUB_NAMES = {
    "attention.q_proj.": "attention.attention.query.", "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.", "attention.o_proj.": "attention.output.dense.",
}  # fmt: skip

Look = Callable[[Tensor], Tensor]  # pictures (N, 3, 64, 64) in -1..1 -> features (N, D) of length 1
Tell = Callable[[list[str]], Tensor]  # captions -> features (N, D) of length 1


# the models


@dataclass(frozen=True)
class Eyes:
    """Both models of a model folder, in float32 on the CPU, and the tokenizer of CLIP."""

    clip: CLIPModel
    tokenizer: CLIPTokenizer
    dino: Dinov2Model


def load_eyes(model: str) -> Eyes:
    """Load the eyes that lie in the folders clip/ and dinov2/ of a model.

    model: as in model.weights.find_model
    Errors: ValueError for missing or damaged files
    """
    files = find_model(model)
    tokenizer = CLIPTokenizer.from_pretrained(str(files.clip_tokenizer), local_files_only=True)
    clip = load_network(CLIPModel, files.root / "clip", "cpu")
    return Eyes(clip, tokenizer, load_network(Dinov2Model, files.root / "dinov2", "cpu"))


def hub_name(name: str) -> str:
    """The name of a tensor of either model in files on the hub."""
    for ours, theirs in HUB_NAMES.items():
        name = name.replace(ours, theirs)
    return name


@torch.no_grad()
def dino_features(model: Dinov2Model, image: Tensor) -> Tensor:
    """The class token of every picture, at length 1; the DINO score of two pictures is their dot product.

    image: (N, 3, 64, 64) in -1..1
    Returns (N, D)
    Errors: ValueError for pictures of another size
    """
    parts = _checked(image, model.config.image_size).split(256)
    return F.normalize(torch.cat([model(pixel_values=part).pooler_output for part in parts]), dim=-1)


@torch.no_grad()
def clip_image_features(model: CLIPModel, image: Tensor) -> Tensor:
    """Pictures in the space that they share with captions, at length 1.

    image: (N, 3, 64, 64) in -1..1
    Returns (N, D)
    Errors: ValueError for pictures of another size
    """
    parts = _checked(image, model.config.vision_config.image_size).split(256)
    seen = torch.cat([model.vision_model(pixel_values=part).pooler_output for part in parts])
    return F.normalize(model.visual_projection(seen), dim=-1)


@torch.no_grad()
def clip_text_features(model: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions in the space that they share with pictures, at length 1: (N, D)."""
    return F.normalize(model.text_projection(text_tower(model, tokenizer, captions)), dim=-1)


@torch.no_grad()
def text_tower(model: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """The vector of every caption that FLUX gets too, before the projection: (N, D).

    Captions are padded to the longest of a batch only: the tower looks back, never ahead, so it changes nothing.
    """
    found = []
    for first in range(0, len(captions), 256):
        some = captions[first : first + 256]
        ids = tokenizer(some, padding=True, truncation=True, return_tensors="pt").input_ids
        found.append(model.text_model(input_ids=ids.to(model.device)).pooler_output)
    return torch.cat(found)


def _checked(image: Tensor, side: int) -> Tensor:
    if image.shape[1:] != (3, side, side):
        raise ValueError(
            f"pictures are {tuple(image.shape)}, not (N, 3, {side}, {side}); cut out and resize the panels"
        )
    return image


# panels


def to_pictures(panels: Sequence[Panel]) -> Tensor:
    """Draw panels: (N, 3, 64, 64) uint8."""
    return torch.from_numpy(np.stack([composite((panel,), 1, 1, PANEL) for panel in panels])).permute(0, 3, 1, 2)


def to_image(panels: Sequence[Panel]) -> Tensor:
    """Draw panels: (N, 3, 64, 64) in -1..1."""
    return to_pictures(panels).float() / 127.5 - 1


def with_subject(panel: Panel, subject: Subject) -> Panel:
    """The panel with another subject in the place of its only one."""
    (one,) = panel.placed
    return replace(panel, placed=(replace(one, subject=subject),))


def with_trait(panel: Panel, trait: str, value: str) -> Panel:
    """The panel of a single subject with one of OPTIONS changed."""
    if trait == "scene":
        return replace(panel, scene=value)
    return with_subject(panel, replace(panel.placed[0].subject, **{trait: value}))


def twin(subject: Subject, rng: np.random.Generator, traits: Sequence[str] = HIDDEN) -> Subject:
    """A subject that captions cannot tell from this one, with some of the hidden traits clearly other."""
    face = (subject.face + int(rng.integers(1, len(FACES)))) % len(FACES)
    hue = subject.hue - float(np.sign(subject.hue) or 1) * float(rng.uniform(0.8, 1.0))
    angle = (subject.angle + turn(subject.pattern) / 2) % 180
    other = {"face": face, "hue": hue, "angle": angle, "spacing": 1 - subject.spacing}
    return replace(subject, **{trait: other[trait] for trait in traits})


def drawn_anew(subject: Subject, rng: np.random.Generator) -> Subject:
    """A subject of the same description whose hidden traits are drawn again; some may come out alike."""
    fresh = random_subject(rng, None)
    return replace(subject, **{trait: getattr(fresh, trait) for trait in HIDDEN})


# CLIP: zero-shot accuracy


def zero_shot(seen: Tensor, panels: Sequence[Panel], tell: Tell) -> dict[str, tuple[Tensor, Tensor]]:
    """By trait: which panels get their own option, the one whose caption has the highest cosine.

    Every option is put into the caption of every panel. With the trait alone, an option is the mean of its
    captions over all panels, so that nothing else is known of a panel; with the rest told, it is the panel's own
    caption with that option, so that only the trait is in question.

    seen: (N, D) features of the panels, each with a single subject
    Returns for every trait (N,) bool with the trait alone, and (N,) bool with the rest told
    Source: arXiv:2103.00020, prompt ensembles
    """
    found = {}
    for trait, options in OPTIONS.items():
        captions = [panel_prompt(with_trait(panel, trait, value)) for panel in panels for value in options]
        told = tell(captions).unflatten(0, (len(panels), len(options)))  # (N, O, D)
        alone = F.normalize(told.mean(dim=0), dim=-1)  # (O, D)
        right = torch.tensor([[with_trait(panel, trait, value) for value in options].index(panel) for panel in panels])
        rest_told = (told @ seen[:, :, None])[..., 0]  # (N, O)
        found[trait] = ((seen @ alone.T).argmax(dim=1) == right, rest_told.argmax(dim=1) == right)
    return found


def clip_zero_shot(look: Look, tell: Tell, count: int = 200) -> list[str]:
    """A table of zero-shot accuracy on panels with one held-out subject.

    count: panels
    """
    rng = np.random.default_rng(SEED)
    panels = [random_set(rng, 1, 1, 1, held_out=True)[0] for _ in range(count)]
    lines = ["| trait | chance | trait alone | rest told |", "|---|---|---|---|"]
    for trait, hits in zero_shot(look(to_image(panels)), panels, tell).items():
        cells = ["{:.1%} ({:.1%} to {:.1%})".format(*interval(right.numpy())) for right in hits]
        lines.append(f"| {trait} | {1 / len(OPTIONS[trait]):.1%} | {cells[0]} | {cells[1]} |")
    return lines


# DINOv2: the same subject against others


def auc(same: np.ndarray, other: np.ndarray) -> float:
    """How often a score of one kind beats one of the other kind; ties count half."""
    ranked = np.sort(other)
    below, up_to = (np.searchsorted(ranked, same, side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(other))


def auc_interval(same: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """The AUC and its 95 % bootstrap interval over subjects, each of which has one score of both kinds."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(same), size=(1000, len(same)))
    found = [auc(same[some], other[some]) for some in drawn]
    return auc(same, other), float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))


def dino_auc(look: Look, count: int = 200) -> list[str]:
    """A table of AUCs: the same subject in another scene and place, against other subjects.

    count: held-out subjects
    """
    rng = np.random.default_rng(SEED + 1)
    kinds: dict[str, list[Panel]] = {"first": [], "same": [], "twin": [], "twin here": [], "anew": []}
    for _ in range(count):
        first, same, elsewhere = random_set(rng, 1, 3, 1, held_out=True)
        subject = first.placed[0].subject
        other = twin(subject, rng)
        group = (first, same, with_subject(elsewhere, other), with_subject(first, other),
                 with_subject(elsewhere, drawn_anew(subject, rng)))  # fmt: skip
        for kind, panel in zip(kinds.values(), group, strict=True):
            kind.append(panel)
    features = {name: look(to_image(panels)) for name, panels in kinds.items()}
    features["anyone"] = features["same"].roll(1, dims=0)
    cosine = {name: (features["first"] * seen).sum(dim=1).numpy() for name, seen in features.items()}
    lines = ["| against | AUC | 95 % interval | mean cosine |", "|---|---|---|---|"]
    lines.append(f"| (the same subject, another scene) | | | {cosine['same'].mean():.2f} |")
    for name, label in (
        ("twin", "same description, every hidden trait other"),
        ("twin here", "the same, in the very scene and place"),
        ("anew", "same description, hidden traits drawn anew"),
        ("anyone", "any other subject"),
    ):
        found = "{:.3f} | {:.3f} to {:.3f}".format(*auc_interval(cosine["same"], cosine[name]))
        lines.append(f"| {label} | {found} | {cosine[name].mean():.2f} |")
    return lines


def tables(eyes: Eyes, autoencoder: AutoEncoder, count: int = 200) -> list[str]:
    """All tables of both eyes, on fresh panels and on what the autoencoder makes of them."""

    def tell(captions: list[str]) -> Tensor:
        return clip_text_features(eyes.clip, eyes.tokenizer, captions)

    lines, after = [], partial(tensors_after, autoencoder)
    for name, through in (("fresh panels", lambda image: image), ("after the autoencoder", after)):
        lines += [f"CLIP, zero-shot, {name}:", ""]
        lines += clip_zero_shot(lambda image, by=through: clip_image_features(eyes.clip, by(image)), tell, count)
        lines += ["", f"DINOv2, the same subject against others, {name}:", ""]
        lines += dino_auc(lambda image, by=through: dino_features(eyes.dino, by(image)), count) + [""]
    return lines[:-1]
