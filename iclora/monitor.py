"""What a training run shows and saves: the bar, a line of metrics a step, checkpoints, the loss curve, sheets.

Letters: B batch, R reference tokens; h, w in latent cells.
"""

import contextlib
import io
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from model.autoencoder import AutoEncoder
from model.checkpoint import write_atomic
from model.flux import Flux
from model.lora import save_lora
from model.position import grid_ids
from model.weights import load_autoencoder
from sampling.denoise import denoise
from sampling.flow import AfterStep, times
from sampling.images import to_picture, to_png
from sampling.inpaint import keep_clean
from sampling.latents import CELL, noise, pack, unpack

from .ahead import ask_for_validation
from .checkpoint import CHECKPOINT, CURVE, MAX_STEPS, METRICS, RESULT, State, averaged, save_checkpoint, start_folder
from .config import UNO, saved
from .data import Example
from .flops import Meter
from .layout import Layout, encode_by_panel, generate_mask
from .loader import Batch, Loader
from .records import Note
from .references import TRAINED_WITH
from .training import DIALECTS, TrainingPlan, board_writer, validation_loss

Column = tuple[str, dict[str, Image.Image]]  # of a sheet: its caption, and pictures by the name of their row
LOGGED = 50  # steps between lines where there is no terminal
SAMPLES = 4  # sets on a sheet
CURVE_SIZE = (960, 420)  # pixels
MARGIN = 56
NEW = 0.05  # share of a new loss in the curve's running mean; of short runs more
LEFT, TOP, GAP, NARROW = 64, 64, 6, 96  # of a sheet, pixels; NARROW is the least that a column's text gets
GLYPH = 6  # pixels of a letter in PIL's own font


@dataclass
class Monitor:
    """What the first process shows and saves after a step; the others only train.

    note: takes a line for the user
    """

    plan: TrainingPlan
    loader: Loader
    flux: Flux
    state: State
    note: Note

    def __enter__(self) -> "Monitor":
        """Begin or go on in the folder of the run; a sheet that a kill prevented is drawn."""
        self.config, self.device, self.saved = self.plan.config, self.state.parameters[0].device, -1  # after which step
        self.folder, self.meter = Path(self.config.out), Meter(self.config, self.flux, self.loader)
        start_folder(self.folder, self.config)
        self.metrics = Metrics(self.folder / METRICS, self.state.step, self.config.tensorboard)
        if self.due(self.config.sample_every) and not self.sheet.exists():
            self.draw_sheet()
        file = sys.stderr if sys.stderr.isatty() else io.StringIO()  # a log gets whole lines, every so often
        counts = {"total": self.config.steps, "initial": self.state.step, "unit": "step", "file": file}
        self.bar = tqdm(desc="training", ascii=True, dynamic_ncols=file is sys.stderr, **counts)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def due(self, every: int) -> bool:
        """Tell whether the step just taken is one of every so many, or the last; 0 is never."""
        step = self.state.step
        return bool(every and step and (step % every == 0 or step == self.config.steps))

    @property
    def sheet(self) -> Path:
        """The file for the sheet of the step just taken."""
        return self.folder / f"sheet-{self.state.step:06d}.png"

    def log(self, loss: float) -> None:
        """Show and note the loss of the step just taken and how fast it was; where it is saved, the validation loss."""
        self.bar.set_postfix_str(f"loss {loss:.4f}, {self.meter.teraflops(self.state.step):.3g} TFLOP/s", refresh=False)
        self.bar.update()
        if self.bar.fp is not sys.stderr and self.due(LOGGED):
            sys.stderr.write(f"{self.bar}\n")
        values = {"loss": loss}  # no times: a run that goes on repeats the file of one that was not stopped
        if self.due(self.config.save_every) and self.loader.held_out:
            ask_for_validation(self.flux, self.loader)
            with averaged(self.state):
                values["validation"] = validation_loss(self.flux, self.loader, self.config.condition, self.device)
        self.metrics.add(self.state.step, **values)
        self.meter.start()

    def save(self) -> None:
        """Write the checkpoint, the LoRA as it is now and the loss curve, unless this step has them; each whole."""
        if self.saved == self.state.step:
            return
        save_checkpoint(self.folder / CHECKPOINT, self.state, saved(self.config), self.plan.fingerprint)
        with averaged(self.state):
            save_lora(self.flux, self.folder / RESULT, DIALECTS[self.config.method], self.lora_metadata())
        draw_curve(self.metrics.rows(), self.folder / CURVE)
        self.saved = self.state.step
        self.meter.start()

    def lora_metadata(self) -> dict[str, str]:
        """List what a reader of the LoRA file should know; sample.py follows the settings among it."""
        names = ("stage", *TRAINED_WITH) if self.config.method == UNO else ("condition", "concat", "text")
        metadata = {name: getattr(self.config, name) for name in names}
        if self.config.method != UNO:
            metadata["grids"] = ",".join(sorted({f"{layout.rows}x{layout.cols}" for layout in self.loader.layouts}))
        metadata |= {"method": self.config.method, "base": self.plan.files.name, "steps": self.state.step}
        return {f"iclora.{name}": str(value) for name, value in metadata.items() if value is not None}

    def draw_sheet(self) -> None:
        """Write a sheet of samples, made with the averaged weights; if memory does not allow it, training goes on."""
        try:
            autoencoder = load_autoencoder(self.plan.files.autoencoder, self.config.device)
            with averaged(self.state):
                columns = sheet_columns(self, autoencoder)
        except (RuntimeError, MemoryError) as error:
            line = str(error).partition("\n")[0][:120]
            return self.note(f"{self.sheet} is left out ({line}); training goes on")
        write_atomic(self.sheet, to_png(labelled(columns, f"step {self.state.step}")))
        self.meter.start()


