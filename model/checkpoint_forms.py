"""Checkpoints in the other forms that people have, read as the released one: diffusers' names, all-in-one files, fp8.

A form is recognised by the names and types in the header, and forms may come together. Nothing is copied as a whole:
a tensor is put together while it is read, in float32 if it is widened, and cast once. What would not give exactly
the weights that the file means is refused by name.
Source: the conventions of diffusers 0.42 and ComfyUI
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .checkpoint import FLOATS, KINDS, PREFIX, WANTED, Checkpoint, Stored, kind, some
from .lora_formats import DIFFUSERS, template

# What is before the names of each part in an all-in-one file
PREFIXES = {"transformer": (PREFIX,), "autoencoder": ("vae.", "first_stage_model.")}
PREFIXES |= {"clip": ("text_encoders.clip_l.transformer.",), "t5": ("text_encoders.t5xxl.transformer.",)}
ELSEWHERE = re.compile(f"{dict(KINDS)['an all-in-one checkpoint']}|{re.escape(PREFIX)}")
FP8 = ("F8_E4M3", "F8_E5M2")
FORMATS = ("float8_e4m3fn", "float8_e5m2")  # as ComfyUI calls them; what has a scale may follow
SCALE = re.compile(r"(.*\.)?(scale_weight|weight_scale)$")
UNUSED = re.compile(r"(.*\.)?(scaled_fp8|scale_input|input_scale|comfy_quant)$")  # a mark, scales of activations
MAX_NOTE = 10_000  # bytes of a comfy_quant, and of refs/main

ROWS = ("all", "swapped", "q", "k", "v", "mlp")  # parts of a Linear's outputs, in order
NORMS = ("query_norm", "key_norm")  # their scale is a weight there
# diffusers' name -> the released name, and which part of its output; beside Linears, norms and what blocks are called
NAMES = {**DIFFUSERS, "transformer_blocks": ("double_blocks", "all")}
NAMES["single_transformer_blocks"] = ("single_blocks", "all")
for letter, norm in zip("qk", NORMS, strict=True):
    NAMES[f"transformer_blocks.{{}}.attn.norm_{letter}"] = (f"double_blocks.{{}}.img_attn.norm.{norm}", "all")
    NAMES[f"transformer_blocks.{{}}.attn.norm_added_{letter}"] = (f"double_blocks.{{}}.txt_attn.norm.{norm}", "all")
    NAMES[f"single_transformer_blocks.{{}}.attn.norm_{letter}"] = (f"single_blocks.{{}}.norm.{norm}", "all")
# Pieces of the autoencoder's names, diffusers'=ours, in the order of exchange
PIECES = (
    "down_blocks=down up_blocks=up resnets=block downsamplers.0=downsample upsamplers.0=upsample "
    "mid_block.block.0=mid.block_1 mid_block.block.1=mid.block_2 mid_block.attentions.0=mid.attn_1 "
    "conv_shortcut=nin_shortcut conv_norm_out=norm_out group_norm=norm to_q=q to_k=k to_v=v to_out.0=proj_out"
)
AUTOENCODER = [tuple(f".{piece}." for piece in pair.split("=")) for pair in PIECES.split()]
LEVEL = re.compile(r"(?<=\.up\.)[0-3](?=\.)")  # of the decoder, which diffusers counts as they run


@dataclass(frozen=True)
class Made:
    """A tensor that is made while it is read: rows put together, fp8 widened and scaled, a matrix as a convolution."""

    path: Path  # of its first rows
    rows: tuple[tuple[Stored, Stored | None], ...]  # in order, each with its scale
    dtype: str  # F32, or what is no float
    shape: tuple[int, ...]
    swapped: bool = False  # the two halves of the rows are exchanged

    def read(self, _: safe_open, dtype: torch.dtype) -> Tensor:
        """Fill it part by part; files are opened for each alone, so that what is mapped is given back at once."""
        result, start = torch.empty(self.shape, dtype=dtype), 0
        for row in self.rows:
            start = _fill(result.view(-1), start, *row)
        return torch.cat(result.chunk(2)[::-1]) if self.swapped else result


def _fill(values: Tensor, start: int, stored: Stored, scale: Stored | None) -> int:
    """Copy a tensor behind others, scaled in float32; the copy is the only cast. Returns where the next begins"""
    with safe_open(stored.path, framework="pt") as file:
        tensor = file.get_tensor(stored.key)
    if scale:
        with safe_open(scale.path, framework="pt") as file:
            tensor = tensor.float().mul_(file.get_tensor(scale.key).float().reshape(-1, *[1] * (tensor.ndim - 1)))
    values[start : start + tensor.numel()] = tensor.flatten()
    return start + tensor.numel()


Entries = dict[str, Stored | Made]  # of a header, by name


def open_form(checkpoint: Checkpoint, metadata: dict[str, str]) -> Checkpoint:
    """Read a header of another form as if it were that of the released one.

    checkpoint: with the file's names
    metadata: of the header
    Errors: ValueError, naming what it is and what to use instead, for whatever is not wanted or not read
    """
    path, wanted, tensors, holds = checkpoint.path, checkpoint.kind, checkpoint.tensors, kind(checkpoint.tensors)
    what, instead, _ = WANTED[wanted]
    parts = {part for part in PREFIXES for key in tensors if key.startswith(PREFIXES[part])} - {"transformer", wanted}
    other_names = f" {wanted} with diffusers' names"
    if holds.endswith((wanted, "fp8 weights", "an all-in-one checkpoint", other_names)):
        prefix = next((prefix for prefix in PREFIXES[wanted] for key in tensors if key.startswith(prefix)), "")
        inner = [key for key in tensors if key.startswith(prefix) or not ELSEWHERE.match(key)]
        tensors = {key.removeprefix(prefix): tensors[key] for key in inner}
        if len(tensors) < len(inner):
            raise ValueError(f"{path} has tensors both with and without {prefix} before their names; download it again")
        tensors = _unquantised(path, tensors, metadata, instead)
        holds = kind(tensors)
    if holds == wanted:
        return replace(checkpoint, tensors=tensors, parts=parts)
    if holds.endswith(other_names):
        return replace(checkpoint, tensors=_renamed(path, tensors), spell=_spell, parts=parts)
    advice = "pass it with --lora" if holds == "LoRA weights" else instead
    raise ValueError(f"{path} holds {WANTED[holds][0] if holds in WANTED else holds}, not {what}; {advice}")


def _unquantised(path: Path, tensors: Entries, metadata: dict[str, str], instead: str) -> Entries:
    """Put each fp8 tensor together with its scale. Errors: ValueError for other formats, by name, and for damage"""
    if odd := [name for name in _formats(path, tensors, metadata) if not name.startswith(FORMATS)]:
        raise ValueError(f"{path} holds weights in the format {odd[0]:.40}, which is not read; {instead}")
    scales = {f"{match[1] or ''}weight": tensors[key] for key in tensors if (match := SCALE.match(key))}
    read: Entries = {}
    for key in (key for key in tensors if not SCALE.match(key) and not UNUSED.match(key)):
        stored, scale = tensors[key], scales.get(key)
        if scale is None and scales and stored.dtype in FP8 and len(stored.shape) == 2:
            raise ValueError(f"{path} has {stored.key} as fp8 without a scale, which others have; download it again")
        shapes = ((), (1,), (1, 1), stored.shape[:1], (*stored.shape[:1], 1))
        if scale and ({stored.dtype, scale.dtype} - {*FP8, *FLOATS} or scale.shape not in shapes):
            shown = f"{stored.key} as {stored.dtype} with {scale.key} {scale.shape} as {scale.dtype}"
            raise ValueError(f"{path} has {shown}; only fp8 weights with a scale in all or a row are read; {instead}")
        made = Made(stored.path, ((stored, scale),), "F32", stored.shape)
        read[key] = made if scale or stored.dtype in FP8 else stored
    if lone := scales.keys() - tensors.keys():
        raise ValueError(f"{path} has scales of weights that it lacks ({some(sorted(lone))}); download it again")
    return read


def _formats(path: Path, tensors: Entries, metadata: dict[str, str]) -> set[str]:
    """List the formats that a quantiser wrote down, in the header or beside the weights."""
    notes = [stored for stored in tensors.values() if stored.key.endswith("comfy_quant")]
    try:
        layers = json.loads(metadata.get("_quantization_metadata") or '{"layers": {}}')["layers"]
        names = {layer["format"] for layer in layers.values()}
        for place in {note.path for note in notes}:
            with safe_open(place, framework="pt") as file:
                texts = [file.get_slice(note.key)[:MAX_NOTE] for note in notes if note.path == place]
                names |= {json.loads(bytes(text.tolist()))["format"] for text in texts}
        return {name.lower() for name in names}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise ValueError(f"{path} has notes on its quantisation that cannot be read; download it again") from None


def _renamed(path: Path, tensors: Entries) -> Entries:
    """Find the released name of each tensor, and put together what is fused there. Errors: ValueError for odd parts"""
    places: dict[str, dict[str, str]] = {}
    for key in tensors:
        name, part = _released_name(key)
        if (other := places.setdefault(name, {}).setdefault(part, key)) != key:
            raise ValueError(f"{path} has both {other} and {key}, which mean the same; download it again")
    return {name: _fused(path, name, {part: tensors[keys[part]] for part in keys}) for name, keys in places.items()}


def _released_name(key: str) -> tuple[str, str]:
    """Give the released name of diffusers', and the part; one that does not exist is its own."""
    if key.startswith(("encoder.", "decoder.")):
        for own, ours in AUTOENCODER:
            key = key.replace(own, ours)
        return LEVEL.sub(lambda level: str(3 - int(level[0])), key), "all"
    stem, _, ending = key.rpartition(".")
    pattern, number = template(stem)
    if pattern not in NAMES:
        return key, "all"
    name, part = NAMES[pattern]
    return f"{name.format(number)}.{'scale' if name.endswith(NORMS) and ending == 'weight' else ending}", part


