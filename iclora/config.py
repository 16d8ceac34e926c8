"""What a script can be asked for, and the rows of defaults that depend on the model.

One frozen dataclass per script, one field per knob. None means undecided: a flag beats the preset, the preset beats
the model's row, the row beats the plain default.
"""

import difflib
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from .prompts import TASKS, Task

if TYPE_CHECKING:  # torch takes a second to import, and a typo shall be answered at once
    from model.flux import FluxConfig

GRID = "2x2"
LAST_SEED = 2**63 - 1


def knob(default: Any, help: str, **more: Any) -> Any:
    """Makes one field of a configuration.

    help: one line for --help; the default is added to it unless that is None, False or empty
    metavar: stands for the value in --help
    choices: the valid texts
    valid: (least, most) of a number
    path: True if it says where something lies, which is kept out of pictures
    saved: False if it has no influence on the result and is not replayed
    follows: names of other knobs; where one of them is given beside a replayed file, the file's value is forgotten
    """
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class SampleConfig:
    """What sample.py is asked for.

    Errors: ValueError for a number outside its range or an unknown choice
    """

    grid: str | None = knob(
        None, f"the set's rows and columns, 3x1 being three rows (default: the preset's, else {GRID})",
        metavar="ROWSxCOLS", follows=("preset",),
    )
    mask: str = knob("all", "panels to generate, in reading order: 3 or 2,4 or 2-4; the others are kept")
    panels: tuple[str, ...] = knob(
        (), "the kept panels in reading order, or those of the whole grid (default: a bundled example)",
        metavar="PICTURE", path=True, follows=("set",),
    )
    set: str | None = knob(
        None, "a folder instead of --panels, with 1.png, 2.png, ... and, if there is one, caption.txt",
        metavar="DIR", path=True, follows=("panels",),
    )
    prompt: str | None = knob(
        None, "the joint caption of all panels; beside --panel-prompt the sentence before them",
        metavar="TEXT", follows=("set", "panel_prompt"),
    )
    panel_prompt: tuple[str, ...] = knob((), "what each panel shows, one text for each, kept ones too", metavar="TEXT")
    preset: str | None = knob(
        None, f"a published task, for its grid, size and markers: {', '.join(TASKS)}", choices=tuple(TASKS)
    )
    model: str = knob(
        "tiny", "a folder under weights/, or the path of a model folder or of a transformer file",
        metavar="NAME|PATH", path=True,
    )
    steps: int | None = knob(None, "Euler steps (default: 20; schnell 4)", valid=(1, 1000), follows=("model",))
    guidance: float | None = knob(
        None, "strength of the text, as distilled into the model (default: 3.5; schnell has none)",
        valid=(0, 100), follows=("model",),
    )
    seed: int = knob(0, "of the first picture; the next ones count up", valid=(0, LAST_SEED))
    num: int = knob(1, "how many pictures to make", valid=(1, 10_000))
    panel_size: str | None = knob(
        None, "pixels, 512 or 512x768 (default: the preset's, else 512, for tiny 64)",
        metavar="WIDTHxHEIGHT", follows=("preset", "model"),
    )
    strength: float = knob(
        1.0, "below 1, masked panels start from the given ones as drafts, for that part of the steps", valid=(0, 1)
    )
    fit: str = knob("crop", "how pictures come to the panel size", choices=("crop", "pad", "stretch"))
    device: str = knob("auto", "auto is cuda if there is one, else cpu", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str | None = knob(
        None, "of the weights (default: bfloat16; for tiny on a CPU float32)",
        choices=("float32", "bfloat16", "float16"), follows=("model",),
    )
    tile: bool = knob(False, "decode in overlapping tiles: less memory, slightly other pixels")
    out: str = knob("out", "folder for the files; nothing in it is overwritten", metavar="DIR", path=True, saved=False)
    config: str | None = knob(
        None, "replay the JSON saved beside a picture; flags given as well win",
        metavar="FILE.json", path=True, saved=False,
    )

    def __post_init__(self) -> None:
        check(self)
        if self.seed + self.num - 1 > LAST_SEED:
            raise ValueError(f"--seed {self.seed} leaves no room for --num {self.num}; the last seed is {LAST_SEED}")


@dataclass(frozen=True)
class ModelRow:
    """Defaults that depend on the model.

    text: T5 tokens; None is the tokenizer's own limit
    guidance: None if the model embeds none
    shift: whether longer sequences spend more steps near noise
    panel: pixels of a square panel
    cpu_dtype: of the weights on a CPU; elsewhere it is bfloat16
    """

    name: str
    text: int | None
    steps: int
    guidance: float | None
    shift: bool
    panel: int
    cpu_dtype: str


DEV = ModelRow("dev", 512, 20, 3.5, True, 512, "bfloat16")
SCHNELL = ModelRow("schnell", 256, 4, None, False, 512, "bfloat16")
TINY = ModelRow("tiny", None, 20, 3.5, True, 64, "float32")


def model_row(shape: "FluxConfig") -> ModelRow:
    """Finds the row of a model by what it is, not by what its file is called."""
    if not shape.guidance_embed:
        return SCHNELL
    return TINY if shape.hidden_size < 1024 else DEV


def settle(config: SampleConfig, task: Task | None, row: ModelRow, device: str) -> SampleConfig:
    """Decides what was left open: by the preset, else by the model, else plainly.

    device: cpu, cuda or mps
    returns: no field is None any more, except those that may be: set, prompt, preset, config, and guidance without it
    """
    chosen = {
        "grid": f"{task.rows}x{task.cols}" if task else GRID,
        "panel_size": "{}x{}".format(*task.panel_size) if task else str(row.panel),
        "steps": row.steps,
        "guidance": row.guidance,
        "dtype": row.cpu_dtype if device == "cpu" else "bfloat16",
    }
    undecided = {name: value for name, value in chosen.items() if getattr(config, name) is None}
    return replace(config, **undecided, device=device)


def saved(config: Any, paths: bool = True) -> dict[str, Any]:
    """Lists the knobs that make the result, to be written beside it and replayed.

    paths: False leaves out what says where something lies
    """
    kept = [f for f in fields(config) if f.metadata.get("saved", True) and (paths or not f.metadata.get("path"))]
    return {f.name: getattr(config, f.name) for f in kept}


def flag(name: str) -> str:
    """Writes a knob's name as its flag."""
    return "--" + name.replace("_", "-")


def nearest(word: str, words: Any) -> str:
    """Suggests what may have been meant, as the beginning of a sentence, or nothing."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {near[0]}? " if near else ""


def check(config: Any) -> None:
    """Refuses unknown choices and numbers outside their ranges; NaN is outside of every range.

    Errors: ValueError with the flag, its value and what is valid
    """
    for knob_field in fields(config):
        value, about = getattr(config, knob_field.name), knob_field.metadata
        if value is None:
            continue
        if "choices" in about and value not in about["choices"]:
            raise ValueError(
                f"{flag(knob_field.name)} {ascii(value[:40])} is unknown; {nearest(value, about['choices'])}"
                f"choose one of {', '.join(about['choices'])}"
            )
        if "valid" in about:
            least, most = about["valid"]
            if not least <= value <= most:
                raise ValueError(f"{flag(knob_field.name)} {str(value)[:40]} is out of range; use {least} to {most}")
