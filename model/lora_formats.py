"""LoRA files <-> the matrices in them: three dialects written, every one read, what is no sum refused by name.

No network is needed, only the shapes of its Linears; the layers are in lora.py, LoKr and LoHa in lora_kinds.py.
Letter: r rank.
A name holds at most one block number, written {} in the tables. Where the released model fuses several projections
into one Linear and a dialect does not, the dialect's Linear stands for a part of the fused output's rows.
Source: the conventions of diffusers and PEFT, kohya's sd-scripts, ai-toolkit, ComfyUI, OneTrainer, XLabs' x-flux
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from .checkpoint import FLOATS, WANTED, Stored, file_in, kind, read_header, read_json, save_safetensors
from .lora_kinds import ALPHAS, CHANNELS, FACTOR, MOST, REFUSED, Change, called, header_alpha, other_model, outer, swap

# diffusers' name -> the released name, and which part of its output
DIFFUSERS = {
    "x_embedder": ("img_in", "all"),
    "context_embedder": ("txt_in", "all"),
    "time_text_embed.timestep_embedder.linear_1": ("time_in.in_layer", "all"),
    "time_text_embed.timestep_embedder.linear_2": ("time_in.out_layer", "all"),
    "time_text_embed.guidance_embedder.linear_1": ("guidance_in.in_layer", "all"),
    "time_text_embed.guidance_embedder.linear_2": ("guidance_in.out_layer", "all"),
    "time_text_embed.text_embedder.linear_1": ("vector_in.in_layer", "all"),
    "time_text_embed.text_embedder.linear_2": ("vector_in.out_layer", "all"),
    "transformer_blocks.{}.norm1.linear": ("double_blocks.{}.img_mod.lin", "all"),
    "transformer_blocks.{}.norm1_context.linear": ("double_blocks.{}.txt_mod.lin", "all"),
    "transformer_blocks.{}.attn.to_out.0": ("double_blocks.{}.img_attn.proj", "all"),
    "transformer_blocks.{}.attn.to_add_out": ("double_blocks.{}.txt_attn.proj", "all"),
    "transformer_blocks.{}.ff.net.0.proj": ("double_blocks.{}.img_mlp.0", "all"),
    "transformer_blocks.{}.ff.net.2": ("double_blocks.{}.img_mlp.2", "all"),
    "transformer_blocks.{}.ff_context.net.0.proj": ("double_blocks.{}.txt_mlp.0", "all"),
    "transformer_blocks.{}.ff_context.net.2": ("double_blocks.{}.txt_mlp.2", "all"),
    "single_transformer_blocks.{}.norm.linear": ("single_blocks.{}.modulation.lin", "all"),
    "single_transformer_blocks.{}.proj_mlp": ("single_blocks.{}.linear1", "mlp"),
    "single_transformer_blocks.{}.proj_out": ("single_blocks.{}.linear2", "all"),
    "norm_out.linear": ("final_layer.adaLN_modulation.1", "swapped"),  # diffusers: scale first; here: shift first
    "proj_out": ("final_layer.linear", "all"),
}
for letter in "qkv":  # one by one there, fused here
    DIFFUSERS[f"transformer_blocks.{{}}.attn.to_{letter}"] = ("double_blocks.{}.img_attn.qkv", letter)
    DIFFUSERS[f"transformer_blocks.{{}}.attn.add_{letter}_proj"] = ("double_blocks.{}.txt_attn.qkv", letter)
    DIFFUSERS[f"single_transformer_blocks.{{}}.attn.to_{letter}"] = ("single_blocks.{}.linear1", letter)
# XLabs' x-flux, UNO and USO: 1 is the image stream, 2 the text stream
XLABS = {
    "double_blocks.{}.processor.qkv_lora1": ("double_blocks.{}.img_attn.qkv", "all"),
    "double_blocks.{}.processor.qkv_lora2": ("double_blocks.{}.txt_attn.qkv", "all"),
    "double_blocks.{}.processor.proj_lora1": ("double_blocks.{}.img_attn.proj", "all"),
    "double_blocks.{}.processor.proj_lora2": ("double_blocks.{}.txt_attn.proj", "all"),
    "single_blocks.{}.processor.qkv_lora": ("single_blocks.{}.linear1", "qkv"),
    "single_blocks.{}.processor.proj_lora": ("single_blocks.{}.linear2", "all"),
}
OFFICIAL = {official: (official, "all") for official, _ in DIFFUSERS.values()}
OFFICIAL["single_blocks.{}.linear1_qkv"] = ("single_blocks.{}.linear1", "qkv")  # ComfyUI's
NAMES = {"diffusers": DIFFUSERS, "official": OFFICIAL, "xlabs": XLABS}
UNDERSCORED = {name.replace(".", "_"): name for name in (*DIFFUSERS, *OFFICIAL)}  # looked up, never guessed
# kohya's: those of blocks only, as diffusers drops the others without a word
KOHYA = {f"lora_unet_{name}".replace(".", "_"): (name, "all") for name, _ in DIFFUSERS.values() if "_blocks." in name}
NUMBER = re.compile(r"(?<=blocks[._])(0|[1-9]\d?)(?=[._])")  # no FLUX.1 has a hundred blocks

# What may stand before a name, and how the dialect is then called ("" as by the name); after _ come no dots
PREFIXES = {"base_model.model.": "PEFT", "model.diffusion_model.": "ComfyUI", "diffusion_model.": "ComfyUI"}
PREFIXES |= {"transformer.": "", "unet.": ""}
PREFIXES |= {"lora_unet_": "kohya", "lora_transformer_": "OneTrainer", "lycoris_": "LyCORIS"}
ROLES = re.compile(
    r"\.(?:(?P<down>lora_A(\.default(_\d)?)?(\.weight)?|lora_down(\.weight)?|(lora\.|lora_linear_layer\.)?down\.weight)"
    r"|(?P<up>lora_B(\.default(_\d)?)?(\.weight)?|lora_up(\.weight)?|(lora\.|lora_linear_layer\.)?up\.weight)"
    r"|(?P<bias>lora_B(\.default(_\d)?)?\.bias)|(?P<diff_b>diff_b)|(?P<alpha>alpha)"
    r"|(?P<factor>diff|lokr_w[12](_[ab])?|hada_w[12]_[ab]))$"  # here the suffix is the role
)
TEXT_ENCODER = re.compile(
    r"^((base_model\.model\.|lora_|lycoris_|oft_)?(text_encoders?(_\d)?[._]|te\d?_|text_model[._]|clip_[lg][._]"
    r"|t5(xxl)?[._]|encoder\.(layers|block)\.)|lycoris_text_|cond_stage_model\.|conditioner\.|bundle_emb\.)"
)
DIFF = re.compile(r"\.diff(_b)?$")
READ = {*FLOATS, "F8_E4M3", "F8_E5M2"}
INTEGER = re.compile(r"[IU](8|16|32|64)")
NARROWED = {torch.float64: torch.float32}
PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}  # PEFT's settings, and its exceptions from them
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways of PEFT's to start a LoRA
MAX_PATTERNS, MAX_WILD = 1000, 100  # and of those with a *; no trainer writes more, and all are tried for every Linear

# The dialects that are written: what they call the Linears and the halves
DIALECTS = {
    "diffusers": ({f"transformer.{name}": place for name, place in DIFFUSERS.items()}, "lora_A", "lora_B"),
    "kohya": (KOHYA, "lora_down", "lora_up"),
    "xlabs": (XLABS, "down", "up"),
}
Shapes = dict[str, tuple[int, int]]  # outputs and inputs of every Linear, by released name
STALE = ("format", "lora_adapter_metadata", "ss_network_dim", "sshs_", *ALPHAS)  # true of the old file only


@dataclass(frozen=True)
class Delta:
    """A low-rank change of some rows of one Linear's output, scale * (up (down x)) + bias."""

    module: str  # the released name
    rows: slice
    down: Tensor  # (r, inputs)
    up: Tensor  # (rows, r)
    scale: float  # alpha / r
    bias: Tensor | None = None  # (rows,)


