"""Several processes that torchrun has started: who is who, how they meet and part, and what they add up."""

import contextlib
import os
import re
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor

LOST = re.compile("onnection (closed|reset|refused)|gloo|NCCL")  # what a process says when another one has ended
PATIENCE = timedelta(days=1)  # of a process that waits for another one; the first one encodes alone


def processes() -> tuple[int, int]:
    """Return the rank of this process, and how many torchrun has started."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device: str, backend: str = "gloo") -> None:
    """Find the other processes that torchrun has started; each of a node takes its own GPU.

    backend: through which tensors are shared, "nccl" for those of a GPU
    """
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.distributed.init_process_group(backend, timeout=PATIENCE)


@contextlib.contextmanager
def lost_process_is_one_line() -> Iterator[None]:
    """Turn what a process raises when another one has ended into one line. Errors: ValueError"""
    try:
        yield
    except RuntimeError as error:
        if "WORLD_SIZE" in os.environ and LOST.search(str(error)):
            raise ValueError("another process of this run has ended; it says why") from None
        raise


def meet(world_size: int) -> None:
    """Wait until all processes are here."""
    if world_size > 1:
        torch.distributed.barrier()


def leave_processes(world_size: int) -> None:
    """Wait for what the first process writes, and part."""
    if world_size > 1:
        meet(world_size)
        torch.distributed.destroy_process_group()


def sum_over_processes(tensors: list[Tensor], world_size: int) -> None:
    """Replace each tensor by its sum over all processes, in one message."""
    if world_size == 1:
        return
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))
