"""LoRA: low-rank changes beside frozen Linears, y = W x + b + scale * strength * up (down x).

Adapters wrap layers; blocks never know. The released model fuses projections (qkv; qkv and the MLP's input), other
programs adapt them one by one: so a part changes only some rows of its Linear's output.
Letters: r rank, N tokens. Files are in lora_files.py and lora_write.py.
Source: arXiv:2106.09685
"""

import difflib
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .lora_files import Delta, LoraReport, describe, read_deltas, read_lora
from .lora_names import rows
from .lora_write import check_named, write_lora

__all__ = ["LoraLinear", "LoraReport", "TARGETS", "adapter_state", "attach", "detach", "linears", "load_adapter_state"]
__all__ += ["load_lora", "merge", "refuse_unnamed", "save_lora", "shapes", "trainable"]

# What can be asked for: Linears by glob, and which rows get an adapter each. A single block's linear2 takes in
# attention and MLP at once, so it belongs to both.
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


class Part(nn.Module):
    """One adapter of some rows."""

    def __init__(self, delta: Delta, strength: float):
        super().__init__()
        self.start, self.stop, self.scale, self.strength = delta.start, delta.stop, delta.scale, strength
        self.down = nn.Parameter(delta.down)  # (r, inputs)
        self.up = nn.Parameter(delta.up)  # (stop - start, r)
        self.bias = None if delta.bias is None else nn.Parameter(delta.bias)

    @property
    def factor(self) -> float:
        return self.scale * self.strength

    def scaled_down(self, dtype: torch.dtype) -> Tensor:
        """Fold the factor in, in the wider of both dtypes, so that it is rounded once."""
        wide = torch.promote_types(self.down.dtype, dtype)
        return self.down if self.factor == 1 else self.down.to(wide) * self.factor

    def delta(self, module: str) -> Delta:
        """Say what this part does, on the CPU, its strength included."""
        down, up, bias = (p if p is None else p.detach().cpu() for p in (self.down, self.up, self.bias))
        return Delta(module, self.start, self.stop, down, up, self.factor, bias)


class Adapted(torch.autograd.Function):
    """y = W x + b, and in the rows of each part, up (down x) on top; W and b are frozen.

    Autograd by itself would need ups padded to all rows, or copy the whole gradient once a part.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, spans: list[slice], *ups: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)  # not of a flat x, which may be rounded differently: fresh adapters change no bit
        ctx.shape, ctx.spans, ctx.ranks = x.shape, spans, [up.shape[1] for up in ups]
        x = x.flatten(0, -2)  # (N, inputs)
        hidden = F.linear(x, down)  # (N, r of all parts)
        for span, part, up in zip(spans, hidden.split(ctx.ranks, dim=1), ups, strict=True):
            y.view(-1, len(weight))[:, span].addmm_(part, up.T)
        ctx.save_for_backward(x, weight, hidden, down, *ups)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, hidden, down, *ups = ctx.saved_tensors
        grad = grad.flatten(0, -2)  # (N, outputs)
        parts = hidden.split(ctx.ranks, dim=1)
        to_ups = [grad[:, span].T @ part for span, part in zip(ctx.spans, parts, strict=True)]
        to_hidden = torch.cat([grad[:, span] @ up for span, up in zip(ctx.spans, ups, strict=True)], dim=1)
        to_x = (grad @ weight).addmm_(to_hidden, down).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return to_x, None, None, to_hidden.T @ x, None, *to_ups


class LoraLinear(nn.Module):
    """A frozen Linear and the adapters beside it, which may be float32: they are cast to the dtype of its input."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.parts = nn.ModuleList()

    @property
    def weight(self) -> Tensor:
        """The base's, which tells the dtype and the shape of this layer."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        downs = [part.scaled_down(x.dtype) for part in self.parts]
        down = (torch.cat(downs) if len(downs) > 1 else downs[0]).to(x.dtype)  # one product for all parts
        ups = [part.up.to(x.dtype) for part in self.parts]
        spans = [slice(part.start, part.stop) for part in self.parts]
        y = Adapted.apply(x, self.base.weight, self.base.bias, down, spans, *ups)
        for part in self.parts:
            if part.bias is not None:
                y = y + F.pad((part.bias * part.factor).to(y.dtype), (part.start, len(self.weight) - part.stop))
        return y

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Give the base all changes, summed in float32 and cast once; its old tensors stay as they were."""
        weight, bias = (p.to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self.base.parameters())
        for part in self.parts:
            own = slice(part.start, part.stop)
            weight[own].addmm_(part.up.to(weight), part.down.to(weight), alpha=part.factor)
            if part.bias is not None:
                bias[own] += part.factor * part.bias.to(bias)
        self.base.weight = nn.Parameter(weight.to(self.base.weight.dtype), requires_grad=False)
        self.base.bias = nn.Parameter(bias.to(self.base.bias.dtype), requires_grad=False)
        return self.base


