"""From a model's name to its networks: find the files, infer the configuration from tensor shapes, load strictly.

What a checkpoint is and how its bytes become tensors is in checkpoint.py; the text encoders are in text.py.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from .autoencoder import AutoEncoder, AutoEncoderConfig
from .checkpoint import WANTED, Checkpoint, file_in, fill, open_checkpoint, save_safetensors
from .flux import Flux, FluxConfig

__all__ = ["ModelFiles", "find_model", "infer_autoencoder_config", "infer_flux_config", "load_autoencoder", "load_flux"]
__all__ += ["examples_folder", "read_flux_config", "save_safetensors", "weight_files"]

Config = TypeVar("Config")
INPUTS = {384: "FLUX.1 Fill", 128: "FLUX.1 Canny or Depth"}  # channels per token of models that need more than noise
PARTS = {
    "flux": "flux1-*.safetensors",
    "autoencoder": "ae.safetensors",
    "clip": "text_encoder/ (or clip_l.safetensors)",
    "t5": "text_encoder_2/ (or t5xxl_fp16.safetensors)",
    "clip_tokenizer": "tokenizer/",
    "t5_tokenizer": "tokenizer_2/",
}
DOWNLOAD = "hf download black-forest-labs/{} --exclude 'transformer/*' --exclude 'vae/*' --local-dir weights/{}"


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of one model lie."""

    flux: Path  # a file, or the index JSON of shards
    autoencoder: Path
    clip: Path  # a folder of the hub layout, or a single file
    t5: Path  # likewise
    clip_tokenizer: Path  # folders
    t5_tokenizer: Path
    root: Path
    name: str


def find_model(name: str) -> ModelFiles:
    """Find a model by name or path, and all of its parts.

    name: a folder under $ICLORA_WEIGHTS or weights/, or the path of a model folder or of its transformer file
    Errors: ValueError that says what is missing, which files go where and how to download them; also if the
        transformer or the autoencoder is recognised as something else
    """
    name = str(name)
    advice = _advice(name)
    found = _locate(name)
    if found is None:
        raise ValueError(
            f"there is no model {name[:80]!r} (models found: {', '.join(_models()) or 'none'}; looked in "
            f"{', '.join(map(str, _places()))}); {advice}"
        )
    root = found if found.is_dir() else found.parent
    files = {
        "flux": file_in(found, PARTS["flux"]) if found.is_dir() else found,
        "autoencoder": _first(root, "ae.safetensors"),
        "clip": _first(root, "text_encoder/*.safetensors", "clip_l.safetensors"),
        "t5": _first(root, "text_encoder_2/*.safetensors", "t5xxl_fp16.safetensors", "t5xxl*.safetensors"),
        "clip_tokenizer": _first(root, "tokenizer/tokenizer.json", "tokenizer/vocab.json"),
        "t5_tokenizer": _first(root, "tokenizer_2/tokenizer.json", "tokenizer_2/spiece.model"),
    }
    for part, wanted in (("flux", "transformer"), ("autoencoder", "autoencoder")):
        if files[part] is not None:  # refused now, not after minutes of encoding text
            open_checkpoint(files[part], wanted)
    if missing := [PARTS[part] for part, path in files.items() if path is None]:
        raise ValueError(f"{root} lacks {', '.join(missing)}; {advice}")
    for part in ("clip", "t5", "clip_tokenizer", "t5_tokenizer"):
        if files[part].parent != root:
            files[part] = files[part].parent
    return ModelFiles(**files, root=root, name=root.resolve().name if found.is_dir() else found.stem)


def _advice(name: str) -> str:
    which = ("FLUX.1-schnell", "flux-schnell") if "schnell" in name.lower() else ("FLUX.1-dev", "flux-dev")
    return f"a model folder holds {', '.join(PARTS.values())}; to get one: {DOWNLOAD.format(*which)}"


def _places() -> list[Path]:
    """Folders whose subfolders are models: the user's, the repository's, the current one's."""
    own = os.environ.get("ICLORA_WEIGHTS")
    places = ([Path(own)] if own else []) + [Path(__file__).resolve().parents[1] / "weights"]
    here = Path("weights")
    return places if here.resolve() in [place.resolve() for place in places] else [*places, here]


