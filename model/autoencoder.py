"""The FLUX.1 autoencoder: pictures to latents with 16 channels at an eighth of the size, and back.

Letters: B batch, C channels; h, w in pixels for images and in latent cells (8 pixels) for z.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

CELL = 8  # pixels a latent cell covers


@dataclass(frozen=True)
class AutoEncoderConfig:
    """The shape of an autoencoder; model.infer reads it off a checkpoint's tensors."""

    ch: int  # channels at full resolution
    ch_mult: tuple[int, ...]  # times ch, at each resolution; four of them make 8x
    num_res_blocks: int  # of the encoder at each resolution; the decoder has one more
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Attention over all positions, one head, at the lowest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (rearrange(f(y), "B C h w -> B 1 (h w) C").contiguous() for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)  # contiguous, else no fused kernel takes them
        return x + self.proj_out(rearrange(out, "B 1 (h w) C -> B C h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one row and column of zeros, right and bottom only


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks at one resolution, with an optional change of resolution after them."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if hasattr(self, "downsample"):
            return self.downsample(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Middle(nn.Module):
    """Two blocks with attention between them, at the lowest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pictures to the posterior's mean and log variance: blocks at each resolution, then the middle."""

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for level, (before, width) in enumerate(zip([config.ch, *widths], widths, strict=False)):
            down = Level(before, width, config.num_res_blocks)
            if level < len(widths) - 1:
                down.downsample = Downsample(width)
            self.down.append(down)
        self.mid = Middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image)
        for down in self.down:
            x = down(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents to pictures: the middle, then blocks from the lowest resolution to the highest."""

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()  # index 0 is full resolution, so it runs from the last to the first
        for level, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            up = Level(before, width, config.num_res_blocks + 1)
            if level > 0:
                up.upsample = Upsample(width)
            self.up.append(up)
        self.norm_out = norm(config.ch)
        self.conv_out = nn.Conv2d(config.ch, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for up in reversed(self.up):
            x = up(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    """FLUX.1's autoencoder; encode and decode speak in latents scaled for the transformer.

    Source: black-forest-labs/flux@802fb47 modules/autoencoder.py
    """

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Give mean and log variance of the posterior, unscaled.

        image: (B, 3, h, w) in -1..1; h and w multiples of 8
        Returns two (B, 16, h/8, w/8)
        """
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        return mean, logvar

    def encode(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode pictures into latents that are scaled and shifted for the transformer.

        image: (B, 3, h, w) in -1..1; h and w multiples of 8
        generator: on the CPU; draws one sample of the posterior. None gives its mean
        Returns z: (B, 16, h/8, w/8)
        """
        z, logvar = self.moments(image.to(self.encoder.conv_in.weight.dtype))
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator).to(z)
            z = z + torch.exp(0.5 * logvar) * noise
        return self.config.scale_factor * (z - self.config.shift_factor)

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents into pictures.

        z: (B, 16, h, w) scaled and shifted latents
        Returns image: (B, 3, 8h, 8w), nominally -1..1, not clamped
        """
        z = z / self.config.scale_factor + self.config.shift_factor
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype))


def decode_tiled(autoencoder: AutoEncoder, z: Tensor, tile: int = 64, overlap: int = 16) -> Tensor:
    """Decode in overlapping tiles that fade into each other, so that memory does not grow with the picture.

    Not equal to decoding at once: GroupNorm and the middle attention see one tile at a time.

    z: (B, 16, h, w) latents
    tile, overlap: in latent cells, the latter less than the former; memory grows with tile squared
    Returns image: (B, 3, 8h, 8w)
    """
    if len(z) > 1:  # such as panels that are encoded apart
        return torch.cat([decode_tiled(autoencoder, one, tile, overlap) for one in z.split(1)])
    rows, columns = (_tile_spans(size, tile, overlap) for size in z.shape[2:])
    size = CELL * z.shape[2], CELL * z.shape[3]
    image, weight = z.new_zeros(1, 3, *size), z.new_zeros(size)
    for top, bottom in rows:
        for left, right in columns:
            part = autoencoder.decode(z[:, :, top:bottom, left:right])
            fade = _fade(top, bottom, z.shape[2], overlap)[:, None] * _fade(left, right, z.shape[3], overlap)[None, :]
            fade = fade.to(part)
            y, x = slice(CELL * top, CELL * bottom), slice(CELL * left, CELL * right)
            image[:, :, y, x] += part * fade
            weight[y, x] += fade
    return image / weight


def _tile_spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Cover 0..size with spans of `tile` cells that overlap by at least `overlap`."""
    if size <= tile:
        return [(0, size)]
    starts = [*range(0, size - tile, tile - overlap), size - tile]
    return [(start, start + tile) for start in starts]


def _fade(start: int, end: int, size: int, overlap: int) -> Tensor:
    """Weights of one tile along one side: rise and fall over the overlap, flat at the picture's own edges."""
    pixels, ramp = CELL * (end - start), CELL * overlap
    weight = torch.ones(pixels)
    rise = (torch.arange(ramp) + 1) / (ramp + 1)
    if start > 0:
        weight[:ramp] = rise
    if end < size:
        weight[pixels - ramp :] = rise.flip(0)
    return weight
