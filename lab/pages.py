"""What stands on a page of results beside its tables: sheets as small files, and the values of every set."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.checkpoint import fingerprint, write_atomic
from model.weights import find_model
from sampling.images import to_picture

TRUE = "true sets"  # the name of their rows among the values
FEW_COLOURS = 65  # mean squared error, of 255 levels, that a picture of 256 colours may have: 30 dB


def sheet(rows: list[Tensor], zoom: int = 2) -> Image.Image:
    """Rows of composites (N, 3, h, w), one below the other."""
    picture = to_picture(torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).clamp(-1, 1))
    return picture.resize((zoom * picture.width, zoom * picture.height), Image.Resampling.NEAREST)


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Write a picture as PNG of 256 colours, or as JPEG if that is smaller or too many colours would be lost.

    path: without a suffix; what stood there with the other one is removed
    Returns the file
    """
    picture = picture.convert("RGB")
    few = picture.quantize(256, kmeans=1, dither=Image.Dither.NONE)  # dithered pixels would not compress
    lost = np.square(np.subtract(few.convert("RGB"), picture, dtype=float)).mean()
    png, jpeg = io.BytesIO(), io.BytesIO()
    few.save(png, "PNG", optimize=True)
    picture.save(jpeg, "JPEG", quality=85, subsampling="4:4:4", optimize=True)
    kinds = {".png": png.getvalue(), ".jpg": jpeg.getvalue()}
    if lost > FEW_COLOURS or len(kinds[".jpg"]) < len(kinds[".png"]):
        kinds = dict(reversed(kinds.items()))
    (suffix, content), (other, _) = kinds.items()
    file = path.with_name(path.name + suffix)
    write_atomic(file, content)
    path.with_name(path.name + other).unlink(missing_ok=True)
    return file


def save_values(values: dict, path: Path) -> None:
    """Write values as JSON without spaces, numbers with 4 decimals, NaN as null."""
    write_atomic(path, json.dumps(_short(values), separators=(",", ":")) + "\n")


def base_mark(model: str) -> str:
    """What stands for the base among values: a digest of transformer and autoencoder."""
    files = find_model(model)
    return fingerprint([*files.flux.paths, *files.autoencoder.paths])


def _short(value: object) -> object:
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_short(each) for each in value]
    if not isinstance(value, float):
        return value
    return None if np.isnan(value) else int(value) if value.is_integer() else round(value, 4)
