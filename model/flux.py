"""The FLUX.1 transformer (MMDiT): two streams of tokens, text and image, that attend to each other.

Letters: B batch, T text tokens, I image tokens (target and references), R reference tokens among them, L = T + I,
N tokens that are wanted, D width, H heads, K head width, A position axes. Parameter names are those of the released
checkpoints, so loading is strict and needs no renaming. Small parts first, the whole model last.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import EVERY, Seen, SelfAttention, attention, joined
from .norms import QKNorm, modulated_norm
from .position import SINUSOID, rotary_angles, timestep_embedding


@dataclass(frozen=True)
class FluxConfig:
    """The shape of a FLUX.1 transformer; model.weights reads it off a checkpoint's tensors."""

    in_channels: int  # 64: 16 latent channels times a 2x2 patch
    out_channels: int
    vec_in_dim: int  # width of the pooled CLIP vector
    context_in_dim: int  # width of the T5 tokens
    hidden_size: int  # D
    mlp_hidden: int
    num_heads: int
    depth: int  # double blocks
    depth_single_blocks: int
    axes_dim: tuple[int, ...]  # rotary channels for index, row, column; they sum to K
    guidance_embed: bool  # dev has it, schnell does not
    theta: float = 10_000

    def __post_init__(self):
        if self.num_heads * sum(self.axes_dim) != self.hidden_size:
            raise ValueError(
                f"rotary axes {self.axes_dim} times {self.num_heads} heads do not make the width {self.hidden_size}"
            )


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """Shift, scale and gate for one (single block) or two (double block) branches, from the vector vec."""

    def __init__(self, hidden: int, branches: int):
        super().__init__()
        self.chunks = 3 * branches
        self.lin = nn.Linear(hidden, self.chunks * hidden)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.chunks, dim=-1)  # each (B, 1, D)


def mlp(hidden: int, mlp_hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, mlp_hidden), nn.GELU(approximate="tanh"), nn.Linear(mlp_hidden, hidden))


class DoubleStreamBlock(nn.Module):
    """Text and image have their own weights and meet in one attention."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        hidden, heads = config.hidden_size, config.num_heads
        self.img_mod = Modulation(hidden, branches=2)
        self.img_attn = SelfAttention(hidden, heads)
        self.img_mlp = mlp(hidden, config.mlp_hidden)
        self.txt_mod = Modulation(hidden, branches=2)
        self.txt_attn = SelfAttention(hidden, heads)
        self.txt_mlp = mlp(hidden, config.mlp_hidden)

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, mask: Tensor | None = None,
        besides: Seen | None = None,
    ) -> tuple[Tensor, Tensor, Seen]:  # fmt: skip
        """Let both streams exchange and think.

        img: (B, I, D), txt: (B, T, D)
        vec: (B, D) conditioning
        pe: from rotary_angles, text first
        mask, besides: as for attention
        Returns (B, I, D) and (B, T, D), and what others may see of these tokens
        """
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        # each stream makes its queries, keys and values; one attention goes over both, text first
        q, k, v = joined(  # (B, H, L, K)
            self.txt_attn.qkv_heads(modulated_norm(txt, txt_shift1, txt_scale1)),
            self.img_attn.qkv_heads(modulated_norm(img, img_shift1, img_scale1)),
        )
        out, seen = attention(q, k, v, pe, mask, besides=besides)
        txt_out, img_out = out.split((txt.shape[1], img.shape[1]), dim=1)

        # back into the image stream
        img = torch.addcmul(img, img_gate1, self.img_attn.proj(img_out))
        img = torch.addcmul(img, img_gate2, self.img_mlp(modulated_norm(img, img_shift2, img_scale2)))

        # and into the text stream
        txt = torch.addcmul(txt, txt_gate1, self.txt_attn.proj(txt_out))
        txt = torch.addcmul(txt, txt_gate2, self.txt_mlp(modulated_norm(txt, txt_shift2, txt_scale2)))
        return img, txt, seen


class SingleStreamBlock(nn.Module):
    """Text and image as one sequence; attention and MLP run side by side between two fused Linears."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        hidden = config.hidden_size
        self.heads = config.num_heads
        self.widths = (3 * hidden, config.mlp_hidden)
        self.modulation = Modulation(hidden, branches=1)
        self.linear1 = nn.Linear(hidden, sum(self.widths))  # q, k, v and the MLP's input
        self.linear2 = nn.Linear(hidden + config.mlp_hidden, hidden)  # attention's output and the MLP's
        self.norm = QKNorm(hidden // self.heads)

    def forward(
        self, x: Tensor, vec: Tensor, pe: Tensor, mask: Tensor | None = None, rows: slice = EVERY,
        besides: Seen | None = None, keep: bool = False,
    ) -> tuple[Tensor, Seen | None]:  # fmt: skip
        """Attend and think side by side.

        x: (B, L, D) text, then image
        vec: (B, D) conditioning
        pe: from rotary_angles
        mask, besides: as for attention
        rows: the tokens that are wanted; of the others only keys and values count
        keep: whether others will see these tokens
        Returns (B, N, D), one row per token wanted, and what others may see of all tokens, or None
        """
        shift, scale, gate = self.modulation(vec)
        qkv, up = self.linear1(modulated_norm(x, shift, scale)).split(self.widths, dim=-1)
        q, k, v = rearrange(qkv, "B L (three H K) -> three B H L K", three=3, H=self.heads)
        attended, seen = attention(self.norm.query_norm(q), self.norm.key_norm(k), v, pe, mask, rows, besides)
        seen = seen if keep else None
        thought = F.gelu(up[:, rows], approximate="tanh")
        del qkv, up, q, k, v  # parts of what linear1 made, half of all that a block holds
        return torch.addcmul(x[:, rows], gate, self.linear2(torch.cat((attended, thought), dim=-1))), seen


class LastLayer(nn.Module):
    def __init__(self, hidden: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))


