"""Results on one page: python -m lab.summary --out docs/results.md

One line an experiment. What is asked, which figure is the headline, what it answers and what the paper has are written
here by hand; figures are read from the values that lab.experiments and lab.report leave in lab/results.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.checkpoint import write_atomic

from . import entry
from .judge import ALL_TASKS
from .pages import TRUE, base_mark
from .scores import above_chance, difference, interval, percent


@dataclass(frozen=True)
class Headline:
    """The figure that stands for an experiment: of one arm on one task.

    none: the figure of the same arm by chance; then the share above chance is told
    against: another arm of the task; then the difference from it is told
    """

    task: str
    arm: str
    figure: str
    none: str = ""
    against: str = ""


@dataclass(frozen=True)
class Row:
    """What a person says of an experiment.

    answer: eight words at most; empty until somebody has looked
    paper: what the paper has, and whether this agrees
    more: what README claims besides
    """

    question: str
    headline: Headline
    answer: str = ""
    paper: str = ""
    more: tuple[Headline, ...] = ()


ROWS = {  # in the order of the page; a name without values in lab/results is told as not run
    "base": Row(
        "Does the base draw what captions tell, alike in all panels?",
        Headline("text", "base", "one subject, 2x2: same subject"),
        answer="Yes, as far as its small world goes.",
    ),
    "tasks": Row(
        "Do twenty sets teach a relation that the base lacks?",
        Headline("walk", "LoRA", "first panel given", against="base"),
        answer="A walk yes; copying pixel by pixel no.",
        paper="In-Context LoRA: 20 to 100 sets do; no figures; agrees in part",
        more=(Headline("walk", "LoRA", "from text"), Headline("walk", ALL_TASKS, "first panel given")),
    ),
    "few": Row(
        "Do more sets help?",
        Headline("sketch", "100 sets", "from text", against="20 sets"),
        answer="Yes; copying needs a hundred sets or more.",
        paper="In-Context LoRA: 20 to 100 sets; no figures; agrees in part",
    ),
    "silent": Row(
        "Does a given panel tell who it is if captions are silent?",
        Headline("walk", "LoRA after filling in, clean", "all traits, own panel", none="all traits, no panel"),
        answer="Half, if it learnt filling in before.",
        paper="In-Context LoRA: captions name the subject; not comparable",
    ),
    "untuned": Row(
        "Does the base generate in context, without a LoRA?",
        Headline("nothing", "base", "all traits, own panel", none="all traits, no panel"),
        answer="Colour, accessory; face and pattern half; shape hardly.",
        paper="In-Context LoRA: its hypothesis; no figures; agrees in part",
    ),
    "condition": Row(
        "Are given panels better noised along (SDEdit) or clean?",
        Headline("walk", "clean", "first panel given", against="SDEdit"),
        answer="No difference was seen.",
        paper="In-Context LoRA: SDEdit, which loses identity; no figures; not seen",
    ),
    "text": Row(
        "Is one joint caption better than a part for each panel?",
        Headline("walk", "panel", "from text", against="joint"),
        answer="No difference was seen.",
        paper="In-Context LoRA: joint; no figures; not seen",
    ),
    "concat": Row(
        "Panels as one picture, or encoded apart?",
        Headline("walk", "tokens", "first panel given", against="pixels"),
        answer="No difference was seen.",
        paper="Group Diffusion Transformers: tokens; no figures; not seen",
    ),
    "filling-in": Row(
        "Does a LoRA that fills in panels carry traits over?",
        Headline("nothing", "clean", "all traits, own panel", none="all traits, no panel"),
        answer="Yes, best with clean given panels.",
        paper="In-Context LoRA: SDEdit fills in; no figures; agrees",
    ),
    "knowledge": Row(
        "Does a LoRA preserve what the base knows?",
        Headline("one subject, 2x2", "LoRA of walk", "same subject", against="base"),
        answer="UNO loses little; of twenty sets much goes.",
        paper="In-Context LoRA: it does; no figures; does not agree",
        more=(
            Headline("one subject, 2x2", "base", "same subject"),
            Headline("two subjects, 1x1", "base", "colours unmixed"),
            Headline("two subjects, 1x2", "UNO", "colours unmixed", against="base"),
        ),
    ),
    "bundled": Row(
        "Does the bundled LoRA walk?",
        Headline("walk", "bundled LoRA", "from text", against="base"),
        answer="Yes, from text and from a panel.",
        paper="In-Context LoRA: 20 to 100 sets do; no figures; agrees",
    ),
    "stages": Row(
        "Are two references followed after both stages?",
        Headline("two", "stages I and II", "look", none="look, no references"),
        answer="Half of the look; stage I: a fifth.",
        paper="UNO, table 4: stage II helps one reference too, DINO 73.0 to 76.0; here it costs; agrees in part",
    ),
    "offsets": Row(
        "Does it matter where references stand?",
        Headline("two", "offset o", "look", against="offset d"),
        answer="On the picture is worst: two swap.",
        paper="UNO, table 6: DINO d 54.2, w 50.8, h 50.1, o 38.6; agrees in part: o is last",
    ),
    "cropped": Row(
        "Do references cut out of the target teach pasting?",
        Headline("two", "cut out", "pasted", against="redrawn by stage I"),
        answer="No difference was seen.",
        paper="UNO, table 3: DINO 52.9 cut out, 54.2 generated; not seen",
    ),
    "cold": Row(
        "Is a first stage of one reference needed?",
        Headline("two", "cold start, as many steps in all", "look", against="stages I and II"),
        answer="No; as many steps on two do better.",
        paper="UNO, table 3: DINO 51.1 cold, 54.2 in stages; does not agree",
    ),
    "filters": Row(
        "Do the factory's filters make its pairs better for stage I?",
        Headline("one", "DINO, judge 3", "look", against="no filter"),
        answer="No difference was seen.",
        paper="UNO, Fig. 9: yes; curves only; not seen",
    ),
    "circle": Row(
        "Does UNO come out of nothing but the base?",
        Headline("two", "own pairs, both stages", "look", against="true pairs, both stages"),
        answer="One reference largely; two do not.",
        paper="UNO: all its data are such pairs; agrees in part",
    ),
    "another-base": Row(
        "Do a narrower base's own pairs teach it UNO's stage I?",
        Headline("one", "own pairs, stage I", "look", against="true pairs, stage I"),
        answer="No, nor do true ones: it draws badly.",
        paper="UNO: FLUX.1-dev alone",
    ),
    "scale": Row(
        "Do references follow better from further away?",
        Headline("one", "offset-scale 2", "look", against="offset-scale 1"),
        answer="No, rather worse; the paper's 1 is best.",
        paper="UNO: scale 1 only",
    ),
    "number": Row(
        "Do more than two references work?",
        Headline("four", "four, taught two to four", "right", none="right, no references"),
        answer="No: this base draws two subjects at most.",
        paper="UNO leaves it open",
    ),
    "edits": Row(
        "Can it recolour a reference once such pairs are taught?",
        Headline("recolour", "taught", "traits", none="traits, no references"),
        answer="Words yes; identity suffers, plain references' too.",
        paper="UNO leaves it open",
    ),
    "tiny-uno": Row(
        "Does the bundled UNO follow one reference, and two?",
        Headline("one", "tiny UNO", "look", none="look, no references"),
        answer="Mostly, one as well as two; patterns half.",
        paper="UNO, table 4: DINO 76.0, CLIP-I 83.5 on photographs; not comparable",
        more=(Headline("two", "tiny UNO", "look", none="look, no references"),),
    ),
}
OTHER = "another-base"  # the one experiment that is run on another base than the bundled one
OTHER_BASE = "Half as wide, without guidance, pretrained on two cores for an hour; all else is the bundled model's:"
OLD = {  # typed by hand from what lab.experiments found on the base before this one, 100 sets, trained once
    "rank": (
        "Does a larger rank follow a reference better?", "rank 64, 4, 16, 128",
        "rank 4, one reference: traits 54.3 (50.3 to 58.3); minus rank 64 -4.6 (-8.2 to -0.9)",
        "From rank 16 on no difference was seen.", "UNO, figure 18: grows up to 128; agrees in part",
    ),
    "alone": (
        "May references see each other alone?", "joint, alone",
        "alone, two references: traits 44.0 (40.1 to 47.6); minus joint +3.5 (+0.4 to +6.6)",
        "No loss was seen; little time is saved.", "UNO: joint only",
    ),
}  # fmt: skip
HEAD = """\
# Results

