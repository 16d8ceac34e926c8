"""Train the bundled tiny FLUX from nothing to its files: python -m toybox.pretrain --out weights/tiny

Stages, each resumed from its last checkpoint after any interruption: the autoencoder, beside it CLIP's two towers and
T5, on captions alone; the transformer, on single panels and then on sets; guidance, distilled into it; the decoder
alone. Checkpoints and drawn pictures are kept in --work.
"""

import argparse
import copy
import dataclasses
import multiprocessing
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from model.text import TextEncoders, load_text_encoders
from model.weights import find_model, load_autoencoder, load_flux

from . import entry, train_autoencoder, train_clip, train_flow, train_text
from .export import write_model
from .sets import GRIDS, draw_sets, load_sets, sets_of
from .tokenizers import make_clip_tokenizer, make_t5_tokenizer
from .training import Stage, Work, finished

STAGES = {
    "autoencoder": Stage("autoencoder", steps=4000, batch=3, lr=1e-3, muon_lr=2e-3, decay_from=0.25, ema=0.998),
    "clip": Stage("clip", steps=400, batch=96, lr=1e-3, ema=0.99),
    "text": Stage("text", steps=1200, batch=40, lr=1e-3, muon_lr=2e-3, decay_from=0.3, ema=0.995),
    "singles": Stage("singles", steps=450, batch=44, lr=1e-3, muon_lr=2e-3, warmup=30, decay_from=1.0, ema=0.99),
    "flow": Stage("flow", steps=2250, batch=36, lr=1e-3, muon_lr=2e-3, warmup=30, decay_from=0.4, ema=0.998),
    "guidance": Stage("guidance", steps=240, batch=24, lr=3e-4, muon_lr=3e-4, warmup=20, decay_from=0.3, ema=0.98),
    "decoder": Stage("decoder", steps=1200, batch=4, lr=5e-4, muon_lr=1e-3, warmup=30, decay_from=0.2, ema=0.995),
}
SETS = 20_000  # over all grids
OFTEN = {(1, 1): 0.06, (1, 2): 0.05, (2, 1): 0.05, (2, 2): 0.79, (3, 1): 0.05}  # how often the flow sees each grid


def pretrain(args: argparse.Namespace) -> None:
    """Run every stage that --work does not hold yet, and write the model."""
    stages = {
        name: dataclasses.replace(stage, steps=max(2, round(stage.steps * args.scale)))
        for name, stage in STAGES.items()
    }
    work = Work(args.work, args.seed, args.device, args.init or "", args.processes if args.device == "cpu" else 1)
    total = round(SETS * min(1.0, args.scale))
    draw_sets(work.folder, total, work.seed, args.processes)
    drawn = {grid: load_sets(work.folder, grid, sets_of(grid, total)) for grid in GRIDS}
    pictures = {grid: of_grid for grid, (of_grid, _) in drawn.items()}
    captions = {grid: of_grid for grid, (_, of_grid) in drawn.items()}

    files = find_model(args.init) if args.init else None
    tokenizers = [files.clip_tokenizer, files.t5_tokenizer] if files else new_tokenizers(captions, work.folder)
    text, autoencoder = None, load_autoencoder(files.autoencoder).requires_grad_(True) if files else None
    if files:
        text = load_text_encoders(files, dtype=torch.float32)
    elif args.init_autoencoder:
        autoencoder = load_autoencoder(find_model(args.init_autoencoder).autoencoder).requires_grad_(True)
    beside = None
    if not files and work.processes > 1:  # trainings of one thread each get through more than one of two threads
        torch.set_num_threads(1)
        alone = dataclasses.replace(work, processes=1)
        task = (stages, pictures, captions, tokenizers, alone)
        beside = multiprocessing.get_context("fork").Process(target=train_encoders, args=task)
        beside.start()
    of_panels = panels_of(pictures)
    autoencoder = train_autoencoder.train(stages["autoencoder"], of_panels, alone if beside else work, autoencoder)
    if beside:
        beside.join()
    text = text or train_encoders(stages, pictures, captions, tokenizers, work)

    print("encoding pictures and captions", flush=True)
    latents = train_flow.prepare_latents(autoencoder, pictures, work)
    torch.set_num_threads(args.processes)
    del drawn, pictures
    torch.manual_seed(work.seed)
    flux = load_flux(files.flux, dtype=torch.float32).requires_grad_(True) if files else train_flow.new_flux()
    if not files:
        few = 1 if finished(stages["singles"], work) else None
        singles = train_flow.singles(latents[2, 2][:few], text, work.seed)
        flux = train_flow.train(stages["singles"], flux, singles, {(1, 1): 1.0}, work)
        flux.requires_grad_(True)
        del singles
    data = train_flow.of_sets(latents, captions, text, work.seed)
    flux = train_flow.train(stages["flow"], flux, data, OFTEN, work, fast=args.compile)
    teacher, flux = copy.deepcopy(flux), flux.requires_grad_(True)
    flux = train_flow.train(stages["guidance"], flux, data, OFTEN, work, teacher, args.compile)
    autoencoder = train_autoencoder.finish(stages["decoder"], autoencoder, of_panels, work)
    write_model(args.out, flux.cpu(), autoencoder, text.clip, text.t5, *tokenizers)
    print(f"wrote {args.out}")


def panels_of(pictures: dict[tuple[int, int], Tensor]) -> Tensor:
    """The autoencoder's panels: all single ones, and those of a quarter of the 2x2 sets; (N, 3, 64, 64) uint8."""
    sets = pictures[2, 2][: max(1, len(pictures[2, 2]) // 4)]
    tiles = sets.unflatten(2, (2, 64)).unflatten(4, (2, 64)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    return torch.cat((pictures[1, 1], tiles)).contiguous()


def train_encoders(stages: dict, pictures: dict, captions: dict, tokenizers: list[Path], work: Work) -> TextEncoders:
    """Train CLIP and T5, each in its stage, and freeze them."""
    clip_tokenizer = CLIPTokenizer.from_pretrained(str(tokenizers[0]))
    t5_tokenizer = T5Tokenizer.from_pretrained(str(tokenizers[1]))
    of_grids = list(pictures.values()), list(captions.values())
    clip = train_clip.train(stages["clip"], *of_grids, clip_tokenizer, work).text_model
    t5 = train_text.train(stages["text"], t5_tokenizer, work)
    return TextEncoders(t5, clip, t5_tokenizer, clip_tokenizer, torch.float32)


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
    parser.add_argument("--init-autoencoder", metavar="MODEL", help="start the autoencoder alone from this model's")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of every stage; 0.01 is a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=2, help="that draw, and on a CPU train together, a core each")
    parser.add_argument("--compile", action="store_true", help="compile the transformer; needs a C++ compiler")
    return entry.run(parser, pretrain, argv)


if __name__ == "__main__":
    sys.exit(main())
