"""Checkpoints on disk: read the header of a safetensors file, say what it holds, map its tensors; write files whole.

Nothing is ever unpickled; what a header says is carried in a Checkpoint, which weights.py opens.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .autoencoder import AutoEncoderConfig
from .flux import FluxConfig
from .infer import infer_autoencoder_config, infer_flux_config
from .loading import BIG, read_pieces

PREFIX = "model.diffusion_model."  # on every name in some repackaged files
MAX_JSON = 16_000_000  # bytes, of headers too; parsed, they take 27 times as much
MAX_TENSORS = 20_000  # an all-in-one checkpoint in fp8 has 4,000
MAX_HASHED = 10**9  # bytes; of larger files, name and size stand for the content
NAME = re.compile(r"\b[a-z]\w*(\.\w+)+")  # of a tensor, in a message
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# What can be wanted: how a message calls it, what to use instead of a wrong file, its names in a folder, best first.
WANTED = {
    "transformer": (
        "a FLUX.1 transformer",
        "use the bfloat16 flux1-*.safetensors from the root of the FLUX.1 repository",
        (
            "flux1-*.safetensors",
            "transformer/*.safetensors.index.json",
            "transformer/diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.safetensors",
        ),
    ),
    "autoencoder": (
        "a FLUX.1 autoencoder",
        "use the ae.safetensors from the root of the FLUX.1 repository",
        ("ae.safetensors", "vae/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
    ),
    "t5": (
        "a T5 text encoder",
        "use the text_encoder_2/ folder of the FLUX.1 repository or t5xxl_fp16.safetensors",
        ("model.safetensors", "*.safetensors"),
    ),
    "clip": (
        "a CLIP text encoder",
        "use the text_encoder/ folder of the FLUX.1 repository or clip_l.safetensors",
        ("model.safetensors", "*.safetensors"),
    ),
}

# What a file is: the first row whose pattern is found in any tensor name. Keys of WANTED are called by their key.
KINDS = (
    ("nunchaku (SVDQuant) weights", r"\.(qweight|wscales|smooth_factor)$"),
    ("LoRA weights", r"lora_|[._]lora[s\d]?\.|lokr_|hada_|oft_blocks|dora_scale|\.diff(_b)?$|\.[ab][12]\.weight$"),
    ("bitsandbytes nf4 or fp4 weights", r"\.quant_state\.bitsandbytes__|\.(absmax|quant_map)$"),
    ("bitsandbytes or quanto int8 weights", r"\.(SCB|_data|_scale)$"),
    ("nvfp4 weights", r"\.weight_scale_2$"),
    ("scaled fp8 weights", r"(^|\.)scaled_fp8$|\.(scale_weight|weight_scale|comfy_quant)$"),
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
    key: str = ""  # its name there

    def read(self, file: safe_open, dtype: torch.dtype) -> Tensor:
        """Map it from its file, which is open, or cast it if it has another type."""
        return file.get_tensor(self.key).to(dtype)


@dataclass(frozen=True)
class Checkpoint:
    """What the header of a file, or of all its shards, says; no data is read yet."""

    path: Path  # the file, or the index JSON of shards
    kind: str  # a key of WANTED
    tensors: dict[str, Stored]  # by the name that the network has for it
    paths: list[Path]  # the files
    spell: Callable[[str], str] = str  # a name of the network -> what the file calls it
    parts: Collection[str] = ()  # what else an all-in-one file holds, as keys of WANTED

    @cached_property
    def config(self) -> FluxConfig | AutoEncoderConfig:
        """Read the configuration off the shapes. Errors: ValueError for shapes that no such network can have"""
        infer = infer_flux_config if self.kind == "transformer" else infer_autoencoder_config
        try:
            return infer({key: stored.shape for key, stored in self.tensors.items()})
        except ValueError as error:
            raise self.error(str(error)) from None

    def read(self, keys: Collection[str], dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Map tensors that have the type into memory, privately: writing to one leaves the file alone; cast the others.

        Errors: KeyError for what is no float
        """
        tensors, ready = {}, [key for key in keys if FLOATS[self.tensors[key].dtype] is dtype]
        others = keys if torch.device(device).type == "cuda" else {*keys} - {*ready}
        if others and sum(map(os.path.getsize, self.paths)) > BIG:
            tensors = read_pieces({key: self.tensors[key] for key in sorted(others)}, FLOATS, dtype, device)
            keys = ready = [key for key in ready if key not in tensors]
        for group in [ready, *([key] for key in sorted({*keys} - {*ready}))]:  # one by one, as mapped pages count too
            for path in dict.fromkeys(self.tensors[key].path for key in group):
                with safe_open(path, framework="pt") as file:
                    for key in (key for key in group if self.tensors[key].path == path):
                        tensors[key] = self.tensors[key].read(file, dtype).to(device)
        return tensors

    def error(self, text: str) -> ValueError:
        """Say what is wrong with names as the file has them."""
        return ValueError(f"{self.path} {NAME.sub(lambda name: self.spell(name[0]), text)}")


