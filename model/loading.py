"""Large checkpoints in the time of their bytes: pieces of files, several at once, straight to where they are wanted.

Each thread reads a piece into a buffer of its own and sends it on: to a GPU from locked memory, on a stream of its own,
where it is cast, or cast on the CPU. While one thread waits for the disk another one copies, so all are in use; no more
than a piece a thread is there twice. Mapped memory instead, page by page, takes several times as long.
"""

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import local
from typing import Any

import torch
from torch import Tensor, nn

PIECE = 2**24  # bytes
THREADS = min(8, os.cpu_count() or 1)
BIG = 2e9  # bytes, from which on it is worth the threads


class Senders:
    """Threads that fill tensors piece by piece. Leaving it waits for all, and has the errors of reading.

    device: of the tensors
    """

    def __init__(self, device: str | torch.device):
        self.device, self.local, self.left = torch.device(device), local(), []
        self.cuda = self.device.type == "cuda"
        if self.cuda and self.device.index is None:  # each thread has a current one of its own, at first the first GPU
            self.device = torch.device("cuda", torch.cuda.current_device())

    def __enter__(self) -> "Senders":
        self.pool = ThreadPoolExecutor(THREADS, initializer=self._begin)
        return self

    def __exit__(self, failed: Any, *error: Any) -> None:
        try:
            for future in () if failed else self.left:
                future.result()
        finally:
            self.pool.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        self.local.buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=self.cuda)
        self.local.stream = torch.cuda.Stream(self.device) if self.cuda else None

    def fill(self, target: Tensor, dtype: torch.dtype, read: Callable[[Tensor, int], None]) -> None:
        """Fill a contiguous tensor.

        dtype: of the source
        read: takes a buffer, and the number of the source's byte that is to be its first, and fills it
        """
        count = PIECE // dtype.itemsize
        for start in range(0, target.numel(), count):
            part = target.detach().view(-1)[start : start + count]
            self.left.append(self.pool.submit(self._send, part, dtype, read, start * dtype.itemsize))

    def _send(self, part: Tensor, dtype: torch.dtype, read: Callable, start: int) -> None:
        buffer, stream = self.local.buffer[: part.numel() * dtype.itemsize], self.local.stream
        read(buffer, start)
        with torch.inference_mode(), torch.cuda.stream(stream) if stream else nullcontext():
            part.copy_(buffer.to(self.device, non_blocking=True).view(dtype))
        if stream:
            stream.synchronize()  # the buffer is free for the next piece then


def read_pieces(
    tensors: Mapping[str, Any], dtypes: Mapping[str, torch.dtype], dtype: torch.dtype, device: str | torch.device
) -> dict[str, Tensor]:
    """Read tensors from safetensors files, cast.

    tensors: of model.checkpoint.Stored, by name; or made of several, which a thread makes and sends as a whole
    dtypes: by their name in the format
    dtype: wanted
    Errors: ValueError for a file that is cut short meanwhile, KeyError for what is no float
    """
    starts: dict[Path, dict[str, int]] = {}
    results: dict[str, Any] = {}
    with Senders(device) as senders:
        if senders.cuda:
            torch.cuda.synchronize(senders.device)  # memory that is free again may be in use until now
        for key, stored in tensors.items():
            source = dtypes[stored.dtype]
            if not hasattr(stored, "key"):
                results[key] = senders.pool.submit(lambda made: made.read(None, dtype).to(senders.device), stored)
                senders.left.append(results[key])
                continue
            if stored.path not in starts:
                starts[stored.path] = data_starts(stored.path)
            results[key] = torch.empty(stored.shape, dtype=dtype, device=device)
            senders.fill(results[key], source, _reader(stored.path, starts[stored.path][stored.key]))
    return {key: result if isinstance(result, Tensor) else result.result() for key, result in results.items()}


def data_starts(path: Path) -> dict[str, int]:
    """Find the first byte of each tensor in a safetensors file, whose header was checked before."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {key: 8 + size + value["data_offsets"][0] for key, value in header.items() if key != "__metadata__"}


def _reader(path: Path, first: int) -> Callable[[Tensor, int], None]:
    def read(buffer: Tensor, start: int) -> None:
        view = memoryview(buffer.numpy())
        with open(path, "rb", buffering=0) as file:
            file.seek(first + start)
            while view:
                if not (count := file.readinto(view)):
                    raise ValueError(f"{path} is cut short while it is read; download it again")
                view = view[count:]

    return read


def move(module: nn.Module, device: str | torch.device) -> nn.Module:
    """Move a module as module.to(device) does, frozen parameters of large ones piece by piece where that is a GPU."""
    parameters = [p for p in module.parameters() if p.device.type == "cpu" and p.is_contiguous()]
    if torch.device(device).type == "cuda" and sum(p.nbytes for p in parameters) > BIG:
        with Senders(device) as senders, torch.no_grad():
            torch.cuda.synchronize(senders.device)
            for p in parameters:
                source, p.data = p.data.view(-1).view(torch.uint8), torch.empty_like(p, device=device)
                senders.fill(p.data, p.dtype, _copier(source))
    return module.to(device)  # what is left


def _copier(source: Tensor) -> Callable[[Tensor, int], None]:
    return lambda buffer, start: buffer.copy_(source[start : start + len(buffer)])
