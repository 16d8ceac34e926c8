"""The committed reference numbers, and how far from them a float32 result may be."""

import json
from pathlib import Path

from safetensors.torch import load_file

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
