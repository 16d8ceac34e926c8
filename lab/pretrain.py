"""Train a tiny FLUX from nothing to its files: python -m lab.pretrain --out runs/tiny-model

Stages, each resumed from its last checkpoint after any interruption: the autoencoder, beside it CLIP's two towers and
T5, on captions alone; the transformer, on a CPU on single panels first, and on sets; guidance, distilled into it; the
decoder alone. Checkpoints and drawn pictures are kept in --work. With --text only the transformer is trained, and all
else is another model's. With --init transformer and decoder of a whole model are trained on, and all else stays.
"""

import argparse
import copy
import dataclasses
import math
import multiprocessing
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5Tokenizer

from iclora.cache import text_encoder_paths
from model.autoencoder import AutoEncoder
from model.checkpoint import fingerprint
from model.flux import Flux, FluxConfig
from model.text import TextEncoders, load_text_encoders
from model.weights import ModelFiles, find_model, load_autoencoder, load_flux

from . import entry, train_autoencoder, train_clip, train_flow, train_text
from .captions import vocabulary
from .export import copy_judges, write_model
from .scores import tiles
from .sets import GRIDS, draw_sets, load_sets, plan_sets, sets_of
from .tokenizers import make_clip_tokenizer, make_t5_tokenizer
from .training import Stage, Work, finished, refuse_other_run

WIDTH = train_flow.CONFIG.hidden_size
SETS = 20_000  # over all grids, on a CPU
OFTEN = {(1, 1): 0.08, (1, 2): 0.05, (2, 1): 0.05, (2, 2): 0.77, (3, 1): 0.05}  # how often the flow sees each grid


@dataclass(frozen=True)
class Recipe:
    """How a kind of machine pretrains. Its stages go by their steps, or with --minutes by shares of their seconds.

    sets: over all grids
    seconds: that no stage takes: encoding pictures and captions, starting, writing; without drawing
    small_crops: share of the autoencoder's stage that has small crops
    """

    stages: dict[str, Stage]
    sets: int
    seconds: float
    small_crops: float


# fmt: off
CPU = Recipe(sets=SETS, seconds=840, small_crops=0.6, stages={  # two cores
    "autoencoder": Stage("autoencoder", 4000, 3, 1e-3, 2e-3, decay_from=0.25, ema=0.998, seconds=1500),
    "clip": Stage("clip", 400, 96, 1e-3, ema=0.99, seconds=180),
    "text": Stage("text", 1200, 40, 1e-3, 2e-3, decay_from=0.3, ema=0.995, seconds=300),
    "singles": Stage("singles", 450, 44, 1e-3, 2e-3, warmup=30, decay_from=1.0, ema=0.99, seconds=1300),
    "flow": Stage("flow", 2500, 36, 1e-3, 2e-3, warmup=30, decay_from=0.4, ema=0.998, seconds=7300),
    "guidance": Stage("guidance", 170, 24, 3e-4, 3e-4, warmup=20, decay_from=0.3, ema=0.98, seconds=500),
    "decoder": Stage("decoder", 1900, 4, 5e-4, 1e-3, warmup=30, decay_from=0.2, ema=0.995, seconds=480),
})
GPU = Recipe(sets=254_750, seconds=92, small_crops=0.0, stages={  # one H100; 480 seconds in all
    "autoencoder": Stage("autoencoder", 1100, 128, 1e-3, 2e-3, decay_from=0.25, ema=0.998, seconds=85, bfloat16=True),
    "clip": Stage("clip", 774, 2048, 1e-3, ema=0.99, seconds=42),
    "text": Stage("text", 1307, 512, 1e-3, 2e-3, decay_from=0.3, ema=0.995, seconds=38),
    "flow": Stage("flow", 4414, 512, 1e-3, 2.5e-3, decay_from=0.35, ema=0.999, seconds=255, bfloat16=True),
    "guidance": Stage("guidance", 206, 256, 3e-4, 3e-4, 20, decay_from=0.3, ema=0.98, seconds=22, bfloat16=True),
    "decoder": Stage("decoder", 583, 128, 5e-4, 1e-3, 30, decay_from=0.2, ema=0.995, seconds=26, bfloat16=True),
})
# fmt: on


