"""Stages 3 and 4: the transformer; first T5 learns along with it, then T5 is frozen and its features are kept."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from model.autoencoder import AutoEncoder
from model.checkpoint import save_safetensors
from model.flux import Flux, FluxConfig
from model.position import grid_ids
from sampling.flow import interpolate
from sampling.latents import pack

from .training import Stage, Work, run

CONFIG = FluxConfig(
    in_channels=64, out_channels=64, vec_in_dim=128, context_in_dim=128, hidden_size=128, mlp_hidden=512, num_heads=4,
    depth=2, depth_single_blocks=6, axes_dim=(4, 14, 14), guidance_embed=True,
)  # fmt: skip
DROPPED = 0.05  # share of the captions replaced by the empty one
GUIDANCE = (1.0, 5.0)  # drawn uniformly, so that every value is in distribution and changes nothing yet


def new_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Build a T5 1.1 encoder for a tokenizer, random but for a sense of order.

    FLUX gives text tokens no positions: only T5 can tell which marker a word follows, and from T5's own start,
    large embeddings and no preference among positions, it had not learned to after 2,450 steps. So embeddings
    start small against what attention adds, two heads look back (near and far) and one looks ahead.
    """
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=CONFIG.context_in_dim, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
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


def new_flux(config: FluxConfig = CONFIG) -> Flux:
    """Build a transformer with random weights whose blocks start as the identity, as DiT's do."""
    flux = Flux(config)
    for name, p in flux.named_parameters():
        if ".lin." in name or "_mod." in name or "adaLN" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(p)
    return flux


def is_hidden(name: str, p: Tensor) -> bool:
    """Tell the matrices inside the blocks of both networks, which Muon trains, from the rest."""
    others = ("mod", "relative_attention_bias")
    return p.ndim == 2 and ("_blocks." in name or ".block." in name) and not any(other in name for other in others)


class Data:
    """Latents and encoded captions of every grid, ready for training.

    latents: by grid, (N, 16, h, w) float16
    ids: by grid, T5 ids (N, phrasings, T)
    vec: by grid, CLIP vectors (N, phrasings, V)
    features: by grid, T5 features (N, phrasings, T, C) bfloat16, once T5 is frozen
    """

    def __init__(self, latents: dict, captions: dict, t5_tokenizer, clip_tokenizer, clip: nn.Module, length: int):
        self.latents, self.grids = latents, list(latents)
        everything = {**captions, "empty": [[""]]}
        pad = dict(padding="max_length", truncation=True)
        self.ids = {
            grid: torch.tensor([t5_tokenizer(group, max_length=length, **pad).input_ids for group in groups])
            for grid, groups in everything.items()
        }
        clip_ids = {
            grid: torch.tensor([clip_tokenizer(group, **pad).input_ids for group in groups])
            for grid, groups in everything.items()
        }
        self.vec = encode_text(lambda ids: clip(input_ids=ids).pooler_output, clip_ids, clip)
        self.features: dict | None = None

    def freeze_text(self, t5: T5EncoderModel) -> None:
        self.features = encode_text(lambda ids: t5(input_ids=ids).last_hidden_state.bfloat16(), self.ids, t5)


@torch.no_grad()
def encode_text(encode: Callable[[Tensor], Tensor], ids: dict, module: nn.Module, batch: int = 256) -> dict:
    """Run an encoder over all captions: ids (N, phrasings, T) by grid to (N, phrasings, ...) by grid, on the CPU."""
    device = next(module.parameters()).device
    return {
        grid: torch.cat([encode(part.to(device)).cpu() for part in of_grid.flatten(0, 1).split(batch)]).unflatten(
            0, of_grid.shape[:2]
        )
        for grid, of_grid in ids.items()
    }