def linears(flux: nn.Module) -> dict[str, nn.Linear | LoraLinear]:
    """List every Linear by its released name, wrapped or not, in the order of the model."""
    modules = dict(flux.named_modules())
    wrapped = {f"{name}.base" for name, module in modules.items() if isinstance(module, LoraLinear)}
    return {n: m for n, m in modules.items() if isinstance(m, nn.Linear | LoraLinear) and n not in wrapped}


def shapes(flux: nn.Module) -> dict[str, tuple[int, int]]:
    """Give outputs and inputs of every Linear, by released name."""
    return {name: tuple(linear.weight.shape) for name, linear in linears(flux).items()}


def layers(flux: nn.Module) -> dict[str, LoraLinear]:
    """List the Linears that have adapters."""
    return {name: module for name, module in flux.named_modules() if isinstance(module, LoraLinear)}


def attach(
    flux: nn.Module, targets: str | Sequence[str] = "all-linear", rank: int = 16, alpha: float | None = None,
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:  # fmt: skip
    """Add fresh adapters in float32, which change nothing until they are trained: their ups are zero.

    targets: names of TARGETS, or released names of Linears such as double_blocks.*.img_attn.qkv; one text may hold
        several, with commas
    alpha: the changes are scaled by alpha / rank; None is the rank, so by 1
    generator: on the CPU; None is torch's own
    Returns their parameters, in a fixed order
    Errors: ValueError for a target that means no Linear, a rank below 1, an alpha that is not a positive number
    """
    if rank < 1:
        raise ValueError(f"LoRA rank {rank} is out of range; use 1 or more, the papers 16 (IC-LoRA) and 512 (UNO)")
    alpha = rank if alpha is None else alpha
    if not 0 < alpha < math.inf:
        raise ValueError(f"LoRA alpha {alpha} is out of range; use a positive number, most often the rank")
    fresh = []
    for name, slots in _chosen(flux, targets).items():
        outputs, inputs = flux.get_submodule(name).weight.shape
        for slot in slots:
            start, stop = rows(slot, (outputs, inputs))
            down = nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=5**0.5, generator=generator)
            delta = Delta(name, start, stop, down, torch.zeros(stop - start, rank), alpha / rank)
            fresh += _add(flux, delta, 1.0, train=True).parameters()
    return fresh


def _chosen(flux: nn.Module, targets: str | Sequence[str]) -> dict[str, list[str]]:
    """Which slots of which Linears, without doubles, in the order of the model."""
    names = [name.strip() for text in ([targets] if isinstance(targets, str) else targets) for name in text.split(",")]
    known = linears(flux)
    chosen: dict[str, list[str]] = {name: [] for name in known}
    for target in names:
        found = False
        for pattern, slots in TARGETS.get(target, ((target, "all"),)):
            for name in (name for name in known if fnmatchcase(name, pattern)):
                chosen[name] += [slot for slot in slots.split() if slot not in chosen[name]]
                found = True
        if not found:
            near = difflib.get_close_matches(target, [*TARGETS, *known], n=3, cutoff=0.5)
            meant = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(
                f"LoRA target {target[:80]!r} means no Linear of this model; {meant}choose from {', '.join(TARGETS)} "
                "or name Linears, such as double_blocks.*.img_attn.qkv"
            )
    return {name: slots for name, slots in chosen.items() if slots}


