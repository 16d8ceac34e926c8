"""What a script can be asked for, and the defaults that depend on the model and on the method.

One frozen dataclass per script, one field per option. None means undecided: a flag beats the preset, the preset beats
the model's defaults, these beat the plain default.
"""

import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from .prompts import TASKS, Task, has_markers, nearest

if TYPE_CHECKING:  # torch takes a second to import, and a typo shall be answered at once
    from model.flux import FluxConfig

REFERENCE_GUIDANCE = 4.0  # UNO's
LAST_SEED = 2**63 - 1
METHODS = IN_CONTEXT, UNO = "in-context-lora", "uno"
ATTENTIONS = JOINT, ALONE = "joint", "alone"
OFFSETS = ("d", "h", "w", "o")
POSTERIORS = ("sample", "mean")
LORA_INITS = ("kaiming", "uno")
SCHEDULES = ("tokens", "uno-release")
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("float32", "bfloat16", "float16")
FIT_RULES = ("crop", "pad", "stretch")
TIMES = ("logit-normal", "shifted", "uniform")
REF_SIZES, COUNTS = (16, 2048), (1, 100_000)
PLACE = {"path": True, "saved": False}  # where something lies, without influence on the result
MODEL = {"path": True, "metavar": "NAME|PATH"}
OFFLOAD = "stream the blocks from the CPU's memory: for small GPUs, exact and slower"
PICTURES = {"metavar": "PICTURE", "path": True}
LORA = {"path": True, "metavar": "FILE[:STRENGTH]"}
CARD = {"metavar": "GB", "valid": (0.001, 10_000), "saved": False}
VRAM = "memory of a card to fit into, by whatever it takes (default: what the device has free)"
DRY_RUN = "print what fits, and the memory it takes, and stop"
SHARED = {"model", "device", "dtype", "quantize", "compile", "offload", "vram", "dry_run"}  # by all requests of a job


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Make one field of a configuration.

    help: one line for --help; the default is added to it unless that is None, False or empty
    metadata: metavar, which stands for the value in --help; choices, the valid texts; valid, (least, most) of a
        number; words, other than yes and no; path=True if it says where something lies, which is kept out of
        pictures; saved=False if it has no influence on the result and is not replayed
    """
    return field(default=default, metadata={"help": help, **metadata})


def check(config: Any) -> None:
    """Refuse unknown choices, empty texts and numbers outside their ranges; NaN is outside of every range.

    Errors: ValueError with the flag, its value and what is valid
    """
    for item in fields(config):
        value, metadata = getattr(config, item.name), item.metadata
        if value is None or value == item.default:
            continue
        if value == "" and item.name != "prompt" or metadata.get("path") and isinstance(value, tuple) and "" in value:
            raise ValueError(f"{flag(item.name)} is empty; give it a value, or leave it out")
        if "choices" in metadata and value not in metadata["choices"]:
            choices = metadata["choices"]
            advice = f"{nearest(value, choices)}choose one of {', '.join(choices)}"
            raise ValueError(f"{flag(item.name)} {ascii(value[:40])} is unknown; {advice}")
        if "valid" in metadata:
            least, most = metadata["valid"]
            if not least <= value <= most:
                raise ValueError(f"{flag(item.name)} {str(value)[:40]} is out of range; use {least} to {most}")


def saved(config: Any) -> dict[str, Any]:
    """List the options that make the result, to be written beside it and replayed."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.metadata.get("saved", True)}


