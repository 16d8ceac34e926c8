"""The data factory in the picture world: its own reader judges pairs and finds subjects; else as iclora.curate.

python -m lab.curate --out runs/factory --count 40
python -m lab.curate --out runs/factory --lora YOURS.safetensors       stage II
"""

import sys
from dataclasses import dataclass

from PIL import Image

from iclora.cli import guard, note, parse
from iclora.curate.chain import curate
from iclora.curate.eyes import Box
from iclora.curate.options import CurateConfig
from iclora.judge import Verdict
from model.checkpoint import fingerprint
from sampling.images import fit, to_tensor

from .sets import PANEL
from .truth import Reader, Reading, Seen, load_reader, read, reader_path, same_traits
from .world import SHAPES, box

CROP, GROUND = 40, 62  # a crop's side, and where it ends in a panel: its subject is small and stands in the middle then


@dataclass(frozen=True)
class TruthJudge:
    """Judges whether two pictures show the same subjects: 4 for a trait that the reader sees in both, else 0."""

    reader: Reader

    def __call__(self, first: Image.Image, second: Image.Image) -> Verdict:
        """Compare the subjects of the second picture with those of their shapes in the first, which may be a crop."""
        subjects = self.see(second).seen
        return max((compare(self.see(way).seen, subjects) for way in (first, in_panel(first))), key=lambda v: v.score)

    def see(self, picture: Image.Image) -> Reading:
        (reading,) = read(self.reader, to_tensor(fit(picture, PANEL, PANEL)))
        return reading


def compare(first: tuple[Seen, ...], second: tuple[Seen, ...]) -> Verdict:
    """Score the traits of subjects that both pictures show."""
    pairs = [(one, other) for other in second for one in first if one.shape == other.shape]
    parts = {
        f"{other.shape} {trait}": 4 * same for one, other in pairs for trait, same in same_traits(one, other).items()
    }
    parts = parts or {"shape": 0}  # nobody is there twice
    return Verdict(parts, sum(parts.values()) / len(parts))


def in_panel(crop: Image.Image) -> Image.Image:
    """Put a crop where the reader looks, at the size of a small subject."""
    panel = fit(crop, PANEL, PANEL).copy()
    panel.paste(fit(crop, CROP, CROP), ((PANEL - CROP) // 2, GROUND - CROP))
    return panel


@dataclass(frozen=True)
class WorldLocator:
    """Finds the subject whose shape words name, where the reader sees it."""

    reader: Reader

    def __call__(self, picture: Image.Image, words: str) -> Box | None:
        (reading,) = read(self.reader, to_tensor(fit(picture, PANEL, PANEL)))
        shapes = [shape for shape in SHAPES if shape in words.split()]
        for which, one in enumerate(reading.seen):
            if one.shape in shapes:
                return tuple(edge * picture.width / 64 for edge in box(reading.specify(), which))
        return None


def main(argv: list[str] | None = None) -> int:
    return guard(lambda: run(parse(CurateConfig, argv, __doc__, "python -m lab.curate")))


def run(config: CurateConfig) -> None:
    """Run the factory with the reader that lies beside the model's files, unless another judge is asked for."""
    path = reader_path(config.model)
    if not path.is_file():
        raise ValueError(f"{path.parent} has no reader; python -m iclora.curate needs none")
    name, reader = f"truth {fingerprint([path])[:8]}", load_reader(config.model)
    judge = None if config.judge else (name, TruthJudge(reader))
    curate(config, note, judge, None if config.detector else (name, WorldLocator(reader)))


if __name__ == "__main__":
    sys.exit(main())
