"""Panel grids: geometry, splitting and pasting, masks.

Panels are numbered from 1 in reading order. Grids are rows x columns, sizes width x height in pixels.
Letters: I image tokens of 16x16 pixels, row by row; h, w the composite's height and width in pixels.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from sampling.images import to_tensor
from sampling.latents import TOKEN

MAX_PANELS = 64
MAX_TOKENS = 65_536  # of the composite: 4096x4096 pixels, seven times the largest published task


@dataclass(frozen=True)
class Layout:
    """A grid of equal panels whose edges are token edges, and the references that stand behind it.

    panel_width, panel_height: pixels, multiples of 16
    references: (width, height) of each in pixels, multiples of 16
    Errors: ValueError for other sizes (with the nearest valid ones) and for absurd grids
    """

    rows: int
    cols: int
    panel_width: int
    panel_height: int
    references: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.rows < 1 or not 1 <= self.panels <= MAX_PANELS:
            raise ValueError(f"grid {self.rows}x{self.cols} has {self.panels} panels; 1 to {MAX_PANELS} are possible")
        sides = (self.panel_width, self.panel_height)
        if any(side < TOKEN or side % TOKEN for side in sides):
            nearest = " or ".join(f"{wide}x{high}" for wide, high in product(*map(_nearest, sides)))
            raise ValueError(f"panel size {sides[0]}x{sides[1]} is not in multiples of {TOKEN} pixels; use {nearest}")
        if self.image_tokens > MAX_TOKENS:
            size = f"{self.rows}x{self.cols} panels make {self.width}x{self.height} pixels, {self.image_tokens} tokens"
            raise ValueError(f"{size}; at most {MAX_TOKENS} are possible, so use smaller panels or a smaller grid")

    @property
    def panels(self) -> int:
        """Number of panels."""
        return self.rows * self.cols

    @property
    def width(self) -> int:
        """Width of the composite in pixels."""
        return self.cols * self.panel_width

    @property
    def height(self) -> int:
        """Height of the composite in pixels."""
        return self.rows * self.panel_height

    @property
    def tokens_wide(self) -> int:
        """Width of the composite in tokens."""
        return self.width // TOKEN

    @property
    def tokens_high(self) -> int:
        """Height of the composite in tokens."""
        return self.height // TOKEN

    @property
    def image_tokens(self) -> int:
        """Number of tokens of the composite, I."""
        return self.tokens_high * self.tokens_wide

    @property
    def reference_tokens(self) -> int:
        """Number of tokens of all references, R."""
        return sum(width // TOKEN * (height // TOKEN) for width, height in self.references)

    def box(self, panel: int) -> tuple[int, int, int, int]:
        """Say where a panel stands: left, top, right, bottom in pixels, the last two exclusive.

        panel: 1 to panels, in reading order
        Errors: ValueError outside the grid
        """
        if not 1 <= panel <= self.panels:
            raise ValueError(f"panel {panel} is outside the {self.rows}x{self.cols} grid; {_valid(self.panels)}")
        row, col = divmod(panel - 1, self.cols)
        left, top = col * self.panel_width, row * self.panel_height
        return left, top, left + self.panel_width, top + self.panel_height


def parse_grid(text: str) -> tuple[int, int]:
    """Read a grid as ROWSxCOLS, "2x3" being two rows of three; Layout checks how large it may be.

    Returns (rows, cols)
    Errors: ValueError for anything else
    """
    found = re.fullmatch(r"\s*([1-9][0-9]{0,3})\s*[xX\u00d7]\s*([1-9][0-9]{0,3})\s*", text)
    if not found:
        raise ValueError(f"grid {ascii(text[:40])} is not ROWSxCOLS; write for example 2x2, or 3x1 for three rows")
    return int(found[1]), int(found[2])


def parse_size(text: str) -> tuple[int, int]:
    """Read a panel size in pixels as WIDTHxHEIGHT, or one number for a square; Layout checks what is possible.

    Returns (width, height), the other way round than a grid, as sizes are usually given
    Errors: ValueError for anything else
    """
    found = re.fullmatch(r"\s*([1-9][0-9]{0,5})\s*(?:[xX\u00d7]\s*([1-9][0-9]{0,5})\s*)?", text)
    if not found:
        raise ValueError(f"panel size {ascii(text[:40])} is not WIDTHxHEIGHT in pixels; for example 512 or 512x768")
    return int(found[1]), int(found[2] or found[1])


def parse_mask(text: str, panels: int) -> tuple[int, ...]:
    """Read which panels to generate: "2,4", "2-4" or "all".

    panels: how many the grid has
    Returns panel numbers, sorted, each once
    Errors: ValueError outside the grid or for anything else
    """
    if text.strip().lower() == "all":
        return tuple(range(1, panels + 1))
    numbers: set[int] = set()
    for item in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", item)
        if not found:
            raise ValueError(f"mask {ascii(text[:40])} is not a list of panels; for example 3, or 2,4 or 2-4 or all")
        first, last = int(found[1]), int(found[2] or found[1])
        if first < 1 or last > panels or first > last:
            raise ValueError(f"mask {ascii(text[:40])}: {item.strip()} does not fit the grid; {_valid(panels)}")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def split(picture: Image.Image, layout: Layout) -> list[Image.Image]:
    """Cut the composite into its panels, in reading order."""
    return [picture.crop(layout.box(panel)) for panel in range(1, layout.panels + 1)]


def paste(picture: Image.Image, panels: Mapping[int, Image.Image], layout: Layout) -> Image.Image:
    """Put panels over a copy of a composite, bit for bit.

    panels: panel number -> picture of panel size
    Errors: ValueError if a number is outside the grid or a size differs
    """
    picture = picture.copy()
    for panel, original in panels.items():
        picture.paste(original, layout.box(panel))
    return picture


def compose(kept: Mapping[int, Image.Image], layout: Layout) -> Tensor:
    """Make the composite to encode, of the kept panels alone; all else is 0, mid-grey.

    The encoder's view reaches across panel edges, so what is to be generated must not be in the canvas at all.

    kept: panel number -> picture of panel size
    Returns (1, 3, h, w) image in -1..1
    Errors: ValueError if a number is outside the grid
    """
    canvas = torch.zeros(1, 3, layout.height, layout.width)
    for panel, picture in kept.items():
        left, top, right, bottom = layout.box(panel)
        canvas[:, :, top:bottom, left:right] = to_tensor(picture)
    return canvas


def generate_mask(panels: Iterable[int], layout: Layout) -> Tensor:
    """Mark the tokens of the panels to generate.

    panels: their numbers
    Returns (1, I, 1) 1.0 where generated, 0.0 where kept
    Errors: ValueError if a number is outside the grid
    """
    mask = torch.zeros(layout.tokens_high, layout.tokens_wide)
    for panel in panels:
        left, top, right, bottom = (edge // TOKEN for edge in layout.box(panel))
        mask[top:bottom, left:right] = 1
    return mask.reshape(1, -1, 1)  # (1, I, 1)


def panel_attention_mask(layout: Layout, text_length: int) -> Tensor:
    """Say which tokens see which where every panel reads a text of its own.

    Panels see each other, and each its own text; a text sees itself and its own panel. So the words of one panel reach
    another only through what they make of their own panel.

    text_length: tokens T of a panel's text; the texts stand before the image, in the panels' order
    Returns (L, L) True where the token of the row sees that of the column; L = panels x T + I
    Source: arXiv:2410.15027 (Group Diffusion Transformers), which conditions every image of a group on its own text
    """
    txt = torch.arange(1, layout.panels + 1).repeat_interleave(text_length)
    img = sum(number * generate_mask([number], layout)[0, :, 0] for number in range(1, layout.panels + 1))  # (I,)
    panel, is_img = torch.cat((txt, img)), torch.arange(len(txt) + len(img)) >= len(txt)
    return (panel[:, None] == panel) | (is_img[:, None] & is_img)  # (L, L)


def encode_by_panel(network: Callable[[Tensor], Tensor], x: Tensor, layout: Layout, concat: str) -> Tensor:
    """Send composites through the autoencoder, in either direction.

    x: (B, C, height, width) images or latents
    concat: "pixels" shows it the composite as one picture; "tokens" shows it every panel by itself, and the results
        stand side by side as the panels do, so that their tokens have the same ids
    """
    rows, cols = (layout.rows, layout.cols) if concat == "tokens" else (1, 1)
    panels = rearrange(x, "B C (r h) (c w) -> (B r c) C h w", r=rows, c=cols)
    return rearrange(network(panels), "(B r c) C h w -> B C (r h) (c w)", r=rows, c=cols)


def _nearest(side: int) -> tuple[int, ...]:
    """Give the valid side, or the two around an invalid one."""
    below = max(TOKEN, side // TOKEN * TOKEN)
    return (below,) if side <= below else (below, below + TOKEN)


def _valid(panels: int) -> str:
    """Say which panel numbers exist."""
    return f"panels are numbered 1 to {panels} in reading order"
