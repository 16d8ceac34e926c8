"""What a script can be asked for, and the rows of defaults that depend on the model.

One frozen dataclass per script, one field per knob. None means undecided: a flag beats the preset, the preset beats
the model's row, the row beats the plain default.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .knobs import check, flag, knob
from .prompts import TASKS, Task

if TYPE_CHECKING:  # torch takes a second to import, and a typo shall be answered at once
    from model.flux import FluxConfig

GRID = "2x2"
REFERENCE_GUIDANCE = 4.0  # UNO's
LAST_SEED = 2**63 - 1
METHODS = IN_CONTEXT, UNO = "in-context-lora", "uno"
REFERENCE_ATTENTION = JOINT, ALONE = "joint", "alone"
AS_PUBLISHED = {"offset": "d", "offset_scale": 1.0, "posterior": "sample", "reference_attention": JOINT}  # by UNO
PAPER = ("model", "method")  # what decides the settings that a paper gives


@dataclass(frozen=True)
class SampleConfig:
    """What sample.py is asked for.

    Errors: ValueError for a number outside its range or an unknown choice
    """

    grid: str | None = knob(
        None,
        f"rows and columns of the set, 3x1 being three rows (default: the preset's; 1x1 with --ref; else {GRID})",
        metavar="ROWSxCOLS",
        follows=("preset",),
    )
    mask: str = knob("all", "panels to generate, in reading order: 3 or 2,4 or 2-4; the others are kept")
    panels: tuple[str, ...] = knob(
        (),
        "the kept panels in reading order, or those of the whole grid (default: a bundled example)",
        metavar="PICTURE",
        path=True,
        follows=("set",),
    )
    set: str | None = knob(
        None,
        "a folder instead of --panels, with 1.png, 2.png, ... and, if there is one, caption.txt",
        metavar="DIR",
        path=True,
        follows=("panels",),
    )
    ref: tuple[str, ...] = knob(
        (),
        "reference pictures, any number; what they show is to appear in the picture (UNO)",
        metavar="PICTURE",
        path=True,
    )
    prompt: str | None = knob(
        None,
        "the joint caption of all panels; beside --panel-prompt the sentence before them",
        metavar="TEXT",
        follows=("set", "panel_prompt"),
    )
    panel_prompt: tuple[str, ...] = knob((), "what each panel shows, one text for each, kept ones too", metavar="TEXT")
    preset: str | None = knob(
        None, f"a published task, for its grid, size and markers: {', '.join(TASKS)}", choices=tuple(TASKS)
    )
    model: str = knob(
        "tiny",
        "a folder under weights/, or the path of a model folder or of a transformer file",
        metavar="NAME|PATH",
        path=True,
    )
    steps: int | None = knob(None, "Euler steps (default: 20; schnell 4)", valid=(1, 1000), follows=("model",))
    guidance: float | None = knob(
        None,
        "strength of the text, as distilled into the model (default: 3.5, with --ref 4; schnell has none)",
        valid=(0, 100),
        follows=("model", "ref"),
    )
    seed: int = knob(0, "of the first picture; the next ones count up", valid=(0, LAST_SEED))
    num: int = knob(1, "how many pictures to make", valid=(1, 10_000))
    lora: tuple[str, ...] = knob(
        (),
        "LoRA files to apply, each with a strength behind a colon if it is not 1: storyboard.safetensors:0.8 "
        "(default: none; with --ref the loras/uno.safetensors of a model that has one, also beside those that train.py "
        "made for panels)",
        metavar="FILE[:STRENGTH]",
        path=True,
    )
    panel_size: str | None = knob(
        None,
        "pixels, 512 or 512x768 (default: the preset's, else 512; for tiny 64)",
        metavar="WIDTHxHEIGHT",
        follows=("preset", "model"),
    )
    ref_size: int | None = knob(
        None,
        "longer side of a reference in pixels (default: the LoRA's, or 512, of several 320, for tiny 64)",
        valid=(16, 2048),
        follows=("model", "lora", "ref"),
    )
    offset: str | None = knob(
        None,
        "references' places: d diagonally off, h below, w beside, o on the picture (default: the LoRA's, or d)",
        choices=("d", "h", "w", "o"),
        follows=("lora",),
    )
    offset_scale: float | None = knob(
        None, "multiplies how far past it they stand (default: the LoRA's, or 1)", valid=(0, 100), follows=("lora",)
    )
    posterior: str | None = knob(
        None,
        "references' latents: a sample under the seed, as UNO's, or the mean (default: the LoRA's, or sample)",
        choices=("sample", "mean"),
        follows=("lora",),
    )
    reference_attention: str | None = knob(
        None,
        "references see all tokens, as UNO's, or each other alone, which makes steps faster and needs a LoRA "
        "that was trained so (default: the LoRA's, or joint)",
        choices=REFERENCE_ATTENTION,
        follows=("lora",),
    )
    schedule: str = knob(
        "tokens",
        "times for the picture's number of tokens, or for 64 times too few, as UNO's release has them",
        choices=("tokens", "uno-release"),
    )
    strength: float = knob(
        1.0, "below 1, masked panels start from the given ones as drafts, for that part of the steps", valid=(0, 1)
    )
    fit: str = knob("crop", "how pictures come to the panel size", choices=("crop", "pad", "stretch"))
    device: str = knob("auto", "auto is cuda if there is one, else cpu", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str | None = knob(
        None,
        "of the weights (default: bfloat16; for tiny on a CPU float32)",
        choices=("float32", "bfloat16", "float16"),
        follows=("model",),
    )
    tile: bool = knob(False, "decode in overlapping tiles: less memory, slightly other pixels")
    out: str = knob("out", "folder for the files; nothing in it is overwritten", metavar="DIR", path=True, saved=False)
    config: str | None = knob(
        None,
        "replay the JSON saved beside a picture; flags given as well win",
        metavar="FILE.json",
        path=True,
        saved=False,
    )

    def __post_init__(self) -> None:
        check(self)
        if self.seed + self.num - 1 > LAST_SEED:
            raise ValueError(f"--seed {self.seed} leaves no room for --num {self.num}; the last seed is {LAST_SEED}")


@dataclass(frozen=True)
class TrainConfig:
    """What train.py is asked for.

    Errors: ValueError for a number outside its range or an unknown choice
    """

    data: str = knob(
        "sets", "folder with sets, or a .jsonl that lists them; with uno a .json of pairs", metavar="PATH", path=True
    )
    method: str = knob(
        IN_CONTEXT, "uno learns to follow reference pictures, the other relations between panels", choices=METHODS
    )
    stage: int | None = knob(
        None,
        "of uno: 1 one reference, 2 several, from the LoRA of stage 1 (default: 1)",
        valid=(1, 2),
        follows=("method",),
    )
    grid: str | None = knob(
        None,
        "rows and columns of every set, 3x1 being three rows (default: what each set.json says)",
        metavar="ROWSxCOLS",
        follows=("method",),
    )
    model: str = knob(
        "tiny",
        "the base: a folder under weights/, or the path of a model folder or of a transformer file",
        metavar="NAME|PATH",
        path=True,
    )
    rank: int | None = knob(
        None, "of the LoRA, and its alpha (default: 16; uno 512, on tiny 64)", valid=(1, 4096), follows=("method",)
    )
    targets: str | None = knob(
        None,
        "what is adapted: all-linear, attn, mlp, mod, uno, several with commas, or names of modules (default: "
        "all-linear; uno uno, which is qkv and proj)",
        follows=("method",),
    )
    init_lora: str | None = knob(None, "start from this LoRA file instead of a fresh one", metavar="FILE", path=True)
    condition: str = knob(
        "none",
        "clean: randomly chosen panels stay clean, the loss is on the others, and sampling does the same",
        choices=("none", "clean"),
        follows=("method",),
    )
    concat: str = knob(
        "pixels",
        "panels become one picture before the autoencoder sees them, or one row of tokens behind it",
        choices=("pixels", "tokens"),
        follows=("method",),
    )
    text: str = knob(
        "joint",
        "one caption for all panels, or each panel reads its own part and what stands before the first",
        choices=("joint", "panel"),
        follows=("method",),
    )
    ref_size: int | None = knob(
        None,
        "longer side of a reference in pixels (default: of a single one 512, of several 320; tiny 64)",
        valid=(16, 2048),
        follows=("model", "method"),
    )
    offset: str | None = knob(
        None,
        "references' places, as sample.py's (default: the starting LoRA's, or d)",
        choices=("d", "h", "w", "o"),
        follows=("method", "init_lora"),
    )
    offset_scale: float | None = knob(
        None, "as sample.py's (default: the starting LoRA's, or 1)", valid=(0, 100), follows=("method", "init_lora")
    )
    posterior: str | None = knob(
        None,
        "references' latents: a new sample in every step, or the mean (default: the starting LoRA's, or sample)",
        choices=("sample", "mean"),
        follows=("method", "init_lora"),
    )
    reference_attention: str | None = knob(
        None,
        "references see all tokens and their time, as UNO's, or each other alone, at time 0: once for all steps "
        "of sampling (default: the starting LoRA's, or joint)",
        choices=REFERENCE_ATTENTION,
        follows=("method", "init_lora"),
    )
    steps: int | None = knob(
        None, "optimizer steps (default: 5000; tiny 400, with uno 1500)", valid=(1, 10_000_000), follows=PAPER
    )
    batch: int | None = knob(
        None, "sets in a step, over all processes (default: 4, tiny 8; uno 16)", valid=(1, 100_000), follows=PAPER
    )
    accumulate: int = knob(1, "parts that a step's batch is worked through in", valid=(1, 10_000))
    lr: float | None = knob(
        None, "learning rate of AdamW (default: 1e-4, with uno 1e-5; tiny 1e-3)", valid=(0, 1), follows=PAPER
    )
    warmup: int = knob(10, "steps until the full learning rate", valid=(0, 1_000_000))
    decay: float | None = knob(
        None, "last share of steps, rate falling to 0 (default: 0; tiny 0.3, with uno 0.5)", valid=(0, 1), follows=PAPER
    )
    ema: float = knob(
        0.99, "decay of the averaged weights, which are what is saved; 0 saves the last ones", valid=(0, 0.99999)
    )
    dropout: float | None = knob(
        None, "share of captions that are left out (default: 0.05; uno 0.1)", valid=(0, 1), follows=("method",)
    )
    times: str | None = knob(
        None,
        "how times are drawn; shifted moves them towards noise as sampling does (default: logit-normal; uno shifted)",
        choices=("logit-normal", "shifted", "uniform"),
        follows=("method",),
    )
    panel_size: int | None = knob(
        None,
        "side in pixels of a square panel; others keep their shape and get its area (default: 512; tiny 64)",
        valid=(16, 8192),
        follows=("model",),
    )
    fit: str = knob("crop", "how pictures come to the size of their bucket", choices=("crop", "pad", "stretch"))
    holdout: float = knob(0.1, "share of the sets kept for the validation loss, at most 32 in all", valid=(0, 0.9))
    save_every: int = knob(250, "steps between checkpoints", valid=(1, 10_000_000))
    sample_every: int = knob(250, "steps between sheets of samples; 0 makes none", valid=(0, 10_000_000))
    sample_prompt: tuple[str, ...] = knob(
        (), "also show on every sheet what these texts give, in the grid of the first sets", metavar="TEXT"
    )
    checkpointing: bool | None = knob(None, "less memory, a third slower (default: yes; tiny no)", follows=("model",))
    seed: int = knob(0, "of everything that is drawn", valid=(0, LAST_SEED))
    device: str = knob("auto", "auto is cuda if there is one, else cpu", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str | None = knob(
        None,
        "of the base's weights; the LoRA's are float32 (default: bfloat16; for tiny on a CPU float32)",
        choices=("float32", "bfloat16"),
        follows=("model",),
    )
    tensorboard: bool = knob(False, "also write the metrics for TensorBoard, which must be installed", saved=False)
    out: str = knob("runs/lora", "folder of the run; a run found there goes on", metavar="DIR", path=True, saved=False)
    config: str | None = knob(
        None,
        "take the settings of another run's config.json; flags given as well win",
        metavar="FILE.json",
        path=True,
        saved=False,
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ModelRow:
    """Defaults that depend on the model.

    text: T5 tokens; None is the tokenizer's own limit
    guidance: None if the model embeds none
    shift: whether longer sequences spend more steps near noise
    panel: pixels of a square panel
    references: pixels of the longer side of a single reference, and of each of several
    cpu_dtype: of the weights on a CPU; elsewhere it is bfloat16
    """

    name: str
    text: int | None
    steps: int
    guidance: float | None
    shift: bool
    panel: int
    references: tuple[int, int]
    cpu_dtype: str

    def long_sides(self, ref_size: int | None) -> tuple[int, int]:
        """Gives the longer sides of a single reference, and of each of several, where --ref-size says something."""
        return self.references if ref_size is None else (ref_size, ref_size)


DEV = ModelRow("dev", 512, 20, 3.5, True, 512, (512, 320), "bfloat16")
SCHNELL = ModelRow("schnell", 256, 4, None, False, 512, (512, 320), "bfloat16")
TINY = ModelRow("tiny", None, 20, 3.5, True, 64, (64, 64), "float32")
TINY_UNGUIDED = replace(TINY, guidance=None)
TRAINING = {  # defaults of train.py, as in arXiv:2410.23775 and arXiv:2504.02160
    IN_CONTEXT: {
        "steps": 5000, "batch": 4, "lr": 1e-4, "rank": 16, "targets": "all-linear", "dropout": 0.05,
        "times": "logit-normal", "decay": 0.0, "checkpointing": True,
    },
    UNO: {
        "steps": 5000, "batch": 16, "lr": 1e-5, "rank": 512, "targets": "uno", "dropout": 0.1, "times": "shifted",
        "decay": 0.0, "checkpointing": True, "stage": 1, **AS_PUBLISHED,
    },
}  # fmt: skip
TINY_TRAINING = {
    IN_CONTEXT: {"steps": 400, "batch": 8, "lr": 1e-3, "decay": 0.3, "checkpointing": False},
    UNO: {"steps": 1500, "lr": 1e-3, "rank": 64, "decay": 0.5, "checkpointing": False},
}
USELESS = {  # to a method
    IN_CONTEXT: ("stage", "ref_size", "offset", "offset_scale", "posterior", "reference_attention"),
    UNO: ("grid", "condition", "concat", "text"),
}


def model_row(shape: "FluxConfig") -> ModelRow:
    """Finds the row of a model by what it is, not by what its file is called."""
    if shape.hidden_size < 1024:
        return TINY if shape.guidance_embed else TINY_UNGUIDED
    return DEV if shape.guidance_embed else SCHNELL


def settle(config: SampleConfig, task: Task | None, row: ModelRow, device: str) -> SampleConfig:
    """Decides what was left open: by the preset, else by the model, else plainly.

    device: cpu, cuda or mps
    returns: no field is None any more, except those that may be: set, prompt, preset, config, and guidance without it
    """
    chosen = {
        "grid": f"{task.rows}x{task.cols}" if task else "1x1" if config.ref else GRID,
        "panel_size": "{}x{}".format(*task.panel_size) if task and row.name != "tiny" else str(row.panel),
        "steps": row.steps,
        "guidance": REFERENCE_GUIDANCE if config.ref and row.guidance is not None else row.guidance,
        "ref_size": row.references[len(config.ref) > 1],
        **AS_PUBLISHED,
        "dtype": row.cpu_dtype if device == "cpu" else "bfloat16",
    }
    undecided = {name: value for name, value in chosen.items() if getattr(config, name) is None}
    return replace(config, **undecided, device=device)


def settle_training(config: TrainConfig, row: ModelRow, device: str) -> TrainConfig:
    """Decides what was left open for training, by the method and the model.

    device: cpu, cuda or mps
    returns: no field is None any more, except those that may be: grid, init_lora, config, ref_size where it follows
        the number of references, and what the method has no use for
    Errors: ValueError for a setting of another method
    """
    for name in USELESS[config.method]:
        if getattr(config, name) != getattr(TrainConfig, name):
            raise ValueError(f"{flag(name)} means nothing to --method {config.method}; leave it out")
    chosen = {**TRAINING[config.method], **(TINY_TRAINING[config.method] if row.name == "tiny" else {})}
    chosen |= {"panel_size": row.panel, "dtype": row.cpu_dtype if device == "cpu" else "bfloat16"}
    undecided = {name: value for name, value in chosen.items() if getattr(config, name) is None}
    return replace(config, **undecided, device=device)
