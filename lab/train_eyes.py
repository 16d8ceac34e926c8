"""Train the eyes of lab.eyes beside a finished model: python -m lab.train_eyes --model weights/tiny

CLIP: FLUX's own text tower is locked, bit for bit, and a vision tower and both projections are trained against it
(LiT, arXiv:2111.07991), in batches of families: panels that differ in a single named trait.

DINOv2: the architecture only. The original learns from pictures alone, by distilling itself over crops and masked
patches; this one is told which panels show the same subject (supervised contrastive learning, arXiv:2004.11362)
and with which traits. So it sees identity in this picture world and is no general image model. Each subject comes
with a twin that has the same description and other hidden traits, in the very same scenes and places: only identity
tells them apart.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from model.autoencoder import AutoEncoder
from model.checkpoint import read_json, save_safetensors, write_atomic
from model.weights import ModelFiles, find_model, load_autoencoder

from . import entry
from .captions import panel_prompt
from .export import bfloat16, write_config
from .eyes import OPTIONS, hub_name, text_tower, to_pictures, twin, with_subject, with_trait
from .sets import PANEL
from .train_truth import roughen, round_trip
from .training import Stage, Work, run
from .truth import HIDDEN, PLACE, TRAITS, labels
from .world import POSITIONS, Panel, is_held_out, random_set

# 0.65 s a step on one core of about 50 GFLOP/s, so 10 minutes each, after 2 of drawing and decoding
CLIP = Stage("clip-vision", steps=900, batch=128, lr=2e-3, muon_lr=5e-3, warmup=50, decay_from=0.2, ema=0.99)
DINO = Stage("dinov2", steps=900, batch=128, lr=2e-3, muon_lr=5e-3, warmup=50, decay_from=0.2, ema=0.99)
WIDTH, PATCH, FAMILY = 128, 8, 4
SPREAD = 0.08  # of new weights; the 0.02 that both models share is for larger widths, and learns late here
FAMILIES = 4000
DECODED = 400  # of them, as the autoencoder gives them back
SEED = 4_000_000
TEMPERATURE = 0.1  # of DINOv2's cosines; CLIP's is learned
MOST = math.log(100)  # the largest logit scale, as in CLIP
TOGETHER = 0.1  # weight of the term that draws both views of a subject together; at 0.5 all features fall together
TOLD = 0.2  # weight of reading the traits off the features

Pool = tuple[Tensor, list[list[Panel]]]  # pictures (families, FAMILY, 3, 64, 64) uint8, and what they show


# what is drawn


def siblings(rng: np.random.Generator) -> list[Panel]:
    """A panel, and the same one with one named trait changed, three times: what CLIP must read off a caption."""
    (first,) = random_set(rng, 1, 1)
    return [first] + [changed(first, str(trait), rng) for trait in rng.permutation(list(OPTIONS))[: FAMILY - 1]]


def changed(panel: Panel, trait: str, rng: np.random.Generator) -> Panel:
    """The panel with another value of one trait; never a held-out subject."""
    others = [with_trait(panel, trait, value) for value in OPTIONS[trait]]
    others = [other for other in others if other != panel and not is_held_out(other.placed[0].subject)] or [panel]
    return others[int(rng.integers(len(others)))]


def subject_and_twin(rng: np.random.Generator) -> list[Panel]:
    """Two scenes with one subject, then the same two with its twin, of which at least one hidden trait is other."""
    panels = random_set(rng, 1, 2)
    subject = panels[0].placed[0].subject
    visible = HIDDEN if subject.pattern != "plain" else ("face", "hue")
    other = [trait for trait in visible if rng.random() < 0.5] or [str(rng.choice(visible))]
    double = twin(subject, rng, other)
    return [*panels, *(with_subject(panel, double) for panel in panels)]


def draw_some(job: tuple[Callable[[np.random.Generator], list[Panel]], int, int]) -> Pool:
    """Draw families; the job is (siblings or subject_and_twin, seed, count)."""
    make, seed, count = job
    rng = np.random.default_rng(seed)
    families = [make(rng) for _ in range(count)]
    return torch.stack([to_pictures(family) for family in families]), families


def draw_pool(make: Callable, seed: int, autoencoder: AutoEncoder, processes: int) -> Pool:
    """Draw all families, and send the first through the autoencoder."""
    jobs = [(make, SEED + 1000 * seed + i, 250) for i in range(FAMILIES // 250)]
    with multiprocessing.get_context("spawn").Pool(processes) as workers:
        parts = list(workers.imap(draw_some, jobs))
    pictures = torch.cat([drawn for drawn, _ in parts])
    pictures[:DECODED] = round_trip(autoencoder, pictures[:DECODED].flatten(0, 1)).unflatten(0, (-1, FAMILY))
    return pictures, [family for _, families in parts for family in families]


def chosen(pictures: Tensor, stage: Stage, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the families of a batch: their numbers, and their pictures (batch, 3, 64, 64) in -1..1, roughened."""
    numbers = torch.randint(len(pictures), (stage.batch // FAMILY,), generator=generator)
    return numbers, roughen(pictures[numbers].flatten(0, 1).float() / 127.5 - 1, generator)


def is_hidden(name: str, p: Tensor) -> bool:
    return p.ndim == 2 and ".layer" in name


# CLIP


def new_clip(files: ModelFiles, tokenizer: CLIPTokenizer) -> CLIPModel:
    """FLUX's text tower, frozen, with a new vision tower and new projections.

    Errors: ValueError if the text encoder is not one of the hub layout
    """
    settings = read_json(files.clip / "config.json")
    settings.pop("dtype", None)
    vision = dict(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, intermediate_size=2 * WIDTH,
        image_size=PANEL, patch_size=PATCH, initializer_range=SPREAD,
    )  # fmt: skip
    clip = CLIPModel(
        CLIPConfig(text_config=settings, vision_config=vision, projection_dim=WIDTH, logit_scale_init_value=3.0)
    )
    tensors = text_tensors(files)
    if tensors.keys() != {name for name in clip.state_dict() if name.startswith("text_model.")}:
        raise ValueError(f"{files.clip} does not hold the text tower that its config.json describes; download it again")
    clip.load_state_dict({**clip.state_dict(), **tensors})
    clip.text_model.requires_grad_(False)
    whiten(clip, tokenizer)
    return clip


def text_tensors(files: ModelFiles) -> dict[str, Tensor]:
    """The text tower as it is in its file."""
    return load_file(files.clip / "model.safetensors")


@torch.no_grad()
def whiten(clip: CLIPModel, tokenizer: CLIPTokenizer, count: int = 1000) -> None:
    """Start the text projection where captions have no mean and the same spread in every direction.

    In the locked tower's vector, scene and colour spread 20 times as far as shape and accessory, which would
    otherwise be learned last.
    """
    rng = np.random.default_rng(SEED)
    vectors = text_tower(clip, tokenizer, [panel_prompt(random_set(rng, 1, 1)[0]) for _ in range(count)])
    spread, axes = torch.linalg.eigh(torch.cov(vectors.T))
    white = axes.T / spread.clamp(min=1e-3 * float(spread.mean())).sqrt()[:, None]
    mean = F.normalize(white @ vectors.mean(dim=0), dim=0)
    white = white - torch.outer(mean, mean @ white)  # a projection has no bias, so the mean's direction goes
    clip.text_projection.weight.copy_(white * WIDTH**-0.5 / white.std())


def clip_losses(clip: CLIPModel, image: Tensor, spoken: Tensor) -> dict[str, Tensor]:
    """The symmetric contrastive loss, and how often a panel finds its caption among those of its family.

    image: (B, 3, 64, 64), spoken: (B, D) of the text tower, family by family
    """
    seen = F.normalize(clip.visual_projection(clip.vision_model(pixel_values=image).pooler_output), dim=-1)
    said = F.normalize(clip.text_projection(spoken), dim=-1)
    logits = clip.logit_scale.clamp(max=MOST).exp() * seen @ said.T
    target = torch.arange(len(image), device=image.device)
    family = torch.arange(len(image) // FAMILY, device=image.device)
    own = logits.unflatten(0, (-1, FAMILY)).unflatten(2, (-1, FAMILY))[family, :, family]  # (families, 4, 4)
    return {
        "loss": (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2,
        "in its family": (own.argmax(dim=2) == target[:FAMILY]).float().mean(),
    }


def train_clip(
    stage: Stage, clip: CLIPModel, tokenizer: CLIPTokenizer, pool: Callable[[], Pool], work: Work
) -> CLIPModel:
    """Train all but the text tower; gives the averaged weights on the CPU.

    Captions are in the one phrasing that tells everything: of varied phrasings, the locked tower's vector shows the
    shape to a linear projection half the time, of this one in seven cases of eight.

    pool: gives families of siblings; asked only if there is a step left to train
    """
    clip = clip.to(work.device)

    @functools.cache
    def data() -> tuple[Tensor, Tensor]:
        pictures, families = pool()
        captions = [panel_prompt(panel) for family in families for panel in family]
        return pictures, text_tower(clip, tokenizer, captions).unflatten(0, (-1, FAMILY))

    def loss_at(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        pictures, spoken = data()
        numbers, image = chosen(pictures, stage, generator)
        return clip_losses(clip, image.to(work.device), spoken[numbers.to(spoken.device)].flatten(0, 1))

    return run(stage, clip, loss_at, work, is_hidden).cpu()


# DINOv2


def new_dino() -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=2, image_size=PANEL, patch_size=PATCH,
        use_mask_token=False, initializer_range=SPREAD,
    )  # fmt: skip
    return Dinov2Model(config)


def traits_of(panel: Panel) -> list[int]:
    """The classes of lab.truth for the panel's only subject; -1 for a trait it lacks, and for its size."""
    first = 1 + POSITIONS.index(panel.placed[0].position) * len(TRAITS)
    told = dict(zip(TRAITS, labels(panel)[first : first + len(TRAITS)], strict=True))
    return list({**told, "size": -1}.values())


def dino_losses(dino: Dinov2Model, head: nn.Module, image: Tensor, told: Tensor) -> dict[str, Tensor]:
    """InfoNCE between the two views of every subject, against all others of the batch, the twin in front.

    The twin stands in the same scenes and places, so that a likeness of scenes only raises the loss; a second term
    draws both views of a subject together directly, for scene, place and size are all that they differ in. A
    third reads the subject's traits off the features: it is what sets off learning, which starts slowly without.

    image: (B, 3, 64, 64), in families of subject_and_twin: view 1, view 2, view 1 of the twin, view 2 of the twin
    told: (B, traits) of traits_of
    """
    seen = dino(pixel_values=image).pooler_output
    z = F.normalize(seen, dim=-1)
    cosine = z @ z.T
    here = torch.arange(len(z), device=z.device)
    other_view = here ^ 1
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    loss = F.cross_entropy((cosine / TEMPERATURE).masked_fill(itself, -torch.inf), other_view)
    same = cosine[here, other_view]
    nearest_twin = torch.maximum(cosine[here, here ^ 2], cosine[here, here ^ 3])
    parts = head(seen).split(list(TRAITS.values()), dim=1)
    wrong = [F.cross_entropy(part, told[:, i], ignore_index=-1, reduction="sum") for i, part in enumerate(parts)]
    traits = torch.stack(wrong).sum() / len(image)
    return {
        "loss": loss + TOGETHER * (1 - same).mean() + TOLD * traits,
        "contrast": loss.detach(),
        "traits": traits.detach(),
        "before its twin": (same > nearest_twin).float().mean(),
    }


def train_dino(stage: Stage, dino: Dinov2Model, pool: Callable[[], Pool], work: Work) -> Dinov2Model:
    """Train on families of subject_and_twin; gives the averaged weights on the CPU.

    pool: asked only if there is a step left to train
    """
    module = nn.ModuleDict({"dino": dino, "head": nn.Linear(WIDTH, PLACE)}).to(work.device)

    @functools.cache
    def data() -> tuple[Tensor, Tensor]:
        pictures, families = pool()
        return pictures, torch.tensor([[traits_of(panel) for panel in family] for family in families])

    def loss_at(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        pictures, told = data()
        numbers, image = chosen(pictures, stage, generator)
        told = told[numbers].flatten(0, 1).to(work.device)
        return dino_losses(module["dino"], module["head"], image.to(work.device), told)

    return run(stage, module, loss_at, work, is_hidden)["dino"].cpu()


# files


def write_eye(module: nn.Module, folder: Path, processor: str, exact: dict[str, Tensor] | None = None) -> None:
    """Write a model in the layout of the hub, in bfloat16.

    processor: the class of transformers that prepares its pictures
    exact: tensors to be written as they are
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {hub_name(name): p for name, p in bfloat16(module).items()} | (exact or {})
    save_safetensors(tensors, folder / "model.safetensors")
    write_config(module.config, type(module).__name__, folder)
    settings = {
        "image_processor_type": processor, "do_convert_rgb": True, "do_resize": True, "resample": 3,
        "size": {"shortest_edge": PANEL}, "do_center_crop": True, "crop_size": {"height": PANEL, "width": PANEL},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    write_atomic(folder / "preprocessor_config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")


def train_both(args: argparse.Namespace) -> None:
    """Train and write CLIP, then DINOv2; a stage that is finished in --work is only written."""
    files = find_model(args.model)
    autoencoder = load_autoencoder(files.autoencoder)
    work = Work(args.work, args.seed, args.device)
    pools = {
        make: functools.partial(draw_pool, make, seed, autoencoder, args.processes)
        for make, seed in ((siblings, 2 * args.seed), (subject_and_twin, 2 * args.seed + 1))
    }
    torch.manual_seed(args.seed)
    exact = text_tensors(files)
    tower = hashlib.sha256(b"".join(t.view(torch.uint8).numpy().tobytes() for t in exact.values())).hexdigest()
    tokenizer = CLIPTokenizer.from_pretrained(str(files.clip_tokenizer), local_files_only=True)
    locked = dataclasses.replace(work, origin=f"text tower {tower[:12]}")
    clip = train_clip(CLIP, new_clip(files, tokenizer), tokenizer, pools[siblings], locked)
    write_eye(clip, args.out / "clip", "CLIPImageProcessor", exact)
    torch.manual_seed(args.seed)
    dino = train_dino(DINO, new_dino(), pools[subject_and_twin], work)
    write_eye(dino, args.out / "dinov2", "BitImageProcessor")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.train_eyes", description=__doc__)
    parser.add_argument("--model", default="tiny", help="whose text tower CLIP shares, and whose autoencoder is used")
    parser.add_argument("--out", type=Path, default=Path("weights/tiny"), help="folder that receives clip/ and dinov2/")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=entry.positive, default=2, help="that draw panels")
    return entry.run(parser, train_both, argv)


if __name__ == "__main__":
    sys.exit(main())
