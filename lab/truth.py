"""The truth about a panel, read back from its pixels: the scene, and who stands where with which traits.

A small convolutional network looks at every place of a panel apart (left, middle, right, top). It is trained on drawn
panels and on what the autoencoder makes of them (lab.train_truth), and is the ruler of every experiment: its own
accuracy, on fresh panels and after the autoencoder, is printed beside every figure that uses it.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model.weights import find_model

from .world import ACCESSORIES, COLOURS, FACES, PATTERNS, POSITIONS, SCENES, SHAPES, SIZES, Panel, Placed, Subject

# a trait -> its values; "shape" has a value more at the front, for nobody
NAMED = {
    "shape": ("", *SHAPES), "colour": tuple(COLOURS), "pattern": PATTERNS, "accessory": ACCESSORIES, "size": SIZES,
}  # fmt: skip
HUES, ANGLES, SPACINGS = 5, 8, 4  # bins of the traits that captions never name
TRAITS = {name: len(values) for name, values in NAMED.items()} | {
    "face": len(FACES), "hue": HUES, "angle": ANGLES, "spacing": SPACINGS,
}  # fmt: skip
HIDDEN = ("face", "hue", "angle", "spacing")
PLACE = sum(TRAITS.values())
OUTPUTS = len(SCENES) + len(POSITIONS) * PLACE


@dataclass(frozen=True)
class Seen:
    """One subject as read from a panel; named traits as in world.Subject.

    hue: -1..1, angle: degrees of its pattern's period, spacing: 0..1; angle and spacing mean nothing if plain
    """

    position: str
    shape: str
    colour: str
    pattern: str
    accessory: str
    size: str
    face: int
    hue: float
    angle: float
    spacing: float


@dataclass(frozen=True)
class Reading:
    """What a panel shows."""

    scene: str
    seen: tuple[Seen, ...]

    def specify(self) -> Panel:
        """Give the specification of what was read."""
        shown = [field.name for field in fields(Subject)]
        placed = [Placed(Subject(**{t: getattr(one, t) for t in shown}), one.position, one.size) for one in self.seen]
        return Panel(self.scene, tuple(placed), 0)


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(self.conv1(x)).relu()
        return (x + self.norm2(self.conv2(h))).relu()


# Where subjects stand: top and left of each place's window, in cells of 4 pixels
WINDOW = (11, 10)  # height and width
CORNERS = {"left": (5, 0), "middle": (5, 3), "right": (5, 6), "top": (0, 3)}


class Reader(nn.Module):
    """Panels (B, 3, 64, 64) in -1..1 -> logits (B, OUTPUTS): the scene, then every trait of every place.

    Subjects stand in four places only, so one network looks through four windows: whatever it learns in one place
    it knows in all of them.
    """

    def __init__(self, widths: tuple[int, int, int] = (24, 48, 96), hidden: int = 256):
        super().__init__()
        first, second, third = widths
        self.body = nn.Sequential(
            *halving(3, first), Block(first), *halving(first, second), Block(second), Block(second)
        )
        self.scene = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16 * second, len(SCENES)))
        self.place = nn.Parameter(torch.zeros(len(POSITIONS), second, 1, 1))
        self.window = nn.Sequential(
            *halving(second, third), Block(third), nn.Conv2d(third, 32, 1), nn.Flatten(),
            nn.Linear(32 * 6 * 5, hidden), nn.GELU(), nn.Linear(hidden, PLACE),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        seen = self.body(image)  # (B, C, 16, 16)
        (height, width), corners = WINDOW, [CORNERS[position] for position in POSITIONS]
        windows = torch.stack([seen[:, :, y : y + height, x : x + width] for y, x in corners], dim=1) + self.place
        places = self.window(windows.flatten(0, 1)).view(len(image), -1)
        return torch.cat((self.scene(seen), places), dim=1)


def halving(before: int, after: int) -> list[nn.Module]:
    """A convolution to half the height and width."""
    return [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]


def turn(pattern: str) -> float:
    """Degrees after which a pattern looks the same: half a turn for stripes, a quarter for dots and checks."""
    return 180.0 if pattern == "striped" else 90.0


def labels(panel: Panel) -> list[int]:
    """The class of every output group for a panel; -1 where there is nothing to read.

    Returns the scene, then for each place the traits in the order of TRAITS
    """
    found = [tuple(SCENES).index(panel.scene)]
    at = {one.position: one for one in panel.placed}
    for position in POSITIONS:
        if position not in at:
            found += [0] + [-1] * (len(TRAITS) - 1)
            continue
        one, subject = at[position], at[position].subject
        values = {**vars(subject), "size": one.size}
        found += [options.index(values[name]) for name, options in NAMED.items()]
        period = turn(subject.pattern)
        plain = subject.pattern == "plain"
        found += [
            subject.face,
            min(HUES - 1, int((subject.hue + 1) / 2 * HUES)),
            -1 if plain else int(subject.angle % period / period * ANGLES) % ANGLES,
            -1 if plain else min(SPACINGS - 1, int(subject.spacing * SPACINGS)),
        ]
    return found


def groups(logits: Tensor) -> list[Tensor]:
    """Split (B, OUTPUTS) into the output groups, in the order of labels."""
    return list(logits.split([len(SCENES), *[size for _ in POSITIONS for size in TRAITS.values()]], dim=1))


def reader_path(model: str) -> Path:
    """Say where a model's reader lies."""
    return find_model(model).root / "truth" / "model.safetensors"


