"""A procedural picture book: subjects with faces in scenes, drawn from a specification alone.

A subject has named traits (shape, colour, pattern, accessory) and traits that captions never name (exact hue, pattern
angle and spacing, face), so that identity can be told apart from description. A panel is a scene with one to four
placed subjects. Everything is decided in `random_*` from the generator passed in; `draw` depends on the panel only.

Scene coordinates are 64ths of the panel, subject coordinates are percent of the subject's height, both y downwards.
"""

import colorsys
import math
import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 4
INK = (43, 38, 52)
CREAM = (255, 248, 232)
WOOD = (126, 84, 52)
LEAF = (70, 150, 66)
CONTRAST = 0.7  # of a pattern's second colour: the autoencoder gains 0.3 dB on single subjects

# name -> hue in degrees, largest hue offset in degrees, saturation, value, second colour of its patterns (RGB)
COLOURS = {
    "red": (0, 9, 0.83, 0.90, (255, 226, 214)),
    "orange": (27, 7, 0.88, 1.00, (255, 244, 220)),
    "yellow": (51, 6, 0.75, 1.00, (176, 98, 22)),
    "green": (117, 23, 0.68, 0.72, (226, 252, 206)),
    "blue": (215, 15, 0.78, 0.88, (222, 240, 255)),
    "purple": (274, 13, 0.66, 0.72, (242, 224, 255)),
    "pink": (334, 11, 0.42, 1.00, (190, 34, 104)),
    "brown": (22, 9, 0.64, 0.52, (250, 224, 186)),
}
PATTERNS = ("plain", "striped", "dotted", "checked")
ACCESSORIES = ("none", "hat", "scarf", "glasses")
POSITIONS = ("left", "middle", "right", "top")
SIZES = ("small", "big")
FACES = ("round eyes", "asleep", "open mouth", "one eye", "teeth")
# Angles and spacings come in few values: in between, neither a reader nor a small model could tell them apart.
ANGLES = (0.0, 45.0, 90.0, 135.0)
SPACINGS = (0.0, 1.0)

# Subject height and column centres in 64ths of the panel, by the number of subjects in it.
HEIGHTS = {1: (32, 42), 2: (27, 31), 3: (19, 22), 4: (19, 21)}
CENTRES = {1: (17, 32, 47), 2: (16, 32, 48), 3: (11, 32, 53), 4: (11, 32, 53)}


@dataclass(frozen=True)
class Shape:
    """A silhouette as circles, boxes and polygons in percent of its height; parts behind it keep their own colour.

    body, behind: primitives ("o", cx, cy, rx, ry), ("b", x0, y0, x1, y1, radius), ("p", x, y, x, y, ...)
    face: centre x, centre y and half width; hat: x, y of the brim; neck: x, y, half width of a scarf
    """

    body: tuple
    face: tuple[int, int, int]
    hat: tuple[int, int]
    neck: tuple[int, int, int]
    behind: tuple = ()


def _round_points(cx: float, cy: float, radii: tuple[float, ...], count: int) -> tuple:
    """A polygon round a centre whose radii alternate, first point upwards."""
    turns = [2 * math.pi * i / count for i in range(count)]
    points = [
        (cx + radii[i % len(radii)] * math.sin(a), cy - radii[i % len(radii)] * math.cos(a))
        for i, a in enumerate(turns)
    ]
    return tuple(v for point in points for v in point)


