"""Trains a LoRA that teaches FLUX.1 a relation between panels, from 20 to 100 sets of pictures that show it.

  python train.py --data sets/ --rank 16              the bundled sets on the bundled model: minutes on a CPU
  python train.py --data my-sets --model flux-dev     the same on FLUX.1-dev, as the paper does
  python train.py --data sets/sketch --condition clean    learn to make panels from clean given ones
  torchrun --nproc-per-node 2 train.py --data sets/    every batch shared by two processes

The same command goes on where a run was stopped.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from iclora.cli import parse
from iclora.config import TrainConfig, model_row, settle_training

if TYPE_CHECKING:  # torch loads after the command line was found to be right
    from iclora.monitor import Metrics
    from iclora.training import State

CHECKPOINT, RESULT = "checkpoint.safetensors", "lora.safetensors"


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns the exit status: 0 done, 2 a mistake (one line on stderr), 130 interrupted."""
    try:
        run(parse(TrainConfig, argv, __doc__))
    except SystemExit:  # after --help
        return 0
    except KeyboardInterrupt:
        return complain("interrupted; the same command goes on from the last checkpoint", 130)
    except (ValueError, OSError) as error:
        return complain(str(error), 2)
    return 0


def complain(line: str, status: int) -> int:
    print(f"error: {line}".replace("\n", " "), file=sys.stderr)
    return status


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(config: TrainConfig) -> None:
    """Reads the data, trains, and writes the LoRA."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = make_folder(Path(config.out))
    import torch

    from iclora import feed as feeds
    from iclora.monitor import Metrics
    from iclora.plan import pick_device
    from iclora.restart import load_state, refuse_other_run
    from iclora.training import keep_no_activations, new_state, parts, train
    from model.lora import attach, load_lora, trainable
    from model.weights import find_model, load_flux, read_flux_config

    files = find_model(config.model)
    row = model_row(read_flux_config(files.flux))
    config = settle_training(config, row, pick_device(config.device))
    parts(config.batch, 0, ranks, config.accumulate)  # refuses a batch that cannot be shared before anything is loaded
    refuse_other_run(folder, config)
    if ranks > 1:
        torch.distributed.init_process_group("nccl" if config.device == "cuda" else "gloo")
        config = on_own_device(config)
    feed = in_turn(ranks, rank, lambda: feeds.prepare(config, files, row, note if rank == 0 else lambda line: None))
    flux = load_flux(files.flux, config.device, getattr(torch, config.dtype))
    if config.init_lora:
        note(str(load_lora(flux, config.init_lora, train=True)))
    else:
        attach(flux, config.targets, config.rank, generator=torch.Generator("cpu").manual_seed(config.seed))
    if config.checkpointing:
        keep_no_activations(flux)
    state = new_state(trainable(flux))
    if (folder / CHECKPOINT).exists():
        load_state(folder / CHECKPOINT, state, config)
        note(f"going on from step {state.step}" if state.step < config.steps else "this run is finished")
    run = Run(config, files, row, feed, flux, state, folder, Metrics(folder / "metrics.jsonl", state.step), rank == 0)
    try:
        train(config, flux, feed, state, run.after_step, rank, ranks)
    except KeyboardInterrupt:
        run.save()
        raise
    run.finish()


class Run:
    """What happens after a step: the bar, the metrics, checkpoints, validation, sheets."""

    def __init__(self, config, files, row, feed, flux, state: "State", folder: Path, metrics: "Metrics", first: bool):
        self.config, self.files, self.row, self.feed, self.flux = config, files, row, feed, flux
        self.state, self.folder, self.metrics, self.first = state, folder, metrics, first
        self.began, self.start = time.monotonic(), state.step

    def after_step(self, loss: float) -> None:
        """Is told the loss of the step that the state has just taken."""
        step, config = self.state.step, self.config
        if not self.first:
            return
        self.show(loss)
        due = step % config.save_every == 0 or step == config.steps
        self.metrics.add(step=step, loss=loss, **({"validation": self.validate()} if due else {}))
        if due:
            self.save()
        if config.sample_every and (step % config.sample_every == 0 or step == config.steps):
            self.sample()

    def show(self, loss: float) -> None:
        """Draws the bar: loss, steps a second, time left."""
        step, steps = self.state.step, self.config.steps
        speed = (step - self.start) / (time.monotonic() - self.began)
        left = (steps - step) / speed
        filled = "#" * (24 * step // steps)
        line = f"[{filled:24}] {step}/{steps}  loss {loss:.4f}  {speed:.2f} steps/s  {left / 60:.1f} min left"
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="\n" if step == steps else "", file=sys.stderr, flush=True)
        elif step % 50 == 0 or step == steps:
            note(line)

    def validate(self) -> float:
        from iclora.training import averaged, validation_loss

        with averaged(self.state):
            return validation_loss(self.flux, self.feed, self.state.parameters[0].device)

    def save(self) -> None:
        """Writes the checkpoint, the LoRA as it is now and the loss curve; each whole or not at all."""
        from iclora.monitor import draw_curve
        from iclora.restart import save_state
        from iclora.training import averaged
        from model.lora import save_lora

        if not self.first:
            return
        save_state(self.folder / CHECKPOINT, self.state, self.config)
        with averaged(self.state):
            save_lora(self.flux, self.folder / RESULT, metadata=self.metadata())
        draw_curve(self.metrics.rows(), self.folder / "loss.png")

    def metadata(self) -> dict[str, str]:
        """What a reader of the LoRA file should know; sample.py picks up the condition."""
        config = self.config
        about = {"method": "in-context-lora", "condition": config.condition, "base": self.files.name}
        about |= {"grids": ",".join(sorted({f"{b.rows}x{b.cols}" for b in self.feed.layouts}))}
        return {f"iclora.{name}": value for name, value in about.items()} | {
            "iclora.steps": str(self.state.step)
        }  # fmt: skip

    def sample(self) -> None:
        """Writes a sheet of samples, made with the averaged weights."""
        from iclora.monitor import sheet
        from iclora.training import averaged
        from model.weights import load_autoencoder

        autoencoder = load_autoencoder(self.files.autoencoder, self.config.device)
        with averaged(self.state):
            picture = sheet(self.flux, autoencoder, self.feed, self.row, self.config.condition == "clean")
        picture.save(self.folder / f"sheet-{self.state.step:06d}.png")

    def finish(self) -> None:
        if self.first:
            self.save()
            note(f"wrote {self.folder / RESULT}; try it with `python sample.py --lora {self.folder / RESULT}`")


def make_folder(folder: Path) -> Path:
    """Makes the folder of the run.

    Errors: ValueError if that is impossible
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; give another --out") from None
    return folder


def on_own_device(config: TrainConfig) -> TrainConfig:
    """Gives each process of a node its own GPU."""
    if config.device == "cuda":
        import torch

        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return config


def in_turn(ranks: int, rank: int, work: Callable):
    """Lets the first process do the work alone, and then the others, who find its cache."""
    if ranks == 1:
        return work()
    from torch.distributed import barrier

    done = work() if rank == 0 else None
    barrier()
    return done if rank == 0 else work()


if __name__ == "__main__":
    sys.exit(main())
