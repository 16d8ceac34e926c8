"""Positions: grid ids for image tokens, UnoPE offsets for reference images, rotary embedding (RoPE); and times.

Letters: B batch, L tokens, H heads, K head width, A position axes (3: index, row, column), h and w in tokens.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MODES = {"d": (1, 1), "h": (1, 0), "w": (0, 1), "o": (0, 0)}  # whether rows and columns are offset
SINUSOID = 256  # channels of the time and guidance sinusoids


def grid_ids(h: int, w: int) -> Tensor:
    """Give the position of every token of an image, in row-major order.

    h, w: height and width in tokens (16 pixels each)
    Returns ids: (h*w, 3) float32; columns 0, row, column
    Source: black-forest-labs/flux@802fb47 sampling.py prepare
    """
    ids = torch.zeros(h, w, 3)
    ids[..., 1] = torch.arange(h)[:, None]
    ids[..., 2] = torch.arange(w)[None, :]
    return ids.reshape(h * w, 3)


def reference_ids(
    target: tuple[int, int], references: Sequence[tuple[int, int]], mode: str = "d", scale: float = 1
) -> list[Tensor]:
    """Place reference images past the target, so that they share no row or column with it (UnoPE).

    Reference N starts where the target and the references before it end: the offset accumulates, in every
    mode. (Equation 8 writes w^(N-1), a superscript: the size of the latent before, not a product.)

    target: (h, w) of the target image in tokens
    references: (h, w) of each reference in tokens; may be empty
    mode: of MODES: "d" offsets rows and columns (the paper's choice), "h" rows, "w" columns, "o" nothing
    scale: multiplies every offset; 1 is the paper
    Returns one (h*w, 3) float32 tensor a reference
    Errors: ValueError for another mode
    Source: arXiv:2504.02160 equation 8; bytedance/UNO@d305981 uno/flux/sampling.py:135
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
    row, column = target
    down, right = MODES[mode]
    placed = []
    for h, w in references:
        placed.append(grid_ids(h, w) + scale * torch.tensor([0.0, down * row, right * column]))
        row, column = row + h, column + w
    return placed


def rotary_angles(ids: Tensor, axes_dim: Sequence[int], theta: float = 10_000) -> Tensor:
    """Turn positions into the cosines and sines that rotate queries and keys.

    Angles are computed in float64 whatever the dtype of ids: in float32 they are off by 6e-5 at position
    1000, and in bfloat16 they are useless. ids themselves must be exact, so never store them below float32.

    ids: (B, L, A) positions
    axes_dim: head channels that each axis turns; they sum to K
    Returns pe: (B, 1, L, K/2, 2) float32 cosines and sines, with room for the heads
    """
    position = ids.to("cpu" if ids.device.type == "mps" else ids.device, torch.float64)  # mps has no float64
    angles = []
    for axis, dim in enumerate(axes_dim):
        frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=position.device) / dim)
        angles.append(position[..., axis, None] * frequency)  # (B, L, dim/2)
    angle = torch.cat(angles, dim=-1).unsqueeze(1)  # (B, 1, L, K/2)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float().to(ids.device)


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate each adjacent pair of channels (2j, 2j+1) by its angle, in float32.

    x: (B, H, L, K) queries or keys after QK-norm
    pe: (B, 1, L, K/2, 2) from rotary_angles
    Returns (B, H, L, K) in the dtype of x
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # each (B, H, L, K/2)
    cos, sin = pe.unbind(-1)
    return torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1).flatten(-2).to(x.dtype)


def timestep_embedding(t: Tensor) -> Tensor:
    """Spread a scalar per sample over sines and cosines of geometrically spaced frequencies, 1 down to 1/10000.

    t is multiplied by 1000 in its own dtype, as in the official code: in bfloat16 a guidance of 3.5 becomes 3504,
    and that is what the released models are sampled with.

    t: (B,) time in 0..1, or guidance
    Returns (B, 256) in the dtype of t: cosines, then sines
    Source: black-forest-labs/flux@802fb47 modules/layers.py timestep_embedding
    """
    half = SINUSOID // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half).to(t.device)
    angle = (1000.0 * t).float()[:, None] * frequency  # (B, 128)
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(t.dtype)