@torch.no_grad()
def prepare_latents(autoencoder: AutoEncoder, pictures: dict, work: Work, batch: int = 16) -> dict:
    """Encode the pictures of every grid, or load them if this autoencoder has encoded that many before.

    pictures: by grid, (N, 3, h, w) uint8
    Returns by grid (N, 16, h/8, w/8) float16
    """
    weights = b"".join(p.numpy().tobytes() for p in autoencoder.parameters())
    mark = hashlib.sha256(weights + str(work.seed).encode()).hexdigest()
    latents = {}
    for (rows, cols), of_grid in pictures.items():
        path = work.folder / f"latents-{rows}x{cols}.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                if file.metadata().get("autoencoder") == mark and len(file.get_slice("z")[:, 0, 0, 0]) == len(of_grid):
                    latents[rows, cols] = file.get_tensor("z")
                    continue
        parts = [autoencoder.encode(part.float() / 127.5 - 1).half() for part in of_grid.split(batch)]
        latents[rows, cols] = torch.cat(parts)
        save_safetensors({"z": latents[rows, cols]}, path, {"autoencoder": mark})
    return latents


def flow_loss(flux: Flux, z: Tensor, txt: Tensor, vec: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity at logit-normal times.

    z: (B, 16, h, w) latents
    txt: (B, T, C), vec: (B, V)
    Source: arXiv:2403.03206 (logit-normal times)
    """
    data = pack(z)  # (B, I, 64)
    noise = torch.randn(data.shape, generator=generator).to(z)
    t = torch.sigmoid(torch.randn(len(z), generator=generator)).to(z)
    guidance = torch.empty(len(z)).uniform_(*GUIDANCE, generator=generator).to(z)
    ids = grid_ids(z.shape[2] // 2, z.shape[3] // 2).to(z).expand(len(z), -1, -1)
    txt_ids = ids.new_zeros(len(z), txt.shape[1], 3)
    v = flux(interpolate(data, noise, t[:, None, None]), ids, txt, txt_ids, t, vec, guidance)
    return (v - (noise - data)).square().mean()


def train(
    stage: Stage, flux: Flux, t5: T5EncoderModel, data: Data, weights: dict, work: Work, joint: bool
) -> tuple[Flux, T5EncoderModel]:
    """Train the transformer, with T5 (joint) or on its kept features; gives the averaged weights.

    weights: by grid, how often it is drawn
    """
    flux, t5 = flux.to(work.device), t5.to(work.device)
    if not joint and data.features is None:
        data.freeze_text(t5)
    chances = torch.tensor([weights[grid] for grid in data.grids])

    def loss_at(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        grid = data.grids[int(torch.multinomial(chances, 1, generator=generator))]
        z, vec = data.latents[grid], data.vec[grid]
        count = batch_size(stage.batch, z, data.ids[grid].shape[-1])
        chosen = torch.randint(len(z), (count,), generator=generator)
        phrasing = torch.randint(vec.shape[1], (count,), generator=generator)
        dropped = torch.rand(count, generator=generator) < DROPPED
        vec = data.vec["empty"][0].where(dropped[:, None], vec[chosen, phrasing])
        if joint:
            ids = data.ids["empty"][0].where(dropped[:, None], data.ids[grid][chosen, phrasing])
            txt = t5(input_ids=ids.to(work.device)).last_hidden_state
        else:
            txt = data.features[grid][chosen, phrasing]
            txt = data.features["empty"][0].where(dropped[:, None, None], txt).float().to(work.device)
        loss = flow_loss(flux, z[chosen].float().to(work.device), txt, vec.to(work.device), generator)
        losses = {"loss": loss}
        if grid == (2, 2):
            losses["2x2"] = loss.detach()
        return losses

    module = nn.ModuleDict({"flux": flux, "t5": t5} if joint else {"flux": flux})
    average = run(stage, module, loss_at, replace(work, seed=work.seed + joint), is_hidden)
    return average["flux"], average["t5"] if joint else t5


def batch_size(base: int, z: Tensor, text: int) -> int:
    """Sets in a batch of this grid, so that every batch has about the tokens of `base` 2x2 sets."""
    tokens = z.shape[2] * z.shape[3] // 4
    return round(base * (64 + text) / (tokens + text))
