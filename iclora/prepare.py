"""A transformer is made ready for its machine here, for sampling and for training, in the one order that works."""

from collections.abc import Callable

import torch

from model.checkpoint import Checkpoint
from model.compiled import WAIT, compile_blocks
from model.flux import Flux
from model.tables import BIG, is_modulation, make_tables

from .config import SampleConfig, TrainConfig
from .memory import stored_values

Config = SampleConfig | TrainConfig  # with nothing left undecided


def staying(flux: Checkpoint, config: Config) -> Callable[[str], bool] | None:
    """Tell load_flux which parameters of a large transformer stay on the CPU; None, and no table, for a small one."""
    large = getattr(torch, config.dtype).itemsize * stored_values(flux) > BIG
    return is_modulation if large and config.device != "cpu" else None


def prepare(flux: Flux, large: bool, config: Config, note: Callable[[str], None]) -> None:
    """Do what large weights and the options ask for, once LoRAs are merged, or attached to be trained."""
    if large:
        make_tables(flux)
    if config.compile:
        note(WAIT)
        compile_blocks(flux)
