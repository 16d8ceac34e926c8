"""Stage 2: CLIP's text and vision towers, trained against each other on pictures and captions, then frozen."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from .training import Stage, Work, run

WIDTH = 128
SIDE = 64  # pixels; larger composites are reduced to it


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Build both towers with random weights, for a tokenizer."""
    tower = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * WIDTH)
    text = dict(
        tower, vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = dict(tower, num_hidden_layers=3, image_size=SIDE, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def train(
    stage: Stage, pictures: list[Tensor], captions: list[list[list[str]]], tokenizer: CLIPTokenizer, work: Work
) -> CLIPModel:
    """Train with the symmetric contrastive loss; gives the averaged weights on the CPU.

    pictures: of each grid, (N, 3, h, w) uint8
    captions: of each grid, N lists of phrasings
    Source: arXiv:2103.00020
    """
    torch.manual_seed(work.seed)
    model = new_clip(tokenizer).to(work.device)
    ids = [
        torch.tensor([tokenizer(c, padding="max_length", truncation=True).input_ids for c in of_grid])
        for of_grid in captions
    ]  # each (N, phrasings, 77)

    def loss_at(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        grid = int(torch.randint(len(pictures), (1,), generator=generator))
        chosen = torch.randint(len(pictures[grid]), (stage.batch,), generator=generator)
        phrasing = torch.randint(ids[grid].shape[1], (stage.batch,), generator=generator)
        image = F.interpolate(pictures[grid][chosen].float() / 127.5 - 1, size=(SIDE, SIDE), mode="area")
        text = ids[grid][chosen, phrasing].to(work.device)
        logits = model(input_ids=text, pixel_values=image.to(work.device)).logits_per_text
        target = torch.arange(stage.batch, device=work.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"loss": loss, "matched": (logits.argmax(dim=1) == target).float().mean()}

    return run(stage, model, loss_at, work).cpu()