def flag(name: str) -> str:
    """Write an option's name as its flag."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class SampleConfig:
    """What sample.py is asked for.

    Errors: ValueError for a number outside its range or an unknown choice
    """

    grid: str | None = option(None, "ROWSxCOLS (default: the preset's; 1x1 with --ref or a --prompt of one; else 2x2)")
    mask: str = option("all", "panels to generate, in reading order: 3 or 2,4 or 2-4; the others are kept")
    panels: tuple[str, ...] = option((), "kept panels in reading order, or all (default: an example's)", **PICTURES)
    set: str | None = option(None, "instead: a folder of 1.png, 2.png ... and caption.txt", metavar="DIR", path=True)
    ref: tuple[str, ...] = option((), "references, any number: what they show is to appear (UNO)", **PICTURES)
    prompt: str | None = option(None, "joint caption; with --panel-prompt the sentence before them", metavar="TEXT")
    panel_prompt: tuple[str, ...] = option((), "what each panel shows, a text for each, kept ones too", metavar="TEXT")
    preset: str | None = option(None, f"grid, size and markers of a task: {', '.join(TASKS)}", choices=tuple(TASKS))
    model: str = option("tiny", "a folder under weights/, or the path of a model folder or transformer file", **MODEL)
    steps: int | None = option(None, "Euler steps (default: 20; schnell 4; UNO's released LoRA 25)", valid=(1, 1000))
    guidance: float | None = option(None, "text's strength (default: 3.5, --ref 4; schnell has none)", valid=(0, 100))
    seed: int = option(0, "of the first picture; the next ones count up", valid=(0, LAST_SEED))
    num: int = option(1, "how many pictures to make", valid=(1, 10_000))
    lora: tuple[str, ...] = option((), "LoRAs, their strength if not 1 (default: with --ref the model's own)", **LORA)
    panel_size: str | None = option(None, "pixels (default: the preset's, else 512; tiny 64)", metavar="WIDTHxHEIGHT")
    ref_size: int | None = option(
        None, "a reference's longer side in pixels (default: the LoRA's; 512, of several 320; tiny 64)", valid=REF_SIZES
    )
    offset: str | None = option(
        None, "references' places: d diagonal, h below, w beside, o none (default: the LoRA's, or d)", choices=OFFSETS
    )
    offset_scale: float | None = option(None, "how many times as far (default: the LoRA's, or 1)", valid=(0, 100))
    posterior: str | None = option(None, "of references (default: the LoRA's, or sample, as UNO)", choices=POSTERIORS)
    reference_attention: str | None = option(
        None, "alone: they see only each other (default: the LoRA's, or joint)", choices=ATTENTIONS
    )
    schedule: str | None = option(None, "uno-release: as UNO's code samples (default: the LoRA's)", choices=SCHEDULES)
    strength: float = option(1.0, "below 1: start from given drafts, for so much of the steps", valid=(0, 1))
    fit: str = option("crop", "how pictures come to the panel size", choices=FIT_RULES)
    device: str = option("auto", "auto is cuda if there is one, else mps, else cpu", choices=DEVICES)
    dtype: str | None = option(None, "of the weights (default: bfloat16; for tiny on a CPU float32)", choices=DTYPES)
    quantize: str | None = option(None, "fp8: half the memory, slightly other pictures", choices=("fp8",))
    compile: bool = option(False, "compile the blocks: slow to start, then faster; other last bits")
    offload: bool = option(False, OFFLOAD, saved=False)
    tile: bool = option(False, "decode in overlapping tiles: less memory, slightly other pixels")
    vram: float | None = option(None, VRAM, **CARD)
    dry_run: bool = option(False, DRY_RUN, saved=False)
    out: str = option("out", "folder for the files; nothing in it is overwritten", metavar="DIR", **PLACE)
    jobs: str | None = option(None, "many requests: rows of options, UNO's .json, DreamBench", metavar="LIST", **PLACE)
    config: str | None = option(None, "replay a saved JSON, or its picture; flags win", metavar="FILE", **PLACE)

    VOIDS = {  # a flag given beside a replayed file -> options whose recorded values it makes void
        "preset": ("grid", "panel_size"),
        "set": ("panels", "prompt"),
        "panels": ("set",),
        "panel_prompt": ("prompt",),
        "model": ("steps", "guidance", "panel_size", "ref_size", "dtype"),
        "ref": ("guidance", "ref_size"),
        "lora": ("ref_size", "offset", "offset_scale", "posterior", "reference_attention", "schedule"),
    }
    BEFORE = {}  # options that are younger than some saved files -> their values then

    def __post_init__(self) -> None:
        check(self)
        if self.seed + self.num - 1 > LAST_SEED:
            raise ValueError(f"--seed {self.seed} leaves no room for --num {self.num}; the last seed is {LAST_SEED}")


@dataclass(frozen=True)
class TrainConfig:
    """What train.py is asked for.

    Errors: ValueError for a number outside its range or an unknown choice
    """

    data: str = option("sets", "sets: a folder, or a .jsonl; uno: pairs, a .json", metavar="PATH", path=True)
    method: str = option(IN_CONTEXT, "uno follows reference pictures, the other relates panels", choices=METHODS)
    stage: int | None = option(None, "uno: 1 one reference, 2 several, from stage 1's LoRA (default: 1)", valid=(1, 2))
    grid: str | None = option(None, "ROWSxCOLS of every set (default: the preset's, else what each set.json says)")
    preset: str | None = option(None, "a published task's grid and, but for tiny, panel area", choices=tuple(TASKS))
    model: str = option("tiny", "the base: a folder under weights/, or a path, as sample.py's", **MODEL)
    rank: int | None = option(None, "of the LoRA, and its alpha (default: 16; uno 512, on tiny 64)", valid=(1, 4096))
    targets: str | None = option(
        None, "all-linear, attn, mlp, mod, uno, several with commas, or names of modules (default: all-linear; uno uno)"
    )
    init_lora: str | None = option(None, "start from this LoRA file instead of a fresh one", metavar="FILE", path=True)
    lora_init: str | None = option(None, "uno: by 1/rank (default: kaiming; uno uno; tiny kaiming)", choices=LORA_INITS)
    condition: str = option("none", "clean: random panels stay clean, as in sampling", choices=("none", "clean"))
    concat: str = option("pixels", "panels are joined before the autoencoder, or behind", choices=("pixels", "tokens"))
    text: str = option("joint", "all panels read the caption, or each its own part", choices=("joint", "panel"))
    ref_size: int | None = option(None, "as sample.py's (default: 512, of several 320; tiny 64)", valid=REF_SIZES)
    offset: str | None = option(None, "as sample.py's (default: the starting LoRA's, or d)", choices=OFFSETS)
    offset_scale: float | None = option(None, "as sample.py's (default: the starting LoRA's, or 1)", valid=(0, 100))
    posterior: str | None = option(None, "of references (default: the starting LoRA's, or sample)", choices=POSTERIORS)
    target_posterior: str | None = option(None, "of targets (default: mean; uno sample; tiny mean)", choices=POSTERIORS)
    reference_attention: str | None = option(None, "as sample.py's (default: the starting LoRA's)", choices=ATTENTIONS)
    steps: int | None = option(None, "optimizer steps (default: 5000; tiny 800, with uno 1500)", valid=(1, 10_000_000))
    batch: int | None = option(None, "sets in a step, over all processes (default: 4, tiny 8; uno 16)", valid=COUNTS)
    accumulate: int = option(1, "parts that a step's batch is worked through in", valid=(1, 10_000))
    lr: float | None = option(None, "learning rate of AdamW (default: 1e-4, with uno 1e-5; tiny 1e-3)", valid=(0, 1))
    eps: float | None = option(None, "of AdamW's denominator (default: 1e-6; uno, tiny 1e-8)", valid=(1e-16, 1))
    warmup: int = option(10, "steps until the full learning rate", valid=(0, 1_000_000))
    decay: float | None = option(None, "last share, rate falling to 0 (default: 0; tiny 0.3, uno 0.5)", valid=(0, 1))
    ema: float = option(0.99, "decay of the averaged weights, which are saved; 0 saves the last", valid=(0, 0.99999))
    dropout: float | None = option(None, "share of captions that are left out (default: 0.05; uno 0.1)", valid=(0, 1))
    times: str | None = option(None, "shifted: as in sampling (default: logit-normal; uno shifted)", choices=TIMES)
    panel_size: int | None = option(None, "of a square (default: the preset's, else 512; tiny 64)", valid=(16, 8192))
    composite_size: str | None = option(
        None,
        "instead: learn every set at several sizes, N being the side of a square with the area of the whole composite; "
        "none is enlarged (official: 512,768,1024,1280,1536)",
        metavar="N[,N...]",
    )
    fit: str = option("crop", "how pictures come to the size of their bucket", choices=FIT_RULES)
    holdout: float = option(0.1, "share of the sets kept for the validation loss, at most 32 in all", valid=(0, 0.9))
    save_every: int = option(250, "steps between checkpoints", valid=(1, 10_000_000))
    sample_every: int = option(250, "steps between sheets of samples; 0 makes none", valid=(0, 10_000_000))
    sample_prompt: tuple[str, ...] = option((), "a text of your own that every sheet shows, or several", metavar="TEXT")
    checkpointing: "bool | str | None" = option(
        None, "less memory, a third slower; auto: of as few blocks as need be (default: auto; tiny no)", words=("auto",)
    )
    seed: int = option(0, "of everything that is drawn", valid=(0, LAST_SEED))
    device: str = option("auto", "auto is cuda if there is one, else mps, else cpu", choices=DEVICES)
    dtype: str | None = option(None, "of the base (default: bfloat16; for tiny on a CPU float32)", choices=DTYPES[:2])
    quantize: str | None = option(None, "fp8: half the memory, slightly other gradients", choices=("fp8",))
    compile: bool = option(False, "compile the blocks, as sample.py's")
    offload: bool = option(False, OFFLOAD, saved=False)
    vram: float | None = option(None, VRAM, **CARD)
    dry_run: bool = option(False, DRY_RUN, saved=False)
    tensorboard: bool = option(False, "also write the metrics for TensorBoard, which must be installed", saved=False)
    out: str = option("runs/lora", "folder of the run, or a new one; a run found there goes on", metavar="DIR", **PLACE)
    config: str | None = option(None, "settings of another run's config.json; flags win", metavar="FILE.json", **PLACE)

    BEFORE = {"lora_init": "kaiming", "target_posterior": "mean", "eps": 1e-8}
    VOIDS = {
        "model": ("ref_size", "steps", "batch", "lr", "decay", "panel_size", "checkpointing", "dtype", *BEFORE),
        "method": (
            *("stage", "grid", "rank", "targets", "condition", "concat", "text", "ref_size", "offset", "offset_scale"),
            *("posterior", "reference_attention", "steps", "batch", "lr", "decay", "dropout", "times"),
            *("preset", "composite_size", *BEFORE),
        ),
        "preset": ("grid", "panel_size"),
        "panel_size": ("composite_size",),
        "composite_size": ("panel_size",),
        "init_lora": ("offset", "offset_scale", "posterior", "reference_attention"),
    }

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ModelDefaults:
    """Defaults that depend on the model."""

    name: str
    text_length: int | None  # T5 tokens; None is the tokenizer's own limit
    steps: int
    guidance: float | None  # None if the model embeds none
    shift: bool  # whether longer sequences spend more steps near noise
    panel: int  # pixels of a square panel
    references: tuple[int, int]  # pixels of the longer side of a single reference, and of each of several
    cpu_dtype: str  # of the weights on a CPU; elsewhere it is bfloat16

    def long_sides(self, ref_size: int | None) -> tuple[int, int]:
        """Give the longer sides of a single reference, and of each of several, where --ref-size says something."""
        return self.references if ref_size is None else (ref_size, ref_size)

    def guidance_with(self, references: bool) -> float | None:
        """Give the guidance, which is UNO's where there are references."""
        return REFERENCE_GUIDANCE if references and self.guidance is not None else self.guidance


