"""Sampling and training with what cards.py has chosen, so that a large model fits; small ones do not come here.

The order in which a transformer is made ready is the one that works: LoRAs are merged or attached, then modulations
become tables, blocks are compiled, and what stays on the CPU streams from there.
What the text encoders made of captions before lies in .cache in the folder of the pictures, 4 MB each, the 200 that
were used last: T5-XXL, 9.5 GB, is read only where a caption is new. Whoever deletes it loses nothing but time.
"""

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import Checkpoint, fingerprint
from model.compiled import WAIT, compile_blocks
from model.flux import Flux
from model.loading import BIG, move
from model.lora import load_lora, merge
from model.lora_formats import LoraFile
from model.offload import offload
from model.quantize import load_quantized
from model.tables import make_tables, read_apart
from model.text import load_text_encoders
from model.weights import empty_network

from .cache import Cache, hash_values, text_encoder_paths
from .cards import Config, MemoryPlan
from .memory import add_memory_plans, stored_values
from .plan import Plan, text_key
from .records import Note

MOST = 200  # captions


def load_fitted(
    flux: Checkpoint, config: Config, plan: MemoryPlan, loras: Sequence[tuple[LoraFile, float]], note: Note
) -> Flux:
    """Load a transformer and merge LoRAs into it, on the CPU where blocks stay there, or all of it finds no room else.

    config: with all defaults resolved
    loras: with their strengths
    note: is told what each is
    """
    device, dtype = "cpu" if plan.offload or plan.load_on_cpu else config.device, getattr(torch, config.dtype)
    if plan.quantize:
        return load_quantized(flux, device, dtype, loras, note, plan.tables)
    network = empty_network(Flux, flux).requires_grad_(False).eval()
    network.load_state_dict(read_apart(flux, flux.tensors, dtype, device, plan.tables), assign=True)
    for lora, strength in loras:
        note(str(load_lora(network, lora, strength)))
    merge(network)
    return network


def prepare(network: Flux, config: Config, plan: MemoryPlan, note: Note) -> None:
    """Do what comes after LoRAs are merged, or attached to be trained. note: is told what is waited for"""
    if plan.tables and config.device != "cpu":  # whose memory has the weights in any case
        make_tables(network)
    if config.compile:
        note(WAIT)
        compile_blocks(network)
    if plan.offload:
        offload(network, config.device)
    else:
        move(network, config.device)


class Fitted:
    """What a pipeline does otherwise where plans say how they fit; see iclora.pipeline.pipeline_for."""

    def __init__(self, *settings: Any):
        super().__init__(*settings)
        self.cache, self.encoders_mark = Cache(Path(self.config.out) / ".cache"), ""

    def run(self, plan: Plan, *progress: Any) -> Iterator[Any]:
        """Choose techniques, unless the plan has them, and make its sets."""
        yield from super().run(*add_memory_plans([plan]), *progress)

    def read_captions(self, plans: Sequence[Plan]) -> None:
        """Read captions, and let the encoders go where there is no room for them beside the transformer."""
        plans = add_memory_plans(list(plans)) if plans else []
        super().read_captions(plans)
        if plans and plans[0].memory_plan.free_text and self.encoders is not None:
            self.encoders = None
            gc.collect()  # transformers' modules hold each other in cycles
            if plans[0].config.device == "cuda":
                torch.cuda.empty_cache()

    def read_caption(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Read features from disk, and tell again what was told of them; else encode and keep them."""
        self.encoders_mark = self.encoders_mark or fingerprint(text_encoder_paths(plan.files), dated=True)
        device = "cpu" if plan.memory_plan.text_on_cpu else plan.config.device
        depends = plan.defaults.text_length, device, plan.config.dtype, self.encoders_mark
        key, large = hash_values("features", *text_key(plan), *depends), 2 * stored_values(plan.files.flux) > BIG
        tensors = self.cache.get(key) if large else None
        if tensors is None:
            if self.encoders is None:
                if plan.memory_plan.free_text:
                    self.flux = self.loaded = None
                    gc.collect()  # as below
                self.encoders = load_text_encoders(plan.files, "cpu", getattr(torch, plan.config.dtype))
                move(self.encoders.t5, device), move(self.encoders.clip, device)
            txt, vec = super().read_caption(plan)
            lines = bytearray(json.dumps(self.doubts(plan)).encode())
            tensors = {"txt": txt, "vec": vec, "lines": torch.frombuffer(lines, dtype=torch.uint8)}
            if large:
                self.cache.put(key, tensors)
                self.forget()
        else:
            for line in json.loads(bytes(tensors["lines"].tolist())):
                self.note(line)
            with suppress(OSError):  # another process may have removed it by now
                os.utime(self.cache.path(key))
        return tensors["txt"].to(plan.config.device), tensors["vec"].to(plan.config.device)

    def forget(self) -> None:
        """Let go of what was not used for longest."""
        with suppress(OSError):  # another process may have removed one by now
            for path in sorted(self.cache.folder.glob("*/*/*.safetensors"), key=os.path.getmtime)[:-MOST]:
                path.unlink(missing_ok=True)

    def make_transformer(self, plan: Plan) -> Flux:
        """Load a transformer with its LoRAs merged, and make it ready."""
        gc.collect()  # what streams or is compiled holds itself
        flux = load_fitted(plan.files.flux, plan.config, plan.memory_plan, plan.loras, self.note)
        prepare(flux, plan.config, plan.memory_plan, self.note)
        return flux
