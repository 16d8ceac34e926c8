"""The committed reference numbers, how far from them a float32 result may be, and their weights in other files."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
FLUX = {"dev": GOLDEN / "dev" / "flux1-dev.safetensors", "schnell": GOLDEN / "schnell" / "flux1-schnell.safetensors"}
AE = GOLDEN / "ae" / "ae.safetensors"

EXACT = 5e-6  # ids, schedules, blocks, encode
WHOLE = 3e-5  # whole forwards, decode, loops, and anything with a LoRA or UNO


def case(name: str) -> dict:
    return load_file(GOLDEN / name / "case.safetensors")


def schedule() -> dict[str, list[float]]:
    return json.loads((GOLDEN / "schedule.json").read_text())


def far(a, b) -> float:
    """The largest absolute difference."""
    return float((a.float() - b.float()).abs().max())


def write(path: Path, tensors: dict[str, Tensor], metadata=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def shard(folder: Path, tensors: dict[str, Tensor], stem: str = "flux1-dev", count: int = 3) -> Path:
    """Write shards in which the parts of a fused Linear lie apart, and their index."""
    keys, where = sorted(tensors), {}
    for i in range(count):
        name = f"{stem}-{i + 1:05}-of-{count:05}.safetensors"
        write(folder / name, {key: tensors[key] for key in keys[i::count]})
        where |= dict.fromkeys(keys[i::count], name)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index
