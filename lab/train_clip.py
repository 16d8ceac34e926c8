"""Stage 2: CLIP's text and vision towers, trained against each other on pictures and captions, then frozen."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from .sets import load_sets
from .tokenizers import token_ids
from .training import Stage, Work, finished, run, step_generator

WIDTH = 128
ALONE = 0.75  # share of the batches that show single panels; the others share out the rest
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


def train(stage: Stage, captions: dict, tokenizer: CLIPTokenizer, work: Work) -> CLIPModel:
    """Train with the symmetric contrastive loss on the sets in the work's folder; gives averaged weights on the CPU.

    captions: by grid, of its first N sets equally many phrasings
    Source: arXiv:2103.00020
    """
    torch.manual_seed(work.seed)
    model = new_clip(tokenizer).to(work.device)
    grids = [] if finished(stage, work) else list(captions)
    pictures = [load_sets(work.folder, grid, len(captions[grid])).to(work.device) for grid in grids]
    phrasings = [[caption for group in captions[grid] for caption in group] for grid in grids]
    ids = [
        token_ids(tokenizer, every).unflatten(0, (len(of_grid), -1)).to(work.device)
        for every, of_grid in zip(phrasings, pictures, strict=True)
    ]  # each (N, phrasings, 77)
    chances = torch.tensor([ALONE if grid == (1, 1) else (1 - ALONE) / max(1, len(grids) - 1) for grid in grids])

    def loss_at(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        grid = int(torch.multinomial(chances, 1, generator=step_generator(work.seed + 1, step)))
        random = {"generator": generator, "device": work.device}
        chosen = torch.randint(len(pictures[grid]), (stage.batch,), **random)
        phrasing = torch.randint(ids[grid].shape[1], (stage.batch,), **random)
        image = F.interpolate(pictures[grid][chosen].float() / 127.5 - 1, size=(SIDE, SIDE), mode="area")
        logits = model(input_ids=ids[grid][chosen, phrasing], pixel_values=image).logits_per_text
        target = torch.arange(stage.batch, device=work.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"loss": loss, "matched": (logits.argmax(dim=1) == target).float().mean()}

    return run(stage, model, loss_at, work).cpu()