class Metrics:
    """metrics.jsonl of a run: one JSON object a line. Lines of steps that a resumed run does again are dropped.

    board: also write events for TensorBoard into the same folder
    Errors: ValueError if TensorBoard is wanted, but not installed
    """

    def __init__(self, path: Path, done: int, board: bool = False):
        self.path = path
        kept = [line for line in self.rows() if line["step"] <= done]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.board = board_writer()(str(path.parent), purge_step=done + 1) if board else None

    def add(self, step: int, **values: float) -> None:
        with open(self.path, "a", newline="\n") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def rows(self) -> list[dict[str, float]]:
        """Read what was written; a last line that a kill cut short does not count, nor does what is not ours."""
        rows = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []:
            with contextlib.suppress(ValueError, TypeError, AttributeError, OverflowError, RecursionError):
                row = {name: value + 0.0 for name, value in json.loads(line).items()}
                if (step := row.get("step", 0.0)).is_integer() and 1 <= step <= MAX_STEPS and "loss" in row:
                    rows.append({**row, "step": int(step)})
        return rows


def draw_curve(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Draw the training loss with its running mean, and the validation loss, over the steps.

    rows: from Metrics.rows
    """
    losses, validation = (
        [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
        for name in ("loss", "validation")
    )
    values = [value for _, value in losses + validation]
    if not values:
        return
    last, low, high = max(row["step"] for row in rows), min(values), max(values)
    high = high if high > low else low + 1
    mean, smooth, new = losses[0][1] if losses else 0.0, [], min(1.0, max(NEW, 1 / (NEW * len(rows))))
    for step, loss in losses:
        mean += new * (loss - mean)
        smooth.append((step, mean))

    def place(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + (CURVE_SIZE[0] - 2 * MARGIN) * step / last
        return x, CURVE_SIZE[1] - MARGIN - (CURVE_SIZE[1] - 2 * MARGIN) * (value - low) / (high - low)

    picture = Image.new("RGB", CURVE_SIZE, "white")
    pen = ImageDraw.Draw(picture)
    pen.rectangle((MARGIN, MARGIN, CURVE_SIZE[0] - MARGIN, CURVE_SIZE[1] - MARGIN), outline=(200, 200, 200))
    for x, y in (place(*point) for point in losses):
        pen.point([(x, y), (x + 1, y)], fill=(170, 200, 235))
    for line, colour in ((smooth, (20, 90, 170)), (validation, (210, 80, 30))):
        if len(line) > 1:
            pen.line([place(*point) for point in line], fill=colour, width=2)
    for value in (low, high):
        pen.text((6, place(0, value)[1] - 5), f"{value:.3f}", fill="black")
    pen.text((MARGIN, CURVE_SIZE[1] - MARGIN + 8), f"0 to {last:g} steps", fill="black")
    pen.text((MARGIN, MARGIN - 18), "loss (blue: running mean), validation (orange)", fill="black")
    write_atomic(path, to_png(picture))


@torch.no_grad()
def sheet_columns(run: Monitor, autoencoder: AutoEncoder) -> list[Column]:
    """Sample the first examples of every bucket, and what --sample-prompt names, each from a seed of its own."""
    buckets = run.loader.held_out or [run.loader.batch(0)]
    chosen = [(layout, examples[i]) for i in range(SAMPLES) for layout, examples in buckets if i < len(examples)]
    columns = [data_column(run, autoencoder, *pair, seed) for seed, pair in enumerate(chosen[:SAMPLES])]
    layout = replace(run.loader.layouts[0], references=())
    for seed, prompt in enumerate(run.config.sample_prompt):
        z = sample(run, layout, run.loader.prompt(prompt, layout).to(run.device), seed)
        columns.append(
            (prompt, {"made": to_picture(encode_by_panel(autoencoder.decode, z, layout, run.config.concat))})
        )
    return columns


def data_column(run: Monitor, autoencoder: AutoEncoder, layout: Layout, example: Example, seed: int) -> Column:
    """Show an example's references, what is made of them and of its caption, and the example itself, as they decode.

    If the run keeps panels clean, the first one is kept here instead of being made.
    """
    kept = (1,) if run.config.condition == "clean" and layout.panels > 1 else ()
    batch, after_step, images = run.loader.collate(layout, [example], [kept], [False]).to(run.device), None, {}
    if kept:
        after_step = keep_clean(pack(batch.known), generate_mask(range(2, layout.panels + 1), layout).to(run.device))
    sizes = [(high // CELL, wide // CELL) for wide, high in layout.references]
    tokens = [] if batch.references is None else batch.references.split([h * w // 4 for h, w in sizes], dim=1)
    for number, (reference, size) in enumerate(zip(tokens, sizes, strict=True), 1):
        images[f"reference {number}"] = autoencoder.decode(unpack(reference, *size))
    for name, z in (("made", sample(run, layout, batch, seed, after_step)), ("target", batch.z)):
        images[name] = encode_by_panel(autoencoder.decode, z, layout, run.config.concat)
    return example.caption, {name: to_picture(image) for name, image in images.items()}


def sample(run: Monitor, layout: Layout, batch: Batch, seed: int, after_step: AfterStep | None = None) -> Tensor:
    """Make latents from a batch of one text and its references, as sample.py does: (1, 16, h, w)."""
    defaults, x = run.plan.defaults, pack(noise(layout.height, layout.width, seed)).to(run.device)
    x = after_step(x, 1.0) if after_step else x
    ids = grid_ids(layout.tokens_high, layout.tokens_wide)[None].to(run.device) if batch.ids is None else batch.ids
    guidance = defaults.guidance_with(bool(layout.references))
    ts = times(defaults.steps, tokens=x.shape[1], shift=defaults.shift)
    conditions = batch.txt, batch.vec, guidance, batch.references, batch.attention_mask, batch.isolate_refs
    return unpack(denoise(run.flux, x, ts, ids, *conditions, after_step), layout.height // CELL, layout.width // CELL)


def labelled(columns: Sequence[Column], title: str) -> Image.Image:
    """Put the columns of a sheet side by side, each below the start of its caption, and name the rows."""
    names = sorted({name for _, pictures in columns for name in pictures}, key=lambda name: (name[0] != "r", name))
    widths = [max(NARROW, *(picture.width for picture in pictures.values())) for _, pictures in columns]
    heights = [max(pictures[name].height for _, pictures in columns if name in pictures) for name in names]
    size = LEFT + sum(widths) + GAP * len(widths), TOP + sum(heights) + GAP * len(heights)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    pen.text((GAP, GAP), title, fill="black")
    tops = [TOP + sum(heights[:i]) + GAP * i for i in range(len(names))]
    for name, top in zip(names, tops, strict=True):
        pen.text((GAP, top), name, fill="black")
    left = LEFT
    for (caption, pictures), width in zip(columns, widths, strict=True):
        lines = textwrap.wrap(caption, width // GLYPH, max_lines=4, placeholder=" ...")
        pen.text((left, GAP), "\n".join(lines), fill="black")
        for name, top in zip(names, tops, strict=True):
            if name in pictures:
                page.paste(pictures[name], (left, top))
        left += width + GAP
    return page