@dataclass(frozen=True)
class Entry:
    """One adapter in a file, not read yet: where it belongs and the keys of its tensors."""

    module: str  # the released name
    part: str  # see slice_of
    name: str  # the dialect's, with dots and without prefix
    dialect: str
    keys: dict[str, str] = field(default_factory=dict)  # by role: down, up, bias, diff_b, and those of factors
    scale: float = 1.0  # alpha / r


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file says before its data is read."""

    path: Path
    tensors: dict[str, Stored]
    entries: list[Entry]
    metadata: dict[str, str]
    skipped: tuple[str, ...]  # keys of text encoders
    notes: tuple[str, ...] = ()  # what else is to be known
    model: str = ""  # another one, which the header says it is for


@dataclass(frozen=True)
class LoraReport:
    """What was loaded; print it. A key that is not used is an error, so there is none."""

    path: str
    dialect: str
    modules: int  # as the dialect counts them
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    metadata: dict[str, str]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        scales = "-".join(f"{scale:.4g}" for scale in self.scales)
        ranks = ["rank " + "-".join(map(str, self.ranks))] if self.ranks else []
        skipped = [f"{len(self.skipped)} of text encoders skipped"] if self.skipped else []
        what = [f"{self.modules} modules", *ranks, f"scale {scales}", "0 keys unused", *skipped, *self.notes]
        return f"{Path(self.path).name}: {self.dialect} names, {', '.join(what)}"


# names


def template(name: str) -> tuple[str, str]:
    """Take the block number out of a name: double_blocks.7.img_mod.lin -> double_blocks.{}.img_mod.lin, 7."""
    number = NUMBER.search(name)
    return (NUMBER.sub("{}", name, count=1), number[0]) if number else (name, "")


def locate(name: str) -> Entry | None:
    """Find the Linear that any dialect's name means, or None."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    pattern, number = template(name.removeprefix(prefix))
    if prefix.endswith("_"):
        pattern = UNDERSCORED.get(pattern, "")
    for dialect, names in NAMES.items():
        if pattern in names:
            module, part = names[pattern]
            dialect = dialect if dialect == "xlabs" else PREFIXES.get(prefix) or dialect
            return Entry(module.format(number), part, pattern.format(number), dialect)
    return None