def pretrain(args: argparse.Namespace) -> None:
    """Run every stage that --work does not hold yet, and write the model.

    Errors: ValueError for flags that do not go together, or a --work of another run
    """
    check(args)
    config = train_flow.new_config(args.width, not args.no_guidance)
    files = find_model(args.init or args.text) if args.init or args.text else None
    recipe = CPU if args.device == "cpu" else GPU
    stages = stages_of(args, recipe)
    processes = args.processes if args.device == "cpu" else 1
    work = Work(args.work, args.seed, args.device, origin(args, files), processes)
    for path in (work.folder / f"{name}.safetensors" for name in stages):
        if path.exists():
            refuse_other_run(path, work)
    allow_tf32(work.device)
    total = min(recipe.sets, stages["flow"].steps * stages["flow"].batch)  # a trial draws no more than it looks at
    draw_sets(work.folder, total, work.seed, args.processes)
    counts = {grid: sets_of(grid, total) for grid in GRIDS}
    planned = {grid: plan_sets(grid, count, work.seed, args.processes) for grid, count in counts.items()}
    pictures = {grid: load_sets(work.folder, grid, count) for grid, count in counts.items()}

    of_panels = panels_of(pictures)
    autoencoder, text, tokenizers = foundations(args, files, recipe, stages, planned, of_panels, work)
    print("encoding pictures and captions", flush=True)
    latents = train_flow.prepare_latents(autoencoder, pictures, work)
    torch.set_num_threads(args.processes)
    del pictures
    flux = train_transformer(args, config, files, stages, latents, planned, text, work)
    if "decoder" in stages:
        autoencoder = train_autoencoder.finish(stages["decoder"], autoencoder, of_panels, work)
    write_model(args.out, flux.cpu(), autoencoder, text.clip.cpu(), text.t5.cpu(), *tokenizers)
    if args.text:
        copy_judges(files.root, args.out)
    print(f"wrote {args.out}")


def stages_of(args: argparse.Namespace, recipe: Recipe) -> dict[str, Stage]:
    """The stages of a recipe that this run has, with their steps, or with --minutes their seconds too."""
    left_out = {"decoder"} if args.text else {"singles"} if args.init else set()
    if args.text or args.init:
        left_out |= {"autoencoder", "clip", "text"}
    if args.no_guidance:
        left_out.add("guidance")
    stages = {name: stage for name, stage in recipe.stages.items() if name not in left_out}
    beside = ("clip", "text") if args.processes > 1 else ()  # the autoencoder, which takes longer
    whole = recipe.seconds + sum(stage.seconds for name, stage in stages.items() if name not in beside)
    factor = args.scale if args.minutes is None else 60 * args.minutes / whole
    timed = 0 if args.minutes is None else factor
    return {
        name: dataclasses.replace(stage, steps=max(2, round(stage.steps * factor)), seconds=stage.seconds * timed)
        for name, stage in stages.items()
    }


def allow_tf32(device: str) -> None:
    """Let products of float32 be TF32 on a GPU."""
    if device != "cpu":
        torch.set_float32_matmul_precision("high")


def foundations(
    args: argparse.Namespace, files: ModelFiles | None, recipe: Recipe, stages: dict, planned: dict, of_panels: Tensor,
    work: Work,
) -> tuple[AutoEncoder, TextEncoders, list[Path]]:  # fmt: skip
    """What the transformer stands on: autoencoder, text encoders and tokenizers, trained or another model's.

    With several processes the autoencoder is trained beside the encoders: trainings of one thread each get through
    more than one of two threads, and small networks leave most of a GPU free. All is rounded as the files will be.
    """
    if files:
        text, autoencoder = load_text_encoders(files, dtype=torch.float32), load_autoencoder(files.autoencoder)
        return autoencoder, text, [files.clip_tokenizer, files.t5_tokenizer]
    captions = {grid: [one.captions for one in of_grid] for grid, of_grid in planned.items()}
    tokenizers = new_tokenizers(captions, work.folder)
    alone = dataclasses.replace(work, processes=1)
    task = (stages, captions, tokenizers, alone, args.processes)
    beside = None
    if args.processes > 1:
        torch.set_num_threads(1)
        beside = multiprocessing.get_context("spawn").Process(target=train_encoders, args=task)
        beside.start()
    autoencoder = train_autoencoder.train(stages["autoencoder"], of_panels, alone, recipe.small_crops)
    if beside:
        beside.join()
    text = train_encoders(*task)  # if it was finished beside, it is loaded
    for network in (autoencoder, text.clip, text.t5):
        round_weights(network)
    return autoencoder, text, tokenizers


@torch.no_grad()
def round_weights(network: nn.Module) -> None:
    """Round the weights to bfloat16, in place, as lab.export writes them."""
    for p in network.parameters():
        p.copy_(p.bfloat16())


