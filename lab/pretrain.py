"""Train the bundled tiny FLUX from nothing to its files: python -m lab.pretrain --out weights/tiny

Stages, each resumed from its last checkpoint after any interruption: the autoencoder, beside it CLIP's two towers and
T5, on captions alone; the transformer, on single panels and then on sets; guidance, distilled into it; the decoder
alone. Checkpoints and drawn pictures are kept in --work. With --text only the transformer is trained, and all else is
another model's.
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

from iclora.cache import text_encoder_paths
from model.autoencoder import AutoEncoder
from model.checkpoint import fingerprint
from model.flux import Flux, FluxConfig
from model.text import TextEncoders, load_text_encoders
from model.weights import ModelFiles, find_model, load_autoencoder, load_flux

from . import entry, train_autoencoder, train_clip, train_flow, train_text
from .export import write_model
from .sets import GRIDS, draw_sets, load_sets, sets_of
from .tokenizers import make_clip_tokenizer, make_t5_tokenizer
from .training import Stage, Work, finished, refuse_other_run

STAGES = {
    "autoencoder": Stage("autoencoder", steps=4000, batch=3, lr=1e-3, muon_lr=2e-3, decay_from=0.25, ema=0.998),
    "clip": Stage("clip", steps=400, batch=96, lr=1e-3, ema=0.99),
    "text": Stage("text", steps=1200, batch=40, lr=1e-3, muon_lr=2e-3, decay_from=0.3, ema=0.995),
    "singles": Stage("singles", steps=450, batch=44, lr=1e-3, muon_lr=2e-3, warmup=30, decay_from=1.0, ema=0.99),
    "flow": Stage("flow", steps=2500, batch=36, lr=1e-3, muon_lr=2e-3, warmup=30, decay_from=0.4, ema=0.998),
    "guidance": Stage("guidance", steps=170, batch=24, lr=3e-4, muon_lr=3e-4, warmup=20, decay_from=0.3, ema=0.98),
    "decoder": Stage("decoder", steps=1900, batch=4, lr=5e-4, muon_lr=1e-3, warmup=30, decay_from=0.2, ema=0.995),
}
WIDTH = train_flow.CONFIG.hidden_size
SETS = 20_000  # over all grids
OFTEN = {(1, 1): 0.06, (1, 2): 0.05, (2, 1): 0.05, (2, 2): 0.79, (3, 1): 0.05}  # how often the flow sees each grid


def pretrain(args: argparse.Namespace) -> None:
    """Run every stage that --work does not hold yet, and write the model.

    Errors: ValueError for flags that do not go together, or a --work of another run
    """
    check(args)
    config = train_flow.new_config(args.width, not args.no_guidance)
    files = find_model(args.init or args.text) if args.init or args.text else None
    stages = {
        name: dataclasses.replace(stage, steps=max(2, round(stage.steps * args.scale)))
        for name, stage in STAGES.items()
    }
    processes = args.processes if args.device == "cpu" else 1
    work = Work(args.work, args.seed, args.device, origin(args, files), processes)
    for path in (work.folder / f"{name}.safetensors" for name in stages):
        if path.exists():
            refuse_other_run(path, work)
    total = min(SETS, stages["flow"].steps * stages["flow"].batch)  # a trial draws no more than it looks at
    draw_sets(work.folder, total, work.seed, args.processes)
    drawn = {grid: load_sets(work.folder, grid, sets_of(grid, total)) for grid in GRIDS}
    pictures = {grid: of_grid for grid, (of_grid, _) in drawn.items()}
    captions = {grid: of_grid for grid, (_, of_grid) in drawn.items()}

    of_panels = panels_of(pictures)
    autoencoder, text, tokenizers = foundations(args, files, stages, pictures, captions, of_panels, work)
    print("encoding pictures and captions", flush=True)
    latents = train_flow.prepare_latents(autoencoder, pictures, work)
    torch.set_num_threads(args.processes)
    del drawn, pictures
    flux = train_transformer(args, config, files, stages, latents, captions, text, work)
    if not args.text:
        autoencoder = train_autoencoder.finish(stages["decoder"], autoencoder, of_panels, work)
    write_model(args.out, flux.cpu(), autoencoder, text.clip, text.t5, *tokenizers)
    print(f"wrote {args.out}")


def foundations(
    args: argparse.Namespace, files: ModelFiles | None, stages: dict, pictures: dict, captions: dict,
    of_panels: Tensor, work: Work,
) -> tuple[AutoEncoder, TextEncoders, list[Path]]:  # fmt: skip
    """What the transformer stands on: autoencoder, text encoders and tokenizers, trained or another model's.

    With several processes the autoencoder is trained beside the encoders: trainings of one thread each get through
    more than one of two threads.
    """
    stage = stages["autoencoder"]
    if files:
        text, autoencoder = load_text_encoders(files, dtype=torch.float32), load_autoencoder(files.autoencoder)
        if args.init:
            autoencoder = train_autoencoder.train(stage, of_panels, work, autoencoder.requires_grad_(True))
        return autoencoder, text, [files.clip_tokenizer, files.t5_tokenizer]
    tokenizers = new_tokenizers(captions, work.folder)
    init = load_autoencoder(find_model(args.init_autoencoder).autoencoder) if args.init_autoencoder else None
    init = init and init.requires_grad_(True)
    task = (stages, pictures, captions, tokenizers)
    if work.processes == 1:
        return train_autoencoder.train(stage, of_panels, work, init), train_encoders(*task, work), tokenizers
    torch.set_num_threads(1)
    alone = dataclasses.replace(work, processes=1)
    beside = multiprocessing.get_context("fork").Process(target=train_encoders, args=(*task, alone))
    beside.start()
    autoencoder = train_autoencoder.train(stage, of_panels, alone, init)
    beside.join()
    return autoencoder, train_encoders(*task, work), tokenizers  # finished beside, so loaded


def train_transformer(
    args: argparse.Namespace, config: FluxConfig, files: ModelFiles | None, stages: dict, latents: dict,
    captions: dict, text: TextEncoders, work: Work,
) -> Flux:  # fmt: skip
    """Train the transformer on panels, unless it comes from --init, and on sets; then distil guidance into it."""
    torch.manual_seed(work.seed)
    if args.init:
        flux = load_flux(files.flux, dtype=torch.float32)
    else:
        widths = {"context_in_dim": text.t5.config.d_model, "vec_in_dim": text.clip.config.hidden_size}
        flux = train_flow.new_flux(dataclasses.replace(config, **widths))
        few = 1 if finished(stages["singles"], work) else None
        singles = train_flow.singles(latents[2, 2][:few], text, work.seed)
        flux = train_flow.train(stages["singles"], flux, singles, {(1, 1): 1.0}, work)
        del singles
    data = train_flow.of_sets(latents, captions, text, work.seed)
    flux = train_flow.train(stages["flow"], flux.requires_grad_(True), data, OFTEN, work, fast=args.compile)
    if flux.config.guidance_embed:
        teacher = copy.deepcopy(flux)
        flux = train_flow.train(stages["guidance"], flux.requires_grad_(True), data, OFTEN, work, teacher)
    return flux


def check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together. Errors: ValueError"""
    if args.init and (args.text or args.width != WIDTH or args.no_guidance):
        raise ValueError("--init brings a whole model; leave out --text, --width and --no-guidance")
    if (args.init or args.text) and args.init_autoencoder:
        raise ValueError("--init and --text bring an autoencoder too; leave out --init-autoencoder")
    if args.text and args.out.resolve() == find_model(args.text).root.resolve():
        raise ValueError(f"--out {args.out} is the model that --text takes from; give another folder")