def names_in(dialect: str, module: str) -> list[tuple[str, str]]:
    """List the names that a dialect which is written has for one Linear, each with its part."""
    (pattern, number), table = template(module), DIALECTS[dialect][0].items()
    return [(name.format(number), part) for name, (official, part) in table if official == pattern]


def slice_of(part: str, shape: tuple[int, int]) -> slice:
    """Give the rows of a part of a Linear's output.

    part: all, swapped (all, the two halves exchanged), or of a fused projection q, k, v, qkv, mlp
    shape: outputs, inputs of the Linear; a fused projection's inputs are the model's width
    """
    outputs, width = shape
    starts = {"k": width, "v": 2 * width, "mlp": 3 * width}
    stops = {"q": width, "k": 2 * width, "v": 3 * width, "qkv": 3 * width}
    return slice(starts.get(part, 0), stops.get(part, outputs))


# reading


def lora_file(path: str | Path) -> Path:
    """Find the file of a LoRA in a folder, PEFT's or a run's; a file is itself. Errors: ValueError if there is none"""
    path = Path(path)
    if not path.is_dir():
        return path
    names = ("adapter_model.safetensors", "lora.safetensors")  # PEFT's, and that of our runs, beside a checkpoint
    file = next((path / name for name in names if (path / name).is_file()), None) or file_in(path, "*.safetensors")
    if file is None:
        raise ValueError(f"{path} holds no LoRA, no .safetensors file; name the file")
    return file


