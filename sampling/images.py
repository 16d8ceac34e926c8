"""Pictures on disk <-> PIL <-> tensors; the only place where pixels become tensors.

Letters: h, w in pixels. A picture is a PIL image in mode RGB; an image is a tensor in -1..1.
"""

import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # others never reach their decoder, Ghostscript included
MAX_PIXELS = 100_000_000  # read off the header, before a pixel is decoded
MAX_SCANS = 64  # of a JPEG; progressive ones have 10
MAX_JPEG = 500_000_000  # bytes
MAX_ASPECT = 32  # long side over short side
GREY = (128, 128, 128)  # what "pad" adds: the 8-bit value next to 0.0, the neutral middle of -1..1

_TOO_LARGE = f"more than {MAX_PIXELS // 10**6} megapixels; scale it down first"
_ENDS = {"PNG": (b"\0\0\0\0IEND\xaeB`\x82", -8, os.SEEK_CUR), "GIF": (b";", -1, os.SEEK_END)}  # and where they are
_SEGMENT = re.compile(rb"\xff([^\x00\xff\x01\xd0-\xd8])", re.DOTALL)  # of a JPEG; in a scan \xff is followed by 0


def open_picture(path: str | Path) -> Image.Image:
    """Read one picture file as 8-bit RGB, upright and opaque; of an animation the first frame.

    path: PNG, JPEG, WEBP, BMP, GIF or TIFF. EXIF orientation is applied, transparency is laid on white, CMYK, palette,
        1-bit, grey and 16-bit pictures are converted; colour profiles are not applied
    Errors: ValueError, one line with the name, if the file is missing, damaged, cut short, too large or too narrow
    """
    with _quiet_pillow(), _reading(path) as file:
        with Image.open(file, formats=FORMATS) as header:
            kind = header.format
            _check_size(header.size)
            header.verify()  # the checksum of every PNG chunk; decoding alone skips those of the pixels
        _check_end(kind, file)
        with Image.open(file, formats=FORMATS) as picture, _quiet_libtiff() if kind == "TIFF" else nullcontext():
            picture.load()
            return to_rgb(picture)


def picture_size(path: str | Path | Image.Image) -> tuple[int, int]:
    """Read width and height of a picture file off its header, before any EXIF orientation; or take a picture's.

    Errors: as open_picture, as far as a header tells
    """
    if isinstance(path, Image.Image):
        _check_size(path.size)
        return path.size
    with _quiet_pillow(), _reading(path) as file, Image.open(file, formats=FORMATS) as header:
        _check_size(header.size)
        return header.size


def fit(picture: Image.Image, width: int, height: int, rule: str = "crop") -> Image.Image:
    """Bring a picture to width x height with Lanczos; one of that size already is returned as it is.

    width, height: pixels
    rule: "crop" scales to cover and cuts the centre, "pad" scales to fit inside and adds mid-grey bars, "stretch"
        scales each side by itself
    """
    size, lanczos = (width, height), Image.Resampling.LANCZOS
    if picture.size == size:
        return picture
    if rule == "crop":
        return ImageOps.fit(picture, size, lanczos)
    return ImageOps.pad(picture, size, lanczos, GREY) if rule == "pad" else picture.resize(size, lanczos)


def to_tensor(picture: Image.Image) -> Tensor:
    """Turn an RGB picture into an image: 0..255 -> -1..1, float32.

    Returns (1, 3, h, w) image
    """
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1  # (1, 3, h, w)


def to_picture(image: Tensor) -> Image.Image:
    """Turn one image into an RGB picture, rounded and clamped; the exact inverse of to_tensor.

    image: (1, 3, h, w) or (3, h, w) in -1..1, any float type, any device
    Errors: ValueError if a value is NaN or infinite
    """
    image = image.detach().reshape(image.shape[-3:]).to("cpu", torch.float32)
    if not torch.isfinite(image).all():
        raise ValueError("the model gave NaN or infinite pixels; try --dtype float32, or another checkpoint or LoRA")
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def to_png(picture: Image.Image, text: dict[str, str] | None = None) -> bytes:
    """Turn a picture into a PNG file with text chunks; the same picture and text give the same bytes.

    text: keyword -> text, such as the prompt; sorted by keyword, no time or path is added
    """
    chunks = PngImagePlugin.PngInfo()
    for keyword, value in sorted((text or {}).items()):
        chunks.add_text(keyword, value)
    bare = picture.copy()
    bare.info = {}  # else a profile or resolution of the source file is written along
    buffer = io.BytesIO()
    bare.save(buffer, "PNG", pnginfo=chunks, compress_level=6)
    return buffer.getvalue()


