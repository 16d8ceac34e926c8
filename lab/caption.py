"""Caption drawn sets without an endpoint: the reader tells what it sees.

python -m lab.caption YOURS
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from iclora import caption
from iclora.prompts import markers_for
from sampling.images import fit, to_tensor

from .captions import joint_caption
from .sets import PANEL
from .truth import Reader, load_reader, read


@dataclass(frozen=True)
class ReaderTeller:
    """Tells what a reader of the picture world sees."""

    reader: Reader

    def __call__(
        self, panels: Sequence[Image.Image], markers: Sequence[str], tag: str, refused: caption.Refused
    ) -> str:
        """Write a joint caption. Errors: ValueError if nobody is seen in a panel"""
        image = torch.cat([to_tensor(fit(panel, PANEL, PANEL)) for panel in panels])  # (panels, 3, 64, 64)
        readings = read(self.reader, image)
        if empty := [number for number, reading in enumerate(readings, start=1) if not reading.seen]:
            raise ValueError(f"the reader sees nobody in panel {empty[0]}; it knows drawn panels only")
        text = joint_caption(tuple(reading.specify() for reading in readings), len(panels), 1)
        for ours, asked in zip(markers_for("image", len(panels), 1), markers, strict=False):
            text = text.replace(ours, asked)
        return f"{tag} {text}".strip()


def make_teller(config: caption.CaptionConfig, limit: int, answers: list) -> ReaderTeller:
    """Load the reader that lies beside the model's files."""
    return ReaderTeller(load_reader(config.model))


def main(argv: list[str] | None = None) -> int:
    return caption.main(argv, make_teller, "lab.caption")


if __name__ == "__main__":
    sys.exit(main())