def load_reader(model: str) -> Reader:
    """Load the reader that lies beside a model's files, for measuring."""
    tensors = load_file(reader_path(model))
    reader = Reader()
    reader.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
    return reader.eval().requires_grad_(False)


@torch.no_grad()
def read(reader: Reader, image: Tensor) -> list[Reading]:
    """Read panels.

    image: (N, 3, 64, 64) in -1..1
    """
    parts = groups(torch.cat([reader(part) for part in image.split(256)]))
    scenes, *places = parts
    classes = [part.argmax(dim=1).tolist() for part in places]
    expected = [_bin_centre(part).tolist() for part in places]
    angles = [_circular(part).tolist() for part in places]
    readings = []
    for i, scene in enumerate(scenes.argmax(dim=1).tolist()):
        seen = []
        for p, position in enumerate(POSITIONS):
            at = {name: p * len(TRAITS) + k for k, name in enumerate(TRAITS)}
            values = {name: options[classes[at[name]][i]] for name, options in NAMED.items()}
            if not values["shape"]:
                continue
            seen.append(
                Seen(
                    position, **values, face=classes[at["face"]][i], hue=2 * expected[at["hue"]][i] - 1,
                    angle=angles[at["angle"]][i] * turn(values["pattern"]), spacing=expected[at["spacing"]][i],
                )
            )  # fmt: skip
        readings.append(Reading(tuple(SCENES)[scene], tuple(seen)))
    return readings


def _bin_centre(logits: Tensor) -> Tensor:
    """The mean of bins (B, n) that fill 0..1, under their probabilities: (B,)."""
    centres = (torch.arange(logits.shape[1], device=logits.device) + 0.5) / logits.shape[1]
    return logits.softmax(dim=1) @ centres


def _circular(logits: Tensor) -> Tensor:
    """The mean direction of bins (B, n) that fill a circle of length 1: (B,) in 0..1."""
    turns = 2 * math.pi * (torch.arange(logits.shape[1], device=logits.device) + 0.5) / logits.shape[1]
    p = logits.softmax(dim=1)
    return torch.atan2(p @ turns.sin(), p @ turns.cos()) / (2 * math.pi) % 1


TOLERANCE = {"hue": 0.5, "angle": 0.2, "spacing": 0.3}  # hue of -1..1, angle as a share of the pattern's turn


def same_hidden(seen: Seen, subject) -> dict[str, bool]:
    """Which of the traits that captions never name agree with a subject's.

    Angle and spacing are only told where both have a pattern that looks the same after the same turn.
    """
    agree = {"face": seen.face == subject.face, "hue": abs(seen.hue - subject.hue) < TOLERANCE["hue"]}
    period = turn(subject.pattern)
    if "plain" not in (seen.pattern, subject.pattern) and turn(seen.pattern) == period:
        apart = abs(seen.angle - subject.angle) % period / period
        agree["angle"] = min(apart, 1 - apart) < TOLERANCE["angle"]
        agree["spacing"] = abs(seen.spacing - subject.spacing) < TOLERANCE["spacing"]
    return agree


SHOWN = ("shape", "colour", "pattern", "accessory", "face", "hue")  # traits that every subject has


def same_traits(seen: Seen, subject) -> dict[str, bool]:
    """Which of SHOWN agree with a subject's."""
    named = {trait: getattr(seen, trait) == getattr(subject, trait) for trait in SHOWN[:4]}
    return named | {trait: same for trait, same in same_hidden(seen, subject).items() if trait in SHOWN}