DEV = ModelDefaults("dev", 512, 20, 3.5, True, 512, (512, 320), "bfloat16")
SCHNELL = ModelDefaults("schnell", 256, 4, None, False, 512, (512, 320), "bfloat16")
TINY = ModelDefaults("tiny", None, 20, 3.5, True, 64, (64, 64), "float32")
TINY_UNGUIDED = replace(TINY, guidance=None)
AS_PUBLISHED = {"offset": "d", "offset_scale": 1.0, "posterior": "sample", "reference_attention": JOINT}  # by UNO
PAPERS = {"steps": 5000, "decay": 0.0, "checkpointing": "auto"}  # arXiv:2410.23775 and arXiv:2504.02160
IN_CONTEXT_PAPER = {"batch": 4, "lr": 1e-4, "rank": 16, "targets": "all-linear", "dropout": 0.05, "times": TIMES[0]}
IN_CONTEXT_CODE = {"lora_init": "kaiming", "target_posterior": "mean", "eps": 1e-6}  # of ai-toolkit's adamw8bit
UNO_PAPER = {"batch": 16, "lr": 1e-5, "rank": 512, "targets": "uno", "dropout": 0.1, "times": TIMES[1], "stage": 1}
UNO_CODE = {"lora_init": "uno", "target_posterior": "sample", "eps": 1e-8}  # bytedance/UNO@d305981
TRAINING = {  # defaults of train.py
    IN_CONTEXT: PAPERS | IN_CONTEXT_PAPER | IN_CONTEXT_CODE,
    UNO: PAPERS | UNO_PAPER | UNO_CODE | AS_PUBLISHED,
}
TINY_TRAINING = {
    IN_CONTEXT: {"steps": 800, "batch": 8, "lr": 1e-3, "decay": 0.3, "checkpointing": False, "eps": 1e-8},
    UNO: {"steps": 1500, "lr": 1e-3, "rank": 64, "decay": 0.5, "checkpointing": False}
    | {"lora_init": "kaiming", "target_posterior": "mean"},
}
NOT_FOR_METHOD = {
    IN_CONTEXT: ("stage", "ref_size", *AS_PUBLISHED),
    UNO: ("grid", "preset", "condition", "concat", "text", "composite_size"),
}
UNO_RELEASE = {"steps": 25, "schedule": "uno-release"}  # of the released sampler, for the released LoRA


