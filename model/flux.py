"""The FLUX.1 transformer (MMDiT): two streams of tokens, text and image, that attend to each other.

Letters: B batch, T text tokens, I image tokens of the target, R reference tokens, N both, L tokens in all, D width,
H heads, K head width, C width of the T5 tokens, V width of the CLIP vector. Parameter names are those of the released
checkpoints, so loading is strict and needs no renaming. Small parts first, the whole model last.
torch.addcmul(x, gate, y) is x + gate * y in one pass over memory, a twelfth of a training step on a CPU.
Source: black-forest-labs/flux@802fb47 model.py, modules/layers.py, math.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .position import SINUSOID, rotary_angles, rotate, timestep_embedding

EPS = 1e-6  # of every LayerNorm and RMSNorm
KV = tuple[Tensor, Tensor]  # rotated keys and values, each (B, H, R, K): all that others see of a token
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # attention with everything bound but q, k, v


@dataclass(frozen=True)
class FluxConfig:
    """The shape of a FLUX.1 transformer; model.infer reads it off a checkpoint's tensors."""

    in_channels: int  # 64: 16 latent channels times a 2x2 patch
    out_channels: int
    vec_in_dim: int  # V
    context_in_dim: int  # C
    hidden_size: int  # D
    mlp_hidden: int
    num_heads: int  # H
    depth: int  # double blocks
    depth_single_blocks: int
    axes_dim: tuple[int, ...]  # rotary channels for index, row, column; they sum to K
    guidance_embed: bool  # dev has it, schnell does not
    theta: float = 10_000

    def __post_init__(self):
        if self.num_heads * sum(self.axes_dim) != self.hidden_size:
            axes = f"rotary axes {self.axes_dim} times {self.num_heads} heads"
            raise ValueError(f"{axes} do not make the width {self.hidden_size}")


def attention(
    q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None = None, ref_kv: KV | None = None
) -> Tensor:
    """Let every token attend to every token, with rotated queries and keys.

    q, k, v: (B, H, L, K)
    pe: (B, 1, L, K/2, 2) from rotary_angles
    mask: (L, L) True where the token of the row sees that of the column, references last; None is everywhere
    ref_kv: of references that are seen and see nothing here; their columns come last
    Returns (B, L, D)
    """
    q, k = rotate(q, pe), rotate(k, pe)
    if ref_kv is not None:
        k, v = torch.cat((k, ref_kv[0]), dim=2), torch.cat((v, ref_kv[1]), dim=2)  # (B, H, L + R, K)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(x, "B H L K -> B L (H K)")


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, EPS)


class QKNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.query_norm = RMSNorm(width)
        self.key_norm = RMSNorm(width)


