"""Panel sets on disk."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sampling.images import fit, open_picture

from .prompts import MAX_CHARACTERS, clean

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class PanelSet:
    """Panel files in reading order and perhaps a joint caption.

    bundled: True for an example of the repository, False for what the user gave
    """

    paths: tuple[Path, ...] = ()
    caption: str | None = None
    bundled: bool = False


@dataclass(frozen=True)
class Source:
    """One panel read from a file.

    picture: of panel size
    drafted: True if a masked panel starts from it, False if it is kept
    """

    path: Path
    sha256: str
    picture: Image.Image
    drafted: bool


def read_set(folder: Path) -> PanelSet:
    """Lists the pictures 1.png, 2.png, ... 10.png of a folder in the order of their numbers, and reads caption.txt.

    Errors: ValueError if the folder or the pictures are missing, a number stands twice, or the caption is no text
    """
    if not os.path.isdir(folder):  # False where Path.is_dir raises: a name too long
        raise ValueError(f"there is no folder {ascii(str(folder)[-80:])}; --set takes one with 1.png, 2.png, ...")
    numbered: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if re.fullmatch("[0-9]{1,4}", path.stem) and path.suffix.lower() in PICTURES:
            other = numbered.setdefault(int(path.stem), path)
            if other is not path:
                raise ValueError(f"{folder} holds {other.name} and {path.name}, the same number twice; remove one")
    if not numbered:
        raise ValueError(f"{folder} holds no pictures named 1.png, 2.png, ...; rename them, or list them with --panels")
    caption = folder / "caption.txt"
    text = None
    try:
        if caption.is_file():
            with open(caption, encoding="utf-8-sig") as file:
                text = file.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"cannot read {caption}: {reason}; correct or remove it") from None
    return PanelSet(tuple(numbered[number] for number in sorted(numbered)), text and clean(text))


def read_source(path: Path, size: tuple[int, int], rule: str, drafted: bool) -> Source:
    """Reads one panel and fits it.

    size: width, height in pixels
    rule: as for sampling.images.fit
    Errors: ValueError in one line if it cannot be read
    """
    picture = fit(open_picture(path), *size, rule)
    return Source(path.absolute(), hashlib.sha256(path.read_bytes()).hexdigest(), picture, drafted)