SHAPES = {
    "cat": Shape(
        (
            ("p", 17, 40, 17, 1, 48, 18),
            ("p", 83, 40, 83, 1, 52, 18),
            ("o", 50, 38, 37, 28),
            ("o", 50, 78, 29, 22),
            ("p", 68, 96, 92, 90, 100, 58, 89, 56, 82, 78, 68, 82),
        ),
        (50, 39, 25),
        (50, 13),
        (50, 64, 27),
    ),
    "rabbit": Shape(
        (
            ("o", 33, 23, 11, 23),
            ("o", 67, 23, 11, 23),
            ("o", 50, 56, 33, 24),
            ("o", 50, 85, 28, 15),
            ("o", 80, 88, 11, 10),
        ),
        (50, 57, 24),
        (50, 36),
        (50, 79, 26),
    ),
    "bear": Shape(
        (
            ("o", 20, 16, 15, 15),
            ("o", 80, 16, 15, 15),
            ("o", 50, 37, 38, 30),
            ("o", 50, 78, 34, 22),
            ("o", 15, 74, 11, 14),
            ("o", 85, 74, 11, 14),
        ),
        (50, 39, 25),
        (50, 9),
        (50, 65, 29),
    ),
    "elephant": Shape(
        (
            ("o", 66, 58, 33, 28),
            ("o", 38, 40, 32, 30),
            ("p", 9, 34, 1, 66, 3, 92, 15, 92, 14, 68, 28, 60),
            ("b", 40, 70, 58, 100, 5),
            ("b", 76, 70, 94, 100, 5),
        ),
        (37, 39, 22),
        (38, 12),
        (46, 70, 24),
    ),
    "bird": Shape(
        (("o", 50, 54, 38, 38), ("p", 78, 44, 102, 20, 100, 62, 80, 72), ("p", 40, 22, 34, 2, 50, 10, 62, 2, 60, 22)),
        (44, 50, 25),
        (46, 18),
        (50, 80, 28),
        (
            ("p", (246, 150, 34), 18, 46, -4, 58, 18, 68),
            ("b", (246, 150, 34), 34, 88, 41, 100, 3),
            ("b", (246, 150, 34), 58, 88, 65, 100, 3),
        ),
    ),
    "fish": Shape(
        (("o", 44, 56, 43, 33), ("p", 74, 56, 102, 24, 97, 56, 102, 88), ("p", 28, 30, 52, 6, 70, 34)),
        (36, 54, 24),
        (32, 27),
        (44, 80, 29),
    ),
    "star": Shape((("p", *_round_points(50, 54, (53, 30), 10)),), (50, 55, 23), (50, 12), (50, 77, 26)),
    "heart": Shape(
        (("o", 27, 36, 26, 26), ("o", 73, 36, 26, 26), ("p", 6, 50, 50, 98, 94, 50, 70, 30, 30, 30)),
        (50, 43, 26),
        (50, 20),
        (50, 76, 22),
    ),
    "flower": Shape(
        tuple(("o", 50 + 29 * math.sin(a * math.pi / 3), 38 - 29 * math.cos(a * math.pi / 3), 17, 17) for a in range(6))
        + (("o", 50, 38, 28, 28),),
        (50, 39, 23),
        (50, 4),
        (50, 68, 22),
        (("b", LEAF, 45, 60, 55, 100, 3), ("o", LEAF, 32, 88, 17, 8), ("o", LEAF, 68, 88, 17, 8)),
    ),
    "mushroom": Shape(
        (("p", 2, 54, 5, 34, 17, 16, 34, 6, 50, 3, 66, 6, 83, 16, 95, 34, 98, 50, 84, 55, 50, 57, 16, 55),),
        (50, 73, 20),
        (50, 8),
        (50, 95, 25),
        (("b", (250, 236, 208), 24, 46, 76, 100, 18),),
    ),
    "car": Shape(
        (("p", 16, 56, 28, 20, 72, 20, 84, 56), ("b", 0, 48, 100, 86, 15)),
        (50, 52, 25),
        (50, 21),
        (50, 80, 30),
        (("o", INK, 24, 86, 14, 14), ("o", INK, 76, 86, 14, 14)),
    ),
    "ghost": Shape(
        (
            ("o", 50, 42, 39, 42),
            ("b", 11, 40, 89, 88, 2),
            ("o", 24, 88, 13, 12),
            ("o", 50, 88, 13, 12),
            ("o", 76, 88, 13, 12),
        ),
        (50, 42, 27),
        (50, 6),
        (50, 72, 36),
    ),
    "robot": Shape(
        (
            ("b", 14, 14, 86, 58, 8),
            ("b", 24, 62, 76, 92, 6),
            ("b", 5, 64, 19, 86, 5),
            ("b", 81, 64, 95, 86, 5),
            ("b", 30, 84, 45, 100, 3),
            ("b", 55, 84, 70, 100, 3),
            ("b", 40, 54, 60, 66, 1),
        ),
        (50, 37, 25),
        (50, 15),
        (50, 62, 28),
        (("b", (150, 156, 170), 47, 2, 53, 16, 1), ("o", (250, 206, 60), 50, 3, 7, 6)),
    ),
    "pear": Shape(
        (("o", 50, 68, 40, 32), ("o", 50, 32, 23, 25), ("p", 29, 24, 71, 24, 87, 58, 13, 58)),
        (50, 58, 26),
        (50, 10),
        (50, 91, 32),
        (("b", WOOD, 46, -4, 54, 14, 3), ("o", LEAF, 66, 5, 14, 7)),
    ),
}


