"""What tests of whole commands share: commands by name, pictures and files compared."""

import gc
import importlib
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
TINY = ROOT / "weights" / "tiny"
REFERENCES = TINY / "examples" / "references"
MODULES = {"sample": "sample", "train": "train", "data": "iclora.data", "convert": "iclora.convert"}
SCRIPTS = {
    "sample": ["sample.py"], "train": ["train.py"], "data": ["-m", "iclora.data"], "convert": ["-m", "iclora.convert"],
}  # fmt: skip
CLOSE = 3e-5  # whole forwards, and anything with a LoRA, in float32
# Levels: another instruction set or number of threads moves a picture by 4e-5, one step of 20 fewer by 0.1, so that a
# tolerance of a whole level would not see it.
SAME = 0.05


def main(command: str, *argv: object) -> int:
    """Run one command in this process, as its script would, and give its exit status."""
    return importlib.import_module(MODULES[command]).main([str(word) for word in argv])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)


def levels_apart(path: Path, other: Path) -> float:
    """The mean absolute difference of two pictures, in levels of 0 to 255."""
    one, two = pixels(path), pixels(other)
    assert one.shape == two.shape
    return float(np.abs(one - two).mean())


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of all files in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}


def record(folder: Path, stem: str = "0001") -> dict:
    return json.loads((folder / f"{stem}.json").read_text())


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


@contextmanager
def quick_collection():
    """Leave what is imported out of garbage collections, which follow every text encoder and take a while otherwise."""
    import transformers.models.clip.modeling_clip
    import transformers.models.t5.modeling_t5  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


def refused(capsys, *fragments: str) -> str:
    """The one line on stderr of a command that refused, which names the fragments in this order."""
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in out + err
    place = 0
    for fragment in fragments:
        assert fragment in err[place:], f"{fragment!r} is not told in {err!r}"
        place = err.index(fragment, place) + len(fragment)
    return err
