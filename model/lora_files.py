"""LoRA files of every dialect become lists of Deltas; whatever is not a plain LoRA is refused by name.

No network is needed, only the shapes of its Linears. Letter: r rank. The names are in lora_names.py, writing is in
lora_write.py, the layers are in lora.py.
Source: the conventions of diffusers and PEFT, kohya's sd-scripts, ai-toolkit, ComfyUI, OneTrainer, XLabs' x-flux
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint import FLOATS, WANTED, Stored, file_in, kind, read_header, read_json
from .lora_names import Place, locate, rows, swap

ROLES = re.compile(
    r"\.(?:(?P<down>lora_A(\.default)?(\.weight)?|lora_down(\.weight)?|(lora\.|lora_linear_layer\.)?down\.weight)"
    r"|(?P<up>lora_B(\.default)?(\.weight)?|lora_up(\.weight)?|(lora\.|lora_linear_layer\.)?up\.weight)"
    r"|(?P<bias>lora_B(\.default)?\.bias)|(?P<alpha>alpha))$"
)
TEXT_ENCODER = re.compile(
    r"^(text_encoders?(_\d)?\.|lora_te\d?_|lycoris_text_|clip_[lg]\.|t5xxl\.|(base_model\.model\.)?text_model\.)"
)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways of PEFT's to start a LoRA
REFUSED = (
    ("DoRA magnitudes", r"dora_scale|lora_magnitude_vector"),
    ("LoKr factors", r"lokr_"),
    ("LoHa factors", r"hada_"),
    ("OFT blocks", r"oft_blocks|\boft_|\.rescale$"),
    ("GLoRA matrices", r"\.[ab][12]\.(weight|bias)$|\.bm\.weight$"),
    ("whole weights to add", r"\.diff(_b)?$"),
    ("whole weights to set", r"\.set_weight$"),
    ("a change of shape", r"\.reshape_weight$"),
    ("norms", r"\.[wb]_norm$|norm\.(query|key)_norm\.|\.norm_(added_)?[qk]\."),
    ("a third matrix", r"lora_mid"),
    ("IA3 vectors", r"\.on_input$"),
)


@dataclass(frozen=True)
class Delta:
    """A low-rank change of rows start to stop of one Linear's output, scale * (up down x + bias)."""

    module: str
    start: int
    stop: int
    down: Tensor  # (r, inputs)
    up: Tensor  # (stop - start, r)
    scale: float  # alpha / r
    bias: Tensor | None = None  # (stop - start,)