def _own_names(name: str) -> dict[str, str]:
    """List diffusers' names of a released tensor, by part, in order; one that does not exist is its own."""
    if name.startswith(("encoder.", "decoder.")):
        name = LEVEL.sub(lambda level: str(3 - int(level[0])), name)
        for own, ours in reversed(AUTOENCODER):
            name = name.replace(ours, own)
        return {"all": name}
    stem, _, ending = name.rpartition(".")
    pattern, number = template(stem)
    ending = "weight" if stem.endswith(NORMS) and ending == "scale" else ending
    own = {part: f"{own.format(number)}.{ending}" for own, (ours, part) in NAMES.items() if ours == pattern}
    return {part: own[part] for part in ROWS if part in own} or {"all": name}


def _spell(name: str) -> str:
    return " + ".join(_own_names(name).values())


def _fused(path: Path, name: str, parts: Entries) -> Stored | Made:
    """Put the parts of a released tensor together, in order."""
    own = {"all": name} if parts.keys() == {"all"} else _own_names(name)  # it may have a released name itself
    if parts.keys() != own.keys():
        missing = some(own[part] for part in own if part not in parts) or f"nothing of {name}, which it has twice"
        raise ValueError(f"{path}, with diffusers' names, lacks {missing}; download it again")
    tensors = [parts[part] for part in own]
    first, *others = shapes = [tensor.shape for tensor in tensors]
    if others and (len({*shapes[:3]}) > 1 or len({shape[1:] for shape in shapes}) > 1 or not first):
        shown = ", ".join(f"{key} {parts[part].shape}" for part, key in own.items())
        raise ValueError(f"{path} has parts of one Linear that do not fit together ({shown}); download it again")
    shape = (sum(shape[0] for shape in shapes), *first[1:]) if others else first
    shape += (1, 1) if ".attn_1." in name and len(shape) == 2 else ()  # a 1x1 convolution, there a matrix
    if shape == first and "swapped" not in own:
        return tensors[0]
    dtype = next((tensor.dtype for tensor in tensors if tensor.dtype not in FLOATS), "F32")
    rows = tuple(row for tensor in tensors for row in (tensor.rows if isinstance(tensor, Made) else ((tensor, None),)))
    return Made(tensors[0].path, rows, dtype, shape, "swapped" in own)


def hub_snapshot(folder: Path) -> Path:
    """Find the version of a model in a folder of the hub's cache: the one that refs/main names, else the only one.

    Errors: ValueError if there are others
    """
    main, versions = folder / "refs" / "main", sorted(folder.glob("snapshots/*/"))
    name = main.read_bytes().strip() if main.is_file() and main.stat().st_size < MAX_NOTE else b""
    found = [path for path in versions if path.name.encode() == name] or versions
    if len(found) != 1:
        raise ValueError(f"{folder} has {len(found)} snapshots and no refs/main that names one; give the path of one")
    return found[0]