@dataclass(frozen=True)
class Subject:
    """Who is drawn. Captions name the first four; the others make the identity.

    hue: -1..1, offset within the named colour; angle: 0..180 degrees; spacing: 0..1, fine to wide; face: index in FACES
    """

    shape: str
    colour: str
    pattern: str
    accessory: str
    hue: float
    angle: float
    spacing: float
    face: int


@dataclass(frozen=True)
class Placed:
    """A subject at a position of POSITIONS in a size of SIZES."""

    subject: Subject
    position: str
    size: str


@dataclass(frozen=True)
class Panel:
    """One picture: a scene of SCENES, one to four placed subjects, and the seed of its small variations."""

    scene: str
    placed: tuple[Placed, ...]
    seed: int


class Brush:
    """Draws in units of its own on a large picture: unit u and origin (x, y) in pixels of that picture."""

    def __init__(self, image: Image.Image, u: float, x: float = 0.0, y: float = 0.0):
        self.draw, self.u, self.x, self.y = ImageDraw.Draw(image), u, x, y

    def points(self, values) -> list[tuple[float, float]]:
        """Pairs of unit coordinates -> pixel coordinates."""
        return [(self.x + values[i] * self.u, self.y + values[i + 1] * self.u) for i in range(0, len(values), 2)]

    def oval(self, cx, cy, rx, ry, fill) -> None:
        self.draw.ellipse(self.points((cx - rx, cy - ry, cx + rx, cy + ry)), fill=fill)

    def box(self, x0, y0, x1, y1, fill, radius=0.0) -> None:
        self.draw.rounded_rectangle(self.points((x0, y0, x1, y1)), radius * self.u, fill=fill)

    def polygon(self, values, fill, grow=0.0) -> None:
        points = self.points(values)
        self.draw.polygon(points, fill=fill)
        if grow:
            self.draw.line([*points, *points[:2]], fill=fill, width=round(2 * grow * self.u), joint="curve")

    def arc(self, cx, cy, rx, ry, start, end, fill, width) -> None:
        around = self.points((cx - rx, cy - ry, cx + rx, cy + ry))
        self.draw.arc(around, start, end, fill, max(1, round(width * self.u)))

    def primitive(self, kind, values, fill, grow=0.0) -> None:
        """One primitive of a Shape, `grow` units larger on every side."""
        if kind == "o":
            cx, cy, rx, ry = values
            self.oval(cx, cy, rx + grow, ry + grow, fill)
        elif kind == "b":
            x0, y0, x1, y1, radius = values
            self.box(x0 - grow, y0 - grow, x1 + grow, y1 + grow, fill, radius + grow)
        else:
            self.polygon(values, fill, grow)


# Scenes: each draws on a sky that is there already; d is its own sideways shift, in 64ths of the panel.
def _beach(b: Brush, d: float) -> None:
    b.oval(50 + d, 12, 7, 7, (255, 224, 92))
    b.box(0, 29, 64, 46, (38, 158, 214))
    b.oval(32, 66, 62, 25, (255, 255, 255))
    b.oval(32, 68, 62, 25, (244, 220, 160))
    b.polygon((6 + d, 48, 9 + d, 48, 13 + d, 14, 11 + d, 14), (142, 98, 58))
    for x, y, rx, ry in ((5, 14, 8, 3), (18, 14, 8, 3), (12, 9, 4, 7)):
        b.oval(x + d, y, rx, ry, (52, 146, 74))


