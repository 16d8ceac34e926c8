"""Lists of Deltas become LoRA files, in the three dialects that the programs around FLUX.1 load unconverted.

Letter: r rank. Reading is in lora_files.py.
"""

from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import save_safetensors
from .lora_files import Delta
from .lora_names import names_in, rows, swap

DIALECTS = ("diffusers", "kohya", "xlabs")
STALE = ("format", "lora_adapter_metadata", "ss_network_dim", "ss_network_alpha", "sshs_")  # true of the old file only


def write_lora(
    deltas: list[Delta], shapes: dict[str, tuple[int, int]], path: str | Path, dialect: str,
    metadata: dict[str, str] | None = None, dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """Write a LoRA file.

    deltas: several for the same rows are joined into one of the summed rank
    shapes: outputs and inputs of every Linear, by released name
    dialect: diffusers, with the scale folded into B, which diffusers and ComfyUI load; kohya, fused and with alpha,
        for kohya, ComfyUI and diffusers; xlabs, fused and without alpha, for XLabs and UNO
    metadata: text for the header; what was true of an older file only, such as its alpha, is left out
    Errors: ValueError naming what the dialect has no place for, or what does not fit the dtype; OSError
    """
    if dialect not in DIALECTS:
        raise ValueError(f"the LoRA dialect {dialect!r} cannot be written; choose one of {', '.join(DIALECTS)}")
    if not deltas:
        raise ValueError("there is no LoRA to write; attach or load one first")
    tensors: dict[str, Tensor] = {}
    for module in dict.fromkeys(delta.module for delta in deltas):
        tensors |= _pairs([delta for delta in deltas if delta.module == module], shapes[module], dialect)
    if dialect == "diffusers":
        tensors |= _alphas(tensors)
    ready = {key: t if key.endswith(".alpha") else t.to(dtype, copy=True) for key, t in tensors.items()}
    if bad := [key for key, tensor in ready.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{bad[0]} holds values that are not finite in {dtype}; write it as float32")
    header = {key: str(value) for key, value in (metadata or {}).items() if not key.startswith(STALE)}
    save_safetensors(ready, path, header)


def check_named(dialect: str, module: str, shape: tuple[int, int], first: int, last: int, bias: bool) -> None:
    """Refuse a change of rows first to last of a Linear that a dialect has no name for. Errors: ValueError"""
    spans = [rows(slot, shape) for _, slot in names_in(dialect, module)]
    if dialect == "diffusers" or (not bias and any(start <= first and last <= stop for start, stop in spans)):
        return  # diffusers names every row
    what = f"rows {first} to {last} of {module}{' with a bias' if bias else ''}"
    raise ValueError(f"the {dialect} dialect has no place for {what}; write the LoRA as diffusers")


def _pairs(own: list[Delta], shape: tuple[int, int], dialect: str) -> dict[str, Tensor]:
    """The tensors of one Linear, under every name that the dialect has for some of its rows.

    Errors: ValueError if there is none for a change, or it has a bias and the dialect none
    """
    module = own[0].module
    names = names_in(dialect, module)
    spans = [rows(slot, shape) for _, slot in names]
    changed = [_changed(delta) for delta in own]
    for delta, (first, last) in zip(own, changed, strict=True):
        check_named(dialect, module, shape, first, last, delta.bias is not None)
    tensors = {}
    for (name, slot), (start, stop) in zip(names, spans, strict=True):
        touching = [delta for delta, (first, last) in zip(own, changed, strict=True) if first < stop and start < last]
        if not touching:
            continue
        down, up, bias, scale = join(touching, start, stop)
        if dialect == "kohya":
            alpha = torch.tensor(scale * len(down))
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
            continue
        a, b = ("down", "up") if dialect == "xlabs" else ("lora_A", "lora_B")
        arrange = swap if slot == "swapped" else torch.clone
        tensors |= {f"{name}.{a}.weight": down, f"{name}.{b}.weight": arrange(up * scale)}
        if bias is not None:
            tensors[f"{name}.{b}.bias"] = arrange(bias * scale)
    return tensors


def _changed(delta: Delta) -> tuple[int, int]:
    """The rows that are really changed, as a fused up may be zero in some; all of its own if it is fresh."""
    rows_used = delta.up.any(dim=1) if delta.bias is None else torch.ones(len(delta.up))
    used = rows_used.nonzero().flatten().tolist() or [0, delta.stop - delta.start - 1]
    return delta.start + used[0], delta.start + used[-1] + 1


def join(deltas: list[Delta], start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Make one pair of all changes to rows start to stop: downs below each other, ups beside each other.

    A down that comes twice, as where a fused adapter was split, is used once; a rank that changes none of these
    rows, as in a block-sparse up, is dropped. So converting to and fro does not raise the rank.

    Returns down, up and bias in float32, and their common scale; 1 if they have several, which are folded in then
    """
    common = len({delta.scale for delta in deltas}) == 1
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    bias = None
    for delta in deltas:
        low, high = max(start, delta.start), min(stop, delta.stop)
        to, of = slice(low - start, high - start), slice(low - delta.start, high - delta.start)
        factor = 1.0 if common else delta.scale
        down, up = delta.down.float(), torch.zeros(stop - start, delta.up.shape[1])
        up[to] = delta.up[of].float() * factor
        same = next((i for i, other in enumerate(downs) if torch.equal(other, down)), None)
        if same is None:
            downs.append(down)
            ups.append(up)
        else:
            ups[same] += up
        if delta.bias is not None:
            bias = torch.zeros(stop - start) if bias is None else bias
            bias[to] += delta.bias[of].float() * factor
    down, up = torch.cat(downs), torch.cat(ups, dim=1)
    used = up.any(dim=0)
    if used.any():  # else it is fresh and keeps its rank
        down, up = down[used], up[:, used]
    return down, up, bias, deltas[0].scale if common else 1.0


def _alphas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where ranks differ, diffusers takes the first one for everybody's alpha, so each is told its own.

    Source: huggingface/diffusers utils/peft_utils.py get_peft_kwargs
    """
    end = ".lora_A.weight"
    ranks = {key.removesuffix(end): float(len(tensor)) for key, tensor in tensors.items() if key.endswith(end)}
    return {f"{name}.alpha": torch.tensor(rank) for name, rank in ranks.items()} if len({*ranks.values()}) > 1 else {}
