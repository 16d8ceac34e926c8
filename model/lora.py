"""LoRA: a low-rank change beside a frozen Linear, y = W x + b + scale * B (A x).

    x: (..., inputs), W: (outputs, inputs), A: (r, inputs), B: (rows, r), y: (..., outputs)

Adapters wrap layers; blocks never know. The released model fuses projections (qkv; qkv and the MLP's input), other
programs adapt them one by one: so an adapter changes only some rows of its Linear's output.
Letter: r rank. Files are in lora_formats.py. Source: arXiv:2106.09685
"""

import difflib
import fnmatch
import math
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import lora_formats as formats
from .lora_formats import Delta, LoraFile, LoraReport, Shapes, read_lora
from .lora_kinds import Change, DenseAdapter, called


class Adapter(nn.Module):
    """The change of some rows, scale * B (A x), and of their bias if it has one, which the scale does not concern."""

    def __init__(self, delta: Delta, weight: float = 1.0):
        super().__init__()
        self.rows, self.scale = delta.rows, delta.scale * weight
        self.down = nn.Parameter(delta.down)  # A (r, inputs)
        self.up = nn.Parameter(delta.up)  # B (rows, r)
        self.bias = None if delta.bias is None else nn.Parameter(weight * delta.bias)  # (rows,)

    def forward(self, x: Tensor) -> Tensor:
        """Compute in the dtype of x; the parameters may be float32 beside a bfloat16 Linear.

        x: (..., inputs)
        Returns (..., rows)
        """
        hidden = self.scale * F.linear(x, self.down.to(x.dtype))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(hidden, self.up.to(x.dtype), bias)

    def add_to(self, weight: Tensor) -> None:
        """Add scale * B A. weight: (rows, inputs) float32"""
        weight.addmm_(self.up.float(), self.down.float(), alpha=self.scale)


