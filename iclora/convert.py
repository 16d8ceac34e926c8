"""Convert a LoRA for FLUX.1 between dialects; the input's dialect is recognised.

python -m iclora.convert IN OUT --to kohya        loads in kohya, ComfyUI and diffusers; Linears of blocks only
python -m iclora.convert IN OUT --to diffusers    loads in diffusers and ComfyUI; every Linear
python -m iclora.convert IN OUT --to xlabs        for XLabs and UNO; attention and projections only
"""

import os
import sys
from dataclasses import dataclass
from functools import reduce

import torch

from model import lora_formats as formats
from model.flux import Flux, FluxConfig
from model.lora import shapes
from model.lora_formats import DIALECTS, LoraFile, read_lora, template
from model.weights import find_model

from .cli import guard, parse, plain
from .config import check, option

# Which side of a Linear is as wide as the model, and what the other side is, D being the width and M the MLP's
WIDTHS = {
    "img_in": ("out", "channels"),
    "txt_in": ("out", "context"),
    "vector_in.in_layer": ("out", "vec"),
    "time_in.in_layer": ("out", ""),
    "guidance_in.in_layer": ("out", ""),
    "double_blocks.{}.img_mlp.0": ("in", "M"),
    "double_blocks.{}.img_mlp.2": ("out", "M"),
    "double_blocks.{}.txt_mlp.0": ("in", "M"),
    "double_blocks.{}.txt_mlp.2": ("out", "M"),
    "single_blocks.{}.linear1": ("in", "3D + M"),
    "single_blocks.{}.linear2": ("out", "D + M"),
}


@dataclass(frozen=True)
class ConvertConfig:
    """What convert is asked for, besides the two files.

    Errors: ValueError for an unknown choice
    """

    to: str | None = option(None, "the dialect to write", choices=DIALECTS)
    model: str | None = option(
        None, "check against this model; without one, its widths are read off the LoRA", metavar="NAME|PATH"
    )
    dtype: str | None = option(
        None,
        "of the tensors (default: as they are; float32 if you need every bit where a scale is folded in)",
        choices=("float32", "bfloat16", "float16"),
    )

    def __post_init__(self) -> None:
        check(self)
        if self.to is None:
            raise ValueError(f"--to is missing; choose one of {', '.join(DIALECTS)}")


def convert(source: str, target: str, config: ConvertConfig) -> str:
    """Convert one file and describe the input in one line.

    Errors: ValueError if the input is no LoRA for FLUX.1, the dialect cannot hold it, or the output cannot be there
    """
    if os.path.lexists(target):
        raise ValueError(f"{target} exists and is not overwritten; remove it or choose another name")
    if not os.path.isdir(os.path.dirname(target) or "."):
        raise ValueError(f"there is no folder {os.path.dirname(target)}; make it first")
    file = read_lora(source)
    formats.refuse_factors(file, "which no dialect that is written has a place for; use the file as it is")
    shape = find_model(config.model).flux.config if config.model else infer_config(file)
    with torch.device("meta"):
        known = shapes(Flux(shape))
    deltas = formats.read_deltas(file, known)
    stored = reduce(torch.promote_types, (half.dtype for delta in deltas for half in (delta.down, delta.up)))
    dtype = getattr(torch, config.dtype) if config.dtype else stored
    formats.write_lora(deltas, known, target, config.to, file.metadata, dtype)
    return f"{formats.describe(file)}; wrote {target}"


def infer_config(file: LoraFile) -> FluxConfig:
    """Read the widths of the model off the shapes of a LoRA's tensors; what it does not touch is as in FLUX.1-dev.

    Errors: ValueError for shapes that no FLUX.1 can have
    """
    size: dict[str, int] = {}
    depth = {"double_blocks": 0, "single_blocks": 0}
    for entry in file.entries:
        pattern, number = template(entry.module)
        if number:
            block = pattern.partition(".")[0]
            depth[block] = max(depth[block], int(number) + 1)
        if "down" not in entry.keys:  # a bias alone does not tell the inputs
            continue
        inputs, outputs = (_width(file, entry.keys[half], axis) for half, axis in (("down", 1), ("up", 0)))
        side, other = WIDTHS.get(pattern, ("in", ""))
        hidden, rest = (inputs, outputs) if side == "in" else (outputs, inputs)
        size.setdefault("hidden", hidden)
        if other == "3D + M" and entry.part in ("all", "mlp"):
            size.setdefault("M", rest - 3 * hidden if entry.part == "all" else rest)
        elif other == "D + M":
            size.setdefault("M", rest - hidden)
        elif other != "3D + M":
            size.setdefault(other, rest)
    if "hidden" not in size:
        raise ValueError(f"{file.path} has biases only, which do not tell the model's widths; name it with --model")
    hidden = size["hidden"]
    mlp = size.get("M", 4 * hidden)
    if not all(0 < width <= 2**20 for width in (mlp, *size.values())):
        raise ValueError(f"{file.path} has shapes that no FLUX.1 can have (width {hidden}, MLP {mlp})")
    text = size.get("vec", 768), size.get("context", 4096)
    return FluxConfig(64, 64, *text, hidden, mlp, 1, *depth.values(), axes_dim=(hidden,), guidance_embed=True)


def _width(file: LoraFile, key: str, axis: int) -> int:
    """One side of a matrix. Errors: ValueError if the tensor is none"""
    if len(shape := file.tensors[key].shape) != 2:
        raise ValueError(f"{file.path} has {key} of shape {shape}; a LoRA's halves have two dimensions")
    return shape[axis]


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return the exit status: 0 done, 2 a mistake (one line on stderr), 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    return guard(lambda: run(argv))


def run(argv: list[str]) -> None:
    """Convert one file and print a line about it."""
    files = [text for text in argv[:2] if text and not text.startswith("-")]
    if len(files) < 2 and not {"-h", "--help"} & {*argv}:
        raise ValueError("name two files before the flags: the LoRA to read and the one to write")
    config = parse(ConvertConfig, argv[len(files) :], __doc__, "python -m iclora.convert IN OUT")
    print(plain(convert(*files, config)))


if __name__ == "__main__":
    sys.exit(main())
