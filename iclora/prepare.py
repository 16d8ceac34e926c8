"""How a transformer is loaded and made ready for its machine, for sampling and training, in the one order that works.

Weights of more than BIG bytes on a GPU get tables (model/tables.py); the rest is asked for: --quantize, --compile.
"""

from collections.abc import Callable, Sequence

import torch

from model.checkpoint import Checkpoint
from model.flux import Flux
from model.lora import load_lora, merge
from model.lora_formats import LoraFile
from model.weights import load_flux

from .config import SampleConfig, TrainConfig
from .memory import stored_values

Config = SampleConfig | TrainConfig  # with nothing left undecided
BIG = 2e9  # bytes of weights from which on techniques that change no bit are worth their while


def has_tables(flux: Checkpoint, config: Config) -> bool:
    """Tell whether modulations are computed ahead, and their weights stay on the CPU."""
    return getattr(torch, config.dtype).itemsize * stored_values(flux) > BIG and config.device != "cpu"


def load_transformer(
    flux: Checkpoint, config: Config, loras: Sequence[tuple[LoraFile, float]], note: Callable[[str], None]
) -> Flux:
    """Load a transformer and merge LoRAs into it. loras: with their strengths; note: is told what each is"""
    dtype, stay = getattr(torch, config.dtype), None
    if has_tables(flux, config):
        from model.tables import is_modulation as stay
    if config.quantize:
        from model.quantize import load_quantized

        return load_quantized(flux, config.device, dtype, stay, loras, note)
    network = load_flux(flux, config.device, dtype, stay)
    for lora, strength in loras:
        note(str(load_lora(network, lora, strength)))
    if loras:
        merge(network)
    return network


def prepare(network: Flux, flux: Checkpoint, config: Config, note: Callable[[str], None]) -> None:
    """Do what must come after LoRAs are merged, or attached to be trained. flux: what network was loaded from"""
    if has_tables(flux, config):
        from model.tables import make_tables

        make_tables(network)
    if config.compile:
        from model.compiled import WAIT, compile_blocks

        note(WAIT)
        compile_blocks(network)