class _Refusal(ValueError):
    """Why a file is refused and what to do, in words for the user; the name of the file goes before it."""


@contextmanager
def _reading(path: str | Path) -> Iterator[io.BufferedReader]:
    """Open a regular file and turn whatever its decoding raises into one line that names it.

    Decoders of untrusted bytes raise OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError,
    struct.error, zlib.error, MemoryError and more; for the user all of them mean that this file is no good.
    """
    try:
        _check_file(Path(path))
        with open(path, "rb") as file:
            yield file
    except Exception as error:
        raise ValueError(f"cannot read {_shown(path)}: {_reason(error)}") from error


def _check_file(path: Path) -> None:
    """Refuse what is no regular file with something in it."""
    if not path.exists():
        raise _Refusal("there is no such file; check the name")
    if not path.is_file():
        raise _Refusal("it is a folder or a device; name one picture file")
    if path.stat().st_size == 0:
        raise _Refusal("it is empty; export the picture again")


def _reason(error: Exception) -> str:
    """Say why a file cannot be read, and what to do."""
    if isinstance(error, _Refusal):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return _TOO_LARGE
    if isinstance(error, Image.UnidentifiedImageError):
        formats = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        return f"not {formats}, or cut short or damaged at its start; save it again as PNG"
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
    return f"{reason}; save it again as PNG"


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Pillow without its warnings and log lines on stderr."""
    logger, silence = logging.getLogger("PIL"), logging.NullHandler()
    logger.addHandler(silence)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(silence)


@contextmanager
def _quiet_libtiff() -> Iterator[None]:
    """Silence file descriptor 2, where libtiff writes what Pillow raises as well."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_size(size: tuple[int, int]) -> None:
    """Refuse pictures that would fill the memory or that no panel can show."""
    wide, high = size
    if wide * high > MAX_PIXELS:
        raise _Refusal(f"{wide}x{high} is {_TOO_LARGE}")
    if max(wide, high) > MAX_ASPECT * min(wide, high) or not wide:
        raise _Refusal(f"{wide}x{high} is narrower than {MAX_ASPECT}:1; crop it first")


def _check_end(kind: str | None, file: io.BufferedReader) -> None:
    """Refuse a PNG or GIF without its end marker, which other decoders miss themselves, and a JPEG of endless scans.

    file: for PNG as verify() leaves it, behind the letters IEND
    """
    if kind in ("JPEG", "MPO"):
        _check_scans(file)
    elif kind in _ENDS:
        end, *place = _ENDS[kind]
        file.seek(*place)
        if file.read(len(end)) != end:
            raise _Refusal("it is cut short or damaged at its end; save it again as PNG")


def _check_scans(file: io.BufferedReader) -> None:
    """Refuse a JPEG of many scans, each of which goes through all pixels, be it of a few bytes."""
    file.seek(0)
    data, place, scans = file.read(MAX_JPEG + 1), 2, 0
    if len(data) > MAX_JPEG:
        raise _Refusal(f"it has more than {MAX_JPEG // 10**6} MB; save it again, smaller")
    while (found := _SEGMENT.search(data, place)) and found[1] != b"\xd9":
        place, scans = found.end() + int.from_bytes(data[found.end() : found.end() + 2]), scans + (found[1] == b"\xda")
    if scans > MAX_SCANS:
        raise _Refusal(f"it has {scans} scans, more than {MAX_SCANS}; save it again as PNG")


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert any mode to upright, opaque 8-bit RGB, without the metadata."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _to_eight_bit(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    picture.info = {}
    return picture


def _to_eight_bit(picture: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and float grey to 8 bits instead of clipping it to white.

    White is 65535 for 16 bits. Wider types don't say what white is: it is the smallest of 1 (float), 255, 65535 and
    the picture's own maximum that clips nothing.
    """
    values = np.asarray(picture).astype(np.float32)
    if not np.isfinite(values).all():
        raise _Refusal("it holds NaN or infinite values; save it again as 8-bit PNG")
    whites = [65535.0] if picture.mode.startswith("I;16") else [255.0, 65535.0, float(values.max())]
    if picture.mode == "F":
        whites.insert(0, 1.0)
    white = next(white for white in whites if values.max() <= white)
    scaled = np.clip(values / white * 255, 0, 255).round().astype(np.uint8)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        scaled[values == transparent] = 255
    return Image.fromarray(scaled)


def _shown(path: str | Path) -> str:
    """A file name fit for one line of a terminal."""
    name = str(path)
    return name if name.isprintable() else ascii(name)
