"""What a training will ask the transformer's tables for (model/tables.py), asked for early, so that one pass over the
weights of the modulations serves many steps.

All that a step draws comes from its seed and number: the times of later steps are known now, and which captions they
leave out. Asked for again by the step itself, the vectors are the same to the bit, and their rows are there.
"""

import math

import torch
from torch import Tensor

from model.flux import Flux
from model.tables import AHEAD

from .config import TrainConfig
from .loader import Batch, Loader
from .training import GUIDANCE, VALIDATION_TIMES, micro_batches, sample_step


def look_ahead(config: TrainConfig, flux: Flux, loader: Loader, step: int, rank: int, world_size: int) -> None:
    """Ask for what this step and the next ones need, every so often; without tables nothing is done.

    step: the next one, from 0
    rank, world_size: of this process, whose share of the batches counts
    """
    tables = getattr(flux, "tables", None)
    if tables is None or (tables.count == tables.ahead and step % AHEAD):  # more are those of a validation or a sheet
        return
    tables.most = math.inf  # forgotten here alone: a backward pass may need rows of references once more
    tables.clear()
    for number in range(step, min(step + AHEAD - step % AHEAD, config.steps)):
        layout, examples = loader.batch(number)
        drawn = sample_step(config, number, len(examples), layout)
        for share in micro_batches(len(examples), rank, world_size, config.accumulate):
            part = drawn[share]
            ask(flux, loader.collate(layout, examples[share], part.kept, part.dropped), part.t)
    tables.ahead = tables.count


def ask_for_validation(flux: Flux, loader: Loader) -> None:
    """Ask for what the validation loss needs, all of it."""
    for layout, examples in loader.held_out if hasattr(flux, "tables") else ():
        for example in examples:
            batch = loader.collate(layout, [example], [()], [False])
            for t in VALIDATION_TIMES:
                ask(flux, batch, torch.tensor([t]))


def ask(flux: Flux, batch: Batch, t: Tensor) -> None:
    """Ask for what a forward of a batch needs: its own vectors, and that of references which see each other only.

    t: (B,) on the CPU
    """
    device = flux.img_in.weight.device
    flux.conditioning(t.to(device), batch.vec.to(device), torch.full((len(t),), GUIDANCE, device=device))
    if batch.isolate_refs:
        flux.reference_vec(len(t))
