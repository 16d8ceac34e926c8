"""From a model's name to its networks: find -> recognise -> configuration from tensor shapes -> strict load.

Data is mapped into memory, not copied, where the file already has the wanted dtype; else each tensor is cast by itself,
so there are never two full copies. What a checkpoint is stands in checkpoint.py; the text encoders are in text.py.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .autoencoder import AutoEncoder
from .checkpoint import FLOATS, Checkpoint, file_in, mismatch, open_checkpoint
from .flux import Flux

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
    """Where the parts of one model lie; the headers of transformer and autoencoder are read."""

    flux: Checkpoint
    autoencoder: Checkpoint
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
    place = _locate(name)
    if place is None:
        looked = f"models found: {', '.join(_models()) or 'none'}; looked in {', '.join(map(str, _places()))}"
        raise ValueError(f"there is no model {name[:80]!r} ({looked}); {_advice(name)}")
    root = place if place.is_dir() else place.parent
    files = {
        "flux": file_in(place, PARTS["flux"]) if place.is_dir() else place,
        "autoencoder": _first(root, "ae.safetensors"),
        "clip": _first(root, "text_encoder/*.safetensors", "clip_l.safetensors"),
        "t5": _first(root, "text_encoder_2/*.safetensors", "t5xxl_fp16.safetensors", "t5xxl*.safetensors"),
        "clip_tokenizer": _first(root, "tokenizer/tokenizer.json", "tokenizer/vocab.json"),
        "t5_tokenizer": _first(root, "tokenizer_2/tokenizer.json", "tokenizer_2/spiece.model"),
    }
    missing = [PARTS[part] for part, path in files.items() if path is None]
    for part, wanted in (("flux", "transformer"), ("autoencoder", "autoencoder")):
        if files[part] is not None:  # what is there is refused before what is missing is told
            files[part] = open_checkpoint(files[part], wanted)
    if missing:
        raise ValueError(f"{root} lacks {', '.join(missing)}; {_advice(name)}")
    for part in ("clip", "t5", "clip_tokenizer", "t5_tokenizer"):
        if files[part].parent != root:
            files[part] = files[part].parent
    return ModelFiles(**files, root=root, name=root.resolve().name if place.is_dir() else place.stem)


def _advice(name: str) -> str:
    which = ("FLUX.1-schnell", "flux-schnell") if "schnell" in name.lower() else ("FLUX.1-dev", "flux-dev")
    return f"a model folder holds {', '.join(PARTS.values())}; to get one: {DOWNLOAD.format(*which)}"


def _places() -> list[Path]:
    """List folders whose subfolders are models: the user's, the repository's, the current one's."""
    mine = os.environ.get("ICLORA_WEIGHTS")
    places = ([Path(mine)] if mine else []) + [Path(__file__).resolve().parents[1] / "weights"]
    here = Path("weights")
    return places if here.resolve() in [place.resolve() for place in places] else [*places, here]


def _locate(name: str) -> Path | None:
    """Find the first that exists: a bare name is a model before it is a path, anything with a slash is a path first."""
    if not name:
        return None
    candidates = [place / name for place in _places()]
    candidates.insert(0 if Path(name).name != name else len(candidates), Path(name))
    return next((path for path in candidates if os.path.exists(path)), None)


def _models() -> list[str]:
    patterns = (f"*/{PARTS['flux']}", "*/*.safetensors.index.json")
    return sorted({path.parent.name for place in _places() for pattern in patterns for path in place.glob(pattern)})


def _first(root: Path, *patterns: str) -> Path | None:
    return next((path for pattern in patterns for path in sorted(root.glob(pattern))), None)


def examples_folder() -> Path:
    """Find the example panel sets that come with the bundled tiny model. Errors: ValueError if they are gone"""
    for place in _places():
        if (folder := place / "tiny" / "examples").is_dir():
            return folder
    raise ValueError("weights/tiny/examples is missing; restore weights/tiny from the repository")


def weight_files(files: ModelFiles) -> list[Path]:
    """List the files that hold a model's tensors, shards included. Errors: ValueError for damaged files, by name"""
    text = open_checkpoint(files.clip, "clip").paths + open_checkpoint(files.t5, "t5").paths
    return list(dict.fromkeys(files.flux.paths + files.autoencoder.paths + text))


def load_flux(
    path: str | Path | Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> Flux:
    """Load a FLUX.1 transformer of any depth and width, frozen and in eval mode.

    path: a file with the official names (or these behind model.diffusion_model.), an index JSON of such shards,
        a folder with one of them (flux1-*.safetensors), or what find_model opened
    dtype: of the parameters; a file that has it already is mapped, not copied, on the CPU
    Errors: ValueError for anything else, saying what it is and what to use instead
    """
    return _load(Flux, path, "transformer", device, dtype)


def load_autoencoder(
    path: str | Path | Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> AutoEncoder:
    """Load a FLUX.1 autoencoder, frozen and in eval mode.

    path: a file with the official names, a folder with ae.safetensors, or what find_model opened
    Errors: ValueError for anything else, saying what it is and what to use instead
    """
    return _load(AutoEncoder, path, "autoencoder", device, dtype)


def _load(
    network: Callable, path: str | Path | Checkpoint, wanted: str, device: str | torch.device, dtype: torch.dtype
) -> nn.Module:
    """Build a network on the meta device and give it its tensors; names and shapes must match exactly."""
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path, wanted)
    with torch.device("meta"):
        module = network(checkpoint.config)
    tensors = {}
    try:
        ready = [key for key, stored in checkpoint.tensors.items() if FLOATS[stored.dtype] is dtype]
        to_cast = [[key] for key in sorted(checkpoint.tensors.keys() - ready)]  # one by one, as mapped pages count too
        for keys in [ready, *to_cast]:
            for key, tensor in checkpoint.read(keys):
                tensors[key] = tensor.to(device, dtype)  # as it is, if nothing changes
                del tensor
        module.load_state_dict(tensors, strict=True, assign=True)
    except (KeyError, RuntimeError):  # of tensors that are no floats; that are missing, unexpected or misshapen
        raise mismatch(checkpoint, module) from None
    return module.requires_grad_(False).eval()
