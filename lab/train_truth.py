"""Train the reader of lab.truth: python -m lab.train_truth --model weights/tiny

It sees panels with one to four subjects of any traits, held-out ones among them, and what the model's autoencoder
makes of half of them.
"""

import argparse
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.autoencoder import AutoEncoder
from model.checkpoint import save_safetensors
from model.weights import find_model, load_autoencoder

from . import entry
from .training import Stage, Work, run
from .truth import Reader, groups, labels
from .world import draw, random_set

STAGE = Stage("truth", steps=3000, batch=48, lr=2e-3, muon_lr=4e-3, warmup=50, decay_from=0.2, ema=0.99)
PANELS = 24_000
DECODED = 12_000  # of them, also as the autoencoder gives them back
SHIFT = 1  # pixels up and aside that pictures are moved by
SUBJECTS = (0.4, 0.28, 0.17, 0.15)  # chance of 1, 2, 3, 4 in a panel
SEED = 3_000_000


def draw_some(job: tuple[int, int, int, bool | None]) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` panels; the job is (seed, count, subjects or 0 for any, held out).

    Returns (count, 3, 64, 64) uint8, and their labels (count, groups)
    """
    seed, count, subjects, held_out = job
    rng = np.random.default_rng(seed)
    pictures, told = [], []
    for _ in range(count):
        number = subjects or 1 + int(rng.choice(4, p=SUBJECTS))
        (panel,) = random_set(rng, 1, 1, number, held_out)
        pictures.append(np.asarray(draw(panel)).transpose(2, 0, 1))
        told.append(labels(panel))
    return np.stack(pictures), np.array(told)


def draw_panels(count: int, processes: int) -> tuple[Tensor, Tensor]:
    """Draw training panels: (count, 3, 64, 64) uint8 and (count, groups) labels."""
    part = min(count, 500)
    jobs = [(SEED + i, part, 0, None) for i in range(count // part)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pictures, told = zip(*pool.imap(draw_some, jobs), strict=True)
    return torch.from_numpy(np.concatenate(pictures)), torch.from_numpy(np.concatenate(told))


@torch.no_grad()
def round_trip(autoencoder: AutoEncoder, pictures: Tensor) -> Tensor:
    """What the autoencoder gives back: (N, 3, 64, 64) uint8 to the same."""
    parts = [autoencoder.decode(autoencoder.encode(part.float() / 127.5 - 1)) for part in pictures.split(16)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().byte()


def tensors_after(autoencoder: AutoEncoder, image: Tensor) -> Tensor:
    """The same of tensors in -1..1: (N, 3, h, w)."""
    return round_trip(autoencoder, ((image + 1) * 127.5).round().byte()).float() / 127.5 - 1


def losses(reader: Reader, image: Tensor, told: Tensor) -> dict[str, Tensor]:
    """Mean cross-entropy of every output group, and how often shapes are right.

    image: (B, 3, 64, 64), told: (B, groups), -1 where there is nothing to read
    """
    parts = groups(reader(image))
    wrong = [F.cross_entropy(part, told[:, i], ignore_index=-1, reduction="sum") for i, part in enumerate(parts)]
    there = [(p.argmax(1) == told[:, i])[told[:, i] > 0] for i, p in enumerate(parts) if p.shape[1] == 15]
    return {"loss": torch.stack(wrong).sum() / len(image) / 10, "shape right": torch.cat(there).float().mean()}


def roughen(image: Tensor, generator: torch.Generator) -> Tensor:
    """Blur some pictures a little and add some noise, so that the reader does not live on single pixels."""
    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    weight = 0.7 * torch.rand(len(image), 1, 1, 1, generator=generator) ** 2
    noise = 0.08 * torch.rand(len(image), 1, 1, 1, generator=generator)
    return image.lerp(blurred, weight) + noise * torch.randn(image.shape, generator=generator)


def shifted(image: Tensor, generator: torch.Generator) -> Tensor:
    """Move a batch by up to SHIFT pixels, edges repeated."""
    x, y = torch.randint(0, 2 * SHIFT + 1, (2,), generator=generator).tolist()
    return F.pad(image, (SHIFT,) * 4, mode="replicate")[:, :, y : y + image.shape[2], x : x + image.shape[3]]


def is_hidden(name: str, p: Tensor) -> bool:
    return p.ndim >= 2 and name != "place" and not name.startswith(("scene", "window.8", "body.0"))


def train(stage: Stage, autoencoder: AutoEncoder, work: Work, processes: int = 2) -> Reader:
    """Draw panels, and train a reader on them and on what the autoencoder gives back."""
    pictures, told = draw_panels(PANELS, processes)
    pool, told = torch.cat((pictures, round_trip(autoencoder, pictures[:DECODED]))), torch.cat((told, told[:DECODED]))
    torch.manual_seed(work.seed)
    reader = Reader().to(memory_format=torch.channels_last)

    def loss_at(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(pool), (stage.batch,), generator=generator)
        image = shifted(roughen(pool[chosen].float() / 127.5 - 1, generator), generator)
        return losses(reader, image.contiguous(memory_format=torch.channels_last), told[chosen])

    return run(stage, reader, loss_at, work, is_hidden).to(memory_format=torch.contiguous_format)


def make(args: argparse.Namespace) -> None:
    """Train the reader and write it."""
    autoencoder = load_autoencoder(find_model(args.model).autoencoder)
    reader = train(STAGE, autoencoder, Work(args.work), args.processes)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    kept = {k: v.bfloat16() if v.is_floating_point() else v for k, v in reader.eval().state_dict().items()}
    save_safetensors({k: v.contiguous() for k, v in kept.items()}, args.out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.train_truth", description=__doc__)
    parser.add_argument("--model", default="tiny", help="whose autoencoder the panels also pass through")
    parser.add_argument("--out", type=Path, default=Path("weights/tiny/truth/model.safetensors"))
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="checkpoints")
    parser.add_argument("--processes", type=entry.positive, default=2, help="that draw panels")
    return entry.run(parser, make, argv)


if __name__ == "__main__":
    sys.exit(main())
