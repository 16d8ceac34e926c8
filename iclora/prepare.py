"""A transformer is made ready for its machine here, for sampling and for training, in the one order that works."""

from collections.abc import Callable

import torch

from model.checkpoint import Checkpoint
from model.compiled import WAIT, compile_blocks
from model.flux import Flux
from model.tables import is_modulation, make_tables, worthwhile

from .config import SampleConfig, TrainConfig
from .memory import stored_values

Config = SampleConfig | TrainConfig  # with nothing left undecided


def staying(flux: Checkpoint, config: Config) -> Callable[[str], bool] | None:
    """Tell load_flux which parameters shall stay on the CPU; None is none."""
    size = getattr(torch, config.dtype).itemsize * stored_values(flux)
    return is_modulation if worthwhile(size, config.device) else None


def prepare(flux: Flux, checkpoint: Checkpoint, config: Config, note: Callable[[str], None]) -> None:
    """Do what the size of a transformer and the options ask for, once its LoRAs are merged, or attached to be trained.

    checkpoint: that it was loaded from, with staying
    """
    if staying(checkpoint, config):
        make_tables(flux)
    if config.compile:
        note(WAIT)
        compile_blocks(flux)