@dataclass(frozen=True)
class Entry:
    """One adapter in a file, not read yet: where it belongs and the keys of its tensors by role."""

    place: Place
    keys: dict[str, str]  # down, up, alpha, bias


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file says before its data is read."""

    path: Path
    stored: dict[str, Stored]
    entries: list[Entry]
    settings: dict  # PEFT's r, lora_alpha, ...; empty if the file has none
    metadata: dict[str, str]
    skipped: tuple[str, ...]  # keys of text encoders


@dataclass(frozen=True)
class LoraReport:
    """What was loaded; print it."""

    path: str
    dialect: str
    modules: int  # as the dialect counts them
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    metadata: dict[str, str]
    unused: tuple[str, ...] = ()  # always empty: an unknown key is an error
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        ranks, scales = "-".join(map(str, self.ranks)), "-".join(f"{scale:.4g}" for scale in self.scales)
        skipped = f", {len(self.skipped)} of text encoders skipped" if self.skipped else ""
        return (
            f"{Path(self.path).name}: {self.dialect} names, {self.modules} modules, rank {ranks}, scale {scales}, "
            f"{len(self.unused)} keys unused{skipped}"
        )


def lora_file(path: str | Path) -> Path:
    """Find the file of a LoRA in a folder, PEFT's or a run's; a file is itself. Errors: ValueError if there is none"""
    path = Path(path)
    if not path.is_dir():
        return path
    names = ("adapter_model.safetensors", "lora.safetensors")  # PEFT's, and that of our runs, beside a checkpoint
    known = next((path / name for name in names if (path / name).is_file()), None)
    if not (found := known or file_in(path, "*.safetensors")):
        raise ValueError(f"{path} holds no LoRA, no .safetensors file; name the file")
    return found


def read_lora(path: str | Path, skip_text_encoder: bool = False) -> LoraFile:
    """Read the header of a LoRA in any dialect and find out where each adapter belongs.

    path: a safetensors file, or a folder as PEFT saves it (adapter_model.safetensors, adapter_config.json)
    skip_text_encoder: leave out what belongs to CLIP or T5, instead of refusing the file
    Errors: ValueError that names the key, for whatever is damaged, no LoRA, no plain LoRA or not for FLUX.1
    """
    path = lora_file(path)
    stored, metadata = read_header(path)
    if (holds := kind(stored)) != "LoRA weights":
        what = WANTED[holds][0] if holds in WANTED else holds
        raise ValueError(f"{path} holds {what}, not a LoRA for FLUX.1; give a LoRA here and a model to --model")
    text = tuple(key for key in stored if TEXT_ENCODER.search(key))
    if text and not skip_text_encoder:
        raise ValueError(
            f"{path} has {len(text)} keys of text encoders ({text[0]}, ...), which are not applied here; skip them "
            "with `python -m iclora.convert` (--skip-text-encoder)"
        )
    own = {key: entry for key, entry in stored.items() if key not in text}
    for what, pattern in REFUSED:
        if found := [key for key in own if re.search(pattern, key)]:
            raise ValueError(f"{path} has {what} ({found[0]}), so it is no plain LoRA and is not applied")
    entries = _entries(path, own)
    if not entries:
        raise ValueError(f"{path} has no adapter for the FLUX.1 transformer")
    return LoraFile(path, own, entries, _settings(path, metadata), metadata, text)


def _entries(path: Path, stored: dict[str, Stored]) -> list[Entry]:
    """Group keys by adapter. Errors: ValueError for an unknown key, a missing half, or one place named twice"""
    grouped: dict[tuple[str, str], Entry] = {}
    for key in stored:
        role = ROLES.search(key)
        place = locate(key[: role.start()]) if role else None
        if place is None:
            raise ValueError(f"{path} has {key}, which belongs to no Linear of FLUX.1; is it a LoRA of another model?")
        keys = grouped.setdefault((place.module, place.slot), Entry(place, {})).keys
        if other := keys.get(role.lastgroup):
            raise ValueError(f"{path} has both {other} and {key}, which mean the same; remove one")
        keys[role.lastgroup] = key
    for entry in grouped.values():
        for half, other in (("down", "lora_A"), ("up", "lora_B")):
            if half not in entry.keys:
                key = next(iter(entry.keys.values()))
                raise ValueError(f"{path} has {key} without its {other} ({half}) half; it is damaged")
    return list(grouped.values())


def _settings(path: Path, metadata: dict[str, str]) -> dict:
    """PEFT's configuration, from the header or from the file beside. Errors: ValueError if it is damaged or DoRA"""
    config = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and config.is_file():
        settings = read_json(config)
    elif "lora_adapter_metadata" in metadata:
        try:
            flat = json.loads(metadata["lora_adapter_metadata"])
            settings = {k.removeprefix("transformer."): v for k, v in flat.items() if k.startswith("transformer.")}
        except (TypeError, ValueError, AttributeError, RecursionError):
            raise ValueError(f"{path} has a damaged lora_adapter_metadata in its header") from None
    else:
        return {}
    if not all(isinstance(settings.get(name) or {}, dict) for name in ("rank_pattern", "alpha_pattern")):
        raise ValueError(f"{path} has a damaged rank_pattern or alpha_pattern in its PEFT configuration")
    odd = [name for name in ("use_dora", "use_qalora") if settings.get(name)]
    odd += [f"peft_type {settings['peft_type']}"] if settings.get("peft_type", "LORA") != "LORA" else []
    if odd:
        raise ValueError(f"{path} is configured with {odd[0]}, so it is no plain LoRA and is not applied")
    if (start := str(settings.get("init_lora_weights")).lower()).startswith(CHANGES_BASE):
        raise ValueError(
            f"{path} was trained beside a base that {start} changed, which the file does not hold; convert it to a "
            "plain LoRA in PEFT"
        )
    return settings


