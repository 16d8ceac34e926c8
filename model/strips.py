"""Convolutions of large pictures strip by strip: what one needs beside its input and output grows with the input."""

import torch.nn.functional as F
from torch import Tensor, nn


def convolve_strips(conv: nn.Conv2d, x: Tensor, scale: int, values: int) -> Tensor:
    """Convolve 3x3 or 1x1 in strips of rows; the same sums as for the whole.

    x: (B, C, h, w)
    scale: by which it is enlarged before, nearest
    values: of an enlarged strip
    Returns (B, C', scale h, scale w)
    """
    (high, wide), halo = x.shape[2:], conv.padding[0]
    step = max(1, values // (scale**2 * x[:, :, 0].numel()))
    out = x.new_empty(len(x), conv.out_channels, scale * high, scale * wide)
    for top in range(0, high, step):
        bottom = min(top + step, high)
        low, most = max(top - halo, 0), min(bottom + halo, high)  # a row beyond, or one of zeros at the edge
        part = x[:, :, low:most]
        part = F.interpolate(part, scale_factor=float(scale), mode="nearest") if scale > 1 else part
        part = part[:, :, scale - 1 if low < top else 0 : part.shape[2] - (scale - 1 if most > bottom else 0)]
        part = F.pad(part, (halo, halo, halo * (low == top), halo * (most == bottom)))
        out[:, :, scale * top : scale * bottom] = F.conv2d(part, conv.weight, conv.bias)
    return out
