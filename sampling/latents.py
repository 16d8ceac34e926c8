"""Latents as the autoencoder makes them (z) and as the transformer reads them (tokens of 2x2 cells).

Letters: B batch, C channels, I image tokens; h, w in latent cells (8 pixels).
"""

import torch
from einops import rearrange
from torch import Tensor

CHANNELS = 16  # of a latent cell
CELL = 8  # pixels a latent cell covers
TOKEN = 16  # pixels a token covers: 2x2 cells


def noise(height: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw the starting noise of one picture on the CPU, the same for every device.

    height, width: of the picture in pixels, multiples of 16
    dtype: rounds the noise as the official sampler does, which draws in bfloat16
    Returns z: (1, 16, height/8, width/8)
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, CHANNELS, height // CELL, width // CELL, generator=generator).to(dtype)


def pack(z: Tensor) -> Tensor:
    """Gather each 2x2 patch of cells into one token.

    z: (B, C, h, w) with even h and w
    Returns tokens: (B, h/2 * w/2, 4C), row-major; channel first, then row and column within the patch
    """
    return rearrange(z, "B C (h i) (w j) -> B (h w) (C i j)", i=2, j=2)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """Undo pack.

    tokens: (B, I, 4C)
    h, w: of the latent, in cells
    Returns z: (B, C, h, w)
    """
    return rearrange(tokens, "B (h w) (C i j) -> B C (h i) (w j)", h=h // 2, w=w // 2, i=2, j=2)
