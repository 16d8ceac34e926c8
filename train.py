"""Trains a LoRA: a relation between panels, from 20 to 100 sets that show it (In-Context LoRA), or to draw what
reference pictures show, from many pairs of references and target (UNO, in two stages).

  python train.py --data sets/ --rank 16              the bundled sets on the bundled model: minutes on a CPU
  python train.py --data my-sets --model flux-dev     the same on FLUX.1-dev, as the paper does
  python train.py --data sets/sketch --condition clean    learn to make panels from clean given ones
  python train.py --data sets/walk --concat tokens --text panel    as in Group Diffusion Transformers, to compare
  python train.py --method uno --data pairs.json --out runs/one       UNO's first stage: one reference
  python train.py --method uno --stage 2 --init-lora runs/one/lora.safetensors --data more.json    and its second
  torchrun --nproc-per-node 2 train.py --data sets/    every batch shared by two processes

The same command goes on where a run was stopped.
"""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from iclora.cli import NO_MEMORY, Bar, check_folder, complain, parse, plain
from iclora.config import IN_CONTEXT, UNO, ModelRow, TrainConfig, model_row, settle_training

if TYPE_CHECKING:  # torch loads after the command line was found to be right
    from iclora.loader import Loader
    from iclora.monitor import Metrics
    from iclora.training import State
    from model.flux import Flux
    from model.weights import ModelFiles

CHECKPOINT, RESULT, METRICS = "checkpoint.safetensors", "lora.safetensors", "metrics.jsonl"
DIALECTS = {IN_CONTEXT: "diffusers", UNO: "xlabs"}  # of the file, by method; the latter is the release's
WAIT = timedelta(days=1)  # for another process; the first one encodes alone
LOST = re.compile("onnection (closed|reset|refused)|gloo|NCCL")  # what a process says when another one has ended


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns the exit status: 0 done, 2 a mistake (one line on stderr), 130 interrupted."""
    try:
        run(parse(TrainConfig, argv, __doc__))
    except SystemExit:  # after --help
        return 0
    except KeyboardInterrupt as stop:
        return complain(str(stop) or "interrupted; the same command goes on from the last checkpoint", 130)
    except (ValueError, OSError) as error:
        return complain(str(error), 2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
            return complain("memory ran out; try --checkpointing, a larger --accumulate or a smaller --panel-size", 2)
        if "WORLD_SIZE" in os.environ and LOST.search(str(error)):
            return complain("another process of this run has ended; it says why", 2)
        raise
    return 0


def run(config: TrainConfig) -> None:
    """Checks all that can be checked without a network, reads the data, trains, and writes the LoRA."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = Path(config.out)
    check_folder(folder)
    if folder.resolve().is_relative_to(Path(config.data).resolve()):
        raise ValueError(f"--out {folder} lies in --data, where the next run would read it; choose one outside")
    import torch

    from iclora.data import bucket, load
    from iclora.layout import parse_grid
    from iclora.loader import Loader, fingerprints
    from iclora.monitor import Metrics, board_writer
    from iclora.plan import pick_device
    from iclora.references import as_trained, check_training_memory
    from iclora.restart import load_state, refuse_other_run, start_folder
    from iclora.training import keep_no_activations, new_state, parts, train
    from model.flux import Flux
    from model.lora import trainable
    from model.weights import find_model, load_flux, read_flux_config

    tell = note if rank == 0 else mute
    files = find_model(config.model)
    shape = read_flux_config(files.flux)
    row = model_row(shape)
    if config.method == UNO and config.init_lora:
        config = as_trained(config, [Path(config.init_lora)])
    config = settle_training(config, row, pick_device(config.device, row, tell))
    parts(config.batch, 0, ranks, config.accumulate)  # refuses a batch that cannot be shared
    if config.tensorboard:
        board_writer()  # refuses what is not installed
    with torch.device("meta"):
        flux = Flux(shape)
    adapt(flux, config)  # refuses unknown targets, and a wrong --init-lora
    examples = load(config.data, config.grid and parse_grid(config.grid), tell, config.method)
    trained = sum(p.numel() for p in trainable(flux))
    layouts = bucket(examples, config.panel_size, row.long_sides(config.ref_size))
    check_training_memory(config, layouts, files.flux, shape, trained, ranks)
    origin = fingerprints(examples, files, config.init_lora)
    refuse_other_run(folder / CHECKPOINT, config, origin)
    if ranks > 1:
        join_processes(config.device)
    feed = Loader(config, examples, files, shape)
    in_turn(ranks, rank, lambda: feed.encode(tell))
    flux = load_flux(files.flux, config.device, getattr(torch, config.dtype))
    report = adapt(flux, config)
    if config.checkpointing:
        keep_no_activations(flux)
    state = new_state(trainable(flux))
    if (folder / CHECKPOINT).exists():
        load_state(folder / CHECKPOINT, state)
        report = f"going on from step {state.step}" if state.step < config.steps else "this run is finished"
    run = Run(config, files, row, feed, flux, state, folder, origin)
    if rank == 0:
        note(report)
        note_doubts(config, feed)
        start_folder(folder, config)
        run.metrics = Metrics(folder / METRICS, state.step, config.tensorboard)
        if run.sheet and not run.sheet.exists():
            run.draw_sheet(run.sheet)  # a kill between checkpoint and sheet prevented it
    with stop_between_steps() as asked:
        with run.bar:
            train(config, flux, feed, state, run.after_step, rank, ranks, lambda: bool(asked))
        if run.saved != state.step:
            run.save()
    if ranks > 1:
        torch.distributed.barrier()  # the others wait for what the first one writes
        torch.distributed.destroy_process_group()
    if state.step < config.steps:
        raise KeyboardInterrupt(f"stopped after step {state.step} of {config.steps}; the same command goes on there")
    if rank == 0:
        rows, cols = feed.layouts[0].rows, feed.layouts[0].cols
        given = " --mask 2 --panels PICTURES" if config.condition == "clean" else ""
        more = " --ref PICTURE" if config.method == UNO else f" --grid {rows}x{cols}{given}"
        note(f"wrote {folder / RESULT}; try it with `python sample.py --lora {folder / RESULT}{more} --prompt TEXT`")