def read_lora(path: str | Path) -> LoraFile:
    """Read the header of a LoRA in any dialect, find out where each adapter belongs and how it is scaled.

    What belongs to text encoders is left out, and so are zeros to add and alphas of nothing.

    path: a safetensors file, or a folder as PEFT saves it (adapter_model.safetensors, adapter_config.json)
    Errors: ValueError that names the key, for whatever is damaged, no LoRA, not only added to weights or not for FLUX.1
    """
    path = lora_file(path)
    stored, metadata = read_header(path)
    if (holds := kind(stored)) != "LoRA weights":
        what = WANTED[holds][0] if holds in WANTED else holds
        raise ValueError(f"{path} holds {what}, not a LoRA for FLUX.1; give a LoRA here and a model to --model")
    skipped = tuple(filter(TEXT_ENCODER.search, stored))
    tensors = {key: tensor for key, tensor in stored.items() if not TEXT_ENCODER.search(key)}
    settings = _settings(path, metadata)
    model = other_model(metadata | settings)
    notes = [f"its header says it is for {model}"] if model else []
    with safe_open(path, framework="pt") as data:
        zeros = {key for key, tensor in tensors.items() if DIFF.search(key) and _is_zero(path, data, key, tensor)}
        notes += [f"{len(zeros)} tensors of zeros ignored"] if zeros else []
        entries = _entries(path, {key: tensor for key, tensor in tensors.items() if key not in zeros}, model)
        lone = [entry.keys["alpha"] for entry in entries if entry.keys.keys() == {"alpha"}]
        notes += [f"{len(lone)} alphas without matrices ignored ({lone[0]})"] if lone else []
        entries = [entry for entry in entries if entry.keys.keys() != {"alpha"}]
        if not entries:
            only = f", only {len(skipped)} keys of text encoders ({skipped[0]})" if skipped else ""
            raise ValueError(f"{path} has no adapter for the FLUX.1 transformer{only}")
        alphas = {e.keys["alpha"]: _alpha(path, data, tensors, e.keys["alpha"]) for e in entries if "alpha" in e.keys}
    usual = None if alphas or settings else header_alpha(path, metadata)
    notes += [f"alpha {usual:g} of its header followed"] if usual else []
    for number, entry in enumerate(entries):
        alpha = alphas.get(entry.keys.get("alpha"), usual)
        entries[number] = replace(entry, scale=_scale(path, entry, tensors, settings, alpha))
    return LoraFile(path, tensors, entries, metadata, skipped, tuple(notes), model)


def _entries(path: Path, tensors: dict[str, Stored], model: str) -> list[Entry]:
    """Sort tensors by where they belong. model: see LoraFile. Errors: ValueError for those that are not understood"""
    for what, pattern in REFUSED:
        if key := next(filter(re.compile(pattern).search, tensors), None):
            raise ValueError(f"{path} has {what} ({key}), so it is no plain LoRA and is not applied")
    entries: dict[tuple[str, str], Entry] = {}
    for key, stored in tensors.items():
        match = ROLES.search(key)
        entry = locate(key[: match.start()]) if match else None
        if entry is None:
            whose = f"its header says it is for {model}" if model else "is it a LoRA of another model?"
            raise ValueError(f"{path} has {key}, which belongs to no Linear of FLUX.1; {whose}")
        role = match["factor"] or match.lastgroup
        keys = entries.setdefault((entry.module, entry.part), entry).keys
        if role in keys:
            raise ValueError(f"{path} has both {keys[role]} and {key}, which mean the same; remove one")
        keys[role] = key
        if 0 in stored.shape:
            raise ValueError(f"{path} has {key} of shape {stored.shape}, so of rank 0")
        if stored.dtype not in READ and (role != "alpha" or not INTEGER.fullmatch(stored.dtype)):
            raise ValueError(f"{path} has {key} in {stored.dtype}; a LoRA must be in floats")
    for entry in entries.values():
        if "down" in entry.keys and (mixed := _factors(entry.keys)) and "diff" not in mixed:
            raise ValueError(f"{path} has both {entry.keys['down']} and {next(iter(mixed.values()))}; it is damaged")
        for half, other in (("down", "lora_A"), ("up", "lora_B")):
            if half not in entry.keys and entry.keys.keys() & {"down", "up", "bias"}:
                key = next(iter(entry.keys.values()))
                raise ValueError(f"{path} has {key} without its {other} ({half}) half; it is damaged")
    return list(entries.values())


