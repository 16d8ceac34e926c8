"""What looks at pictures for scores: DINO, DINOv2 and CLIP through transformers, from local folders.

Letters: N pictures or texts, D width of features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer, Dinov2Model, ViTModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # that of 5.17 itself wants torchvision
from transformers.utils import logging

from model.checkpoint import file_sha256, read_header, read_json
from model.text import load_tokenizer

DINO, CLIP = {"vit": ViTModel, "dinov2": Dinov2Model}, {"clip": CLIPModel}  # by model_type
SHAPE = ("hidden_size", "num_hidden_layers", "patch_size")
PREPROCESSING = ("size", "resample", "do_center_crop", "crop_size", "image_mean", "image_std")
UNO = {  # how UNO's script shows pictures to DINO; the folder facebook/dino-vits16 itself says 224x224, bilinear, uncut
    "size": {"shortest_edge": 256},
    "resample": 3,  # bicubic
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}
BATCH = 64


def damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"{folder} does not load ({' '.join(str(error).split())[:160]}); download it again")


def load_network(kind: type, folder: Path, device: str, **options: Any) -> nn.Module:
    """Load a network from a folder in float32; transformers only reports what is missing: here that is an error.

    Errors: ValueError in one line
    """
    path = folder / "model.safetensors"
    if not path.is_file() or not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no folder of a {kind.__name__} with config.json and {path.name}; name another")
    read_header(path)  # refuses a damaged file by name
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options |= {"local_files_only": True, "use_safetensors": True, "output_loading_info": True, "dtype": torch.float32}
    try:
        network, report = kind.from_pretrained(folder, **options)
    except Exception as error:  # of many kinds, for settings and shapes that do not fit
        raise damaged(folder, error) from None
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{path} lacks {', '.join(missing[:3])} ({len(missing)} tensors); download it again")
    return network.requires_grad_(False).eval().to(device)


class Backbone:
    """A network that turns pictures, and CLIP also texts, into features of length 1.

    about: model_type, shape, preprocessing and sha256
    """

    def __init__(self, folder: Path, kinds: dict[str, type], device: str, preprocessing: dict[str, Any] | None = None):
        """Load a folder in transformers' form.

        kinds: DINO or CLIP
        preprocessing: in place of what the folder's preprocessor_config.json says
        Errors: ValueError in one line
        """
        path, config = folder / "model.safetensors", read_json(folder / "config.json")
        if (kind := config.get("model_type")) not in kinds:
            raise ValueError(
                f"{folder} holds a model of type {kind!r:.40}, not {' or '.join(kinds)}; give another folder"
            )
        options = {"add_pooling_layer": False} if kind == "vit" else {}
        self.network = load_network(kinds[kind], folder, device, **options)
        try:
            read_json(folder / "preprocessor_config.json")
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        except Exception as error:  # of many kinds, for settings that do not fit
            raise damaged(folder, error) from None
        self.device, self.preprocessing = device, preprocessing or {}
        shape = getattr(self.network.config, "vision_config", self.network.config)
        settings = self.processor.to_dict() | self.preprocessing
        self.about = {"model": kind, **{name: getattr(shape, name) for name in SHAPE}}
        self.about |= {name: settings.get(name) for name in PREPROCESSING} | {"sha256": file_sha256(path)}
        if kind == "clip":
            own = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
            self.tokenizer = load_tokenizer(CLIPTokenizer, folder if own else folder.parent / "tokenizer")

    @torch.inference_mode()
    def see(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return features of pictures: CLIP's in the space of texts, DINO's class token: (N, D)."""
        features = []
        for first in range(0, len(pictures), BATCH):
            batch = self.processor(pictures[first : first + BATCH], return_tensors="pt", **self.preprocessing)
            image = batch.pixel_values.to(self.device)  # (N, 3, h, w)
            if isinstance(self.network, CLIPModel):
                hidden = self.network.vision_model(pixel_values=image).pooler_output
                features.append(self.network.visual_projection(hidden))
            else:
                features.append(self.network(pixel_values=image).last_hidden_state[:, 0])
        return F.normalize(torch.cat(features), dim=-1).cpu()

    @torch.inference_mode()
    def read(self, texts: Sequence[str]) -> Tensor:
        """Return CLIP's features of texts, as many tokens as it takes: (N, D)."""
        ids = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").input_ids
        hidden = self.network.text_model(input_ids=ids.to(self.device)).pooler_output
        return F.normalize(self.network.text_projection(hidden), dim=-1).cpu()

    def describe(self) -> str:
        """Say in one line which network this is, and how it gets its pictures."""
        about, name = self.about, "{model}, {hidden_size} wide, {num_hidden_layers} layers, patches of {patch_size}"
        edge, (high, wide) = about["size"].get("shortest_edge"), map(about["size"].get, ("height", "width"))
        size = f"the shorter side {edge}" if edge else f"{wide}x{high}"
        centre = " and cut to {width}x{height}".format(**about["crop_size"]) if about["do_center_crop"] else ""
        how = f"{size} ({Image.Resampling(about['resample']).name.lower()}){centre}"
        mean, std = ("{:.3f} {:.3f} {:.3f}".format(*about[name]) for name in ("image_mean", "image_std"))
        mark = about["sha256"] or "not taken"
        return f"{name.format(**about)}; pictures resized to {how}, mean {mean}, deviation {std}; sha256 {mark}"
