"""Train the bundled tiny FLUX from nothing to its files: python -m toybox.pretrain --out weights/tiny

Stages, each resumed from its last checkpoint after any interruption: the autoencoder; CLIP's two towers; T5 along
with the transformer; the transformer alone. Checkpoints and drawn pictures are kept in --work.
"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

import torch
from transformers import CLIPTokenizer, T5Tokenizer

from model.text import load_text_encoders
from model.weights import find_model, load_autoencoder, load_flux

from . import train_autoencoder, train_clip, train_flow
from .export import write_model
from .sets import GRIDS, draw_sets, load_sets, sets_of
from .tokenizers import T5_LENGTH, make_clip_tokenizer, make_t5_tokenizer
from .training import Stage, Work

STAGES = {
    "autoencoder": Stage("autoencoder", steps=4200, batch=3, lr=1e-3, muon_lr=2e-3, decay_from=0.25),
    "clip": Stage("clip", steps=400, batch=96, lr=1e-3, ema=0.99),
    "text": Stage("text", steps=800, batch=40, lr=1e-3, muon_lr=2e-3, decay_from=1.0),
    "flow": Stage("flow", steps=1600, batch=40, lr=1e-3, muon_lr=2e-3, warmup=20, decay_from=0.25),
}
SETS = 15_000  # over all grids
OFTEN = {(1, 1): 0.06, (1, 2): 0.05, (2, 1): 0.05, (2, 2): 0.78, (3, 1): 0.06}  # how often the flow sees each grid


def pretrain(args: argparse.Namespace) -> None:
    """Run every stage that --work does not hold yet, and write the model."""
    stages = {
        name: dataclasses.replace(stage, steps=max(2, round(stage.steps * args.scale)))
        for name, stage in STAGES.items()
    }
    work = Work(args.work, args.seed, args.device, args.init or "")
    total = round(SETS * min(1.0, args.scale))
    draw_sets(work.folder, total, work.seed, args.processes)
    drawn = {grid: load_sets(work.folder, grid, sets_of(grid, total)) for grid in GRIDS}
    pictures = {grid: of_grid for grid, (of_grid, _) in drawn.items()}
    captions = {grid: of_grid for grid, (_, of_grid) in drawn.items()}

    files = find_model(args.init) if args.init else None
    init = load_autoencoder(files.autoencoder).requires_grad_(True) if files else None
    autoencoder = train_autoencoder.train(stages["autoencoder"], pictures[1, 1], work, init)

    tokenizers = [files.clip_tokenizer, files.t5_tokenizer] if files else new_tokenizers(captions, work.folder)
    clip_tokenizer = CLIPTokenizer.from_pretrained(str(tokenizers[0]))
    t5_tokenizer = T5Tokenizer.from_pretrained(str(tokenizers[1]))
    encoders = load_text_encoders(files, dtype=torch.float32) if files else None
    if encoders:
        clip = encoders.clip  # frozen after its stage, so there is nothing to continue
    else:
        clip = train_clip.train(
            stages["clip"], list(pictures.values()), list(captions.values()), clip_tokenizer, work
        ).text_model

    print("encoding pictures and captions", flush=True)
    latents = train_flow.prepare_latents(autoencoder, pictures, work)
    data = train_flow.Data(latents, captions, t5_tokenizer, clip_tokenizer, clip, T5_LENGTH)
    del drawn, pictures
    torch.manual_seed(work.seed)
    flux = load_flux(files.flux, dtype=torch.float32) if files else train_flow.new_flux()
    t5 = encoders.t5 if encoders else train_flow.new_t5(t5_tokenizer)
    for name, joint in (("text", True), ("flow", False)):
        flux, t5 = flux.requires_grad_(True), t5.requires_grad_(joint)
        flux, t5 = train_flow.train(stages[name], flux, t5, data, OFTEN, work, joint)
    write_model(args.out, flux.cpu(), autoencoder, clip, t5.cpu(), *tokenizers)
    print(f"wrote {args.out}")


def new_tokenizers(captions: dict, folder: Path) -> list[Path]:
    """Make both tokenizers from the captions; gives their folders, CLIP's first."""
    every = [caption for of_grid in captions.values() for group in of_grid for caption in group]
    made = [folder / "tokenizer", folder / "tokenizer_2"]
    for make, place in zip((make_clip_tokenizer, make_t5_tokenizer), made, strict=True):
        if not place.exists():
            half = place.with_name(f".{place.name}.tmp")
            shutil.rmtree(half, ignore_errors=True)
            make(every, half)
            half.rename(place)
    return made


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
