"""The papers' experiments as rows: what every arm trains, and on which case it is judged."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import inf

from .judge import ALL_TASKS, IN_CONTEXT, IN_CONTEXT_WITH_BARS, SILENT, Judge
from .judge_kept import KEPT
from .judge_text import TEXT, TEXT_CASES
from .judge_uno import UNO, UNO_WITH_BARS
from .panels import TELLING
from .tasks import COUNT, GRIDS

BASE, WHOLE = None, ("--holdout", "0")
ONE_EPOCH = ("--steps", "2", "--batch", "5", *WHOLE, "--warmup", "0", "--ema", "0")


@dataclass(frozen=True)
class Training:
    """One run of train.py.

    data: kinds of sets or pairs and how many of each, mixed; none are the committed sets of all tasks together
    flags: of train.py
    stage: of UNO; None is In-Context LoRA
    start: whose LoRA it goes on from
    length: multiplies the steps
    """

    data: tuple[tuple[str, int], ...] = ()
    flags: tuple[str, ...] = ()
    stage: int | None = None
    start: "Training | None" = None
    length: float = 1


@dataclass(frozen=True)
class Arm:
    """One line of a table.

    task: what is judged: a task, or with UNO a kind of pairs
    training: BASE, which is None, judges the model without a LoRA, and a text one that lies in the model's folder
    paper: what the paper has in this line
    seeds: of its training, from 0
    """

    task: str
    name: str
    training: Training | str | None = BASE
    paper: str = ""
    seeds: int = 1


@dataclass(frozen=True)
class Experiment:
    """Arms, each compared with the first one of its task.

    steps: of a training, where --steps does not say otherwise
    columns: the figures that its table shows; none are the judge's
    minutes: that a training should take at most
    """

    title: str
    arms: tuple[Arm, ...]
    judge: Judge = IN_CONTEXT
    steps: int = 800
    columns: tuple[str, ...] = ()
    minutes: float = 10


# In-Context LoRA

SIZE = ("--targets", "uno", "--rank", "32")
CLEAN = ("--condition", "clean")
LEARNT = ("walk", "sparkle")  # of a task that no arm learns, arms cannot differ
NOT_SKETCH = " (sketch is left out, as no arm learns it)"


def filling_in(*flags: str) -> Training:
    """Learns to fill in panels of all sorts of sets."""
    return Training((("panels", 1200),), (*flags, *SIZE), length=2)


def after_filling_in(task: str, name: str) -> Arm:
    """An arm that learns the task's sets with clean given panels, from the LoRA that fills in panels."""
    return Arm(task, name, Training(((task, COUNT),), CLEAN, start=filling_in(*CLEAN)))


def of_tasks(arms: Callable[[str], Iterable[Arm]], tasks: Iterable[str] = GRIDS) -> tuple[Arm, ...]:
    """The same arms for each task."""
    return tuple(arm for task in tasks for arm in arms(task))


def thrice(arms: Iterable[Arm]) -> tuple[Arm, ...]:
    """The same arms, with three trainings each."""
    return tuple(replace(arm, seeds=3) for arm in arms)


def on_sets(task: str, name: str, flags: tuple[str, ...] = (), count: int = COUNT) -> Arm:
    """An arm that learns the first sets of the task that it is judged by."""
    return Arm(task, name, Training(((task, count),), flags))


def knowledge() -> tuple[Arm, ...]:
    """Sets from text by the base, and with the LoRA of each task and of all of them; in all of the report's cases."""
    loras = {"base": BASE} | {f"LoRA of {task}": Training(((task, COUNT),)) for task in GRIDS}
    loras |= {"LoRA of all tasks": Training(), "UNO": "loras/uno.safetensors"}
    return tuple(Arm(case, name, lora) for case in TEXT_CASES for name, lora in loras.items())


# UNO

PAIRS = 2000
DEFAULTS = {  # without the flag, so that trainings are shared
    "--offset": "d", "--offset-scale": "1", "--rank": "64", "--reference-attention": "joint",
}  # fmt: skip
LIKENESS = ("traits", "look", "all right", "swapped", "scene", "copied", "pasted", "DINO", "CLIP-I")
EDITS = ("recolour", "sketch", "hat")