def split_heads(qkv: Tensor, norm: QKNorm, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a fused projection (B, L, 3D) into normed queries, normed keys and values, each (B, H, L, K)."""
    q, k, v = rearrange(qkv, "B L (three H K) -> three B H L K", three=3, H=heads)
    return norm.query_norm(q), norm.key_norm(k), v


class SelfAttention(nn.Module):
    """The attention weights of one stream; the double block joins two of them."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.norm = QKNorm(hidden // heads)
        self.proj = nn.Linear(hidden, hidden)

    def qkv_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return split_heads(self.qkv(x), self.norm, self.heads)


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


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Norm every token (B, L, D) over its width, then (1 + scale) * normed + shift."""
    return torch.addcmul(shift, 1 + scale, F.layer_norm(x, x.shape[-1:], eps=EPS))


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

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """Update both streams: joint attention, then the MLP of each.

        img: (B, N, D), txt: (B, T, D)
        vec: (B, D) conditioning
        attend: attention over text and image
        Returns img (B, N, D) and txt (B, T, D)
        """
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        # each stream makes its queries, keys and values; one attention goes over both, text first
        txt_qkv = self.txt_attn.qkv_heads(modulated_norm(txt, txt_shift1, txt_scale1))
        img_qkv = self.img_attn.qkv_heads(modulated_norm(img, img_shift1, img_scale1))
        attn = attend(*(torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True)))
        txt_attn, img_attn = attn.split((txt.shape[1], img.shape[1]), dim=1)

        # back into the image stream
        img = torch.addcmul(img, img_gate1, self.img_attn.proj(img_attn))
        img = torch.addcmul(img, img_gate2, self.img_mlp(modulated_norm(img, img_shift2, img_scale2)))

        # and into the text stream
        txt = torch.addcmul(txt, txt_gate1, self.txt_attn.proj(txt_attn))
        txt = torch.addcmul(txt, txt_gate2, self.txt_mlp(modulated_norm(txt, txt_shift2, txt_scale2)))
        return img, txt


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

    def forward(self, x: Tensor, vec: Tensor, attend: Attend) -> Tensor:
        """Run attention and MLP in parallel.

        x: (B, L, D) text, then image
        vec: (B, D) conditioning
        attend: attention over all of them
        Returns (B, L, D)
        """
        shift, scale, gate = self.modulation(vec)
        qkv, mlp_in = self.linear1(modulated_norm(x, shift, scale)).split(self.widths, dim=-1)
        attn = attend(*split_heads(qkv, self.norm, self.heads))
        mlp_out = F.gelu(mlp_in, approximate="tanh")
        del qkv, mlp_in  # what linear1 made is half of all that a block holds
        return torch.addcmul(x, gate, self.linear2(torch.cat((attn, mlp_out), dim=-1)))


class LastLayer(nn.Module):
    def __init__(self, hidden: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))


@dataclass(frozen=True)
class Conditioning:
    """What does not depend on time, so that all steps of a run share it; Flux.prefill computes it once."""

    txt: Tensor  # (B, T, D)
    refs: Tensor  # (B, R, D) references that go through every step; R is 0 if they were prefilled
    pe: Tensor  # (B, 1, L, K/2, 2) rotations of text, target and such references
    mask: Tensor | None  # (L, L)
    ref_kv: list[KV | None]  # of every block, of references that were prefilled


class Flux(nn.Module):
    """FLUX.1: noisy latent tokens, text and time in; velocity (noise - data) out."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
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

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        mask: Tensor | None = None,
        refs: Tensor | None = None,
        isolate_refs: bool = False,
    ) -> Tensor:
        """Predict the velocity of every token in img.

        img: (B, I, 64) packed latent tokens; references, if any, stand after the target here, or below
        img_ids: (B, I + R, 3) float32 positions, those of references last
        txt: (B, T, C) T5 tokens
        txt_ids: (B, T, 3) zeros
        timesteps: (B,) 1 is noise, 0 is data
        y: (B, V) pooled CLIP text
        guidance: (B,) raw scale such as 3.5; ignored by models without it
        mask, refs, isolate_refs: as for prefill
        Returns (B, I, 64), one row per token of img
        """
        cond = self.prefill(torch.cat((txt_ids, img_ids), dim=1), txt, refs, mask, isolate_refs)
        return self.velocity(img, cond, self.conditioning(timesteps, y, guidance))

    def conditioning(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Tensor:
        """Sum the embeddings of time, guidance and pooled text into the vector that modulates every block.

        timesteps: (B,) in 0..1
        y: (B, V) pooled text
        guidance: (B,) raw scale; None for models without it
        Returns vec: (B, D)
        Errors: ValueError if a model with guidance gets none
        """
        dtype = self.img_in.weight.dtype
        vec = self.time_in(timestep_embedding(timesteps.to(dtype)))
        if self.config.guidance_embed:
            if guidance is None:
                raise ValueError("this model embeds guidance; pass guidance, e.g. 3.5 for every sample")
            vec = vec + self.guidance_in(timestep_embedding(guidance.to(dtype)))
        return vec + self.vector_in(y.to(dtype))

    def prefill(
        self,
        ids: Tensor,
        txt: Tensor,
        refs: Tensor | None = None,
        mask: Tensor | None = None,
        isolate_refs: bool = False,
    ) -> Conditioning:
        """Compute what does not depend on time, to be used in every step.

        ids: (B, L, 3) float32 positions: zeros for the text, then the target's, then those of references
        txt: (B, T, C) T5 tokens
        refs: (B, R, 64) packed clean latent tokens of references, which are seen and not predicted; None for none
        mask: (L, L) True where the token of the row sees that of the column; None is everywhere
        isolate_refs: whether references see each other only, at time 0: then their keys and values are made here
        """
        dtype, blocks = self.img_in.weight.dtype, len(self.double_blocks) + len(self.single_blocks)
        pe = rotary_angles(ids, self.config.axes_dim, self.config.theta)
        txt = self.txt_in(txt.to(dtype))
        if refs is None or not refs.shape[1]:
            return Conditioning(txt, txt[:, :0], pe, mask, [None] * blocks)
        refs = self.img_in(refs.to(dtype))
        if not isolate_refs:
            return Conditioning(txt, refs, pe, mask, [None] * blocks)
        rest = pe.shape[2] - refs.shape[1]  # T + I
        ref_kv = self.reference_kv(refs, pe[:, :, rest:])
        return Conditioning(txt, refs[:, :0], pe[:, :, :rest], None if mask is None else mask[:rest], ref_kv)

    def reference_vec(self, count: int) -> Tensor:
        """Make what modulates references by themselves: time 0, guidance 1, pooled text 0. Returns vec: (B, D)"""
        zero = torch.zeros(count, 1, device=self.img_in.weight.device)
        return self.conditioning(zero[:, 0], zero.expand(-1, self.config.vec_in_dim), zero[:, 0] + 1)

    def reference_kv(self, refs: Tensor, pe: Tensor) -> list[KV]:
        """Pass references through all blocks as a picture by itself, without text.

        So what others see of them depends on no time, prompt or seed. They see each other, all of them.

        refs: (B, R, D), pe: (B, 1, R, K/2, 2) their rotations
        Returns rotated keys and values (B, H, R, K) of every block
        """
        vec = self.reference_vec(len(refs))  # (B, D)
        ref_kv: list[KV] = []

        def attend_and_keep(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            ref_kv.append((rotate(k, pe), v.clone()))  # uncopied, v would keep the block's whole projection alive
            return attention(q, k, v, pe)

        img, txt = refs, refs[:, :0]
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, attend_and_keep)
        for block in self.single_blocks:
            img = block(img, vec, attend_and_keep)
        return ref_kv

    def velocity(self, img: Tensor, cond: Conditioning, vec: Tensor) -> Tensor:
        """Predict the velocity of the target's tokens.

        img: (B, I, 64) packed noisy latent tokens of the target
        cond: from prefill
        vec: (B, D) from conditioning
        Returns (B, I, 64)
        """
        txt, target = cond.txt, slice(cond.txt.shape[1], cond.txt.shape[1] + img.shape[1])
        img = torch.cat((self.img_in(img.to(self.img_in.weight.dtype)), cond.refs), dim=1)  # (B, I + R, D)
        attends = [partial(attention, pe=cond.pe, mask=cond.mask, ref_kv=ref_kv) for ref_kv in cond.ref_kv]
        for block, attend in zip(self.double_blocks, attends, strict=False):
            img, txt = block(img, txt, vec, attend)

        x = torch.cat((txt, img), dim=1)  # (B, L, D)
        for block, attend in zip(self.single_blocks, attends[len(self.double_blocks) :], strict=True):
            x = block(x, vec, attend)

        return self.final_layer(x[:, target], vec)  # (B, I, 64)
