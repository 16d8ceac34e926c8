"""Compiled blocks: torch fuses what stands between the matrix products, a sixth of a 1024x1024 step on an H100.

Each kind of block is one graph, whose weights are inputs, so that all blocks share it. Another size of picture makes a
second graph, which knows no sizes, and all further ones share that. Conditioning stays outside: the compiler would keep
1000 * guidance in float32, where the released models are sampled with what bfloat16 makes of it, 3504 for 3.5.
References that see only each other pass the blocks as written: once a run, through an attention of its own.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any
from weakref import ref

import torch
from torch import nn

from .flux import Flux, attention

GRAPHS = 64  # of a kind of block: sizes, masks, references, with gradients and without; torch gives up at 8
WAIT = "the blocks are compiled: the first step of a new kind of picture may take minutes, the others are faster for it"


@cache
def check_compiler(device: str) -> None:
    """Try the compiler on one line, before anything is loaded.

    Errors: ValueError if there is none that works
    """
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:  # whatever torch makes of a missing or broken one
        needs, reason = "g++" if device == "cpu" else "Triton", str(error).strip().partition("\n")[0][:80]
        raise ValueError(f"--compile does not work here ({reason}); install {needs}, or leave it out") from None


def compile_blocks(flux: Flux, backend: str | Callable = "inductor") -> None:
    """Have the blocks compiled when they are called first.

    backend: as for torch.compile
    """
    torch._dynamo.config.recompile_limit = GRAPHS
    for blocks in (flux.double_blocks, flux.single_blocks):
        graph = torch.compile(type(blocks[0]).forward, fullgraph=True, backend=backend) if blocks else None
        for block in blocks:
            block.forward = partial(_run, graph, ref(block))  # a block that held itself would outlive its transformer


def _run(graph: Callable, block: ref[nn.Module], *inputs: Any) -> Any:
    """Call the graph, or what it was made of where attention, the last of the inputs, is not the one for every step."""
    forward = graph if getattr(inputs[-1], "func", None) is attention else type(block()).forward
    return forward(block(), *inputs)