def _snow(b: Brush, d: float) -> None:
    for x, y, s in ((10 + d, 40, 1.0), (54 + d, 38, 1.25)):
        for k in range(3):
            b.polygon(
                (x - (9 - 2 * k) * s, y - 8 * k * s, x + (9 - 2 * k) * s, y - 8 * k * s, x, y - (13 + 8 * k) * s),
                (62, 122, 120) if k < 2 else (250, 253, 255),
            )
    b.oval(14, 62, 48, 26, (226, 238, 248))
    b.oval(52, 66, 50, 27, (252, 254, 255))


def _forest(b: Brush, d: float) -> None:
    for x, w in ((6, 6), (25, 5), (42, 6), (59, 5)):
        b.box(x + d - w / 2, 8, x + d + w / 2, 48, (104, 70, 46))
    for x, y, r in ((2, 6, 13), (22, 3, 12), (42, 6, 13), (62, 3, 12)):
        b.oval(x + d, y, r, r - 2, (38, 104, 58))
    b.oval(32, 66, 60, 24, (70, 118, 52))


def _desert(b: Brush, d: float) -> None:
    b.oval(14 - d, 12, 7, 7, (255, 250, 214))
    b.oval(56, 60, 40, 24, (238, 172, 92))
    for x0, y0, x1, y1, radius in (
        (47, 18, 52, 46, 2.5),
        (41, 28, 49, 32, 2),
        (41, 22, 45, 32, 2),
        (50, 33, 58, 37, 2),
        (54, 26, 58, 37, 2),
    ):
        b.box(x0 + d, y0, x1 + d, y1, (78, 140, 84), radius)
    b.oval(14, 70, 62, 28, (226, 144, 66))


def _night(b: Brush, d: float) -> None:
    b.oval(48 + d, 14, 9, 9, (255, 242, 182))
    b.oval(51 + d, 12, 2.5, 2.5, (238, 218, 146))
    for x, y in ((8, 8), (22, 16), (30, 6), (12, 26), (60, 30)):
        b.oval(x - d, y, 0.9, 0.9, (240, 240, 255))
    b.oval(8, 66, 44, 28, (44, 58, 116))
    b.oval(50, 70, 50, 27, (34, 44, 92))


def _city(b: Brush, d: float) -> None:
    for x, y, w, fill in (
        (-4, 18, 16, (132, 140, 172)),
        (13, 8, 14, (166, 134, 158)),
        (28, 22, 13, (118, 126, 158)),
        (42, 12, 13, (150, 150, 182)),
        (56, 4, 14, (166, 134, 158)),
    ):
        b.box(x + d, y, x + d + w, 48, fill)
        for wy in range(y + 4, 44, 7):
            b.box(x + d + 2.5, wy, x + d + 5.5, wy + 3, (255, 232, 150))
            b.box(x + d + w - 5.5, wy, x + d + w - 2.5, wy + 3, (255, 232, 150))
    b.box(0, 46, 64, 65, (98, 100, 112))
    for x in (-4, 14, 32, 50):
        b.box(x - d, 59, x - d + 9, 61, (236, 232, 214))


def _mountains(b: Brush, d: float) -> None:
    for x, y, w, fill in ((46 + d, 14, 26, (150, 156, 188)), (17 + d, 5, 28, (116, 122, 160))):
        b.polygon((x - w, 44, x, y, x + w, 44), fill)
        b.polygon(
            (x - w * 0.3, y + (44 - y) * 0.3, x, y, x + w * 0.3, y + (44 - y) * 0.3, x + 2, y + 9, x - 3, y + 13),
            (252, 253, 255),
        )
    b.oval(32, 68, 64, 27, (150, 178, 118))


def _sea(b: Brush, d: float) -> None:
    for x, y, r in ((10, 12, 3), (15, 22, 2), (52, 8, 2.5), (56, 18, 3.5), (36, 6, 2)):
        b.oval(x + d, y, r, r, (148, 226, 232))
    for x, h in ((4, 30), (10, 20), (55, 22), (61, 34)):
        for k in range(int(h / 5)):
            b.oval(x - d + (1.3 if k % 2 else -1.3), 56 - 5 * k, 2.4, 4, (34, 150, 112))
    b.oval(32, 74, 60, 20, (222, 200, 142))