def train_transformer(
    args: argparse.Namespace, config: FluxConfig, files: ModelFiles | None, stages: dict, latents: dict,
    planned: dict, text: TextEncoders, work: Work,
) -> Flux:  # fmt: skip
    """Train the transformer on panels, where a recipe has that stage, and on sets; then distil guidance into it."""
    torch.manual_seed(work.seed)
    if args.init:
        flux = load_flux(files.flux, dtype=torch.float32)
    else:
        widths = {"context_in_dim": text.t5.config.d_model, "vec_in_dim": text.clip.config.hidden_size}
        flux = train_flow.new_flux(dataclasses.replace(config, **widths))
    if "singles" in stages:
        few = 1 if finished(stages["singles"], work) else None
        singles = train_flow.singles(latents[2, 2][:few], planned[2, 2][:few], text, work)
        flux = train_flow.train(stages["singles"], flux, singles, {(1, 1): 1.0}, work)
        del singles
    data = train_flow.of_sets(latents, planned, text, work)
    flux = train_flow.train(stages["flow"], flux.requires_grad_(True), data, OFTEN, work, fast=args.compile)
    if flux.config.guidance_embed:
        teacher = copy.deepcopy(flux)
        flux = train_flow.train(stages["guidance"], flux.requires_grad_(True), data, OFTEN, work, teacher)
    return flux


def check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together. Errors: ValueError"""
    if args.minutes is not None and (not 0 < args.minutes < math.inf or args.scale != 1):
        raise ValueError(f"--minutes {args.minutes:g} sets how long all stages take; give more than 0, and no --scale")
    if args.init and (args.text or args.width != WIDTH or args.no_guidance):
        raise ValueError("--init brings a whole model; leave out --text, --width and --no-guidance")
    if args.text and args.out.resolve() == find_model(args.text).root.resolve():
        raise ValueError(f"--out {args.out} is the model that --text takes from; give another folder")


def origin(args: argparse.Namespace, files: ModelFiles | None) -> str:
    """What tells the checkpoints of a run from those of others: the model that it started from, and another shape.

    What --text takes is marked by its content, as the same name may soon mean another model.
    """
    parts = [args.init] if args.init else []
    if args.text:
        mark = f"{fingerprint(files.autoencoder.paths)[:8]}{fingerprint(text_encoder_paths(files))[:8]}"
        parts.append(f"text and autoencoder of {args.text} ({mark})")
    parts += [f"width {args.width}"] * (args.width != WIDTH) + ["no guidance"] * args.no_guidance
    return ", ".join(parts)


def panels_of(pictures: dict[tuple[int, int], Tensor]) -> Tensor:
    """The autoencoder's panels: all single ones, and those of a quarter of the 2x2 sets; (N, 3, 64, 64) uint8."""
    sets = pictures[2, 2][: max(1, len(pictures[2, 2]) // 4)]
    return torch.cat((pictures[1, 1], tiles(sets)))


def train_encoders(
    stages: dict, captions: dict, tokenizers: list[Path], work: Work, processes: int
) -> TextEncoders:  # fmt: skip
    """Train CLIP and T5, each in its stage, and freeze them.

    captions: by grid
    processes: that write more of them
    """
    allow_tf32(work.device)
    if processes > 1:
        torch.set_num_threads(1)
    clip_tokenizer = CLIPTokenizer.from_pretrained(str(tokenizers[0]))
    t5_tokenizer = T5Tokenizer.from_pretrained(str(tokenizers[1]))
    clip = train_clip.train(stages["clip"], captions, clip_tokenizer, work).text_model
    t5 = train_text.train(stages["text"], t5_tokenizer, work, processes)
    return TextEncoders(t5, clip, t5_tokenizer, clip_tokenizer, torch.float32)


def new_tokenizers(captions: dict, folder: Path) -> list[Path]:
    """Make both tokenizers from the captions; gives their folders, CLIP's first."""
    every = [caption for of_grid in captions.values() for group in of_grid for caption in group]
    made = [folder / "tokenizer", folder / "tokenizer_2"]
    for make, place in zip((make_clip_tokenizer, make_t5_tokenizer), made, strict=True):
        if not place.exists():
            half = place.with_name(f".{place.name}.tmp")
            shutil.rmtree(half, ignore_errors=True)
            make([*every, " ".join(vocabulary())], half)  # those of a trial may lack words
            half.rename(place)
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-model"), help="folder that receives the model")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="checkpoints and drawn pictures")
    parser.add_argument("--init", metavar="MODEL", help="train this model's transformer and decoder on")
    parser.add_argument("--text", metavar="MODEL", help="take this model's autoencoder, text encoders and tokenizers")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the transformer, a multiple of 32")
    parser.add_argument("--no-guidance", action="store_true", help="embed no guidance, and distil none")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of every stage; 0.01 is a trial")
    parser.add_argument("--minutes", type=float, help="go by the clock: so long in all, without drawing and compiling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=entry.positive, default=2, help="that draw; on a CPU they also train")
    parser.add_argument("--compile", action="store_true", help="compile the transformer; needs a C++ compiler")
    return entry.run(parser, pretrain, argv)


if __name__ == "__main__":
    sys.exit(main())
