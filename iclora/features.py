"""What the text encoders made of captions before, on disk: T5-XXL, 9.5 GB, is read only where a caption is new.

The entries lie in .cache in the folder of the pictures, 4 MB each, the 200 that were used last; whoever deletes them
loses nothing but time. Training has a cache of its own, of texts one by one: what several texts of one picture give
when they are encoded together may differ from that in the last bits, and here nothing may.
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from model.checkpoint import fingerprint
from model.text import check_widths

from .cache import Cache, hash_values, text_encoder_paths
from .plan import Plan

MOST = 200  # captions


class Features:
    """What a pipeline's encoders made of captions, by all that it depends on.

    pipeline: an iclora.pipeline.Pipeline
    text_key, doubts: of that module, which uses this one
    plan: one of those to come, which all have the same encoders
    device: that these run on
    """

    def __init__(self, pipeline: Any, plan: Plan, device: str, text_key: Callable, doubts: Callable):
        self.pipeline, self.cache = pipeline, Cache(pipeline.folder)
        self.text_key, self.doubts = text_key, doubts
        encoders = fingerprint(text_encoder_paths(plan.files), dated=True)
        self.depends = (plan.defaults.text_length, device, plan.config.dtype, encoders)

    def recall(self, plans: Sequence[Plan]) -> list[Plan]:
        """Hand the pipeline what is there, and tell again what was told of it. Returns plans whose captions are new"""
        new = []
        for plan in plans:
            if (tensors := self.cache.get(self._key(plan))) is None:
                new.append(plan)
                continue
            with suppress(OSError):  # another process may have removed it by now
                os.utime(self.cache.path(self._key(plan)))
            for line in json.loads(bytes(tensors["lines"].tolist())):
                self.pipeline.note(line)
            txt, vec = (tensors[name].to(plan.config.device) for name in ("txt", "vec"))
            check_widths(txt, vec, plan.files.flux.config, plan.files.name)
            self.pipeline.texts[self.text_key(plan)] = txt, vec
        return new

    def keep(self, plans: Sequence[Plan]) -> None:
        """Keep what the pipeline has read, and let go of what was not used for longest."""
        for plan in plans:
            txt, vec = self.pipeline.texts[self.text_key(plan)]
            lines = json.dumps(self.doubts(self.pipeline.encoders, plan)).encode()
            lines = torch.frombuffer(bytearray(lines), dtype=torch.uint8)
            self.cache.put(self._key(plan), {"txt": txt, "vec": vec, "lines": lines})
        times = {}
        for path in self.cache.folder.glob("*/*/*.safetensors"):
            with suppress(OSError):
                times[path] = path.stat().st_mtime
        for path in sorted(times, key=times.get)[:-MOST]:
            path.unlink(missing_ok=True)

    def _key(self, plan: Plan) -> str:
        return hash_values("features", *self.text_key(plan), *self.depends)
