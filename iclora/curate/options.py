"""What the factory can be asked for."""

from dataclasses import dataclass

from ..config import DEVICES, DTYPES, LAST_SEED, LORA, MODEL, check, option
from ..prompts import nearest
from .catalogue import STAGE_ONE, STAGES

CHAIN = ("taxonomy", *STAGES)


@dataclass(frozen=True)
class CurateConfig:
    """What the factory is asked for.

    Errors: ValueError for a number outside its range or an unknown choice
    """

    out: str = option("runs/factory", "folder of the catalogue and its pictures; a run found there goes on")
    count: int = option(40, "pairs that are tried in all; more may be asked for later", valid=(1, 10**8))
    stages: str | None = option(None, f"only these of {','.join(CHAIN)} (default: to export; with --lora all)")
    redo: str | None = option(None, "first forget this stage, and all behind it", choices=CHAIN)
    seed: int = option(0, "of everything that is drawn", valid=(0, LAST_SEED))
    model: str = option("tiny", "the text-to-image model: a folder under weights/, or a path", **MODEL)
    words: str | None = option(None, "word lists (default: the factory's, for the model)", metavar="FILE.json")
    writer: str | None = option(None, "a chat endpoint that writes subjects and scenes instead", metavar="URL")
    writer_model: str = option("default", "the model's name there", metavar="NAME")
    steps: int | None = option(None, "Euler steps of every picture (default: sample.py's)", valid=(1, 1000))
    seam: float = option(0.65, "least share of lines with a large step at the seam", valid=(0, 1))
    dino: float = option(0.5, "least cosine of DINOv2's features of two pictures", valid=(-1, 1))
    dino_model: str | None = option(None, "folder of a DINOv2 (default: dinov2/ beside the model)", metavar="DIR")
    judge: str | None = option(None, "a chat endpoint, or a folder of a CLIP (default: clip/)", metavar="URL|DIR")
    judge_model: str = option("default", "the model's name at the endpoint", metavar="NAME")
    judge_score: float = option(3.5, "least mean score of the parts, each 0 to 4", valid=(0, 4))
    timeout: int = option(120, "seconds to wait for an endpoint's answer", valid=(1, 3600))
    at_once: int = option(4, "pairs that an endpoint judges at a time", valid=(1, 256))
    where: str | None = option(None, "export what this SQL condition selects instead: 'dino > 0.7 and judge >= 3'")
    detector: str | None = option(
        None, "folder of an OWLv2, which finds subjects (default: owlv2/ beside the model)", metavar="DIR"
    )
    lora: str | None = option(None, "the LoRA of stage I, which draws subjects again", **LORA)
    device: str = option("auto", "auto is cuda if there is one, else mps, else cpu", choices=DEVICES)
    dtype: str | None = option(None, "of the weights, as sample.py's", choices=DTYPES)

    def __post_init__(self) -> None:
        check(self)
        for name in self.chosen:
            if name not in CHAIN:
                advice = f"{nearest(name, CHAIN)}choose of {', '.join(CHAIN)}"
                raise ValueError(f"--stages {ascii(name[:40])} is unknown; {advice}")
        if "redraw" in self.chosen and not self.lora:
            raise ValueError("redraw needs the LoRA of stage I; train it on pairs.json and give --lora")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The stages to run."""
        if self.stages is None:
            return CHAIN if self.lora else ("taxonomy", *STAGE_ONE)
        return tuple(name.strip() for name in self.stages.split(","))

    def bar(self, stage: str) -> float | None:
        """Give the score from which a stage keeps an item, if it has one."""
        return {"split": self.seam, "dino": self.dino, "judge": self.judge_score}.get(stage.rstrip("2"))