def _add(flux: nn.Module, delta: Delta, strength: float, train: bool) -> Part:
    """Wrap the Linear unless it is, and put one more part beside it, on the Linear's device."""
    linear = flux.get_submodule(delta.module)
    if not isinstance(linear, LoraLinear):
        linear = LoraLinear(linear)
        flux.set_submodule(delta.module, linear)
    part = Part(delta, strength).to(linear.weight.device).requires_grad_(train)
    linear.parts.append(part.float() if train else part)
    return part


def load_lora(
    flux: nn.Module, path: str | Path, strength: float = 1.0, skip_text_encoder: bool = False, train: bool = False
) -> LoraReport:
    """Attach a LoRA of any dialect beside what is attached already; all of the file or, if it is refused, nothing.

    path: a safetensors file, or a folder as PEFT saves it
    strength: of its effect; 0 is none, 1 as trained
    skip_text_encoder: leave out what belongs to CLIP or T5, instead of refusing the file
    train: keep it in float32 to be trained further; else frozen, in the dtype of the file
    Errors: ValueError that names the file and the key, see read_lora and read_deltas
    """
    if not math.isfinite(strength):
        raise ValueError(f"LoRA strength {strength} is no finite number; 1 is as trained")
    file = read_lora(path, skip_text_encoder)
    deltas = read_deltas(file, shapes(flux))
    for delta in deltas:
        _add(flux, delta, strength, train)
    return describe(file, deltas)


def save_lora(
    flux: nn.Module, path: str | Path, dialect: str = "diffusers", metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """Save everything that is attached, at its strength, as one LoRA file.

    dialect, metadata, Errors: see model.lora_write.write_lora
    dtype: of the tensors; bfloat16 is what other programs write, float32 keeps every bit for training further
    """
    deltas = [part.delta(name) for name, layer in layers(flux).items() for part in layer.parts]
    write_lora(deltas, shapes(flux), path, dialect, metadata, dtype)


def refuse_unnamed(flux: nn.Module, dialect: str) -> None:
    """Refuse adapters that a dialect could not save, before they are trained. Errors: ValueError with the Linear"""
    for name, layer in layers(flux).items():
        for part in layer.parts:
            check_named(dialect, name, tuple(layer.weight.shape), part.start, part.stop, part.bias is not None)


def merge(flux: nn.Module) -> None:
    """Fold all adapters into the weights and take the wrappers away, so that a step costs what it cost before."""
    for name, layer in layers(flux).items():
        flux.set_submodule(name, layer.merged())


def detach(flux: nn.Module) -> None:
    """Take all adapters away; the model is what it was, to the bit."""
    for name, layer in layers(flux).items():
        flux.set_submodule(name, layer.base)


def trainable(flux: nn.Module) -> list[nn.Parameter]:
    """List the parameters of adapters that are trained, in the order of the model and of attaching."""
    return [p for layer in layers(flux).values() for p in layer.parts.parameters() if p.requires_grad]


def adapter_state(flux: nn.Module) -> dict[str, Tensor]:
    """Name the adapters' own tensors, for a trainer's checkpoint; they are not copied."""
    parts = {f"{name}.parts": layer.parts for name, layer in layers(flux).items()}
    return {f"{name}.{key}": p.detach() for name, part in parts.items() for key, p in part.named_parameters()}


@torch.no_grad()
def load_adapter_state(flux: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a checkpoint into adapters that were attached in the same way; optimisers keep their parameters.

    Errors: ValueError if names or shapes differ, before anything is copied
    """
    own = adapter_state(flux)
    odd = [name for name in own.keys() | state.keys() if name not in own or name not in state]
    odd += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if odd:
        raise ValueError(
            f"the checkpoint's adapters differ from the model's in {len(odd)} of {len(own)} tensors ({min(odd)}); "
            "attach the same targets at the same rank"
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])
