"""How a transformer is loaded and made ready where cards.py says how it fits into memory, in the order that works.

Small models on the plain path do not come here: model.weights.load_flux, load_lora and merge are all that it takes.
"""

from collections.abc import Callable, Sequence

import torch

from model.checkpoint import Checkpoint
from model.compiled import WAIT, compile_blocks
from model.flux import Flux
from model.lora import load_lora, merge
from model.lora_formats import LoraFile
from model.offload import offload
from model.quantize import load_quantized
from model.tables import is_modulation, make_tables
from model.weights import load_flux

from .cards import Fit
from .config import SampleConfig, TrainConfig

Config = SampleConfig | TrainConfig  # with nothing left undecided
Note = Callable[[str], None]


def load_fitted(
    flux: Checkpoint, config: Config, fit: Fit, loras: Sequence[tuple[LoraFile, float]], note: Note
) -> Flux:
    """Load a transformer and merge LoRAs into it, on the CPU where blocks are to stay there.

    loras: with their strengths
    note: is told what each is
    """
    device, dtype = "cpu" if fit.offload or fit.load_on_cpu else config.device, getattr(torch, config.dtype)
    stay = is_modulation if has_tables(config, fit) else None
    if config.quantize:
        return load_quantized(flux, device, dtype, stay, loras, note)
    network = load_flux(flux, device, dtype, stay)
    for lora, strength in loras:
        note(str(load_lora(network, lora, strength)))
    if loras:
        merge(network)
    return network


def prepare(network: Flux, config: Config, fit: Fit, note: Note) -> Flux:
    """Do what comes after LoRAs are merged, or attached to be trained. note: is told what is waited for"""
    if has_tables(config, fit):
        make_tables(network)
    if config.compile:
        note(WAIT)
        compile_blocks(network)
    if fit.offload:
        offload(network, config.device)
    return network.to(config.device) if fit.load_on_cpu and not fit.offload else network


def has_tables(config: Config, fit: Fit) -> bool:
    """Tell whether modulations are computed ahead; on a CPU their weights are mapped, and cost nothing."""
    return fit.tables and config.device != "cpu"