def _read(path: Path, data: safe_open, key: str) -> Tensor:
    """Read a tensor: fp8 as bfloat16, which holds it exactly; float64 as float32, in which all is summed.

    Errors: ValueError for values that are not finite, or too large to be weights
    """
    tensor = data.get_tensor(key)
    tensor = tensor.bfloat16() if tensor.element_size() == 1 else tensor.to(NARROWED.get(tensor.dtype, tensor.dtype))
    low, high = map(float, tensor.aminmax())
    if not -MOST < low <= high < MOST:
        raise ValueError(f"{path} has values in {key} that are not finite or beyond {MOST:g}; it is damaged")
    return tensor


def _is_zero(path: Path, data: safe_open, key: str, stored: Stored) -> bool:
    """Say if a tensor that can be read is zero everywhere."""
    return stored.dtype in READ and 0 not in stored.shape and not _read(path, data, key).any()


def _alpha(path: Path, data: safe_open, tensors: dict[str, Stored], key: str) -> float:
    """Read an alpha, of any type. Errors: ValueError if it is not one number"""
    if tensors[key].shape not in ((), (1,)):
        raise ValueError(f"{path} has {key} of shape {tensors[key].shape}; an alpha is one number")
    return float(data.get_tensor(key).double())


def _settings(path: Path, metadata: dict[str, str]) -> dict:
    """PEFT's configuration, from the header or from the file beside. Errors: ValueError if it is damaged or DoRA"""
    config = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and config.exists():
        settings = read_json(config)
    elif "lora_adapter_metadata" in metadata:
        try:
            flat = json.loads(metadata["lora_adapter_metadata"])
            settings = {k.removeprefix("transformer."): v for k, v in flat.items() if k.startswith("transformer.")}
        except (TypeError, ValueError, AttributeError, RecursionError):
            raise ValueError(f"{path} has a damaged lora_adapter_metadata in its header") from None
    else:
        return {}
    odd = [name for name in ("use_dora", "use_qalora") if settings.get(name)]
    peft, init = (_short(settings.get(name)) for name in ("peft_type", "init_lora_weights"))
    odd += [f"peft_type {peft}"] if peft not in ("LORA", "None") else []
    if odd:
        raise ValueError(f"{path} is configured with {odd[0]}, so it is no plain LoRA and is not applied")
    if init.lower().startswith(CHANGES_BASE):
        base = f"a base that {init.lower()} changed, which the file does not hold"
        raise ValueError(f"{path} was trained beside {base}; convert it to a plain LoRA in PEFT")
    return settings and settings | {name: _globs(path, settings, name) for name in PATTERNS.values()}


def _short(value: object) -> str:
    """Show a value of a file in a message, however long or deep it is."""
    return str(value)[:40] if isinstance(value, str | int | float | None) else f"of {type(value).__name__}"


def _globs(path: Path, settings: dict, name: str) -> dict[str, object]:
    """Rewrite PEFT's patterns for fnmatch, ^ kept, as no file's regular expression is run. Errors: ValueError"""
    globs, patterns = {}, settings.get(name) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{path} has a damaged rank_pattern or alpha_pattern in its PEFT configuration")
    for pattern, value in patterns.items():
        glob = pattern[:201].removesuffix("$").replace(r"\.", ".").replace(".*", "*")
        if len(pattern) > 200 or not re.fullmatch(r"\^?[\w.*-]+", glob):
            raise ValueError(f"{path} has {pattern[:80]!r} in its {name}, no valid pattern; names, with .* too, are")
        globs.setdefault(glob, value)
    if len(globs) > MAX_PATTERNS or sum("*" in glob for glob in globs) > MAX_WILD:
        raise ValueError(f"{path} has {len(globs)} patterns in its {name}, more than any trainer writes; it is damaged")
    return globs


