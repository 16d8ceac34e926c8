"""Write trained networks as a model folder in the layout of the FLUX.1-dev hub repository, in bfloat16.

python -m lab.export draws the bundled reference pictures again, which need no network.
"""

import argparse
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from model.autoencoder import AutoEncoder
from model.checkpoint import save_safetensors, write_atomic
from model.flux import Flux

from . import entry
from .captions import joint_caption
from .world import Panel, Placed, Subject, draw, random_set

EXAMPLES = {(1, 2): 11, (2, 1): 22, (2, 2): 33, (3, 1): 44}  # grid -> seed
EXAMPLE_SIDE = 256  # pixels; fitted to the panel size of any model
REFERENCES = {  # subjects that training never shows, each in a scene of its own
    "cat": ("bedroom", Subject("cat", "purple", "striped", "hat", 0.4, 45.0, 1.0, 2)),
    "mushroom": ("meadow", Subject("mushroom", "blue", "checked", "none", -0.5, 45.0, 0.0, 0)),
    "robot": ("city", Subject("robot", "yellow", "checked", "scarf", 0.0, 0.0, 1.0, 3)),
}


def bfloat16(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().to(torch.bfloat16) for name, p in module.state_dict().items()}


def write_model(
    folder: Path, flux: Flux, autoencoder: AutoEncoder, clip: nn.Module, t5: T5EncoderModel, clip_tokenizer: Path,
    t5_tokenizer: Path,
) -> None:  # fmt: skip
    """Write every file of the model, and the example sets.

    clip: CLIP's text tower
    clip_tokenizer, t5_tokenizer: folders to copy
    """
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    save_safetensors(bfloat16(flux), folder / "flux1-tiny.safetensors")
    save_safetensors(bfloat16(autoencoder), folder / "ae.safetensors")
    text = {"text_model." + name.removeprefix("text_model."): p for name, p in bfloat16(clip).items()}
    text = {name: p for name, p in text.items() if "position_ids" not in name}
    save_safetensors(text, folder / "text_encoder" / "model.safetensors")
    write_config(clip.config, "CLIPTextModel", folder / "text_encoder")
    kept = {name: p for name, p in bfloat16(t5).items() if name != "encoder.embed_tokens.weight"}
    save_safetensors(kept, folder / "text_encoder_2" / "model.safetensors")
    write_config(t5.config, "T5EncoderModel", folder / "text_encoder_2")
    for source, name in ((clip_tokenizer, "tokenizer"), (t5_tokenizer, "tokenizer_2")):
        for file in sorted(source.iterdir()):
            write_atomic(folder / name / file.name, file.read_bytes())
    write_examples(folder / "examples")
    write_references(folder / "examples" / "references")


def copy_judges(source: Path, folder: Path) -> None:
    """Copy the reader, CLIP and DINOv2 of a model, as far as it has them, to one with the same autoencoder."""
    for name in ("truth", "clip", "dinov2"):
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name, dirs_exist_ok=True)


def write_config(config, architecture: str, folder: Path) -> None:
    settings = {**config.to_diff_dict(), "architectures": [architecture], "dtype": "bfloat16"}
    settings.pop("transformers_version", None)
    write_atomic(folder / "config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")


def write_examples(folder: Path) -> None:
    """Draw one example set a grid, with its caption: <rows>x<cols>/1.png ... and caption.txt."""
    for (rows, cols), seed in EXAMPLES.items():
        panels = random_set(np.random.default_rng(seed), rows, cols, subjects=1, held_out=True)
        place = folder / f"{rows}x{cols}"
        place.mkdir(parents=True, exist_ok=True)
        for i, panel in enumerate(panels, 1):
            write_atomic(place / f"{i}.png", drawn(panel))
        write_atomic(place / "caption.txt", joint_caption(panels, rows, cols) + "\n")


def write_references(folder: Path) -> None:
    """Draw each reference picture: cat.png, mushroom.png, robot.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (scene, subject) in REFERENCES.items():
        write_atomic(folder / f"{name}.png", drawn(Panel(scene, (Placed(subject, "middle", "big"),), seed=1)))


def drawn(panel: Panel) -> bytes:
    """Draw a panel as the bytes of a PNG."""
    png = io.BytesIO()
    draw(panel, EXAMPLE_SIDE).save(png, "PNG", optimize=True)
    return png.getvalue()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.export", description="Draw the bundled reference pictures.")
    default = Path("weights/tiny/examples/references")
    parser.add_argument("--out", type=Path, default=default, help="folder that receives them")
    return entry.run(parser, lambda args: write_references(args.out), argv)


if __name__ == "__main__":
    sys.exit(main())