@dataclass
class Run:
    """What happens after a step: the bar, the metrics, checkpoints, validation, sheets.

    origin: marks of what is learnt from, see iclora.loader
    metrics: of the first process; the others only train
    """

    config: TrainConfig
    files: "ModelFiles"
    row: ModelRow
    feed: "Loader"
    flux: "Flux"
    state: "State"
    folder: Path
    origin: dict[str, str]
    metrics: "Metrics | None" = None

    def __post_init__(self) -> None:
        self.bar = Bar("training", before=self.state.step, every=50)
        self.saved = -1  # after which step

    def after_step(self, loss: float) -> None:
        """Is told the loss of the step that the state has just taken."""
        step, config = self.state.step, self.config
        if self.metrics is None:
            return
        self.bar(step, config.steps, f", loss {loss:.4f}")
        due = step % config.save_every == 0 or step == config.steps
        self.metrics.add(step=step, loss=loss, **(self.validation() if due else {}))
        if due:
            self.save()
        if self.sheet:
            self.draw_sheet(self.sheet)

    def validation(self) -> dict[str, float]:
        """The loss on the held-out sets with the averaged weights; nothing if none are held out."""
        from iclora.training import averaged, validation_loss

        if not self.feed.held_out:
            return {}
        device = self.state.parameters[0].device
        with averaged(self.state):
            return {"validation": validation_loss(self.flux, self.feed, self.config.condition, device)}

    def save(self) -> None:
        """Writes the checkpoint, the LoRA as it is now and the loss curve; each whole or not at all."""
        from iclora.monitor import draw_curve
        from iclora.restart import save_state
        from iclora.training import averaged
        from model.lora import save_lora

        if self.metrics is None:
            return
        save_state(self.folder / CHECKPOINT, self.state, self.config, self.origin)
        with averaged(self.state):
            save_lora(self.flux, self.folder / RESULT, DIALECTS[self.config.method], self.metadata())
        draw_curve(self.metrics.rows(), self.folder / "loss.png")
        self.saved = self.state.step

    def metadata(self) -> dict[str, str]:
        """What a reader of the LoRA file should know; sample.py follows the settings among it."""
        from iclora.references import TRAINED

        config = self.config
        if config.method == UNO:
            told = {name: getattr(config, name) for name in ("stage", *TRAINED)}
        else:
            told = {name: getattr(config, name) for name in ("condition", "concat", "text")}
            told["grids"] = ",".join(sorted({f"{layout.rows}x{layout.cols}" for layout in self.feed.layouts}))
        told |= {"method": config.method, "base": self.files.name, "steps": self.state.step}
        return {f"iclora.{name}": str(value) for name, value in told.items() if value is not None}

    @property
    def sheet(self) -> Path | None:
        """The sheet of samples that belongs to the step just taken, if there is one."""
        step, config = self.state.step, self.config
        due = config.sample_every and step and (step % config.sample_every == 0 or step == config.steps)
        return self.folder / f"sheet-{step:06d}.png" if due else None

    def draw_sheet(self, path: Path) -> None:
        """Writes a sheet of samples, made with the averaged weights; if memory does not allow it, training goes on."""
        from iclora.monitor import put_png, sheet
        from iclora.training import averaged
        from model.weights import load_autoencoder

        try:
            autoencoder = load_autoencoder(self.files.autoencoder, self.config.device)
            with averaged(self.state):
                picture = sheet(self.flux, autoencoder, self.feed, self.row, self.config)
        except (RuntimeError, MemoryError) as error:
            return note(f"{path} is left out ({str(error).partition(chr(10))[0][:120]}); training goes on")
        put_png(picture, path)