def _scale(path: Path, entry: Entry, tensors: dict[str, Stored], settings: dict, alpha: float | None) -> float:
    """alpha / r: alpha from the adapter's own tensor, PEFT's configuration or the header, else equal to the rank.

    Errors: ValueError if the tensor and a configuration are there, one does not fit, or an alpha is absurd
    """
    key, shapes = next(iter(entry.keys.values())), {role: tensors[key].shape for role, key in entry.keys.items()}
    if "down" in shapes:
        rank = (shapes["down"] or (0,))[0]
    else:
        rank = outer(path, entry.keys, _factors(shapes))[1] if called(shapes) else None
    if rank == 0:
        raise ValueError(f"{path} has {key} of shape (), so of rank 0")
    if alpha is not None and settings:
        raise ValueError(f"{path} has {entry.keys['alpha']} and a PEFT configuration; nobody knows which counts")
    if rank is None:  # nothing is low-rank, so alpha means nothing, and some trainers write an absurd one
        return 1.0
    if not settings:
        if alpha is not None and not abs(alpha) < MOST:
            raise ValueError(f"{path} has {entry.keys.get('alpha', 'a header')} of {alpha:g}, no alpha; it is damaged")
        return 1.0 if alpha is None else alpha / rank
    words = entry.name.split(".")
    names = {"^" + entry.name, *(".".join(words[i:]) for i in range(len(words)))}  # a pattern means one of these
    for setting, patterns in PATTERNS.items():
        globs = settings[patterns]  # the first that matches counts
        match = next((g for g in globs if g in names or "*" in g and any(fnmatchcase(n, g) for n in names)), None)
        value = settings.get(setting) if match is None else globs[match]
        if not isinstance(value, int | float) or not 0 < value < MOST:
            raise ValueError(f"{path} gives {entry.name} the {setting} {_short(value)}, no positive number")
        if setting == "r" and value != rank:
            raise ValueError(f"{path} says rank {value} for {entry.name}, but {key} has rank {rank}")
    return value / (rank**0.5 if settings.get("use_rslora") else rank)


def _factors(roles: dict) -> dict:
    """Pick the factors of a whole matrix."""
    return {role: value for role, value in roles.items() if FACTOR.match(role)}


def refuse_factors(file: LoraFile, why: str) -> None:
    """Refuse a file with changes that are no products of two thin matrices. Errors: ValueError, with the reason"""
    for entry in file.entries:
        if what := called(entry.keys):
            raise ValueError(f"{file.path} has {what} ({next(iter(_factors(entry.keys).values()))}), {why}")


def check_shapes(file: LoraFile, shapes: Shapes) -> list[slice]:
    """Check a file against a model, without reading its data.

    shapes: outputs and inputs of every Linear, by released name
    Returns the rows that each entry changes
    Errors: ValueError that names the key, for blocks the model lacks and wrong shapes
    """
    slices, header = [], f"; its header says it is for {file.model}" if file.model else ""
    for entry in file.entries:
        if entry.module not in shapes:
            key = next(iter(entry.keys.values()))
            raise ValueError(f"{file.path} has {key}, but this model has no {entry.module}; it is for another{header}")
        rows = slice_of(entry.part, shapes[entry.module])
        stored = {role: file.tensors[key].shape for role, key in entry.keys.items()}
        (outputs, inputs), rank = (rows.stop - rows.start, shapes[entry.module][1]), stored.get("down", (0,))[0]
        wanted = {"down": (rank, inputs), "up": (outputs, rank), "bias": (outputs,), "diff_b": (outputs,)}
        sizes = {entry.keys[role]: (stored[role], size) for role, size in wanted.items() if role in stored}
        if factors := _factors(entry.keys):
            key = next(iter(factors.values()))
            key = key if "diff" in factors else f"a product of {key}"
            sizes[key] = outer(file.path, factors, _factors(stored))[0], (outputs, inputs)
        for key, (shape, size) in sizes.items():
            if shape != size:
                if entry.module == "img_in" and size[-1] == inputs and shape[-1:] in CHANNELS:
                    header = f"; it is for {CHANNELS[shape[-1:]]}"
                needs = f"{entry.module} of this model needs {size}"
                raise ValueError(f"{file.path} has {key} of shape {shape}; {needs}{header}")
        slices.append(rows)
    return slices


