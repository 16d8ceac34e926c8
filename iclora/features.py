"""What the text encoders made of captions before, on disk: T5-XXL, 9.5 GB, is read only where a caption is new.

The entries lie in .cache in the folder of the pictures, 4 MB each, the 200 that were used last; whoever deletes them
loses nothing but time. Training has a cache of its own, of texts one by one: what several texts of one picture give
when they are encoded together may differ from that in the last bits, and here nothing may.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import fingerprint
from model.loading import BIG

from .cache import Cache, hash_values, text_encoder_paths
from .memory import stored_values
from .pipeline import Pipeline, doubts, text_key
from .plan import Plan

MOST = 200  # captions


class CachingPipeline(Pipeline):
    """A pipeline that keeps what large encoders made of captions, beside its pictures; as Pipeline else."""

    def __init__(self, *settings: Any):
        super().__init__(*settings)
        self.cache, self.encoders_mark = Cache(Path(self.config.out) / ".cache"), ""

    def read_caption(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Read features from disk, and tell again what was told of them; else encode and keep them."""
        if 2 * stored_values(plan.files.flux) <= BIG:
            return super().read_caption(plan)
        self.encoders_mark = self.encoders_mark or fingerprint(text_encoder_paths(plan.files), dated=True)
        device = "cpu" if plan.fit and plan.fit.text_on_cpu else plan.config.device
        depends = plan.defaults.text_length, device, plan.config.dtype, self.encoders_mark
        key = hash_values("features", *text_key(plan), *depends)
        if tensors := self.cache.get(key):
            with suppress(OSError):  # another process may have removed it by now
                os.utime(self.cache.path(key))
            for line in json.loads(bytes(tensors["lines"].tolist())):
                self.note(line)
            return tensors["txt"].to(plan.config.device), tensors["vec"].to(plan.config.device)
        txt, vec = super().read_caption(plan)
        lines = bytearray(json.dumps(doubts(self.encoders, plan)).encode())
        self.cache.put(key, {"txt": txt.cpu(), "vec": vec.cpu(), "lines": torch.frombuffer(lines, dtype=torch.uint8)})
        self.forget()
        return txt, vec

    def forget(self) -> None:
        """Let go of what was not used for longest."""
        times = {}
        for path in self.cache.folder.glob("*/*/*.safetensors"):
            with suppress(OSError):
                times[path] = path.stat().st_mtime
        for path in sorted(times, key=times.get)[:-MOST]:
            path.unlink(missing_ok=True)
