"""From a model's name to its networks: find -> recognise -> configuration from tensor shapes -> strict load.

Data is mapped into memory, not copied, where the file already has the wanted dtype; else each tensor is cast by itself,
so there are never two full copies. What a checkpoint is stands in checkpoint.py, other forms of one in
checkpoint_forms.py; the text encoders are in text.py.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .autoencoder import AutoEncoder
from .checkpoint import FLOATS, PREFIX, WANTED, Checkpoint, file_in, files_named, kind, mismatch, read_headers
from .checkpoint_forms import hub_snapshot, open_form
from .flux import Flux

PARTS = {
    "flux": "flux1-*.safetensors",
    "autoencoder": "ae.safetensors",
    "clip": "text_encoder/ (or clip_l.safetensors)",
    "t5": "text_encoder_2/ (or t5xxl_fp16.safetensors)",
    "clip_tokenizer": "tokenizer/",
    "t5_tokenizer": "tokenizer_2/",
}
Source = str | Path | Checkpoint
TOKENIZERS = {"tokenizer/", "tokenizer_2/"}
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
    place = hub_snapshot(place) if (place / "snapshots").is_dir() else place
    root = place if place.is_dir() else place.parent
    files = {
        "flux": file_in(place, *WANTED["transformer"][2]) if place.is_dir() else place,
        "autoencoder": _first(root, *WANTED["autoencoder"][2]),
        "clip": _first(root, "text_encoder/*.safetensors", "clip_l.safetensors"),
        "t5": _first(root, "text_encoder_2/*.safetensors", "t5xxl_fp16.safetensors", "t5xxl*.safetensors"),
        "clip_tokenizer": _first(root, "tokenizer/tokenizer.json", "tokenizer/vocab.json"),
        "t5_tokenizer": _first(root, "tokenizer_2/tokenizer.json", "tokenizer_2/spiece.model"),
    }
    for part, wanted in (("flux", "transformer"), ("autoencoder", "autoencoder")):
        if files[part] is not None:  # what is there is refused before what is missing is told
            files[part] = open_checkpoint(files[part], wanted)
            files |= dict.fromkeys(files[part].parts, files[part].path)
    if missing := [PARTS[part] for part, path in files.items() if path is None]:
        raise ValueError(f"{root} lacks {', '.join(missing)}; {_advice(name, root, missing)}")
    for part in ("clip", "t5", "clip_tokenizer", "t5_tokenizer"):
        if files[part].parent != root:
            files[part] = files[part].parent
    return ModelFiles(**files, root=root, name=root.resolve().name if place.is_dir() else place.stem)


def _advice(name: str, root: Path | None = None, missing: Iterable[str] = ()) -> str:
    which = ("FLUX.1-schnell", "flux-schnell") if "schnell" in name.lower() else ("FLUX.1-dev", "flux-dev")
    if missing and {*missing} <= TOKENIZERS:
        return f"to get them: hf download black-forest-labs/{which[0]} --include 'tokenizer*' --local-dir {root}"
    pickles = sorted(root.glob("text_encoder*/*.bin"))[:1] if root else ()
    advice = "".join(f"{path} is a pickle, which is never unpickled; " for path in pickles)
    return f"{advice}a model folder holds {', '.join(PARTS.values())}; to get one: {DOWNLOAD.format(*which)}"


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
    patterns = ("*.safetensors.index.json", *WANTED["transformer"][2])
    folders = (folder for place in _places() for folder in place.glob("*/"))
    return sorted({folder.name for folder in folders if any(files_named(folder, pattern) for pattern in patterns)})


def _first(root: Path, *patterns: str) -> Path | None:
    return next((path for pattern in patterns for path in files_named(root, pattern)), None)


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


def open_checkpoint(path: str | Path, wanted: str) -> Checkpoint:
    """Read the header of one file, or of all shards, and refuse by name whatever is not wanted.

    path: a safetensors file of any form, an index JSON of shards, or a folder with one of them
    wanted: a key of WANTED
    Errors: ValueError if nothing is there, a file is damaged, or it holds something else
    """
    path = Path(path)
    _, instead, names = WANTED[wanted]
    file = (file_in(path, *names) or path / names[0]) if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} is no file; {instead}")
    tensors, metadata, paths = read_headers(file)
    checkpoint = Checkpoint(file, wanted, tensors, paths)
    official = kind(tensors) == wanted and not any(key.startswith(PREFIX) for key in tensors)
    return checkpoint if official else open_form(checkpoint, metadata)


def load_flux(path: Source, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16) -> Flux:
    """Load a FLUX.1 transformer of any depth and width, frozen and in eval mode.

    path: a file with the official names or in a form of checkpoint_forms.py, an index JSON of such shards, a folder
        with one of them (flux1-*.safetensors, transformer/), or what find_model opened
    dtype: of the parameters; a file that has it already is mapped, not copied, on the CPU
    Errors: ValueError for anything else, saying what it is and what to use instead
    """
    return _load(Flux, path, "transformer", device, dtype)


def load_autoencoder(
    path: str | Path | Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> AutoEncoder:
    """Load a FLUX.1 autoencoder, frozen and in eval mode.

    path: a file with the official or diffusers' names, a folder with one (ae.safetensors, vae/), or what find_model
        opened
    Errors: ValueError for anything else, saying what it is and what to use instead
    """
    return _load(AutoEncoder, path, "autoencoder", device, dtype)


def _load(network: Callable, path: Source, wanted: str, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """Build a network on the meta device and give it its tensors."""
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path, wanted)
    module = empty_network(network, checkpoint)
    module.load_state_dict(checkpoint.read(checkpoint.tensors, dtype, device), assign=True)
    return module.requires_grad_(False).eval()


def empty_network(network: Callable, checkpoint: Checkpoint) -> nn.Module:
    """Build a network on the meta device, before anything is read. Errors: ValueError if names or shapes differ"""
    with torch.device("meta"):
        module = network(checkpoint.config)
    shapes = {key: (stored.shape, stored.dtype in FLOATS) for key, stored in checkpoint.tensors.items()}
    if shapes != {key: (tensor.shape, True) for key, tensor in module.state_dict().items()}:
        raise mismatch(checkpoint, module)
    return module