def pairs(*kinds: str, count: int = PAIRS) -> tuple[tuple[str, int], ...]:
    """Pairs of several kinds; one that is named twice gets twice as many."""
    return tuple((kind, kinds.count(kind) * count // len(kinds)) for kind in dict.fromkeys(kinds))


def one(*flags: str) -> Training:
    """Stage I: one reference."""
    return Training(pairs("one"), flags, 1)


def then(*kinds: str, flags: tuple[str, ...] = ()) -> Training:
    """Stage I, then stage II on pairs of other kinds."""
    return Training(pairs(*kinds), flags, 2, one(*flags))


def by_flag(case: str, flag: str, rows: dict[str, str]) -> tuple[Arm, ...]:
    """Arms that differ in one flag: its value, and what the paper has there; both stages but for one reference."""
    arms = []
    for value, paper in rows.items():
        flags = () if value == DEFAULTS[flag] else (flag, value)
        training = one(*flags) if case == "one" else then("two", flags=flags)
        arms.append(Arm(case, f"{flag.lstrip('-')} {value}", training, paper))
    return tuple(arms)


def uno(title: str, *arms: Arm, judge: Judge = UNO, steps: int = 600, columns=LIKENESS) -> Experiment:
    return Experiment(title, arms, judge, steps, columns=columns, minutes=inf)


STAGES = (
    Arm("one", "base"),
    Arm("one", "stage I", one(), "Table 4: 73.0 / 82.1 / 30.9"),
    Arm("one", "stages I and II", then("two"), "Table 4: 76.0 / 83.5 / 30.4"),
    Arm("two", "base"),
    Arm("two", "stage I", one()),
    Arm("two", "stages I and II", then("two"), "Table 2: 54.2 / 73.3 / 32.2"),
)
MADE = Training((("made-judge-3", 1000),), (), 1)  # on pairs that the base made itself, see lab.circle
COLD = Training(pairs("two"), (), 2, length=2)
# what is bundled must do both: at last a fifth of the pairs has one reference; half costs two references 8 points
BUNDLED = Training(pairs("one", *["two"] * 4, count=2500), (), 2, replace(COLD, length=3.5), length=0.8)

EXPERIMENTS = {
    "tasks": Experiment(
        "What a LoRA of twenty sets teaches the base (bars: the base at most 20 %, the LoRA at least 85 %)",
        thrice(of_tasks(lambda task: (Arm(task, "base"), on_sets(task, "LoRA"), Arm(task, ALL_TASKS, Training())))),
        IN_CONTEXT_WITH_BARS,
    ),
    "few": Experiment(
        "Ten sets, twenty, and a hundred; and ten for a single epoch",
        of_tasks(lambda task: (
            on_sets(task, f"{COUNT} sets"), on_sets(task, "10 sets", WHOLE, 10),
            on_sets(task, "10 sets, one epoch (2 steps)", ONE_EPOCH, 10), on_sets(task, "100 sets", (), 100),
        )),
    ),
    "silent": Experiment(
        "Captions silent about the subject: does a given panel tell who it is? (bar: traits 80 % above chance)",
        (
            Arm("walk", "base"), on_sets("walk", "LoRA"), on_sets("walk", "LoRA, clean", CLEAN),
            after_filling_in("walk", "LoRA after filling in, clean"),
        ),
        SILENT,
    ),
    "untuned": Experiment(
        "Does the base generate in context? Panel 3 from the others, captions telling more or less",
        tuple(Arm(telling, "base") for telling in TELLING), KEPT,
    ),
    "filling-in": Experiment(
        "Filling in a panel when captions tell nothing of the subject: the base, and LoRAs that learnt it from 1,200 "
        "sets, with given panels noised or clean",
        tuple(
            Arm("nothing", name, training)
            for name, training in (("base", BASE), ("SDEdit", filling_in()), ("clean", filling_in(*CLEAN)))
        ),
        KEPT, minutes=inf,
    ),
    "condition": Experiment(
        f"Given panels noised along (SDEdit) or clean, in training as in sampling{NOT_SKETCH}",
        (
            *of_tasks(
                lambda task: (Arm(task, "base"), on_sets(task, "SDEdit"), on_sets(task, "clean", CLEAN)), LEARNT
            ),
            after_filling_in("sparkle", "clean, after filling in"),
        ),
    ),
    "text": Experiment(
        "One caption for all panels, or each reads its own part (the base was pretrained on joint captions only; "
        "sketch is left out, as no arm learns it)",
        of_tasks(
            lambda task: (on_sets(task, "joint"), on_sets(task, "panel", ("--text", "panel"))), LEARNT
        ),
    ),
    "concat": Experiment(
        f"Panels as one picture or as one row of tokens{NOT_SKETCH}",
        of_tasks(
            lambda task: (on_sets(task, "pixels"), on_sets(task, "tokens", ("--concat", "tokens"))), LEARNT
        ),
    ),
    "knowledge": Experiment("Does a LoRA preserve what the base knows? Sets from text with it", knowledge(), TEXT),
    "bundled": Experiment(
        "The bundled LoRA of a walk",
        (Arm("walk", "base"), Arm("walk", "bundled LoRA", "loras/walk.safetensors")),
        IN_CONTEXT_WITH_BARS,
    ),
    "stages": uno("UNO: no LoRA, stage I alone, both stages", *STAGES),
    "offsets": uno(
        "UNO: references stand diagonally off the picture (d), below (h), beside it (w), or on it (o)",
        *thrice(by_flag("one", "--offset", {"d": "Table 5: 73.0 / 82.1 / 30.9", "o": "Table 5: 47.0 / 72.2 / 30.8"})),
        *by_flag("one", "--offset", {"h": "Table 5: 67.8 / 79.7 / 30.8", "w": "Table 5: 71.7 / 81.3 / 30.4"}),
        *thrice(by_flag("two", "--offset", {"d": "Table 6: 54.2 / 73.3 / 32.2", "o": "Table 6: 38.6 / 67.4 / 32.3"})),
        *by_flag("two", "--offset", {"h": "Table 6: 50.1 / 71.9 / 30.6", "w": "Table 6: 50.8 / 72.4 / 32.1"}),
    ),
    "cropped": uno(
        "UNO: the second reference redrawn by the stage-I model, as the paper does, or by the renderer, or cut out",
        Arm("two", "redrawn by stage I", then("redrawn"), "Table 3: 54.2 / 73.3 / 32.2"),
        Arm("two", "drawn by the renderer", then("two")),
        Arm("two", "cut out", then("cropped"), "Table 3: 52.9 / 73.0 / 30.8"),
    ),
    "cold": uno(
        "UNO: several references after a stage of one, or from the start; for as many steps in all, or of stage II",
        Arm("two", "stages I and II", then("two"), "Table 3: 54.2 / 73.3 / 32.2"),
        Arm("two", "cold start, as many steps in all", COLD, "Table 3: 51.1 / 72.1 / 32.2"),
        Arm("two", "cold start, as many of stage II", replace(COLD, length=1)),
        Arm("one", "stages I and II", then("two"), "Table 4: 76.0 / 83.5 / 30.4"),
        Arm("one", "cold start, as many steps in all", COLD),
        Arm("one", "cold start, as many of stage II", replace(COLD, length=1)),
    ),
    "filters": uno(
        "UNO, stage I on pairs that the base made itself, as the filters of the data factory leave them",
        Arm("one", "base"),
        *(
            Arm("one", name, replace(MADE, data=((kind, 1000),)))
            for name, kind in (("no filter", "made"), ("DINO", "made-dino"), ("DINO, judge 4", "made-judge-4"))
        ),
        Arm("one", "DINO, judge 3", MADE),
        Arm("one", "true pairs", one()),
    ),
    "circle": uno(
        "UNO from nothing but the base: both stages on pairs that it made itself, and on the world's true ones",
        Arm("one", "base"),
        Arm("one", "own pairs, stage I", MADE),
        Arm("one", "true pairs, stage I", one()),
        Arm("two", "base"),
        Arm("two", "own pairs, stage I", MADE),
        Arm("two", "own pairs, both stages", Training((("made-second", 1000),), (), 2, MADE)),
        Arm("two", "both stages, II unfiltered", Training((("made-second-all", 1000),), (), 2, MADE)),
        Arm("two", "true pairs, both stages", then("two")),
    ),
    "another-base": uno(
        "The circle's first half on another base: stage I on pairs that it made itself, and on the world's true ones",
        Arm("one", "base"), Arm("one", "own pairs, stage I", MADE), Arm("one", "true pairs, stage I", one()),
    ),
    "scale": uno(
        "UNO: how far past the picture references stand",
        *by_flag("one", "--offset-scale", {"1": "as the paper's; it has no others", "2": "", "3": ""}),
        *by_flag("two", "--offset-scale", {"1": "as the paper's; it has no others", "2": "", "3": ""}),
    ),
    "rank": uno(
        "UNO: rank of the LoRA, stage I",
        *by_flag("one", "--rank", {
            "64": "Fig. 18, curves only", "4": "lowest curve", "16": "gains go on", "128": "and slow down from here",
        }),
    ),
    "alone": uno(
        "UNO: references see all tokens (joint), or each other alone and are passed once a run",
        *by_flag("one", "--reference-attention", {"joint": "as the paper's; it has no other", "alone": ""}),
        *by_flag("two", "--reference-attention", {"joint": "as the paper's; it has no other", "alone": ""}),
    ),
    "number": uno(
        "UNO: identity and confusion against the number of references (the paper leaves it open)",
        *(
            Arm(case, f"{case}, taught {name}", training)
            for case in ("one", "two", "three", "four")
            for name, training in (("two", then("two")), ("two to four", then("up-to-four")))
        ),
        columns=("traits", "right", "all right", "swapped", "mistaken", "confused", "missing", "scene", "copied"),
    ),
    "edits": uno(
        "UNO: recolouring, sketching and putting something on, once such pairs are among those of stage II, and what "
        "that costs plain references (the paper leaves it open)",
        *(Arm(case, "taught", then("two", "two", "two", *EDITS)) for case in (*EDITS, "try-on", "one", "two")),
        columns=("asked for", "traits", "all right", "confused", "scene", "copied", "pasted"),
    ),
    "tiny-uno": uno(
        "UNO: the bundled LoRA",
        *thrice(Arm(case, "tiny UNO", BUNDLED) for case in ("one", "two")),
        judge=UNO_WITH_BARS,
        columns=(
            "traits", "look", "right", "all right", "swapped", "confused", "scene", "copied", "pasted", "DINO",
            "CLIP-I",
        ),
    ),
}  # fmt: skip