def model_defaults(config: "FluxConfig") -> ModelDefaults:
    """Find the defaults of a model by what it is, not by what its file is called."""
    if config.hidden_size < 1024:
        return TINY if config.guidance_embed else TINY_UNGUIDED
    return DEV if config.guidance_embed else SCHNELL


def choose_grid(config: SampleConfig, task: Task | None) -> str:
    """Decide the grid: as asked for, else the preset's, else 1x1 for references or one bare prompt, else 2x2."""
    bare = config.prompt is not None and not has_markers(config.prompt) and config.mask == "all"
    single = config.ref or bare and not (config.panel_prompt or config.panels or config.set)
    return config.grid or (f"{task.rows}x{task.cols}" if task else "1x1" if single else "2x2")


def resolve_defaults(config: SampleConfig, task: Task | None, defaults: ModelDefaults, device: str) -> SampleConfig:
    """Decide what was left open: by the preset, else by the model, else plainly.

    device: cpu, cuda or mps
    Returns a configuration in which only set, prompt, preset, config, jobs, quantize, vram, and guidance of models
        without it are None
    """
    chosen = {
        "grid": choose_grid(config, task),
        "panel_size": "{}x{}".format(*task.panel_size) if task and defaults.name != "tiny" else str(defaults.panel),
        "steps": defaults.steps,
        "guidance": defaults.guidance_with(bool(config.ref)),
        "ref_size": defaults.references[len(config.ref) > 1],
        "dtype": defaults.cpu_dtype if device == "cpu" else "bfloat16",
        "schedule": "tokens",
        **AS_PUBLISHED,
    }
    return replace(config, **{k: v for k, v in chosen.items() if getattr(config, k) is None}, device=device)


