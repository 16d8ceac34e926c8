"""Norms: of queries and keys, and of tokens before they are modulated.

Letters: B batch, L tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EPS = 1e-6  # of every LayerNorm and RMSNorm


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


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Norm every token over its width, then scale it by 1 + scale and shift it.

    x: (B, L, D)
    shift, scale: (B, 1, D), or of every token (B, L, D)
    """
    return ModulatedNorm.apply(x, shift, scale)


class ModulatedNorm(torch.autograd.Function):
    """What autograd would do by itself, but the normed tokens are computed again instead of being kept."""

    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed, mean, deviation = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)
        ctx.save_for_backward(x, mean, deviation, scale)
        return torch.addcmul(shift, 1 + scale, normed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, mean, deviation, scale = ctx.saved_tensors
        normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
        to_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad * (1 + scale), x, x.shape[-1:], mean, deviation, None, None, [True, False, False]
        )
        return to_x, grad.sum_to_size(scale.shape), (grad * normed).sum_to_size(scale.shape)