def _meadow(b: Brush, d: float) -> None:
    for x, y, r in ((10, 13, 6), (18, 10, 7), (26, 13, 6)):
        b.oval(x + d * 2, y, r, r * 0.75, (255, 255, 255))
    b.oval(52, 66, 50, 34, (164, 220, 92))
    b.oval(10, 70, 56, 36, (140, 206, 72))
    flowers = ((5, 47), (17, 42), (31, 44), (46, 42), (59, 46), (24, 60), (8, 60), (41, 61), (57, 58))
    for k, (x, y) in enumerate(flowers):
        b.oval(x + d, y, 2.5, 2.5, ((255, 112, 150), (255, 255, 255), (255, 220, 70))[k % 3])


def _bedroom(b: Brush, d: float) -> None:
    b.box(8 + d, 6, 28 + d, 26, (255, 255, 255), 1)
    for x, y in ((10, 8), (19, 8), (10, 17), (19, 17)):
        b.box(x + d, y, x + d + 7, y + 7, (140, 206, 240))
    b.box(0, 44, 64, 65, (206, 152, 104))
    b.box(35 + d, 22, 70, 40, (150, 96, 62), 3)
    b.box(38 + d, 26, 54 + d, 36, (255, 255, 255), 3)
    b.box(36 + d, 32, 70, 50, (128, 112, 206), 3)
    b.oval(24 - d, 57, 24, 5, (244, 222, 170))


def _space(b: Brush, d: float) -> None:
    b.oval(46 + d, 16, 17, 4.5, (244, 210, 150))
    b.oval(46 + d, 15.5, 12, 2.5, (40, 22, 66))
    b.oval(46 + d, 14, 9, 9, (232, 120, 88))
    b.polygon((29.5 + d, 16, 62.5 + d, 16, 58 + d, 19.5, 46 + d, 20.8, 34 + d, 19.5), (244, 210, 150))
    for x, y in ((6, 8), (18, 20), (24, 6), (60, 34), (10, 32)):
        b.oval(x - d, y, 0.9, 0.9, (255, 255, 255))
    b.oval(32, 72, 60, 29, (146, 146, 164))
    for x, y, r in ((8, 52, 5), (30, 48, 4), (54, 54, 6), (26, 61, 5)):
        b.oval(x + d, y, r, r * 0.5, (112, 112, 134))


def _sunset(b: Brush, d: float) -> None:
    b.oval(32 + 2 * d, 38, 17, 17, (255, 226, 112))
    for x, y, w in ((10, 12, 14), (52, 20, 13), (30, 7, 9)):
        b.oval(x - d, y, w, 2.2, (255, 172, 140))
    b.oval(6, 62, 44, 24, (124, 56, 104))
    b.oval(54, 66, 46, 27, (96, 40, 92))


# name -> sky colour at the top, sky colour at the bottom, what stands before it
SCENES = {
    "beach": ((112, 200, 244), (216, 242, 252), _beach),
    "snow": ((176, 212, 238), (232, 244, 252), _snow),
    "forest": ((96, 168, 96), (186, 222, 130), _forest),
    "desert": ((255, 206, 128), (255, 240, 206), _desert),
    "night": ((18, 24, 66), (62, 76, 148), _night),
    "city": ((186, 200, 226), (240, 226, 226), _city),
    "mountains": ((124, 190, 240), (226, 242, 252), _mountains),
    "sea": ((44, 178, 196), (10, 74, 136), _sea),
    "meadow": ((132, 208, 250), (230, 247, 255), _meadow),
    "bedroom": ((250, 204, 206), (250, 216, 206), _bedroom),
    "space": ((16, 10, 34), (58, 30, 88), _space),
    "sunset": ((132, 58, 140), (255, 150, 84), _sunset),
}


@lru_cache(maxsize=64)
def _sky(top: tuple, bottom: tuple, side: int) -> Image.Image:
    """A square with a vertical gradient of about 85 % of its height; cached, so copy before drawing on it."""
    mix = np.clip(np.linspace(0, 1.4, side), 0, 1)[:, None, None]
    rows = np.array(top) * (1 - mix) + np.array(bottom) * mix
    return Image.fromarray(np.repeat(rows.round().astype(np.uint8), side, axis=1))


