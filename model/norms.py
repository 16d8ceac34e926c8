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
    """Gradients as autograd would make them, but normed tokens are computed again, not kept. None of second order."""

    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)
        ctx.save_for_backward(x, mean, rstd, scale)
        return torch.addcmul(shift, 1 + scale, normed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, mean, rstd, scale = ctx.saved_tensors
        to_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad * (1 + scale), x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )
        to_shift = grad.sum_to_size(scale.shape) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[2]:  # modulations without adapters
            return to_x, to_shift, None
        return to_x, to_shift, (grad * F.layer_norm(x, x.shape[-1:], eps=EPS)).sum_to_size(scale.shape)
