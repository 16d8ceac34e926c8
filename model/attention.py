"""Attention: every token looks at every token, with normed and rotated queries and keys.

Letters: B batch, L tokens, N those whose result is wanted, R tokens that are seen besides, S = L + R, D width, H heads,
K head width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .norms import QKNorm
from .position import rotate

EVERY = slice(None)  # every row of a sequence
Seen = tuple[Tensor, Tensor]  # rotated keys and values, which is all that others see of a token


def attention(
    q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None = None, rows: slice = EVERY,
    besides: Seen | None = None,
) -> tuple[Tensor, Seen]:  # fmt: skip
    """Let every token attend to every token, with rotated queries and keys.

    q, k, v: (B, H, L, K)
    pe: from rotary_angles
    mask: (L, S) True where the token of the row sees that of the column, those besides last; None is everywhere
    rows: the tokens whose result is wanted
    besides: (B, H, R, K) rotated keys, and values, of tokens that are seen and see nothing here
    Returns (B, N, D), and what others may see of these tokens
    """
    q = rotate(q[:, :, rows], pe[:, :, rows])  # (B, H, N, K)
    own = k, v = rotate(k, pe), v
    if besides is not None:
        k, v = joined(own, besides)  # (B, H, S, K)
    mask = None if mask is None else mask[rows]  # (N, S)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(out, "B H L K -> B L (H K)"), own


def joined(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Put tokens behind others: their queries, keys and values, each (B, H, L, K)."""
    return tuple(torch.cat(both, dim=2) for both in zip(first, second, strict=True))


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
