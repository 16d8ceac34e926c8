"""Stage 3: T5, taught on captions alone to tell every token what the panel it belongs to shows, then frozen.

FLUX gives text tokens no positions and never trains its T5, so all that a marker means must already be in T5's
features. A linear layer on every token reads the number of its panel, the panel's scene, each subject's traits
and place, and the token itself; tokens before the first marker and behind the end read the cast alone.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from .captions import joint_caption, reticent
from .sets import GRIDS, MARKERS
from .tokenizers import T5_LENGTH
from .training import Stage, Work, run
from .world import ACCESSORIES, COLOURS, PATTERNS, POSITIONS, SCENES, SHAPES, SIZES, Panel, random_set

WIDTH = 128
SLOTS = 4  # subjects of a panel
TRAITS = {
    "shape": tuple(SHAPES), "colour": tuple(COLOURS), "pattern": PATTERNS, "accessory": ACCESSORIES,
    "position": POSITIONS, "size": SIZES,
}  # fmt: skip
CLASSES = [5, len(SCENES) + 1] + [len(values) + 1 for values in TRAITS.values()] * SLOTS  # 0 says nothing


def new_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Build a T5 1.1 encoder for a tokenizer, random but for a sense of order.

    From T5's own start, large embeddings and no preference among positions, it did not learn what follows what
    (docs/log.md). So embeddings start small against what attention adds, two heads look back (near and far)
    and one looks ahead.
    """
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=WIDTH, d_kv=32, d_ff=256, num_layers=4, num_heads=4,
            feed_forward_proj="gated-gelu", dropout_rate=0.0,
        )
    )  # fmt: skip
    bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # (32 buckets, 4 heads)
    distance = torch.arange(16.0)  # the first 16 buckets look back, the others ahead
    with torch.no_grad():
        t5.shared.weight.mul_(0.3)
        bias.zero_()
        for head, (slope, past) in enumerate(((0.5, True), (0.1, True), (0.5, False))):
            bias[:, head] = -8.0
            bias[:16, head] = -slope * distance if past else -8.0
            bias[16:, head] = -8.0 if past else -slope * distance
    return t5


def facts(panel: Panel, number: int) -> list[int]:
    """What a token of one panel should tell: a class for each entry of CLASSES.

    number: of the panel, from 1; 0 leaves out all but the cast
    """
    told = [number, 1 + tuple(SCENES).index(panel.scene) if number else 0]
    for one in panel.placed:
        traits = {"position": one.position, "size": one.size, **vars(one.subject)}
        for trait, values in TRAITS.items():
            placed = trait in ("position", "size")
            told.append(1 + values.index(traits[trait]) if traits[trait] and (number or not placed) else 0)
    return told + [0] * (len(CLASSES) - len(told))


def draw_captions(count: int, seed: int, held_out: bool | None = False) -> tuple[list[str], Tensor]:
    """Write captions of random sets of every grid, with the facts of their tokens.

    Returns the captions, and (count, 5, facts): of the tokens before the first marker, after it, after the second...
    """
    rng = np.random.default_rng([seed, 5])
    grids, kinds = list(GRIDS), [kind for kind, _ in MARKERS]
    often, chosen = np.array([0.15, 0.12, 0.12, 0.46, 0.15]), np.array([weight for _, weight in MARKERS])
    captions, told = [], []
    for _ in range(count):
        rows, cols = grids[int(rng.choice(len(grids), p=often))]
        chances = GRIDS[rows, cols][1]
        panels = random_set(rng, rows, cols, 1 + int(rng.choice(len(chances), p=chances)), held_out)
        panels = reticent(panels, rng)
        captions.append(joint_caption(panels, rows, cols, rng, str(rng.choice(kinds, p=chosen))))
        one = len(panels) == 1  # a single panel has no marker
        rows_of_facts = [facts(panels[0], int(one))] + [facts(panel, i) for i, panel in enumerate(panels, 1)]
        told.append(rows_of_facts + [rows_of_facts[0]] * (5 - len(rows_of_facts)))
    return captions, torch.tensor(told)


def panel_of(ids: Tensor, tokenizer: T5Tokenizer) -> Tensor:
    """The number of the panel that each token belongs to: ids (N, T) to (N, T), 0 outside panels."""
    markers = torch.tensor([i for piece, i in tokenizer.get_vocab().items() if piece.startswith("[")])
    inside = ids > 2  # neither padding nor the end
    return torch.isin(ids, markers).long().cumsum(dim=1).clamp(max=4) * inside


def wrong_facts(logits: Tensor, told: Tensor) -> Tensor:
    """The mean cross-entropy of every fact: (facts,).

    logits: (B, L, classes) for any tokens, told: (B, L, facts)
    """
    parts = logits.split(CLASSES, dim=-1)
    return torch.stack([F.cross_entropy(p.flatten(0, 1), told[..., i].flatten()) for i, p in enumerate(parts)])


def losses(t5: T5EncoderModel, head: nn.Module, ids: Tensor, told: Tensor) -> dict[str, Tensor]:
    """Mean cross-entropy of every fact and of the tokens themselves.

    ids: (B, T), told: (B, T, facts)
    """
    logits = head(t5(input_ids=ids).last_hidden_state)
    logits, words = logits.split([sum(CLASSES), logits.shape[-1] - sum(CLASSES)], dim=-1)
    loss = wrong_facts(logits, told)
    scene = (logits.split(CLASSES, dim=-1)[1].argmax(dim=-1) == told[..., 1]).float().mean()
    return {
        "loss": loss.sum() / SLOTS + 0.3 * F.cross_entropy(words.flatten(0, 1), ids.flatten()),
        "panel": loss[0].detach(),
        "scene right": scene,
        "colour": loss[3].detach(),
    }


def is_hidden(name: str, p: Tensor) -> bool:
    return p.ndim == 2 and ".block." in name and "relative_attention_bias" not in name


def train(stage: Stage, tokenizer: T5Tokenizer, work: Work, count: int = 30_000) -> T5EncoderModel:
    """Train T5 with its reading layer; gives the averaged T5 on the CPU.

    count: captions written for it
    """
    torch.manual_seed(work.seed)
    t5 = new_t5(tokenizer)
    captions, told = draw_captions(count, work.seed)
    ids = torch.tensor(tokenizer(captions, padding="max_length", truncation=True, max_length=T5_LENGTH).input_ids)
    panel = panel_of(ids, tokenizer)
    module = nn.ModuleDict({"t5": t5, "head": nn.Linear(WIDTH, sum(CLASSES) + len(tokenizer))}).to(work.device)

    def loss_at(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(ids), (stage.batch,), generator=generator)
        rows = torch.arange(stage.batch)[:, None]
        of_token = told[chosen][rows, panel[chosen]]  # (B, T, facts)
        return losses(module["t5"], module["head"], ids[chosen].to(work.device), of_token.to(work.device))

    return run(stage, module, loss_at, work, is_hidden)["t5"].cpu()