@dataclass(frozen=True)
class Fixed:
    """What all steps of a run share; Flux.prepare computes it once."""

    txt: Tensor  # (B, T, D)
    references: Tensor  # (B, R, D), those that go through every step
    pe: Tensor  # (B, 1, L, K/2, 2) of text, target and such references
    mask: Tensor | None  # (L, L), or (T + I, L) if references are alone
    alone: list[Seen | None]  # what every block sees of references that do not


class Flux(nn.Module):
    """FLUX.1: noisy latent tokens, text and time in; velocity (noise - data) out.

    exact_conditioning: multiply time and guidance by 1000 in float32 instead of the model's dtype; the two
        differ in bfloat16 only (see timestep_embedding)
    Source: black-forest-labs/flux@802fb47 model.py, modules/layers.py
    """

    def __init__(self, config: FluxConfig, exact_conditioning: bool = False):
        super().__init__()
        self.config = config
        self.exact_conditioning = exact_conditioning
        hidden = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, hidden)
        self.time_in = MLPEmbedder(SINUSOID, hidden)
        self.vector_in = MLPEmbedder(config.vec_in_dim, hidden)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(SINUSOID, hidden)
        self.txt_in = nn.Linear(config.context_in_dim, hidden)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = LastLayer(hidden, config.out_channels)

    def conditioning(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Tensor:
        """Sum the embeddings of time, guidance and pooled text into the vector that modulates every block.

        timesteps: (B,) in 0..1
        y: (B, V) pooled text
        guidance: (B,) raw scale such as 3.5; None for models without it
        Returns vec: (B, D)
        Errors: ValueError if a model with guidance gets none
        """
        dtype, exact = self.img_in.weight.dtype, self.exact_conditioning

        def sinusoid(t: Tensor) -> Tensor:
            return timestep_embedding(t if exact else t.to(dtype), exact).to(dtype)

        vec = self.time_in(sinusoid(timesteps))
        if self.config.guidance_embed:
            if guidance is None:
                raise ValueError("this model embeds guidance; pass guidance, e.g. 3.5 for every sample")
            vec = vec + self.guidance_in(sinusoid(guidance))
        return vec + self.vector_in(y.to(dtype))

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor,
        guidance: Tensor | None = None, mask: Tensor | None = None, references: Tensor | None = None,
        alone: bool = False,
    ) -> Tensor:  # fmt: skip
        """Predict the velocity of every token in img.

        img: (B, N, 64) packed latent tokens; references, if any, stand after the target here, or below
        img_ids: (B, I, 3) float32 positions, those of references last
        txt: (B, T, C) T5 tokens
        txt_ids: (B, T, 3) zeros
        timesteps: (B,) 1 is noise, 0 is data
        y: (B, V) pooled CLIP text
        guidance: (B,) raw scale; ignored by models without it
        mask: (L, L) True where the token of the row sees that of the column, text first; None is everywhere
        references: (B, R, 64) packed clean latent tokens that are seen and not predicted
        alone: whether references see references only, at time 0
        Returns (B, N, 64), one row per token of img
        """
        vec = self.conditioning(timesteps, y, guidance)  # (B, D)
        return self.predict(img, self.prepare(img_ids, txt, txt_ids, references, mask, alone), vec)

    def prepare(
        self, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, references: Tensor | None = None,
        mask: Tensor | None = None, alone: bool = False,
    ) -> Fixed:  # fmt: skip
        """Compute what does not depend on time, to be used in every step.

        img_ids: (B, I, 3) float32 positions of the target, then of the references
        txt: (B, T, C) T5 tokens
        txt_ids: (B, T, 3) zeros
        references: (B, R, 64) packed clean latent tokens; None leaves everything to predict
        mask: (L, L) as for forward
        alone: as for forward; then all that is seen of references is computed here, and steps only append it
        """
        dtype, blocks = self.img_in.weight.dtype, len(self.double_blocks) + len(self.single_blocks)
        if references is None:
            references = txt.new_zeros(len(txt), 0, self.config.in_channels)
        pe = rotary_angles(torch.cat((txt_ids, img_ids), dim=1), self.config.axes_dim, self.config.theta)
        txt, references = self.txt_in(txt.to(dtype)), self.img_in(references.to(dtype))
        if not alone or not references.shape[1]:
            return Fixed(txt, references, pe, mask, [None] * blocks)
        own = pe.shape[2] - references.shape[1]  # T + I
        seen = self.pass_alone(references, pe[:, :, own:])
        mask = None if mask is None else mask[:own]
        return Fixed(txt, references[:, :0], pe[:, :, :own], mask, seen)

    def pass_alone(self, references: Tensor, pe: Tensor) -> list[Seen]:
        """Pass references through all blocks as a picture by itself: no text, time 0, guidance 1, pooled text 0.

        So what others see of them depends on no time, prompt or seed. They see each other, all of them.

        references: (B, R, D)
        Returns keys and values, for every block
        """
        zero = torch.zeros(len(references), 1, device=references.device)
        vec = self.conditioning(zero[:, 0], zero.expand(-1, self.config.vec_in_dim), zero[:, 0] + 1)  # (B, D)
        img, txt, every = references, references[:, :0], []
        for block in self.double_blocks:
            img, txt, seen = block(img, txt, vec, pe)
            every.append(seen)
        for number, block in enumerate(self.single_blocks, start=1):
            rows = EVERY if number < len(self.single_blocks) else slice(0)  # of the last one no result is read
            img, (k, v) = block(img, vec, pe, rows=rows, keep=True)
            every.append((k, v.clone()))  # v is a slice, which would keep all of its block's projection
        return every

    def predict(self, img: Tensor, fixed: Fixed, vec: Tensor) -> Tensor:
        """Predict the velocity of the target's tokens; what is fixed was computed before, and is not predicted.

        img: (B, N, 64) packed noisy latent tokens of the target
        vec: (B, D) from conditioning
        Returns (B, N, 64)
        """
        txt, pe, mask, alone = fixed.txt, fixed.pe, fixed.mask, iter(fixed.alone)  # txt (B, T, D)
        target = slice(txt.shape[1], txt.shape[1] + img.shape[1])
        img = torch.cat((self.img_in(img.to(self.img_in.weight.dtype)), fixed.references), dim=1)  # (B, I, D)

        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe, mask, next(alone))[:2]  # the rest is not held through the next block

        x = torch.cat((txt, img), dim=1)  # (B, L, D)
        for block in self.single_blocks[:-1]:
            x = block(x, vec, pe, mask, EVERY, next(alone))[0]
        for block in self.single_blocks[-1:]:  # of the last one, nothing but the target is read any more
            x = block(x, vec, pe, mask, target, next(alone))[0]  # (B, N, D)

        return self.final_layer(x, vec)  # (B, N, 64)