def adapt(flux: "Flux", config: TrainConfig) -> str:
    """Attaches the adapters that are trained: those of --init-lora, else fresh ones.

    returns: a line about them
    Errors: ValueError for targets that mean nothing here or cannot be saved, or a file that is no LoRA for this model
    """
    import torch

    from model.lora import attach, load_lora, refuse_unnamed

    if config.init_lora:
        report = load_lora(flux, config.init_lora, train=True)
        report = f"starting from {report}; --rank and --targets are those of the file"
    else:
        fresh = attach(flux, config.targets, config.rank, generator=torch.Generator("cpu").manual_seed(config.seed))
        report = f"training {sum(p.numel() for p in fresh):,} parameters of rank {config.rank}"
    try:
        refuse_unnamed(flux, DIALECTS[config.method])
    except ValueError as error:
        line = str(error).partition(";")[0]
        raise ValueError(f"{line}, so the release's names cannot hold it; use --targets uno, or another file") from None
    return report


def note_doubts(config: TrainConfig, feed: "Loader") -> None:
    """Tells of what is possible, but seldom meant."""
    from iclora.plan import note_other_ways

    most = max(len(layout.references) for layout in feed.layouts)
    if config.stage == 1 and most > 1:
        note(f"rows of --data have up to {most} references; the paper's stage 1 has one, several are for --stage 2")
    if config.stage == 2 and most < 2:
        note("every row of --data has one reference; the paper's stage 2 has several")
    if config.stage == 2 and not config.init_lora:
        note("stage 2 starts cold; the paper starts it from the LoRA of stage 1, which goes to --init-lora")
    if config.method == IN_CONTEXT and config.init_lora:
        ways = {name: getattr(config, name) for name in ("condition", "concat", "text")}
        note_other_ways([Path(config.init_lora)], ways, note)


@contextlib.contextmanager
def stop_between_steps() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM in a list, so that a step is never left half done; the second one stops at once."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt
        os.write(2, b"\nstopping after this step; once more stops at once, at the cost of the steps since the save\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def join_processes(device: str) -> None:
    """Finds the other processes that torchrun has started; each of a node takes its own GPU."""
    import torch

    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=WAIT)


def in_turn(ranks: int, rank: int, work: Callable):
    """Lets the first process do the work alone, and then the others, who find its cache."""
    if ranks == 1:
        return work()
    from torch.distributed import barrier

    done = work() if rank == 0 else None
    barrier()
    return done if rank == 0 else work()


def note(line: str) -> None:
    """Tells the user something that is no mistake."""
    print(plain(line), file=sys.stderr, flush=True)


def mute(line: str) -> None:
    """Tells nothing: the first process does."""


if __name__ == "__main__":
    sys.exit(main())