@lru_cache(maxsize=64)
def _grid(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x and y in percent about the centre, and the soft shading factor, for a square of side pixels."""
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side * 110 - 55
    x, y = np.meshgrid(axis, axis)
    distance = np.sqrt((x + 18) ** 2 + (y + 26) ** 2)
    return x, y, np.clip(1.10 - distance / 260, 0.78, 1.08)[..., None]


def base_colour(subject: Subject) -> tuple[int, int, int]:
    """The subject's own body colour, RGB 0..255: the named colour moved by its hidden hue, paler as it grows."""
    hue, reach, saturation, value, _ = COLOURS[subject.colour]
    saturation *= 1 - 0.1 * subject.hue
    red, green, blue = colorsys.hsv_to_rgb((hue + reach * subject.hue) % 360 / 360, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _surface(subject: Subject, side: int) -> Image.Image:
    """The subject's pattern over a square, with soft shading; its middle is the middle of the body."""
    x, y, shade = _grid(side)
    turn = math.radians(subject.angle)
    along, across = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    period = 24 + 18 * subject.spacing
    if subject.pattern == "striped":
        second = (along / period) % 1 < 0.48
    elif subject.pattern == "dotted":
        second = ((along / period) % 1 - 0.5) ** 2 + ((across / period) % 1 - 0.5) ** 2 < 0.105
    elif subject.pattern == "checked":
        second = ((along / period) % 1 < 0.5) ^ ((across / period) % 1 < 0.5)
    else:
        second = np.zeros_like(x, dtype=bool)
    first, second_colour = (np.array(c, dtype=np.float32) for c in (base_colour(subject), COLOURS[subject.colour][4]))
    colours = np.stack([first, first + CONTRAST * (second_colour - first)])
    return Image.fromarray(np.clip(colours[second.astype(np.intp)] * shade, 0, 255).astype(np.uint8))


def _draw_face(b: Brush, kind: int, cx: float, cy: float, f: float) -> None:
    """One of FACES about (cx, cy), f percent to either side."""
    apart, eye = 0.55 * f, cy - 0.25 * f
    if kind == 0:
        for x in (cx - apart, cx + apart):
            b.oval(x, eye, 0.44 * f, 0.52 * f, (255, 255, 255))
            b.oval(x, eye + 0.08 * f, 0.24 * f, 0.30 * f, INK)
        b.arc(cx, cy + 0.22 * f, 0.45 * f, 0.40 * f, 20, 160, INK, 0.17 * f)
    elif kind == 1:
        for x in (cx - apart, cx + apart):
            b.arc(x, eye - 0.15 * f, 0.38 * f, 0.42 * f, 10, 170, INK, 0.20 * f)
        b.oval(cx, cy + 0.55 * f, 0.18 * f, 0.16 * f, INK)
    elif kind == 2:
        for x in (cx - apart, cx + apart):
            b.oval(x, eye - 0.1 * f, 0.22 * f, 0.24 * f, INK)
        b.oval(cx, cy + 0.48 * f, 0.46 * f, 0.42 * f, INK)
        b.oval(cx, cy + 0.64 * f, 0.30 * f, 0.22 * f, (240, 92, 104))
    elif kind == 3:
        b.oval(cx, eye, 0.68 * f, 0.66 * f, (255, 255, 255))
        b.oval(cx, eye + 0.04 * f, 0.34 * f, 0.36 * f, INK)
        b.arc(cx, cy + 0.34 * f, 0.45 * f, 0.42 * f, 20, 160, INK, 0.17 * f)
    else:
        for x in (cx - apart, cx + apart):
            b.oval(x, eye, 0.18 * f, 0.36 * f, INK)
        b.box(cx - 0.62 * f, cy + 0.26 * f, cx + 0.62 * f, cy + 0.82 * f, INK, 0.2 * f)
        b.box(cx - 0.50 * f, cy + 0.37 * f, cx + 0.50 * f, cy + 0.71 * f, (255, 255, 255), 0.1 * f)


def _draw_accessory(b: Brush, kind: str, shape: Shape) -> None:
    """A hat, scarf or glasses in ink and cream, so that no accessory carries a named colour."""
    if kind == "hat":
        x, y = shape.hat
        b.box(x - 18, y - 25, x + 18, y, INK, 2)
        b.box(x - 29, y - 4, x + 29, y + 4, INK, 2)
        b.box(x - 18, y - 13, x + 18, y - 4, CREAM)
    elif kind == "scarf":
        x, y, half = shape.neck
        for grow, fill in ((3, INK), (0, CREAM)):
            b.box(x + half * 0.25 - grow, y - grow, x + half * 0.25 + 14 + grow, min(y + 25, 103) + grow, fill, 2)
            b.box(x - half - grow, y - 6 - grow, x + half + grow, y + 6 + grow, fill, 5)
    elif kind == "glasses":
        cx, cy, f = shape.face
        for x in (cx - 0.6 * f, cx + 0.6 * f):
            b.arc(x, cy - 0.22 * f, 0.68 * f, 0.68 * f, 0, 360, INK, 0.2 * f)
        b.box(cx - 0.12 * f, cy - 0.34 * f, cx + 0.12 * f, cy - 0.14 * f, INK)


def _draw_subject(image: Image.Image, subject: Subject, cx: float, bottom: float, height: float) -> None:
    """A subject standing on (cx, bottom) of a large picture; all three in pixels of it."""
    shape, u = SHAPES[subject.shape], height / 100
    left, top, side = round(cx - 55 * u), round(bottom - 105 * u), round(110 * u)
    outline, grow = tuple(c * 2 // 5 for c in base_colour(subject)), 3.0
    b = Brush(image, u, left + 5 * u, top + 5 * u)
    for kind, _, *values in shape.behind:
        b.primitive(kind, values, outline, grow)
    for kind, *values in shape.body:
        b.primitive(kind, values, outline, grow)
    for kind, fill, *values in shape.behind:
        b.primitive(kind, values, fill)
    mask = Image.new("L", (side, side))
    silhouette = Brush(mask, u, 5 * u, 5 * u)
    for kind, *values in shape.body:
        silhouette.primitive(kind, values, 255)
    image.paste(_surface(subject, side), (left, top), mask)
    x, y, f = shape.face
    if subject.pattern != "plain" and subject.shape != "mushroom":
        b.oval(x, y, 1.1 * f, 0.95 * f, base_colour(subject))
    _draw_face(b, subject.face, x, y, f)
    _draw_accessory(b, subject.accessory, shape)


def _variations(panel: Panel) -> tuple[float, bool, list[tuple[float, float, float]]]:
    """What the panel's seed decides: the scene's shift and whether it is mirrored, and the spots of its subjects."""
    rng = np.random.default_rng(panel.seed)
    shift, flip, jitter = rng.uniform(-1, 1), rng.random() < 0.5, rng.uniform(-0.5, 0.5, (len(panel.placed), 2))
    return shift, bool(flip), [_spot(panel, placed, jitter[i]) for i, placed in enumerate(panel.placed)]


def _spot(panel: Panel, placed: Placed, jitter: np.ndarray) -> tuple[float, float, float]:
    """Centre x, ground y and height of a placed subject, in 64ths of the panel."""
    count = len(panel.placed)
    height = HEIGHTS[count][SIZES.index(placed.size)]
    if placed.position == "top":
        return 32 + jitter[0], 8 + height + jitter[1] / 2, height
    x = CENTRES[count][POSITIONS.index(placed.position)] + jitter[0]
    x = min(max(x, 0.48 * height), 64 - 0.48 * height)
    return x, (61 if placed.size == "big" else 57) + jitter[1], height


def box(panel: Panel, which: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a square round one subject of a panel, hat and all, in 64ths of the panel."""
    x, y, height = _variations(panel)[2][which]
    half = 0.62 * height
    x, y = (min(max(centre, half), 64 - half) for centre in (x, y - 0.5 * height))  # the panel ends there
    return x - half, y - half, x + half, y + half


def draw(panel: Panel, size: int = 64) -> Image.Image:
    """Draws a panel; equal panels give equal bytes.

    size: side in pixels, a multiple of 16
    Errors: ValueError if size is not a positive multiple of 16, or the panel holds no or more than four subjects
    """
    if size < 16 or size % 16:
        raise ValueError(f"panel size is {size} pixels, but must be a positive multiple of 16; use 64")
    if not 1 <= len(panel.placed) <= 4:
        raise ValueError(f"panel holds {len(panel.placed)} subjects, but can show 1 to 4; place 1 to 4 subjects")
    shift, flip, spots = _variations(panel)
    side = size * SUPERSAMPLING
    u = side / 64
    top, bottom, paint = SCENES[panel.scene]
    image = _sky(top, bottom, side).copy()
    paint(Brush(image, u), shift)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    shadow = Image.new("L", image.size)
    for placed, (x, y, height) in zip(panel.placed, spots, strict=True):
        if placed.position != "top":
            Brush(shadow, u).oval(x, y, 0.44 * height, 0.07 * height + 0.6, 80)
    image.paste((20, 20, 50), (0, 0), shadow)
    for placed, (x, y, height) in sorted(zip(panel.placed, spots, strict=True), key=lambda pair: pair[1][1]):
        _draw_subject(image, placed.subject, x * u, y * u, height * u)
    return image.reduce(SUPERSAMPLING)


def is_held_out(subject: Subject) -> bool:
    """Whether training never shows this combination of shape, colour and pattern (about one in ten)."""
    return zlib.crc32(f"{subject.shape} {subject.colour} {subject.pattern}".encode()) % 10 == 3


def _pick(rng: np.random.Generator, names):
    return tuple(names)[int(rng.integers(len(names)))]


def random_subject(rng: np.random.Generator, held_out: bool | None = False) -> Subject:
    """A subject with every trait drawn evenly.

    held_out: False for training combinations only, True for held-out ones only, None for any
    """
    while True:
        subject = Subject(
            _pick(rng, SHAPES),
            _pick(rng, COLOURS),
            _pick(rng, PATTERNS),
            _pick(rng, ACCESSORIES),
            round(float(rng.uniform(-1, 1)), 3),
            _pick(rng, ANGLES),
            _pick(rng, SPACINGS),
            int(rng.integers(len(FACES))),
        )
        if held_out is None or is_held_out(subject) == held_out:
            return subject


def _random_positions(rng: np.random.Generator, subjects: int) -> list[str]:
    """Positions for the subjects of one panel, in random order; four fill all of them."""
    if subjects == 1:
        return ["top" if rng.random() < 0.08 else _pick(rng, POSITIONS[:3])]
    if subjects == 2:
        return rng.permutation(("left", "right")).tolist()
    return rng.permutation(POSITIONS[:subjects]).tolist()


def _random_size(rng: np.random.Generator, position: str) -> str:
    """A size that fits: small at the top."""
    return "small" if position == "top" else _pick(rng, SIZES)


def random_set(
    rng: np.random.Generator, rows: int, cols: int, subjects: int = 1, held_out: bool | None = False
) -> tuple[Panel, ...]:
    """rows * cols panels in which the same subjects recur, each panel in a scene of its own.

    subjects: 1 to 4, of different shapes and colours
    held_out: as in random_subject, for every subject
    Errors: ValueError if there are more panels than scenes, or the number of subjects is not 1 to 4
    """
    count = rows * cols
    if not 1 <= count <= len(SCENES):
        raise ValueError(f"grid {rows}x{cols} has {count} panels, but a set has 1 to {len(SCENES)}; use fewer")
    if not 1 <= subjects <= 4:
        raise ValueError(f"subjects is {subjects}, but a panel shows 1 to 4; pass 1, 2, 3 or 4")
    cast: list[Subject] = []
    while len(cast) < subjects:
        subject = random_subject(rng, held_out)
        if all(subject.shape != other.shape and subject.colour != other.colour for other in cast):
            cast.append(subject)
    scenes = [tuple(SCENES)[i] for i in rng.choice(len(SCENES), count, replace=False)]
    while True:
        positions = [_random_positions(rng, subjects) for _ in range(count)]
        # A walk from left to right over three panels is kept for a LoRA to learn.
        if all(walk != ("left", "middle", "right") for walk in zip(*positions, strict=True)):
            break
    return tuple(
        Panel(
            scene,
            tuple(
                Placed(subject, position, _random_size(rng, position))
                for subject, position in zip(cast, places, strict=True)
            ),
            int(rng.integers(2**31)),
        )
        for scene, places in zip(scenes, positions, strict=True)
    )