def kind(tensors: dict[str, Stored]) -> str:
    """Say what a file holds: a key of WANTED if it can be read here, else words for a message."""
    names = "\n".join(key.removeprefix(PREFIX) for key in tensors)
    for what, pattern in KINDS:
        if re.search(pattern, names, re.MULTILINE):
            fp8 = any(stored.dtype.startswith("F8") for stored in tensors.values())
            return "fp8 weights" if fp8 and what in WANTED else what
    return "no network that is known here"


def files_named(folder: Path, pattern: str) -> list[Path]:
    """List the files of a name in a folder; .sft is another word for .safetensors."""
    return sorted({*folder.glob(pattern), *folder.glob(pattern.replace(".safetensors", ".sft"))})


def file_in(folder: Path, *patterns: str) -> Path | None:
    """Find the index JSON in a folder, else the one file that has the first of these names that any has, else nothing.

    Errors: ValueError if several have it
    """
    patterns = ("*.safetensors.index.json", *patterns)
    files = next(filter(None, (files_named(folder, pattern) for pattern in patterns)), [])
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise ValueError(f"{folder} has {len(files)} candidates ({names}); give the path of one of them")
    return files[0] if files else None


def read_headers(path: Path) -> tuple[dict[str, Stored], dict[str, str], list[Path]]:
    """Read what a file holds, or all shards that an index JSON names.

    Returns the tensors by name, the metadata, the files
    Errors: ValueError if one is not there, or repeats tensors
    """
    paths = _shards(path) if path.suffix == ".json" else [path]
    tensors, metadata = read_header(paths[0])
    for shard in paths[1:]:
        more, _ = read_header(shard)
        if double := tensors.keys() & more.keys():
            raise ValueError(f"{shard} repeats tensors of another shard ({some(double)}); download the shards again")
        tensors |= more
    return tensors, metadata, paths


def _shards(path: Path) -> list[Path]:
    """List the files that an index JSON names."""
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path} has no weight_map from tensors to shards; download it again")
    shards = [path.parent / name for name in sorted(set(names.values()))]
    for shard in shards:
        if shard.parent != path.parent or not os.path.isfile(shard):
            raise ValueError(f"{path} names a shard {shard.name!r} that is not beside it; download the shards again")
    return shards