def read_deltas(file: LoraFile, shapes: Shapes) -> list[Delta | Change]:
    """Read the tensors, in the dtype of the file as far as that is computed with, and check them against the model.

    shapes: outputs and inputs of every Linear, by released name
    Errors: ValueError that names the key, for what check_shapes refuses and values that are not finite
    """
    slices, deltas = check_shapes(file, shapes), []
    with safe_open(file.path, framework="pt") as data:
        for entry, rows in zip(file.entries, slices, strict=True):
            swapped = entry.part == "swapped"
            tensors = {role: _read(file.path, data, key) for role, key in entry.keys.items() if role != "alpha"}
            biases = [entry.scale * tensors["bias"].float()] if "bias" in tensors else []
            biases += [tensors["diff_b"].float()] if "diff_b" in tensors else []
            bias = sum(biases) if biases else None
            bias = swap(bias) if swapped and biases else bias
            if factors := _factors(tensors):
                scale = 1.0 if "diff" in factors else entry.scale
                deltas.append(Change(entry.module, rows, factors, scale, bias, swapped))
                bias = None
            if "down" in tensors:
                up = swap(tensors["up"]) if swapped else tensors["up"]
                deltas.append(Delta(entry.module, rows, tensors["down"], up, entry.scale, bias))
            elif not factors:  # a bias alone, beside matrices of rank 1 that say nothing
                zeros, inputs = tensors["diff_b"].new_zeros, shapes[entry.module][1]
                deltas.append(Delta(entry.module, rows, zeros(1, inputs), zeros(len(bias), 1), entry.scale, bias))
    return deltas


def describe(file: LoraFile) -> LoraReport:
    """Sum up what was read."""
    ranks = tuple(sorted({file.tensors[entry.keys["down"]].shape[0] for entry in file.entries if "down" in entry.keys}))
    scales = tuple(sorted({entry.scale for entry in file.entries}))
    dialect = " and ".join(sorted({entry.dialect for entry in file.entries}))
    kinds = Counter(filter(None, (called(entry.keys) for entry in file.entries)))
    notes = (*(f"{count} of them {what}" for what, count in kinds.items()), *file.notes)
    return LoraReport(str(file.path), dialect, len(file.entries), ranks, scales, file.metadata, file.skipped, notes)


# writing