def resolve_training_defaults(config: TrainConfig, defaults: ModelDefaults, device: str) -> TrainConfig:
    """Decide what was left open for training, by the method and the model.

    device: cpu, cuda or mps
    Returns a configuration in which only grid, preset, init_lora, config, quantize, vram, ref_size where it follows the
        number of references, one of panel_size and composite_size, and what the method has no use for are None
    Errors: ValueError for a setting of another method, or both of panel_size and composite_size
    """
    for name in NOT_FOR_METHOD[config.method]:
        if getattr(config, name) != getattr(TrainConfig, name):
            raise ValueError(f"{flag(name)} means nothing to --method {config.method}; leave it out")
    chosen = {**TRAINING[config.method], **(TINY_TRAINING[config.method] if defaults.name == "tiny" else {})}
    chosen |= {"panel_size": defaults.panel, "dtype": defaults.cpu_dtype if device == "cpu" else "bfloat16"}
    if task := TASKS.get(config.preset):
        chosen["grid"] = f"{task.rows}x{task.cols}"
        if defaults.name != "tiny":
            chosen["panel_size"] = round(math.sqrt(math.prod(task.panel_size)))
    if config.composite_size:
        del chosen["panel_size"]
    if config.composite_size and config.panel_size:
        raise ValueError("--panel-size and --composite-size are two ways to say how large sets are; use one of them")
    return replace(config, **{k: v for k, v in chosen.items() if getattr(config, k) is None}, device=device)