def read_header(path: str | Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Read what a safetensors file holds; the library checks that all of it is there, whole and without overlaps.

    Returns the tensors by name, and the header's metadata
    Errors: ValueError in one line that names the file, for whatever is not a whole safetensors file
    """
    path = Path(path)
    if not path.is_file():  # a pipe would never end
        raise ValueError(f"{path} cannot be read (it is no file); name one that is")
    try:
        with open(path, "rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_JSON:
                raise SafetensorError
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            if len(slices) > MAX_TENSORS:
                raise SafetensorError
            tensors = {key: Stored(path, s.get_dtype(), tuple(s.get_shape()), key) for key, s in slices.items()}
            return tensors, file.metadata() or {}
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None
    except SafetensorError:
        raise ValueError(f"{path} {_other_format(path)}") from None


def _other_format(path: Path) -> str:
    """Say what a file is that is no safetensors file, and what to use instead."""
    with open(path, "rb") as file:
        start = file.read(32)
    damaged = "is no safetensors file, or it is cut short or its header is damaged; download it again"
    # A safetensors file begins with a length, which may look like a magic, and goes on with {"
    return next((message for magic, message in MAGICS if start.startswith(magic) and start[8:10] != b'{"'), damaged)


def read_json(path: Path) -> dict:
    """Read a JSON object from a file. Errors: ValueError naming the file"""
    if not path.is_file():
        raise ValueError(f"{path} is no file; download it again")
    try:
        content = json.loads(path.read_bytes().decode() if path.stat().st_size <= MAX_JSON else "")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object; it is damaged, download it again")
    return content


def mismatch(checkpoint: Checkpoint, module: nn.Module) -> ValueError:
    """Say which tensors of a checkpoint are missing, unexpected, misshapen or no floats: counted and named."""
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    stored, both = checkpoint.tensors, expected.keys() & checkpoint.tensors.keys()
    missing = [key for key in expected if key not in stored]
    extra = [key for key in stored if key not in expected]
    wrong = [f"{k} {stored[k].shape}, not {expected[k]}" for k in sorted(both) if stored[k].shape != expected[k]]
    odd = [f"{key} {stored[key].dtype}" for key in sorted(both) if stored[key].dtype not in FLOATS]
    problems = [
        f"lacks {len(missing)} of {len(expected)} tensors ({some(missing)})" if missing else "",
        f"has {len(extra)} unexpected tensors ({some(extra)})" if extra else "",
        f"has {len(wrong)} tensors of the wrong shape ({some(wrong)})" if wrong else "",
        f"has {len(odd)} tensors that are no floats of 16 bits or more ({some(odd)})" if odd else "",
    ]
    return checkpoint.error("; ".join(filter(None, problems)))


def some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(name[:100] for name in names[:3]) + (", ..." if len(names) > 3 else "")


def fingerprint(paths: Iterable[str | Path], dated: bool = False) -> str:
    """Identify files by their content; those over 1 GB by name, size and, if dated, time of change."""
    marks = []
    for path in map(Path, paths):
        stat = path.stat()
        marks.append(file_sha256(path) or [path.name, stat.st_size, *[stat.st_mtime_ns] * dated])
    return hashlib.sha256(json.dumps(["files", marks]).encode()).hexdigest()


def file_sha256(path: str | Path) -> str | None:
    """Hash a file; None if it is over 1 GB."""
    if Path(path).stat().st_size > MAX_HASHED:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_safetensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; the same tensors and metadata give the same bytes.

    tensors: by name; copied to the CPU and made contiguous as needed
    metadata: text for the header
    Errors: OSError if the file cannot be written; an earlier one is still there then
    """
    ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        mode = temporary.stat().st_mode  # safetensors writes files that only their owner can read
        try:
            save_file(ready, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written ({error})") from None
        temporary.chmod(mode)
        _sort_header(temporary)

    write_atomic(path, write)


def _sort_header(path: Path) -> None:
    """Bring the metadata of a fresh file into order, in place: safetensors shuffles it from one save to the next."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # else spelled in another way: leave what is right, if unsorted
            file.seek(8)
            file.write(text.ljust(size))


def write_atomic(path: str | Path, write: bytes | str | Callable[[Path], None], overwrite: bool = True) -> None:
    """Write a file whole or not at all: beside its place first, then renamed onto it.

    write: what it holds, or a function that writes it to the path that it is given, which is an empty file
    overwrite: False refuses a name that is taken
    Errors: OSError if the disk is full or read-only, FileExistsError if the name is taken; nothing is left behind then
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        if callable(write):
            write(temporary)
        else:
            temporary.write_bytes(write.encode() if isinstance(write, str) else write)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            _link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    """Give a file a name unless that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except (AttributeError, OSError):  # Android, exFAT, mounted cloud drives: reserve the name, then rename onto it
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, path)