class LoraLinear(nn.Module):
    """A frozen Linear and the adapters beside it; those of the same rows add up."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adapters = nn.ModuleList()

    @property
    def weight(self) -> Tensor:
        """The base's, which tells the dtype and the shape of this layer."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """Add the change to W x + b. x: (..., inputs). Returns (..., outputs)"""
        return self.base(x) + self.change(x)

    def change(self, x: Tensor) -> Tensor:
        """Give what the adapters say of their rows, and zeros elsewhere.

        x: (..., inputs)
        Returns (..., outputs)
        """
        changes = [(adapter.rows.start, adapter.rows.stop, adapter(x)) for adapter in self.adapters]
        edges = {0, len(self.weight)}.union(*((start, stop) for start, stop, _ in changes))
        pieces = []
        for low, high in pairwise(sorted(edges)):
            here = [change[..., low - start : high - start] for start, stop, change in changes if start <= low < stop]
            pieces.append(sum(here[1:], here[0]) if here else x.new_zeros(*x.shape[:-1], high - low))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)  # cat copies even one

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Give the base all changes, summed in float32 and cast once; its old tensors stay as they were.

        An fp8 base (quantize.py) would round most of a small change away, so there they stay beside it.
        """
        if self.weight.itemsize == 1:
            return self
        weight, bias = (p.to(torch.float32, copy=True) for p in (self.base.weight, self.base.bias))
        for adapter in self.adapters:
            adapter.add_to(weight[adapter.rows])
            if adapter.bias is not None:
                bias[adapter.rows] += adapter.bias.float()
        self.base.weight = nn.Parameter(weight.to(self.base.weight.dtype), requires_grad=False)
        self.base.bias = nn.Parameter(bias.to(self.base.bias.dtype), requires_grad=False)
        return self.base


# What can be asked for: Linears by glob, and which parts of them get an adapter each. A single block's linear2 takes
# in attention and MLP at once, so it belongs to both.
TARGETS = {
    "attn": (
        ("double_blocks.*_attn.qkv", "q k v"),
        ("double_blocks.*_attn.proj", "all"),
        ("single_blocks.*.linear1", "q k v"),
        ("single_blocks.*.linear2", "all"),
    ),
    "mlp": (
        ("double_blocks.*_mlp.[02]", "all"),
        ("single_blocks.*.linear1", "mlp"),
        ("single_blocks.*.linear2", "all"),
    ),
    "mod": (("double_blocks.*_mod.lin", "all"), ("single_blocks.*.modulation.lin", "all")),
    "uno": (("double_blocks.*_attn.*", "all"), ("single_blocks.*.linear1", "qkv"), ("single_blocks.*.linear2", "all")),
}
TARGETS["all-linear"] = TARGETS["attn"] + TARGETS["mlp"] + TARGETS["mod"]  # as the published IC-LoRAs


INITS = ("kaiming", "uno")


def shapes(flux: nn.Module) -> Shapes:
    """Give outputs and inputs of every Linear, wrapped or not, by released name, in the order of the model."""
    linears = ((name, module) for name, module in flux.named_modules() if isinstance(module, nn.Linear))
    return {name.removesuffix(".base"): tuple(linear.weight.shape) for name, linear in linears}


def layers(flux: nn.Module) -> dict[str, LoraLinear]:
    """List the Linears that have adapters."""
    return {name: module for name, module in flux.named_modules() if isinstance(module, LoraLinear)}


def attach(
    flux: nn.Module,
    targets: str = "all-linear",
    rank: int = 16,
    alpha: float | None = None,
    generator: torch.Generator | None = None,
    init: str = "kaiming",
) -> list[nn.Parameter]:
    """Add fresh adapters in float32, which change nothing until they are trained: their ups are zero.

    targets: with commas between them, names of TARGETS or released names of Linears such as
        double_blocks.*.img_attn.qkv
    alpha: the changes are scaled by alpha / rank; None is the rank, so by 1
    generator: on the CPU; None is torch's own
    init: of the downs, whose size is that of the first changes: "kaiming" is uniform with a standard deviation of
        1 / sqrt(3 inputs), "uno" normal with 1 / rank
    Returns their parameters, in a fixed order
    Errors: ValueError for a target that means no Linear, a rank below 1, an alpha that is not a positive number, or
        another init
    Source: of kaiming arXiv:2106.09685; of uno bytedance/UNO@d305981 uno/flux/modules/layers.py LoRALinearLayer
    """
    if rank < 1:
        raise ValueError(f"LoRA rank {rank} is out of range; use 1 or more, the papers 16 (IC-LoRA) and 512 (UNO)")
    alpha = rank if alpha is None else alpha
    if not 0 < alpha < math.inf:
        raise ValueError(f"LoRA alpha {alpha} is out of range; use a positive number, most often the rank")
    if init not in INITS:
        raise ValueError(f"LoRA init {init!r} is unknown; choose one of {', '.join(INITS)}")
    fresh, known = [], shapes(flux)
    for name, parts in _choose(known, targets).items():
        for part in parts:
            rows = formats.slice_of(part, known[name])
            down = torch.empty(rank, known[name][1])
            if init == "uno":
                nn.init.normal_(down, std=1 / rank, generator=generator)
            else:
                nn.init.kaiming_uniform_(down, a=5**0.5, generator=generator)
            delta = Delta(name, rows, down, torch.zeros(rows.stop - rows.start, rank), alpha / rank)
            fresh += add(flux, delta, 1.0, train=True).parameters()
    return fresh


def _choose(known: Shapes, targets: str) -> dict[str, dict[str, None]]:
    """Which parts of which Linears, without doubles, in the order of the model."""
    chosen: dict[str, dict[str, None]] = {name: {} for name in known}
    for target in map(str.strip, targets.split(",")):
        globs = TARGETS.get(target, ((target, "all"),))
        hits = [(name, parts) for glob, parts in globs for name in fnmatch.filter(known, glob)]
        if not hits:
            near = difflib.get_close_matches(target, [*TARGETS, *known], n=3, cutoff=0.5)
            meant = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(
                f"LoRA target {target[:80]!r} means no Linear of this model; {meant}choose from {', '.join(TARGETS)} "
                "or name Linears, such as double_blocks.*.img_attn.qkv"
            )
        for name, parts in hits:
            chosen[name] |= dict.fromkeys(parts.split())
    return chosen


def add(flux: nn.Module, delta: Delta | Change, weight: float, train: bool) -> Adapter | DenseAdapter:
    """Wrap the Linear unless it is, and put one more adapter beside it, on the Linear's device."""
    linear = flux.get_submodule(delta.module)
    layer = linear if isinstance(linear, LoraLinear) else LoraLinear(linear)
    flux.set_submodule(delta.module, layer)
    adapter = (DenseAdapter if isinstance(delta, Change) else Adapter)(delta, weight)
    adapter = adapter.to(layer.weight.device).requires_grad_(train)
    layer.adapters.append(adapter.float() if train else adapter)
    return adapter


