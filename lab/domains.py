"""Two domains beside the plain one, in which whole panels are drawn: pencil on paper, and dusk with sparkles.

Pretraining shows sets that are wholly in one of them, so that a LoRA of lab.tasks has to teach a relation, not a look.
"""

import numpy as np
from PIL import Image

from .world import SUPERSAMPLING

# The panel at dusk is DIM of itself and VEIL of a purple; then every spot lights up, in 64ths of the panel
DIM, VEIL, PURPLE = 0.55, 0.20, (58, 34, 104)
GOLD, WHITE = (255, 214, 92), (255, 252, 226)
SPOTS = tuple((x, y) for y in (10, 31, 53) for x in (10, 32, 54) if (x, y) != (32, 31))  # but not in the middle
SPARKLE = (5.5, 9.0)  # from the centre of a sparkle to its points

PAPER, PENCIL = (252, 250, 245), (52, 52, 58)


def in_domain(picture: Image.Image, domain: str, seed: int) -> Image.Image:
    """Draw a picture in a domain, a key of lab.captions.DOMAIN_WORDS, or leave it as it is: "".

    seed: as for with_sparkles
    """
    if domain == "pencil":
        return with_pencil(picture)
    return with_sparkles(picture, seed) if domain == "dusk" else picture


def with_sparkles(picture: Image.Image, seed: int) -> Image.Image:
    """The same picture at dusk, with eight golden sparkles round its middle.

    seed: moves the sparkles a little and makes them larger or smaller
    """
    rng = np.random.default_rng(seed)
    side, u = picture.width * SUPERSAMPLING, 64 / picture.width / SUPERSAMPLING
    y, x = (np.mgrid[0:side, 0:side] + 0.5) * u
    glow, star = np.zeros((side, side)), np.zeros((side, side))
    for centre in SPOTS:
        dx, dy = (np.abs(axis - at - rng.uniform(-4, 4)) for axis, at in zip((x, y), centre, strict=True))
        reach = rng.uniform(*SPARKLE)
        glow = np.maximum(glow, 0.75 * np.exp(-(dx**2 + dy**2) / (0.55 * reach) ** 2))
        points = np.sqrt(dx / reach) + np.sqrt(dy / reach) < 1
        star = np.maximum(star, points | (dx**2 + dy**2 < (0.2 * reach) ** 2))
    pixels = _dusk(np.asarray(picture, dtype=np.float64))
    for light, colour in ((glow, GOLD), (star, WHITE)):
        pixels += (np.array(colour) - pixels) * _reduce(light)
    return Image.fromarray(pixels.round().astype(np.uint8))


def _dusk(pixels: np.ndarray) -> np.ndarray:
    """Pixels 0..255 as they are at dusk."""
    return DIM * pixels + VEIL * np.array(PURPLE)


def _reduce(light: np.ndarray) -> np.ndarray:
    """Means over the pixels of the supersampling: (h, w, 1)."""
    h, w = (side // SUPERSAMPLING for side in light.shape)
    return light.reshape(h, SUPERSAMPLING, w, SUPERSAMPLING).mean(axis=(1, 3))[..., None]


def with_pencil(picture: Image.Image) -> Image.Image:
    """The same picture drawn in pencil on paper: lines along its edges, and a little shade where it is dark."""
    pixels = np.asarray(picture, dtype=np.float64) / 255
    p = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    across, down = p[:, 2:] - p[:, :-2], p[2:] - p[:-2]  # Sobel's derivatives, of every colour channel
    across = (across[:-2] + 2 * across[1:-1] + across[2:]) / 4
    down = (down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]) / 4
    edges = np.sqrt(across**2 + down**2).max(axis=2, keepdims=True)
    line = np.clip(1.6 * edges - 0.08, 0, 1)
    shade = 0.16 * (1 - pixels.mean(axis=2, keepdims=True))
    dark = line + shade * (1 - line)
    return Image.fromarray((np.array(PAPER) * (1 - dark) + np.array(PENCIL) * dark).round().astype(np.uint8))