def _locate(name: str) -> Path | None:
    """The first that exists: a bare name is a model before it is a path, anything with a slash is a path first."""
    if not name:
        return None
    candidates = [place / name for place in _places()]
    candidates.insert(0 if Path(name).name != name else len(candidates), Path(name))
    return next((path for path in candidates if os.path.exists(path)), None)


def _models() -> list[str]:
    transformers = (
        path
        for place in _places()
        for part in (PARTS["flux"], "*.safetensors.index.json")
        for path in place.glob(f"*/{part}")
    )
    return sorted({path.parent.name for path in transformers})


def examples_folder() -> Path:
    """Find the example panel sets that come with the bundled tiny model. Errors: ValueError if they are gone"""
    for place in _places():
        if (folder := place / "tiny" / "examples").is_dir():
            return folder
    raise ValueError("weights/tiny/examples is missing; restore weights/tiny from the repository")


def weight_files(files: ModelFiles) -> list[Path]:
    """List the files that hold a model's tensors, shards included; all headers are checked on the way.

    Errors: ValueError for damaged files, by name
    """
    parts = ((files.flux, "transformer"), (files.autoencoder, "autoencoder"), (files.clip, "clip"), (files.t5, "t5"))
    opened = [open_checkpoint(path, wanted) for path, wanted in parts]
    return list(dict.fromkeys(stored.path for checkpoint in opened for stored in checkpoint.tensors.values()))


def _first(root: Path, *patterns: str) -> Path | None:
    return next((path for pattern in patterns for path in sorted(root.glob(pattern))), None)


def dimensions(shapes: dict[str, tuple[int, ...]], key: str, ndim: int) -> tuple[int, ...]:
    """Look up a shape that an inference needs. Errors: ValueError, without a subject, if it is not there or not such"""
    if key not in shapes:
        raise ValueError(f"lacks {key}, from which the configuration is inferred")
    if len(shapes[key]) != ndim or not all(shapes[key]):
        raise ValueError(f"has {key} of shape {shapes[key]}; it should have {ndim} dimensions, none of them 0")
    return shapes[key]


def count_blocks(keys: Iterable[str], stem: str) -> int:
    """Count the blocks stem.0, stem.1, ... Errors: ValueError, without a subject, if the numbers have gaps"""
    found = {int(match[1]) for key in keys if (match := re.match(rf"{re.escape(stem)}\.([0-9]{{1,6}})\.", key))}
    gaps = set(range(len(found))) - found
    if gaps:
        raise ValueError(f"lacks {stem}.{min(gaps)} although it has {stem}.{max(found)}; blocks are numbered from 0")
    return len(found)


def infer(function: Callable[[dict[str, tuple[int, ...]]], Config], checkpoint: Checkpoint) -> Config:
    """Call one of the infer functions on a checkpoint; its name becomes the subject of their messages."""
    try:
        return function({key: stored.shape for key, stored in checkpoint.tensors.items()})
    except ValueError as error:
        raise ValueError(f"{checkpoint.name} {error}") from None


