"""Blocks that live in the CPU's memory and visit the device: two at a time, one at work and the next on its way.

Frozen weights only ever go one way. A block's tensors lie one behind the other in a row of bytes, so that one copy
brings them; on a GPU that row is locked in memory and copied on a stream of its own, beside the computation. Where a
step computes longer than the copies take, it costs no time; the results are the same to the bit.
On the device a block's tensors are views of one storage, which is emptied when the block has been at work and filled
when it comes again. So what a backward pass has kept of a weight is that weight again, once it is back:

    forward     0 1 2 3     each block brings the next one; at the end 0, or where gradients are wanted the one before
    backward    3 2 1 0     whatever a block has kept brings its weights back when it is asked for; then the one before

Blocks that are computed again in the backward pass (checkpointing) run their forward there, which does the same.
What is trained stays on the device.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

ALIGNMENT = 256  # bytes; GPU kernels want 16 at least


def offload(flux: nn.Module, device: str | torch.device) -> "Stream":
    """Let the blocks' frozen parameters and buffers stream to a device; all else moves there.

    After LoRAs are merged or attached, weights quantised and blocks compiled; before checkpointing.

    flux: with double_blocks and single_blocks, best loaded on the CPU
    device: "cuda", or "cpu", which does the same without streams
    Returns what tells which blocks are there
    Errors: ValueError if memory cannot be locked
    """
    device = torch.device(device)
    blocks = [*flux.double_blocks, *flux.single_blocks]
    for child in flux.children():
        if child not in (flux.double_blocks, flux.single_blocks):
            child.to(device)
    stream = Stream([_move(block, device) for block in blocks], device)
    for index, block in enumerate(blocks):
        block.forward = partial(_run, stream, index, block, block.forward)
    return stream


@dataclass
class Row:
    """The bytes of a block.

    home: (bytes,) on the CPU
    visit: (bytes,) on the device, whose storage is empty while the block is at home
    ready: of the last copy, on a GPU
    """

    home: Tensor
    visit: Tensor
    ready: Any = None


class Stream:
    """Which blocks are on the device, and which one is next."""

    def __init__(self, rows: list[Row], device: torch.device):
        self.rows, self.present, self.current = rows, set(), -1
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def enter(self, index: int, step: int = 1) -> None:
        """Have a block's weights on the device when what follows runs, and send for the next one's.

        step: 1 if the blocks run forwards, -1 backwards
        """
        if index == self.current:
            return
        following = index + step
        if following == len(self.rows):
            following = index - 1 if torch.is_grad_enabled() else 0
        following = 1 if following < 0 else following
        self.current, wanted = -1, dict.fromkeys((index, following % len(self.rows)))  # no memory, and it stays -1
        for gone in self.present - wanted.keys():
            self._wait(self.rows[gone])  # it may be on its way still
            self.present.discard(gone)
            self.rows[gone].visit.untyped_storage().resize_(0)
        for number in wanted:
            if number not in self.present:
                self._fetch(self.rows[number])
                self.present.add(number)
        self.current = index
        self._wait(self.rows[index])

    def _wait(self, row: Row) -> None:
        """Let the computation wait for a row's copy."""
        if row.ready:
            torch.cuda.current_stream().wait_event(row.ready)

    def _fetch(self, row: Row) -> None:
        row.visit.untyped_storage().resize_(row.home.nbytes)
        if self.copies:
            self.copies.wait_stream(torch.cuda.current_stream())  # who had this memory before is at work until then
        with torch.no_grad(), torch.cuda.stream(self.copies) if self.copies else nullcontext():
            row.visit.copy_(row.home, non_blocking=True)
        row.ready = self.copies and self.copies.record_event()


def _run(stream: Stream, index: int, block: nn.Module, forward: Callable, *inputs: Any) -> Any:
    """Run a block with its weights there, and have them back whenever its backward pass asks for what it kept."""
    backwards = index == stream.current - 1 and torch.is_grad_enabled()  # computed again
    stream.enter(index, -1 if backwards else 1)
    again = getattr(block.forward, "func", None) is checkpoint  # which keeps nothing, and runs this before its backward

    def unpack(kept: Tensor) -> Tensor:
        stream.enter(index, -1)
        return kept

    with nullcontext() if again else saved_tensors_hooks(lambda kept: kept, unpack):
        return forward(*inputs)


def _tensors(block: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """List all parameters and buffers, each with the module that has it."""
    for module in block.modules():
        for tensors in (module._parameters, module._buffers):
            yield from ((module, name, tensor) for name, tensor in tensors.items() if tensor is not None)


def _move(block: nn.Module, device: torch.device) -> Row:
    """Put a block's frozen tensors into a row, and views of its visits in their place."""
    frozen, size = [], 0
    for module, name, tensor in [*_tensors(block)]:
        if tensor.requires_grad:
            tensor.data = tensor.data.to(device)
            continue
        frozen.append((module, name, tensor, size))
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    row = Row(torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8, device=device))
    for module, name, tensor, start in frozen:
        row.home[start : start + tensor.nbytes] = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        view = row.visit[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        setattr(module, name, nn.Parameter(view, requires_grad=False) if name in module._parameters else view)
    if device.type == "cuda":
        _lock(row.home)
    row.visit.untyped_storage().resize_(0)
    return row


def _lock(home: Tensor) -> None:
    """Lock memory in its place; torch's own pinned memory would round a block up to a power of two."""
    address, cudart = home.data_ptr(), torch.cuda.cudart()
    if int(cudart.cudaHostRegister(address, home.nbytes, 0)):
        size = f"{home.nbytes / 1e9:.2f} GB"
        raise ValueError(f"--offload cannot lock {size} more of the CPU's memory; free some, or leave it out")
    weakref.finalize(home, cudart.cudaHostUnregister, address)
