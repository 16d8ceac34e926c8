"""What a training run shows: a line of metrics for every step, the loss as a curve, and sheets of samples."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from model.autoencoder import AutoEncoder
from model.flux import Flux
from model.position import grid_ids
from sampling.flow import euler, times
from sampling.images import save_png, to_picture
from sampling.inpaint import keep_clean
from sampling.latents import CELL, TOKEN, noise, pack, unpack

from .config import REFERENCE_GUIDANCE, ModelRow, TrainConfig
from .data import Example
from .layout import Layout, through, token_mask
from .loader import Loader
from .restart import write_whole

SAMPLES = 4  # sets on a sheet
CURVE = (960, 420)  # pixels
MARGIN = 56
NEW = 0.05  # share of a new loss in the curve's running mean; of short runs more


class Metrics:
    """metrics.jsonl of a run: one JSON object a line. Lines of steps that a resumed run does again are dropped.

    board: also write events for TensorBoard into the same folder
    Errors: ValueError if TensorBoard is wanted, but not installed
    """

    def __init__(self, path: Path, done: int, board: bool = False):
        self.path = path
        kept = [line for line in self.rows() if line["step"] <= done]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.board = board_writer()(str(path.parent), purge_step=done + 1) if board else None

    def add(self, step: int, **values: float) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def rows(self) -> list[dict[str, float]]:
        """Reads what was written; a last line that a kill cut short does not count."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows


def board_writer() -> type:
    """Finds the class that writes events for TensorBoard, which is no requirement of ours.

    Errors: ValueError if it is not installed
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        advice = "pip install tensorboard, or leave it out: metrics.jsonl and loss.png tell the same"
        raise ValueError(f"--tensorboard needs a package that is not installed; {advice}") from None
    return SummaryWriter


def draw_curve(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Draws the training loss with its running mean, and the validation loss, over the steps.

    rows: from Metrics.rows
    """
    picture = Image.new("RGB", CURVE, "white")
    pen = ImageDraw.Draw(picture)
    values = [row[name] for row in rows for name in ("loss", "validation") if math.isfinite(row.get(name, math.nan))]
    if not values:
        return
    last, low, high = max(row["step"] for row in rows), min(values), max(values)
    high = high if high > low else low + 1

    def place(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + (CURVE[0] - 2 * MARGIN) * step / last
        return x, CURVE[1] - MARGIN - (CURVE[1] - 2 * MARGIN) * (value - low) / (high - low)

    pen.rectangle((MARGIN, MARGIN, CURVE[0] - MARGIN, CURVE[1] - MARGIN), outline=(200, 200, 200))
    mean, smooth, validation, new = None, [], [], min(1.0, max(NEW, 1 / (NEW * len(rows))))
    for row in rows:
        if math.isfinite(row.get("loss", math.nan)):
            mean = row["loss"] if mean is None else (1 - new) * mean + new * row["loss"]
            x, y = place(row["step"], row["loss"])
            pen.point([(x, y), (x + 1, y)], fill=(170, 200, 235))
            smooth.append(place(row["step"], mean))
        if math.isfinite(row.get("validation", math.nan)):
            validation.append(place(row["step"], row["validation"]))
    for line, colour in ((smooth, (20, 90, 170)), (validation, (210, 80, 30))):
        if len(line) > 1:
            pen.line(line, fill=colour, width=2)
    for value in (low, high):
        pen.text((6, place(0, value)[1] - 5), f"{value:.3f}", fill="black")
    pen.text((MARGIN, CURVE[1] - MARGIN + 8), f"0 to {last:g} steps", fill="black")
    pen.text((MARGIN, MARGIN - 18), "loss (blue: running mean), validation (orange)", fill="black")
    put_png(picture, path)


def put_png(picture: Image.Image, path: Path) -> None:
    """Writes a PNG whole or not at all, in place of an earlier one.

    Errors: OSError or ValueError if the disk is full or read-only
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_png(picture, temporary)  # which never writes over a file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@torch.no_grad()
def sheet(flux: Flux, autoencoder: AutoEncoder, feed: Loader, row: ModelRow, config: TrainConfig) -> Image.Image:
    """Samples of the first examples of every bucket, each below its references and above the example itself.

    config: of the run; if it keeps panels clean, the first one is kept here instead of being made
    """
    buckets = feed.held_out or [feed.batch(0)]
    chosen = [(layout, some[i]) for i in range(SAMPLES) for layout, some in buckets if i < len(some)][:SAMPLES]
    columns = []
    for seed, (layout, example) in enumerate(chosen):
        columns.append(_stack(_sample(flux, autoencoder, feed, row, layout, example, seed, config), down=True))
    return _stack(columns, down=False)


def _stack(pictures: Sequence[Image.Image], down: bool) -> Image.Image:
    """Puts pictures one below the other, or side by side."""
    sizes = [picture.size if down else picture.size[::-1] for picture in pictures]
    shape = max(across for across, _ in sizes), sum(along + 4 for _, along in sizes) - 4
    page, place = Image.new("RGB", shape if down else shape[::-1], "white"), 0
    for picture, (_, along) in zip(pictures, sizes, strict=True):
        page.paste(picture, (0, place) if down else (place, 0))
        place += along + 4
    return page


def _sample(
    flux: Flux, autoencoder: AutoEncoder, feed: Loader, row: ModelRow, layout: Layout, example: Example, seed: int,
    config: TrainConfig,
) -> list[Image.Image]:  # fmt: skip
    """Gives the references, what is made, and the example itself, as their latents decode."""
    device = next(flux.parameters()).device
    keep = config.condition == "clean" and layout.panels > 1
    sets = feed.collate(layout, [example], [(1,) if keep else ()], [False]).to(device)
    start = pack(noise(layout.height, layout.width, seed)).to(device)
    ids = grid_ids(layout.tokens_high, layout.tokens_wide)[None].to(device) if sets.ids is None else sets.ids
    txt_ids = torch.zeros(1, sets.txt.shape[1], 3, device=device)
    strength = REFERENCE_GUIDANCE if layout.references else row.guidance
    guidance = None if row.guidance is None else torch.full((1,), strength, device=device)
    after_step = None
    if keep:
        mask = token_mask(range(2, layout.panels + 1), layout).to(device)
        after_step = keep_clean(pack(sets.known), mask)
        start = after_step(start, 1.0)

    fixed = flux.prepare(ids, sets.txt, txt_ids, sets.references, sets.attention_mask, sets.isolate_refs)

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        vec = flux.conditioning(torch.full((1,), t, device=device), sets.vec, guidance)
        return flux.predict(x, fixed, vec).float()

    x = euler(velocity, start, times(row.steps, tokens=start.shape[1], shift=row.shift), after_step)
    made = unpack(x, 2 * layout.tokens_high, 2 * layout.tokens_wide)
    shown, start = [], 0
    for wide, high in layout.references:
        end = start + wide // TOKEN * (high // TOKEN)
        shown.append(autoencoder.decode(unpack(sets.references[:, start:end], high // CELL, wide // CELL)))
        start = end
    shown += [through(autoencoder.decode, z, layout, config.concat) for z in (made, sets.z)]
    return [to_picture(image) for image in shown]
