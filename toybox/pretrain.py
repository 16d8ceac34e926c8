"""Train the bundled tiny FLUX from nothing to its files: python -m toybox.pretrain --out weights/tiny

Stages, each resumed from its last checkpoint after any interruption: the autoencoder; CLIP's two towers; T5 along
with the transformer; the transformer alone. Checkpoints and drawn pictures are kept in --work.
"""

import argparse
import dataclasses
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPModel

from model.text import load_text_encoders
from model.weights import find_model, load_autoencoder, load_flux

from . import train_autoencoder, train_clip, train_flow
from .export import write_model
from .sets import GRIDS, draw_sets, load_sets
from .tokenizers import T5_LENGTH, make_clip_tokenizer, make_t5_tokenizer
from .training import Stage
from .world import draw, random_set

STAGES = {
    "autoencoder": Stage("autoencoder", steps=2600, batch=8, lr=1e-3, muon_lr=2e-3, decay_from=0.5),
    "clip": Stage("clip", steps=1000, batch=96, lr=1e-3, ema=0.99),
    "text": Stage("text", steps=1000, batch=64, lr=1e-3, muon_lr=2e-3, decay_from=1.0),
    "flow": Stage("flow", steps=2200, batch=64, lr=1e-3, muon_lr=2e-3, warmup=20, decay_from=0.3),
}
PANELS = 10_000  # single panels for the autoencoder
SETS = 18_000  # over all grids
OFTEN = {(1, 1): 0.15, (1, 2): 0.11, (2, 1): 0.11, (2, 2): 0.5, (3, 1): 0.13}  # how often the flow sees each grid


def draw_panels(job: tuple[int, int]) -> np.ndarray:
    """Draw single panels of one to four subjects: (N, 3, 64, 64) uint8. The job is (seed, N)."""
    seed, count = job
    rng = np.random.default_rng(seed)
    panels = [random_set(rng, 1, 1, int(rng.choice([1, 1, 2, 2, 3, 4])))[0] for _ in range(count)]
    return np.stack([np.asarray(draw(panel)).transpose(2, 0, 1) for panel in panels])


def panel_pool(count: int, seed: int, processes: int) -> Tensor:
    jobs = [(seed * 1000 + i, min(500, count)) for i in range(max(1, count // 500))]
    with multiprocessing.Pool(processes) as pool:
        return torch.from_numpy(np.concatenate(pool.map(draw_panels, jobs)))


def clip_vectors(clip: CLIPModel, tokenizer, captions: list[list[str]]) -> Tensor:
    """Encode N lists of phrasings into CLIP's pooled vectors: (N, phrasings, V)."""
    parts = []
    with torch.no_grad():
        for group in captions:
            ids = torch.tensor(tokenizer(group, padding="max_length", truncation=True).input_ids)
            parts.append(clip.text_model(input_ids=ids).pooler_output)
    return torch.stack(parts)


def pretrain(args: argparse.Namespace) -> None:
    stages = {
        name: dataclasses.replace(stage, steps=max(2, round(stage.steps * args.scale)))
        for name, stage in STAGES.items()
    }
    files = find_model(args.init) if args.init else None
    work, seed, device = args.work, args.seed, args.device
    count = max(16, round(PANELS * min(1.0, args.scale)))

    autoencoder = train_autoencoder.train(
        stages["autoencoder"], panel_pool(count, seed, args.processes), work, seed, device,
        load_autoencoder(files.autoencoder) if files else None,
    )  # fmt: skip

    draw_sets(work, round(SETS * min(1.0, args.scale)), seed, args.processes)
    drawn = {grid: load_sets(work, grid) for grid in GRIDS}
    captions = {grid: of_grid for grid, (_, of_grid) in drawn.items()}
    every = [caption for of_grid in captions.values() for group in of_grid for caption in group]
    clip_tokenizer = make_clip_tokenizer(every, work / "tokenizer")
    t5_tokenizer = make_t5_tokenizer(every, work / "tokenizer_2")
    clip = train_clip.train(
        stages["clip"], [pictures for pictures, _ in drawn.values()], list(captions.values()), clip_tokenizer,
        work, seed, device,
    )  # fmt: skip

    print("encoding pictures and captions", flush=True)
    pad = dict(padding="max_length", truncation=True, max_length=T5_LENGTH)
    data = train_flow.Data(
        latents={grid: train_flow.encode_pictures(autoencoder, pictures) for grid, (pictures, _) in drawn.items()},
        ids={g: torch.tensor([t5_tokenizer(group, **pad).input_ids for group in c]) for g, c in captions.items()},
        vec={grid: clip_vectors(clip, clip_tokenizer, of_grid) for grid, of_grid in captions.items()},
        empty=(torch.tensor(t5_tokenizer("", **pad).input_ids), clip_vectors(clip, clip_tokenizer, [[""]])[0, 0]),
    )
    del drawn
    torch.manual_seed(seed)
    flux = load_flux(files.flux, dtype=torch.float32) if files else train_flow.new_flux()
    t5 = load_text_encoders(files, dtype=torch.float32).t5 if files else train_flow.new_t5(t5_tokenizer)
    flux, t5 = train_flow.train(stages["text"], flux, t5, data, OFTEN, work, seed, joint=True, device=device)
    flux, t5 = train_flow.train(
        stages["flow"], flux.requires_grad_(True), t5, data, OFTEN, work, seed + 1, joint=False, device=device
    )
    write_model(args.out, flux.cpu(), autoencoder, clip, t5.cpu(), work / "tokenizer", work / "tokenizer_2")
    print(f"wrote {args.out}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m toybox.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("weights/tiny"), help="folder that receives the model")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="checkpoints and drawn pictures")
    parser.add_argument("--init", help="start from the weights of this model, with fresh optimizers")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of every stage; 0.01 is a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=2, help="that draw pictures")
    args = parser.parse_args(argv)
    try:
        pretrain(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
