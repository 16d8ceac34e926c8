"""Stage 3: T5, taught on captions alone to tell every token what the panel it belongs to shows, then frozen.

FLUX gives text tokens no positions and never trains its T5, so all that a marker means must already be in T5's
features. A linear layer on every token reads the number of its panel, the panel's scene, each subject's traits
and place, and the token itself; tokens before the first marker and behind the end read the cast alone.
"""

import multiprocessing

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from .captions import joint_caption, reticent
from .sets import GRIDS, MARKERS, choose_domain
from .tokenizers import token_ids
from .training import Stage, Work, finished, run
from .world import ACCESSORIES, COLOURS, PATTERNS, POSITIONS, SCENES, SHAPES, SIZES, Panel, random_set

WIDTH = 128
CAPTIONS = 200_000  # at the most
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


def draw_captions(job: tuple[int, int, int]) -> tuple[list[str], Tensor]:
    """Write captions of random sets of every grid, with the facts of their tokens; the job is (count, seed, number).

    Returns the captions, and (count, 5, facts): of the tokens before the first marker, after it, after the second...
    """
    count, *seeds = job
    rng = np.random.default_rng([*seeds, 5])
    grids, kinds = list(GRIDS), [kind for kind, _ in MARKERS]
    often, chosen = np.array([0.15, 0.12, 0.12, 0.46, 0.15]), np.array([weight for _, weight in MARKERS])
    captions, told = [], []
    for _ in range(count):
        rows, cols = grids[int(rng.choice(len(grids), p=often))]
        chances = GRIDS[rows, cols][1]
        panels = random_set(rng, rows, cols, 1 + int(rng.choice(len(chances), p=chances)))
        panels = reticent(panels, rng)
        caption = joint_caption(panels, rows, cols, rng, str(rng.choice(kinds, p=chosen)))
        captions += choose_domain([caption], len(panels), rng)[1]
        one = len(panels) == 1  # a single panel has no marker
        rows_of_facts = [facts(panels[0], int(one))] + [facts(panel, i) for i, panel in enumerate(panels, 1)]
        told.append(rows_of_facts + [rows_of_facts[0]] * (5 - len(rows_of_facts)))
    return captions, torch.tensor(told)


def draw_many(count: int, seed: int, processes: int) -> tuple[list[str], Tensor]:
    """Write about `count` captions with their facts, in several processes; as draw_captions."""
    part = min(count, 1000)
    jobs = [(part, seed, number) for number in range(count // part)]
    if processes == 1 or len(jobs) == 1:
        parts = [draw_captions(job) for job in jobs]
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            parts = list(pool.imap(draw_captions, jobs))
    return [caption for captions, _ in parts for caption in captions], torch.cat([told for _, told in parts])


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


def train(stage: Stage, tokenizer: T5Tokenizer, work: Work, processes: int = 1) -> T5EncoderModel:
    """Train T5 with its reading layer; gives the averaged T5 on the CPU.

    processes: that write captions
    """
    torch.manual_seed(work.seed)
    module = nn.ModuleDict({"t5": new_t5(tokenizer), "head": nn.Linear(WIDTH, sum(CLASSES) + len(tokenizer))})
    count = 1 if finished(stage, work) else min(CAPTIONS, stage.steps * stage.batch)
    captions, told = draw_many(count, work.seed, processes)
    ids = token_ids(tokenizer, captions)
    panel = panel_of(ids, tokenizer).to(work.device)
    ids, told, module = ids.to(work.device), told.to(work.device), module.to(work.device)
    rows = torch.arange(stage.batch, device=work.device)[:, None]

    def loss_at(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(ids), (stage.batch,), generator=generator, device=work.device)
        of_token = told[chosen][rows, panel[chosen]]  # (B, T, facts)
        return losses(module["t5"], module["head"], ids[chosen], of_token)

    return run(stage, module, loss_at, work, is_hidden)["t5"].cpu()