def write_lora(
    deltas: list[Delta], shapes: Shapes, path: str | Path, dialect: str, metadata: dict[str, str], dtype: torch.dtype
) -> None:
    """Write a LoRA file.

    deltas: several for the same rows are joined into one of the summed rank
    dialect: diffusers, with the scale folded into B, which diffusers and ComfyUI load; kohya, fused and with alpha,
        for kohya, ComfyUI and diffusers; xlabs, fused and without alpha, for XLabs and UNO
    metadata: text for the header; what was true of an older file only, such as its alpha, is left out
    Errors: ValueError naming what the dialect has no place for, or what does not fit the dtype; OSError
    """
    if dialect not in DIALECTS:
        raise ValueError(f"the LoRA dialect {dialect!r} cannot be written; choose one of {', '.join(DIALECTS)}")
    if not deltas:
        raise ValueError("there is no LoRA to write; attach or load one first")
    modules: dict[str, list[Delta]] = {}
    for delta in map(_trim, deltas):
        check_named(dialect, delta.module, shapes[delta.module], delta.rows, delta.bias is not None)
        modules.setdefault(delta.module, []).append(delta)
    tensors: dict[str, Tensor] = {}
    _, a, b = DIALECTS[dialect]
    for module, changes in modules.items():
        for name, part in names_in(dialect, module):
            rows = slice_of(part, shapes[module])
            inside = [delta for delta in changes if delta.rows.start < rows.stop and rows.start < delta.rows.stop]
            if not inside:
                continue
            joined = _join(inside, rows, fold=dialect != "kohya")
            ups = {f"{name}.{b}.weight": joined.up, f"{name}.{b}.bias": joined.bias}
            tensors[f"{name}.{a}.weight"] = joined.down
            tensors |= {k: swap(t) if part == "swapped" else t for k, t in ups.items() if t is not None}
            if dialect == "kohya":
                tensors[f"{name}.alpha"] = torch.tensor(joined.scale * len(joined.down))
    # Where ranks differ, diffusers takes the first for everybody's alpha, so each says its own.
    # Source: huggingface/diffusers utils/peft_utils.py get_peft_kwargs
    ranks = {key: len(tensor) for key, tensor in tensors.items() if key.endswith(".lora_A.weight")}
    if len({*ranks.values()}) > 1:
        tensors |= {key.replace(".lora_A.weight", ".alpha"): torch.tensor(float(r)) for key, r in ranks.items()}
    tensors = {key: t if key.endswith(".alpha") else t.to(dtype, copy=True) for key, t in tensors.items()}
    if bad := next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise ValueError(f"{bad} holds values that are not finite in {dtype}; write it as float32")
    save_safetensors(tensors, path, {k: str(v) for k, v in metadata.items() if not k.startswith(STALE)})


def check_named(dialect: str, module: str, shape: tuple[int, int], rows: slice, biased: bool) -> None:
    """Refuse a change of some rows of a Linear that a dialect has no name for. Errors: ValueError"""
    named = [slice_of(part, shape) for _, part in names_in(dialect, module)]
    if dialect == "diffusers" or (not biased and any(n.start <= rows.start and rows.stop <= n.stop for n in named)):
        return  # diffusers names every row
    what = f"rows {rows.start} to {rows.stop} of {module}{' with a bias' if biased else ''}"
    raise ValueError(f"the {dialect} dialect has no place for {what}; write the LoRA as diffusers")


def _trim(delta: Delta) -> Delta:
    """Leave out first and last rows that stay as they are, as in a fused up; a fresh adapter keeps all."""
    used = delta.up.any(dim=1).nonzero().flatten().tolist()
    if delta.bias is not None or not used:
        return delta
    start, stop = used[0], used[-1] + 1
    return replace(delta, rows=slice(delta.rows.start + start, delta.rows.start + stop), up=delta.up[start:stop])


def _join(deltas: list[Delta], rows: slice, fold: bool) -> Delta:
    """Make one change of some rows, in float32: downs below each other, ups beside each other.

    A down that comes twice, as where a fused adapter was split, is used once; a rank that changes none of these
    rows, as in a block-sparse up, is dropped. So converting to and fro does not raise the rank.

    fold: the scale into the up; it is also done where scales differ
    """
    scale = 1.0 if fold or len({delta.scale for delta in deltas}) > 1 else deltas[0].scale
    pairs: dict[bytes, tuple[Tensor, Tensor]] = {}
    bias = None
    for delta in deltas:
        factor = 1.0 if delta.scale == scale else delta.scale
        edges = (delta.rows.start - rows.start, rows.stop - delta.rows.stop)  # to add, or to cut if negative
        down, up = delta.down.float(), F.pad(factor * delta.up.float(), (0, 0, *edges))
        key = down.numpy().tobytes()
        pairs[key] = (down, up + pairs[key][1] if key in pairs else up)
        if delta.bias is not None:
            bias = F.pad(delta.bias.float(), edges) + (0 if bias is None else bias)
    down, up = torch.cat([down for down, _ in pairs.values()]), torch.cat([up for _, up in pairs.values()], dim=1)
    if (used := up.any(dim=0)).any():  # else it is fresh and keeps its rank
        down, up = down[used], up[:, used]
    return Delta(deltas[0].module, rows, down, up, scale, bias)
