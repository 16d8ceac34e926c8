"""Modulations computed ahead, so that their weights, 27 % of FLUX.1-dev, need not stand on the GPU.

A block's shifts, scales and gates are a Linear of the vector vec, which is made of time, guidance and pooled text: in a
double block 113 MB of weights for 37 kB of result. All vecs of a run are known before its first step. So each such
Linear comes to the GPU once, alone, is applied to all of them, and a step looks its rows up:

    flux.conditioning(t, y, guidance) -> rows    puts vec on a list, and gives numbers of rows in its place
    flux.velocity(img, cond, rows)               before the first block, what is on the list is computed

The result is the same to the bit: every vec is computed and multiplied as it is without tables, in the same shape, only
earlier. (LoRAs on modulations are merged on the CPU, where the weights lie, which may round another way than a GPU.)
Callers that know later times ask for their rows early: sampling/denoise.py for all steps, iclora/ahead.py for the next
ones of a training. What is asked for late costs one more pass over the weights.
Letters: B batch, D width, N rows of a table, W their width, which is 2, 3 or 6 D.
"""

import re
from collections.abc import Collection
from functools import partial
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .checkpoint import Checkpoint
from .flux import Flux
from .lora import LoraLinear

AHEAD = 16  # steps of a training whose rows are asked for at once: at batch 4 these are 64
MOST_ROWS = 128  # kept, in case a caption comes again; 2.1 MB each in FLUX.1-dev


def is_modulation(name: str) -> bool:
    """Tell whether a module or parameter is a modulation's."""
    return re.search(r"(_mod|\.modulation|\.adaLN_modulation)\b", name) is not None


def read_apart(
    checkpoint: Checkpoint, keys: Collection[str], dtype: torch.dtype, device: str | torch.device, tables: bool
) -> dict[str, Tensor]:
    """Read tensors as Checkpoint.read; if there will be tables, those of modulations onto the CPU."""
    apart = [key for key in keys if tables and is_modulation(key)]
    return checkpoint.read({*keys}.difference(apart), dtype, device) | checkpoint.read(apart, dtype)


class Table(nn.Module):
    """Stands where a Modulation stood, or the last layer's, and gives what that would give.

    The frozen Linear leaves the tree of modules, so that nobody moves it to the GPU; an adapter stays there, and live.
    """

    def __init__(self, modulation: nn.Module, device: torch.device):
        super().__init__()
        self.name, linear = [*modulation.named_children()][-1]
        self.chunks = getattr(modulation, "chunks", None)  # the last layer cuts by itself
        self.live = isinstance(linear, LoraLinear)
        self.frozen = [(linear.base if self.live else linear).to("cpu")]  # a module in a list is no child
        shape = without_weights(self.frozen[0])
        if self.live:
            linear.base, shape = shape, linear
            linear.adapters.to(device)
        self.add_module(self.name, shape)
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self.rows: Tensor | None = None  # (N, W)
        self.vecs: Tensor | None = None  # (N, D), for adapters

    def extend(self, vecs: list[Tensor]) -> None:
        """Append the rows of vecs, each (B, D), one by one as the plain path computes them."""
        device = vecs[0].device
        weights = {name: p.to(device, non_blocking=True) for name, p in self.frozen[0].named_parameters()}
        rows = [functional_call(self.frozen[0], weights, (F.silu(vec),)) for vec in vecs]
        self.rows = torch.cat(rows if self.rows is None else (self.rows, *rows))
        if self.live:
            self.vecs = torch.cat(vecs if self.vecs is None else (self.vecs, *vecs))

    def forward(self, rows: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Look rows up, and add what an adapter makes of their vecs.

        rows: (B,) their numbers
        Returns (B, W), or its chunks, each (B, 1, D)
        """
        out = self.rows.index_select(0, rows)
        if self.live:
            out = out + getattr(self, self.name).change(F.silu(self.vecs.index_select(0, rows)))
        return out if self.chunks is None else out[:, None].chunk(self.chunks, dim=-1)


def without_weights(linear: nn.Linear) -> nn.Linear:
    """Make a Linear that tells its name, shape and dtype, and has no parameters."""
    shape = nn.Linear(*reversed(linear.weight.shape), device="meta")
    for name, _ in [*shape.named_parameters()]:
        delattr(shape, name)
        setattr(shape, name, getattr(linear, name).detach().to("meta"))  # codes of fp8 are no parameter of a Linear
    return shape


class Tables:
    """All tables of a transformer, which have the same rows.

    passes: over the weights, so far
    ahead: rows that iclora.ahead has asked for
    most: rows that are kept
    ran: whether blocks ran since rows were asked for
    """

    def __init__(self, tables: list[Table]):
        self.tables, self.passes, self.ahead, self.most, self.ran = tables, 0, -1, MOST_ROWS, False
        self.clear()

    def clear(self) -> None:
        """Forget all rows, whose numbers are void then."""
        self.known: dict[bytes, Tensor] = {}  # a vec's bytes -> its rows
        self.asked: list[Tensor] = []
        self.count = 0
        for table in self.tables:
            table.clear()

    def rows_of(self, vec: Tensor) -> Tensor:
        """Give the numbers of a vec's rows, and have them computed if they are not there.

        The first one after blocks ran begins a new run: rows of earlier ones are forgotten if they have become many.

        vec: (B, D)
        Returns (B,) whole numbers
        """
        if vec.requires_grad:  # a table would keep its gradient from it
            raise ValueError("a model this large trains no LoRA on time_in, guidance_in or vector_in; leave them out")
        key = vec.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        if key not in self.known:
            if self.ran and self.count > self.most:
                self.clear()
            self.ran = False
            self.known[key] = torch.arange(self.count, self.count + len(vec), device=vec.device)
            self.asked.append(vec)
            self.count += len(vec)
        return self.known[key]

    @torch.no_grad()
    def fill(self, *_: object) -> None:
        """Compute the rows that were asked for; called before the first block."""
        self.ran = True
        if not self.asked:
            return
        try:
            for table in self.tables:
                # who makes one picture does not wait until memory is locked, from where a GPU copies without a detour
                for p in table.frozen[0].parameters() if self.passes == 1 and self.asked[0].is_cuda else ():
                    p.data = p.data.pin_memory()
                table.extend(self.asked)
        except BaseException:  # no memory, say: some tables have the rows now, others do not
            self.clear()
            raise
        self.asked, self.passes = [], self.passes + 1


def _rows_of_conditioning(flux: ref[Flux], *inputs: Tensor) -> Tensor:
    """Give the rows of what conditioning gives."""
    return flux().tables.rows_of(Flux.conditioning(flux(), *inputs))


def make_tables(flux: Flux) -> None:
    """Put tables in place of all modulations, whose weights go to the CPU, or stay there.

    LoRAs of sampling are merged before, those that are trained attached.
    """
    device, tables = flux.img_in.weight.device, []
    for name, module in [*flux.named_modules()]:
        if is_modulation(name) and not is_modulation(name.rpartition(".")[0]):
            tables.append(Table(module, device))
            flux.set_submodule(name, tables[-1])
    flux.tables = Tables(tables)
    flux.conditioning = partial(_rows_of_conditioning, ref(flux))  # a transformer that held itself would stay
    [*flux.double_blocks, *flux.single_blocks][0].register_forward_pre_hook(flux.tables.fill)