def origin(args: argparse.Namespace, files: ModelFiles | None) -> str:
    """What tells the checkpoints of a run from those of others: the model that it started from, and another shape.

    What --text and --init-autoencoder take is marked by its content, as the same name may soon mean another model.
    """
    parts = [args.init] if args.init else []
    if args.init_autoencoder:
        mark = fingerprint(find_model(args.init_autoencoder).autoencoder.paths)[:8]
        parts.append(f"autoencoder begun as that of {args.init_autoencoder} ({mark})")
    if args.text:
        mark = f"{fingerprint(files.autoencoder.paths)[:8]}{fingerprint(text_encoder_paths(files))[:8]}"
        parts.append(f"text and autoencoder of {args.text} ({mark})")
    parts += [f"width {args.width}"] * (args.width != WIDTH) + ["no guidance"] * args.no_guidance
    return ", ".join(parts)


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
    parser = argparse.ArgumentParser(prog="python -m lab.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("weights/tiny"), help="folder that receives the model")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="checkpoints and drawn pictures")
    parser.add_argument("--init", help="start from the weights of this model, with fresh optimizers")
    parser.add_argument("--text", metavar="MODEL", help="take this model's autoencoder, text encoders and tokenizers")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the transformer, a multiple of 32")
    parser.add_argument("--no-guidance", action="store_true", help="embed no guidance, and distil none")
    parser.add_argument("--init-autoencoder", metavar="MODEL", help="start the autoencoder alone from this model's")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of every stage; 0.01 is a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=entry.positive, default=2, help="that draw; on a CPU they also train")
    parser.add_argument("--compile", action="store_true", help="compile the transformer; needs a C++ compiler")
    return entry.run(parser, pretrain, argv)


if __name__ == "__main__":
    sys.exit(main())