def _scale(file: LoraFile, entry: Entry, rank: int, alpha: float | None) -> float:
    """alpha / rank: alpha from the adapter's own tensor, else PEFT's configuration, else equal to the rank.

    Errors: ValueError if both are there, or the configuration does not fit
    """
    if alpha is not None and file.settings:
        raise ValueError(f"{file.path} has {entry.keys['alpha']} and a PEFT configuration; nobody knows which counts")
    if alpha is not None or not file.settings:
        return 1.0 if alpha is None else alpha / rank
    chosen = {}
    for name, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        value = file.settings.get(name)
        for pattern, other in reversed((file.settings.get(patterns) or {}).items()):  # the first match stays
            try:
                matches = re.match(rf"^(.*\.)?({pattern})$", entry.place.name)  # PEFT's own rule
            except re.error:
                raise ValueError(f"{file.path} has {pattern[:80]!r} in its {patterns}, no valid pattern") from None
            value = other if matches else value
        if not isinstance(value, int | float) or not 0 < value < 1e6:
            raise ValueError(f"{file.path} gives {entry.place.name} the {name} {str(value)[:40]}, no positive number")
        chosen[name] = value
    if chosen["r"] != rank:
        raise ValueError(
            f"{file.path} says rank {chosen['r']} for {entry.place.name}, but {entry.keys['down']} has rank {rank}"
        )
    return chosen["lora_alpha"] / (rank**0.5 if file.settings.get("use_rslora") else rank)


def read_deltas(file: LoraFile, shapes: dict[str, tuple[int, int]]) -> list[Delta]:
    """Read the tensors, in the dtype of the file, and check them against the model.

    shapes: outputs and inputs of every Linear, by released name
    Errors: ValueError that names the key, for blocks the model lacks, wrong shapes, odd dtypes, values not finite
    """
    spans = [_span(file, entry, shapes) for entry in file.entries]
    deltas = []
    try:
        data = safe_open(file.path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file.path} has a damaged header ({error}); download it again") from None
    with data:
        for entry, (start, stop) in zip(file.entries, spans, strict=True):
            tensors = {role: data.get_tensor(key) for role, key in entry.keys.items()}
            for role, key in entry.keys.items():
                if not tensors[role].isfinite().all():
                    raise ValueError(f"{file.path} has values in {key} that are not finite")
            alpha = float(tensors.pop("alpha")) if "alpha" in tensors else None
            if entry.place.slot == "swapped":
                for role in tensors.keys() - {"down"}:
                    tensors[role] = swap(tensors[role])
            scale = _scale(file, entry, tensors["down"].shape[0], alpha)
            deltas.append(Delta(entry.place.module, start, stop, **tensors, scale=scale))
    return deltas


def _span(file: LoraFile, entry: Entry, shapes: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """The rows of an adapter. Errors: ValueError unless all its tensors have the shapes and dtypes that fit them"""
    module, down = entry.place.module, file.stored[entry.keys["down"]]
    if module not in shapes:
        raise ValueError(f"{file.path} has {entry.keys['down']}, but this model has no {module}; it is for another")
    start, stop = rows(entry.place.slot, shapes[module])
    rank = down.shape[0] if down.shape else 0
    if rank < 1:
        raise ValueError(f"{file.path} has {entry.keys['down']} of shape {down.shape}, so of rank 0")
    wanted = {"down": (rank, shapes[module][1]), "up": (stop - start, rank), "bias": (stop - start,)}
    for role, key in entry.keys.items():
        shape, dtype = file.stored[key].shape, file.stored[key].dtype
        if shape not in ([(), (1,)] if role == "alpha" else [wanted[role]]):
            right = "one number" if role == "alpha" else str(wanted[role])
            raise ValueError(f"{file.path} has {key} of shape {shape}; {module} of this model needs {right}")
        if dtype not in FLOATS:
            raise ValueError(f"{file.path} has {key} in {dtype}; a LoRA must be in floats of 16 bits or more")
    return start, stop


def describe(file: LoraFile, deltas: list[Delta]) -> LoraReport:
    """Sum up what was read."""
    ranks = tuple(sorted({delta.down.shape[0] for delta in deltas}))
    scales = tuple(sorted({delta.scale for delta in deltas}))
    dialect = " and ".join(sorted({entry.place.dialect for entry in file.entries}))
    return LoraReport(str(file.path), dialect, len(deltas), ranks, scales, file.metadata, skipped=file.skipped)
