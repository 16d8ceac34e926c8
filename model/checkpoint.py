"""Checkpoints on disk: open and check safetensors files, say what they hold, fill a module, save.

Nothing is ever unpickled. A header is checked against the size of its file before any data is touched, so a
damaged file costs one line, not a crash. Data is mapped into memory, not copied, where the file already has
the wanted dtype; else each tensor is read and cast by itself, so there are never two full copies.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

PREFIX = "model.diffusion_model."  # on every name in some repackaged files
MAX_JSON = 100_000_000  # bytes; the format's own limit for a header
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "BOOL": 8, "C64": 64}
BITS |= {"U64": 64, "U32": 32, "U16": 16, "U8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6}

# What can be wanted: how a message calls it, what to use instead of a wrong file, the file's name in a folder.
WANTED = {
    "transformer": (
        "a FLUX.1 transformer",
        "use the bfloat16 flux1-*.safetensors from the root of the FLUX.1 repository",
        "flux1-*.safetensors",
    ),
    "autoencoder": (
        "a FLUX.1 autoencoder",
        "use the ae.safetensors from the root of the FLUX.1 repository",
        "ae.safetensors",
    ),
    "t5": (
        "a T5 text encoder",
        "use the text_encoder_2/ folder of the FLUX.1 repository or t5xxl_fp16.safetensors",
        "model.safetensors",
    ),
    "clip": (
        "a CLIP text encoder",
        "use the text_encoder/ folder of the FLUX.1 repository or clip_l.safetensors",
        "model.safetensors",
    ),
}

# What a file is: the first row whose pattern is found in any tensor name. Keys of WANTED are called by their key.
KINDS = (
    ("nunchaku (SVDQuant) weights", r"\.(qweight|wscales|smooth_factor)$"),
    ("LoRA weights", r"lora_|\.lora\.|_lora\d?\.|lokr_|hada_|oft_blocks|dora_scale|\.diff(_b)?$|\.[ab][12]\.weight$"),
    ("bitsandbytes nf4 or fp4 weights", r"\.quant_state\.bitsandbytes__|\.(absmax|quant_map)$"),
    ("scaled fp8 weights", r"(^|\.)scaled_fp8$|\.(scale_weight|weight_scale(_2)?|comfy_quant)$"),
    ("an all-in-one checkpoint", r"^(text_encoders|vae|first_stage_model|cond_stage_model|conditioner)\."),
    ("a FLUX.2 transformer", r"double_stream_modulation_img\."),
    ("a Chroma transformer", r"^distilled_guidance_layer\."),
    ("a ControlNet", r"controlnet_|^input_hint_block\."),
    ("an IP adapter", r"ip_adapter|\.(ip_k|ip_v|to_k_ip|to_v_ip)"),
    ("a FLUX.1 Redux adapter", r"^redux_"),
    ("a transformer with diffusers' names", r"^(single_)?transformer_blocks\."),
    ("the transformer of another model", r"^(joint_blocks|input_blocks|blocks|layers)\."),
    ("an autoencoder with diffusers' names", r"^(encoder|decoder)\.(down_blocks|up_blocks|mid_block)\."),
    ("an OpenCLIP text encoder", r"transformer\.resblocks\."),
    ("t5", r"^encoder\.block\.\d+\.layer\.|^shared\.weight$"),
    ("clip", r"^(text_model\.)?(embeddings\.token_embedding|encoder\.layers)\."),
    ("transformer", r"^(double_blocks|single_blocks)\.\d"),
    ("autoencoder", r"^(encoder|decoder)\.(down|up|mid|conv_in|conv_out)\."),
)
MAGICS = (
    (b"GGUF", "is a GGUF file, whose quantised weights are not read; use the bfloat16 safetensors file of the model"),
    (b"PK\x03\x04", "is a torch pickle, which is never unpickled; use the safetensors file of the model"),
    (b"\x80", "is a pickle, which is never unpickled; use the safetensors file of the model"),
    (b"version https://git-lfs", "is a git-lfs pointer and not the file itself; download it with hf download"),
)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where, and as what."""

    path: Path
    dtype: str  # the format's name, e.g. BF16
    shape: tuple[int, ...]
    start: int  # byte in the file
    size: int  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one file or of all its shards, by name; none of their data is read yet."""

    name: str  # the path, for messages
    tensors: dict[str, Stored]


def kind(tensors: dict[str, Stored]) -> str:
    """Say what a file holds: a key of WANTED if it can be read here, else words for a message."""
    names = "\n".join(key.removeprefix(PREFIX) for key in tensors)
    for what, pattern in KINDS:
        if re.search(pattern, names, re.MULTILINE):
            fp8 = any(stored.dtype.startswith("F8") for stored in tensors.values())
            return "fp8 weights" if fp8 and what in WANTED else what
    return "no network that is known here"


def open_checkpoint(path: str | Path, wanted: str) -> Checkpoint:
    """Open one file, or all shards, and refuse by name whatever is not wanted.

    path: a safetensors file, an index JSON of shards, or a folder with one of them
    wanted: a key of WANTED
    Errors: ValueError if nothing is there, a file is damaged, or it holds something else
    """
    path = Path(path)
    what, instead, pattern = WANTED[wanted]
    found = file_in(path, pattern) if path.is_dir() else path
    if found is None:
        raise ValueError(f"{path} has no {pattern} and no index JSON of shards; {instead}")
    path = found
    if not path.is_file():
        raise ValueError(f"{path} is no file; {instead}")
    tensors: dict[str, Stored] = {}
    for file in _shards(path):
        more, _ = read_header(file)
        if double := tensors.keys() & more.keys():
            raise ValueError(f"{file} repeats tensors of another shard ({_some(double)}); download the shards again")
        tensors |= more
    if (holds := kind(tensors)) != wanted:
        advice = "pass it with --lora" if holds == "LoRA weights" else instead
        raise ValueError(f"{path} holds {WANTED[holds][0] if holds in WANTED else holds}, not {what}; {advice}")
    if all(key.startswith(PREFIX) for key in tensors):
        tensors = {key.removeprefix(PREFIX): stored for key, stored in tensors.items()}
    return Checkpoint(str(path), tensors)


def file_in(folder: Path, pattern: str) -> Path | None:
    """Find the index JSON in a folder, else the one file of that name, else nothing.

    Errors: ValueError if there are several
    """
    found = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob(pattern))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} has {len(found)} candidates ({names}); give the path of one of them")
    return found[0] if found else None


def _shards(path: Path) -> list[Path]:
    """The files that an index JSON names, or the file itself."""
    if path.suffix != ".json":
        return [path]
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path} has no weight_map from tensors to shards; download it again")
    shards = [path.parent / name for name in sorted(set(names.values()))]
    for shard in shards:
        if shard.parent != path.parent or not shard.is_file():
            raise ValueError(f"{path} names a shard {shard.name!r} that is not beside it; download the shards again")
    return shards


def read_header(path: str | Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Read what a safetensors file holds, and check that all of it is there.

    Returns the tensors by name, and the header's metadata
    Errors: ValueError in one line that names the file, for whatever is not a whole safetensors file
    Source: the format's own rules, huggingface/safetensors README
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            first = file.read(32)
            length = int.from_bytes(first[:8], "little")
            file.seek(8)
            header = file.read(length) if length <= MAX_JSON else b""
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    if not header.startswith(b"{"):
        for magic, message in MAGICS:
            if first.startswith(magic):
                raise ValueError(f"{path} {message}")
    try:
        content = _json_object(header)
        metadata = content.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError
        tensors = {name: _entry(path, 8 + length, entry) for name, entry in content.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is no safetensors file, or its header is damaged; download it again") from None
    end = 8 + length
    for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.size)):
        if stored.start != end:
            raise ValueError(f"{path} has a damaged header (tensors overlap or leave gaps); download it again")
        end += stored.size
    if end != size:
        raise ValueError(f"{path} is damaged: it has {size} bytes where its header says {end}; download it again")
    return tensors, metadata


def _entry(path: Path, offset: int, entry: dict) -> Stored:
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    if not all(type(n) is int and 0 <= n < 2**60 for n in (*shape, start, end)):
        raise ValueError
    if BITS[entry["dtype"]] * math.prod(shape) != 8 * (end - start):
        raise ValueError
    return Stored(path, entry["dtype"], tuple(shape), offset + start, end - start)


def read_json(path: Path) -> dict:
    """Read a JSON object from a file. Errors: ValueError naming the file"""
    if not path.is_file():
        raise ValueError(f"{path} is no file; download it again")
    try:
        data = path.read_bytes() if path.stat().st_size <= MAX_JSON else b""
        return _json_object(data)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError:
        raise ValueError(f"{path} is not a JSON object; it is damaged, download it again") from None


def _json_object(data: bytes) -> dict:
    try:
        content = json.loads(data.decode())
    except RecursionError:
        raise ValueError("nested without end") from None
    if not isinstance(content, dict):
        raise ValueError("not an object")
    return content


def fill(module: nn.Module, checkpoint: Checkpoint, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """Give a module built on the meta device its tensors, freeze it and set it to eval mode.

    Names and shapes must match exactly. A tensor under two names is read once.

    dtype: of all parameters; tensors that have it already are mapped, not copied, on the CPU
    Errors: ValueError that counts and names missing, unexpected and misshapen tensors
    """
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    tensors = checkpoint.tensors
    missing = [key for key in expected if key not in tensors]
    extra = [key for key in tensors if key not in expected]
    both = [key for key in expected if key in tensors]
    wrong = [f"{key} {tensors[key].shape}, not {expected[key]}" for key in both if tensors[key].shape != expected[key]]
    odd = [f"{key} {tensors[key].dtype}" for key in both if tensors[key].dtype not in FLOATS]
    problems = [
        f"lacks {len(missing)} of {len(expected)} tensors ({_some(missing)})" if missing else "",
        f"has {len(extra)} unexpected tensors ({_some(extra)})" if extra else "",
        f"has {len(wrong)} tensors of the wrong shape ({_some(wrong)})" if wrong else "",
        f"has {len(odd)} tensors that are no floats of 16 bits or more ({_some(odd)})" if odd else "",
    ]
    if any(problems):
        raise ValueError(f"{checkpoint.name} {'; '.join(filter(None, problems))}")
    maps: dict[Path, Tensor] = {}
    scratch = torch.empty(max(stored.size for stored in tensors.values()), dtype=torch.uint8)  # one, reused: see _read
    device = torch.device(device)
    read = {stored: _read(stored, device, dtype, maps, scratch) for stored in dict.fromkeys(tensors.values())}
    module.load_state_dict({key: read[stored] for key, stored in tensors.items()}, assign=True)
    return module.requires_grad_(False).eval()


def _read(
    stored: Stored, device: torch.device, dtype: torch.dtype, maps: dict[Path, Tensor], scratch: Tensor
) -> Tensor:
    """One tensor: a view of the mapped file if nothing has to change, else read and converted.

    Mappings are private: writing to a weight changes this process's copy of a page, never the file. What is
    converted is not read through a mapping, whose pages would stay in memory beside the result, nor into buffers
    of its own, which would leave holes in the heap as large as themselves.
    """
    own = FLOATS[stored.dtype]
    if own is dtype and device.type == "cpu" and stored.start % own.itemsize == 0:
        if stored.path not in maps:
            size = stored.path.stat().st_size
            maps[stored.path] = torch.from_file(str(stored.path), shared=False, size=size, dtype=torch.uint8)
        data = maps[stored.path][stored.start : stored.start + stored.size]
        return data.view(own).view(stored.shape)
    data = scratch[: stored.size]
    with open(stored.path, "rb") as file:
        file.seek(stored.start)
        if file.readinto(data.numpy()) != stored.size:
            raise ValueError(f"{stored.path} became shorter while it was read; download it again")
    return data.view(own).view(stored.shape).to(device, dtype, copy=True)


def save_safetensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all: beside the target first, then renamed onto it.

    tensors: by name; copied to the CPU and made contiguous as needed
    metadata: text for the header
    Errors: OSError if the file cannot be written; nothing is left behind then
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        temporary.touch()  # safetensors writes files that only their owner can read; keep the usual permissions
        mode = temporary.stat().st_mode
        save_file(ready, temporary, metadata={"format": "pt", **(metadata or {})})
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            _sort_header(file)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _sort_header(file: BinaryIO) -> None:
    """Bring the metadata of a fresh file into order, in place: safetensors shuffles it from one save to the next."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > size:  # spelled in another way: leave what is right, if unsorted
        return
    file.seek(8)
    file.write(text.ljust(size))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