def trainable(flux: nn.Module) -> list[nn.Parameter]:
    """List the parameters of adapters that are trained, in the order of the model and of attaching."""
    return [p for layer in layers(flux).values() for p in layer.adapters.parameters() if p.requires_grad]


def merge(flux: nn.Module) -> None:
    """Fold all adapters into the weights and take the wrappers away, so that a step costs what it cost before.

    Those of fp8 Linears stay, see LoraLinear.merged.
    """
    for name, layer in layers(flux).items():
        flux.set_submodule(name, layer.merged())


def detach(flux: nn.Module) -> None:
    """Take all adapters away; the model is what it was, to the bit."""
    for name, layer in layers(flux).items():
        flux.set_submodule(name, layer.base)


def load_lora(flux: nn.Module, path: str | Path | LoraFile, strength: float = 1.0, train: bool = False) -> LoraReport:
    """Attach a LoRA of any dialect beside what is attached already; all of the file or, if it is refused, nothing.

    path: a safetensors file, a folder as PEFT saves it, or what read_lora gave
    strength: of its effect; 0 is none, 1 as trained
    train: keep it in float32 to be trained further; else frozen, in the dtype of the file
    Errors: ValueError that names the file and the key, see read_lora and read_deltas
    """
    if not math.isfinite(strength):
        raise ValueError(f"LoRA strength {strength} is no finite number; 1 is as trained")
    file = path if isinstance(path, LoraFile) else read_lora(path)
    if train:
        formats.refuse_factors(file, "which are not trained further; start from a plain LoRA")
    for delta in formats.read_deltas(file, shapes(flux)):
        add(flux, delta, strength, train)
    return formats.describe(file)


def save_lora(
    flux: nn.Module,
    path: str | Path,
    dialect: str = "diffusers",
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Save everything that is attached, at its strength, as one LoRA file.

    dialect, metadata, Errors: see write_lora; ValueError for LoKr and the like, which no dialect has a place for
    dtype: of the tensors; bfloat16 is what other programs write, float32 keeps every bit for training further
    """
    deltas = []
    for name, layer in layers(flux).items():
        for a in layer.adapters:
            if isinstance(a, DenseAdapter):
                raise ValueError(f"{called(a.factors)} of {name} are no LoRA that can be saved; merge them instead")
            down, up, bias = (None if p is None else p.detach().cpu() for p in (a.down, a.up, a.bias))
            deltas.append(Delta(name, a.rows, down, up, a.scale, bias))
    formats.write_lora(deltas, shapes(flux), path, dialect, metadata or {}, dtype)


def refuse_unnamed(flux: nn.Module, dialect: str) -> None:
    """Refuse adapters that a dialect could not save, before they are trained. Errors: ValueError with the Linear"""
    for name, layer in layers(flux).items():
        for adapter in layer.adapters:
            formats.check_named(dialect, name, tuple(layer.weight.shape), adapter.rows, adapter.bias is not None)