One line an experiment; its name leads to the page with all tables and sheets. Everything is measured on held-out \
subjects, in percent, with 95 % intervals. Figures *above chance* are (own - none) / (ceiling - none): none is the \
same arm without references or given panels, ceiling is the true picture after the autoencoder; other figures and \
differences are not. What \
intervals cover stands on each page. The papers' figures are of photographs, so that only the order of arms can agree.

Made by `python -m lab.summary`; speed and memory are in [benchmarks.md](../lab/results/benchmarks.md),
what fp8 loses in [fp8.md](../lab/results/fp8.md).
"""
COLUMNS = ("experiment", "question", "arms", "headline", "answer", "paper")


def page(results: Path, mark: str) -> str:
    """The whole page.

    results: folder of values
    mark: of this base (base_mark); what was measured on another one counts as not run, but for OTHER
    Errors: ValueError if values lack the headline of their experiment
    """
    run, other, not_run = [], [], []
    for name, row in ROWS.items():
        path = results / f"{name}.json"
        values = json.loads(path.read_text()) if path.exists() else {}
        if values and (values["base"] == mark) != (name == OTHER):
            arms = ", ".join(dict.fromkeys(each["name"] for each in values["rows"] if each["name"] != TRUE))
            link = f"[{name}](../lab/results/{name}.md)"
            told = "; ".join(headline(path, each) for each in (row.headline, *row.more))
            cells = link, row.question, arms, told, row.answer, row.paper
            (other if name == OTHER else run).append(cells)
        else:
            not_run.append(f"- {name}: {row.question}")
    old = [(name, *cells) for name, cells in OLD.items()]
    parts = [HEAD]
    parts += ["## On this base", "", *table(run), ""] if run else []
    parts += ["## Not run", "", "Nothing is claimed of:", "", *not_run, ""] if not_run else []
    parts += ["## On another base", "", OTHER_BASE, "", *table(other), ""] if other else []
    parts += ["## On the old base", "", "Measured on the base before this one, 100 sets, every arm trained once:", ""]
    return "\n".join([*parts, *table(old)]) + "\n"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]


def headline(path: Path, told: Headline) -> str:
    """The headline in words and percent, from the values of an experiment.

    Errors: ValueError if they lack it
    """
    rows = {(row["task"], row["name"]): row["figures"] for row in json.loads(path.read_text())["rows"]}

    def of(arm: str, figure: str) -> np.ndarray:
        each = rows.get((told.task, arm), [{}])
        if any(figure not in figures for figures in each):
            raise ValueError(f"{path} has no figure {figure!r} of {arm!r} in {told.task!r}; change its row in ROWS")
        return np.array([figures[figure] for figures in each], dtype=float)  # (S, N); null becomes NaN

    own, words = of(told.arm, told.figure), f"{told.arm}, {told.task}: {told.figure}"
    if told.none:
        found = above_chance(own, of(told.arm, told.none), of(TRUE, told.figure))
        return f"{words}, above chance {percent(found) if found else 'cannot be told'}"
    if told.against:
        apart = difference(own, of(told.against, told.figure))
        return f"{words} {percent(interval(own))}; minus {told.against} {percent(apart, '+')}"
    return f"{words} {percent(interval(own))}"


def write(args: argparse.Namespace) -> None:
    """Write the page."""
    write_atomic(args.out, page(args.results, base_mark("tiny")))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.summary", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("lab/results"), help="folder of values")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="the page")
    return entry.run(parser, write, argv)


if __name__ == "__main__":
    sys.exit(main())
