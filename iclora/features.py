"""What the text encoders made of captions before, on disk: T5-XXL, 9.5 GB, is read only where a caption is new.

The entries lie in .cache in the folder of the pictures, 4 MB each, the 200 that were used last; whoever deletes them
loses nothing but time. Training has a cache of its own, of texts one by one: what several texts of one picture give
when they are encoded together may differ from that in the last bits, and here nothing may.
Letters: T text tokens, C width of the T5 tokens, V of the CLIP vector.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import fingerprint

from .cache import Cache, hash_values, text_encoder_paths
from .plan import Plan

MOST = 200  # captions
Read = tuple[Tensor, Tensor, list[str]]  # txt (1, T, C), vec (1, V), and lines for the user


class Features:
    """Captions that were read, by all that their features depend on."""

    def __init__(self, folder: Path, plan: Plan, device: str):
        self.cache = Cache(folder)
        encoders = fingerprint(text_encoder_paths(plan.files), dated=True)
        self.depends = (device, plan.config.dtype, encoders)

    def find(self, plan: Plan) -> Read | None:
        """Give what was made of a plan's caption, if it is there and whole."""
        tensors = self.cache.get(self._key(plan))
        if tensors is None:
            return None
        with suppress(OSError):  # another process may have removed it by now
            os.utime(self.cache.path(self._key(plan)))
        return tensors["txt"], tensors["vec"], json.loads(bytes(tensors["lines"].tolist()))

    def keep(self, plan: Plan, read: Read) -> None:
        """Keep what was made of a plan's caption, and let go of what was not used for longest."""
        txt, vec, lines = read
        text = torch.frombuffer(bytearray(json.dumps(lines).encode()), dtype=torch.uint8)
        self.cache.put(self._key(plan), {"txt": txt, "vec": vec, "lines": text})
        times = {}
        for path in self.cache.folder.glob("*/*/*.safetensors"):
            with suppress(OSError):
                times[path] = path.stat().st_mtime
        for path in sorted(times, key=times.get)[:-MOST]:
            path.unlink(missing_ok=True)

    def _key(self, plan: Plan) -> str:
        texts = plan.caption, plan.text_mode, plan.layout.rows, plan.layout.cols, plan.defaults.text_length
        return hash_values("features", *texts, *self.depends)