def infer_flux_config(shapes: dict[str, tuple[int, ...]]) -> FluxConfig:
    """Read the configuration of a transformer off its tensor shapes.

    shapes: by official name, e.g. {"img_in.weight": (3072, 64), ...}
    Errors: ValueError, without a subject ("lacks img_in.weight, ..."), for shapes that no FLUX.1 here can have
    """
    hidden, inputs = dimensions(shapes, "img_in.weight", 2)
    outputs, _ = dimensions(shapes, "final_layer.linear.weight", 2)
    if inputs != 64 or outputs != 64:
        name = f" ({INPUTS[inputs]})" if inputs in INPUTS else ""
        raise ValueError(
            f"takes {inputs} and gives {outputs} channels per token{name}; only models with 64 and 64 are run here: "
            "use FLUX.1-dev, -schnell or -Krea-dev"
        )
    depth, singles = count_blocks(shapes, "double_blocks"), count_blocks(shapes, "single_blocks")
    norm = "double_blocks.0.img_attn.norm.query_norm.scale" if depth else "single_blocks.0.norm.query_norm.scale"
    (head,) = dimensions(shapes, norm, 1)
    if head % 32 or hidden % head:
        raise ValueError(
            f"has attention heads of width {head} at width {hidden}; the head width must be a multiple of 32, for "
            "rotary axes of 1/8, 7/16 and 7/16 of it, and divide the width"
        )
    if depth:
        mlp_hidden = dimensions(shapes, "double_blocks.0.img_mlp.0.weight", 2)[0]
    else:
        mlp_hidden = dimensions(shapes, "single_blocks.0.linear2.weight", 2)[1] - hidden
    if mlp_hidden < 1:
        raise ValueError(f"has single_blocks.0.linear2.weight too narrow for the width {hidden}")
    return FluxConfig(
        in_channels=inputs,
        out_channels=outputs,
        vec_in_dim=dimensions(shapes, "vector_in.in_layer.weight", 2)[1],
        context_in_dim=dimensions(shapes, "txt_in.weight", 2)[1],
        hidden_size=hidden,
        mlp_hidden=mlp_hidden,
        num_heads=hidden // head,
        depth=depth,
        depth_single_blocks=singles,
        axes_dim=(head // 8, head * 7 // 16, head * 7 // 16),
        guidance_embed=any(key.startswith("guidance_in.") for key in shapes),
    )


def infer_autoencoder_config(shapes: dict[str, tuple[int, ...]]) -> AutoEncoderConfig:
    """Read the configuration of an autoencoder off its tensor shapes.

    shapes: by official name, e.g. {"encoder.conv_in.weight": (128, 3, 3, 3), ...}
    Errors: ValueError, without a subject, for shapes that no FLUX.1 autoencoder can have
    """
    ch = dimensions(shapes, "encoder.conv_in.weight", 4)[0]
    latent = dimensions(shapes, "encoder.conv_out.weight", 4)[0] // 2
    levels = count_blocks(shapes, "encoder.down")
    if latent != 16 or levels != 4:
        raise ValueError(
            f"has {latent} latent channels and {levels} resolutions; the FLUX.1 autoencoder has 16 and 4: "
            + WANTED["autoencoder"][1]
        )
    widths = [dimensions(shapes, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
    if ch % 32 or any(width % ch for width in widths):
        raise ValueError(f"has channels {ch} and {widths}; they must be multiples of 32 and of the first")
    return AutoEncoderConfig(
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=count_blocks(shapes, "encoder.down.0.block"),
        z_channels=latent,
    )


def read_flux_config(path: str | Path) -> FluxConfig:
    """Read the configuration of a transformer off its header alone; path and errors as for load_flux."""
    return infer(infer_flux_config, open_checkpoint(path, "transformer"))


def load_flux(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16,
) -> Flux:  # fmt: skip
    """Load a FLUX.1 transformer of any depth and width, frozen and in eval mode.

    path: a file with the official names (or these behind model.diffusion_model.), an index JSON of such shards,
        or a folder with one of them (flux1-*.safetensors)
    dtype: of the parameters; a file that has it already is mapped, not copied, on the CPU
    Errors: ValueError for anything else, saying what it is and what to use instead
    """
    checkpoint = open_checkpoint(path, "transformer")
    config = infer(infer_flux_config, checkpoint)
    with torch.device("meta"):
        flux = Flux(config)
    return fill(flux, checkpoint, device, dtype)


def load_autoencoder(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> AutoEncoder:
    """Load a FLUX.1 autoencoder, frozen and in eval mode.

    path: a file with the official names, or a folder with ae.safetensors
    Errors: ValueError for anything else, saying what it is and what to use instead
    """
    checkpoint = open_checkpoint(path, "autoencoder")
    config = infer(infer_autoencoder_config, checkpoint)
    with torch.device("meta"):
        autoencoder = AutoEncoder(config)
    return fill(autoencoder, checkpoint, device, dtype)
