"""What looks at pictures: DINOv2, CLIP as a judge and OWLv2 as a detector, through transformers from local folders."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPTokenizer, Owlv2ForObjectDetection

from model.checkpoint import fingerprint
from model.text import load_tokenizer
from sampling.images import GREY, to_tensor

from ..backbones import CLIP, DINO, Backbone, load_network
from ..judge import Verdict

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SURE = 0.2  # OWLv2's score from which a thing counts as found
Locator = Callable[[Image.Image, str], Box | None]  # finds what words name in a picture


def mark(folder: Path) -> str:
    """Name a model folder by its content, for the catalogue."""
    file = folder / "model.safetensors"
    return f"{folder.name} {fingerprint([file])[:8]}" if file.is_file() else folder.name


class Dino:
    """DINOv2: how alike two pictures are."""

    def __init__(self, folder: Path, device: str):
        self.dino = Backbone(folder, {"dinov2": DINO["dinov2"]}, device)

    def __call__(self, first: Image.Image, second: Image.Image) -> float:
        """Return the cosine of two pictures' class tokens."""
        features = self.dino.see([first, second])
        return float(features[0] @ features[1])


class ClipJudge:
    """CLIP as a judge that needs no endpoint: it reads every part in both pictures, and compares what it reads.

    parts: by name, the options of each: texts whose mean stands for one option
    """

    def __init__(self, folder: Path, parts: Mapping[str, Sequence[Sequence[str]]], device: str):
        self.clip = Backbone(folder, CLIP, device)
        if not parts:
            raise ValueError("the word lists have no parts for CLIP to read; add some, or give --judge an endpoint")
        self.parts = {
            name: F.normalize(torch.stack([self.clip.read(texts).mean(dim=0) for texts in options]), dim=-1)
            for name, options in parts.items()
        }

    @torch.inference_mode()
    def __call__(self, first: Image.Image, second: Image.Image) -> Verdict:
        """Score each part by how much the two readings of it overlap, as probabilities of its options: 0 to 4."""
        features = self.clip.network.logit_scale.exp().cpu() * self.clip.see([first, second])
        features = [(features @ options.T).softmax(dim=-1) for options in self.parts.values()]  # (2, options) each
        parts = {
            name: round(4 * float(p.prod(dim=0).sqrt().sum())) for name, p in zip(self.parts, features, strict=True)
        }
        return Verdict(parts, sum(parts.values()) / len(parts))


class Owl:
    """OWLv2: finds what words name."""

    def __init__(self, folder: Path, device: str):
        self.model = load_network(Owlv2ForObjectDetection, folder, device)
        self.tokenizer = load_tokenizer(CLIPTokenizer, folder)
        self.side = self.model.config.vision_config.image_size

    @torch.inference_mode()
    def __call__(self, picture: Image.Image, words: str) -> Box | None:
        """Return the box of what is most likely what the words name, if it is likely enough."""
        longest = max(picture.size)
        square = Image.new("RGB", (longest, longest), GREY)
        square.paste(picture)  # grey is added below or on the right, as OWLv2 knows it
        square = square.resize((self.side, self.side), Image.Resampling.BILINEAR)
        mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        image = (((to_tensor(square) + 1) / 2 - mean) / std).to(self.model.device)  # (1, 3, side, side)
        length = self.model.config.text_config.max_position_embeddings
        padded = {"padding": "max_length", "max_length": length, "truncation": True}
        text = self.tokenizer([f"a photo of a {words}"], **padded, return_tensors="pt").to(self.model.device)
        output = self.model(text.input_ids, image, text.attention_mask)
        scores = output.logits[0, :, 0].sigmoid()  # (boxes,)
        if scores.max() < SURE:
            return None
        x, y, width, height = (longest * output.pred_boxes[0, scores.argmax()]).tolist()
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
