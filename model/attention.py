"""Attention: every token looks at every token, with normed and rotated queries and keys.

Letters: B batch, L tokens, N those whose result is wanted, R tokens that are seen besides, S = L + R, D width, H heads,
K head width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .position import rotate

EPS = 1e-6  # of every LayerNorm and RMSNorm
EVERY = slice(None)  # every row of a sequence
Seen = tuple[Tensor, Tensor]  # rotated keys and values, which is all that others see of a token


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


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pe: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    rows: slice = EVERY,
    besides: Seen | None = None,
) -> tuple[Tensor, Seen]:
    """Let every token attend to every token, with rotated queries and keys.

    q, k, v: (B, H, L, K)
    mask: (L, S) True where the token of the row sees that of the column, those besides last; None is everywhere
    rows: the tokens whose result is wanted
    besides: (B, H, R, K) rotated keys, and values, of tokens that are seen and see nothing here
    Returns (B, N, D), and what others may see of these tokens
    """
    cos, sin = pe
    q = rotate(q[:, :, rows], cos[:, :, rows], sin[:, :, rows])  # (B, H, N, K)
    own = k, v = rotate(k, cos, sin), v
    if besides is not None:
        k, v = (torch.cat(pair, dim=2) for pair in zip(own, besides, strict=True))  # (B, H, S, K)
    mask = None if mask is None else mask[rows]  # (N, S)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(out, "B H L K -> B L (H K)"), own


class SelfAttention(nn.Module):
    """The attention weights of one stream; the double block joins two of them."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.norm = QKNorm(hidden // heads)
        self.proj = nn.Linear(hidden, hidden)

    def qkv_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "B L (three H K) -> three B H L K", three=3, H=self.heads)
        return self.norm.query_norm(q), self.norm.key_norm(k), v
