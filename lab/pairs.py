"""Pairs for UNO from the picture world: references, a prompt, and the picture that should come out.

python -m lab.pairs --out runs/pairs --kind one --count 2000

Every reference shows one subject alone in a scene of its own, and the target shows them all in another scene. Prompts
call subjects by their shape only, so colour, pattern, accessory, exact hue and face can come from the references alone.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from model.checkpoint import write_atomic

from . import entry
from .captions import panel_prompt
from .domains import with_pencil
from .eyes import with_subject, with_trait
from .sets import PANEL
from .world import COLOURS, SCENES, Panel, Subject, box, draw, random_set, random_subject


@dataclass(frozen=True)
class Pair:
    """One example; reference i shows the i-th subject of the panel, and those left over what a subject puts on.

    panel: what the target shows
    shown: what the references show
    """

    prompt: str
    panel: Panel
    target: Image.Image
    shown: tuple[Panel, ...]
    references: tuple[Image.Image, ...]


def bare(panel: Panel, **told: str) -> Panel:
    """The panel as a prompt that names shapes only would have it, and what else is told."""
    unsaid = {"colour": "", "pattern": "plain", "accessory": "none", **told}
    return replace(panel, placed=tuple(replace(one, subject=replace(one.subject, **unsaid)) for one in panel.placed))


def alone(subject: Subject, scene: str, rng: np.random.Generator) -> Panel:
    """A panel of its own for one subject, as pretraining places single ones."""
    (panel,) = random_set(rng, 1, 1, 1)
    return replace(with_subject(panel, subject), scene=scene)


def draw_pair(panel: Panel, rng: np.random.Generator, prompt: str = "") -> Pair:
    """References and target of one panel: every subject drawn again, alone, in a scene that no other picture has."""
    others = [scene for scene in SCENES if scene != panel.scene]
    scenes = [others[i] for i in rng.permutation(len(others))]
    shown = tuple(alone(one.subject, scene, rng) for one, scene in zip(panel.placed, scenes, strict=False))
    prompt = prompt or panel_prompt(bare(panel), rng)
    return Pair(prompt, panel, draw(panel, PANEL), shown, tuple(draw(each, PANEL) for each in shown))


def of_subjects(counts: tuple[int, ...]) -> Callable:
    """A kind whose target shows one of these numbers of subjects."""

    def make(rng: np.random.Generator, held_out: bool | None) -> Pair:
        (panel,) = random_set(rng, 1, 1, counts[int(rng.integers(len(counts)))], held_out)
        return draw_pair(panel, rng)

    return make


def cropped(rng: np.random.Generator, held_out: bool | None) -> Pair:
    """Two subjects, the second reference cut out of the target instead of drawn again (UNO, Table 3)."""
    pair = of_subjects((2,))(rng, held_out)
    return replace(pair, references=(pair.references[0], cut_out(pair.panel, 1)))


def cut_out(panel: Panel, which: int) -> Image.Image:
    """A square round one subject of a panel, at the panel's size.

    The panel is drawn four times as large first, as a detector's crop of a large picture is not blurred either.
    """
    scale = 4 * PANEL / 64
    edges = tuple(round(edge * scale) for edge in box(panel, which))
    return draw(panel, 4 * PANEL).crop(edges).resize((PANEL, PANEL), Image.Resampling.LANCZOS)


def recoloured(rng: np.random.Generator, held_out: bool | None) -> Pair:
    """One subject in a colour that the prompt names and the reference does not have."""
    (panel,) = random_set(rng, 1, 1, 1, held_out)
    before = panel.placed[0].subject
    colours = [colour for colour in COLOURS if colour != before.colour]
    after = replace(before, colour=colours[int(rng.integers(len(colours)))])
    pair = draw_pair(panel, rng, panel_prompt(bare(panel, colour=after.colour), rng))
    return with_target(pair, after)


def with_hat(rng: np.random.Generator, held_out: bool | None) -> Pair:
    """One subject with an accessory that the prompt names and the reference does not have."""
    (panel,) = random_set(rng, 1, 1, 1, held_out)
    wears = ("hat", "scarf", "glasses")[int(rng.integers(3))]
    naked = with_trait(panel, "accessory", "none")
    pair = draw_pair(naked, rng, panel_prompt(bare(naked, accessory=wears), rng))
    return with_target(pair, replace(naked.placed[0].subject, accessory=wears))


def tried_on(rng: np.random.Generator, held_out: bool | None) -> Pair:
    """As with_hat, and a second reference shows somebody else who wears it; the target shows the first one only.

    Prompts name what is put on, as people do, and accessories have no looks of their own here: what the second
    reference adds to that shows against one that wears something else.
    """
    pair = with_hat(rng, held_out)
    mine = pair.panel.placed[0].subject
    while (wearer := random_subject(rng, held_out)).shape == mine.shape or wearer.colour == mine.colour:
        pass
    scenes = [scene for scene in SCENES if scene not in (pair.panel.scene, pair.shown[0].scene)]
    second = alone(replace(wearer, accessory=mine.accessory), scenes[int(rng.integers(len(scenes)))], rng)
    return replace(pair, shown=(*pair.shown, second), references=(*pair.references, draw(second, PANEL)))


def sketched(rng: np.random.Generator, held_out: bool | None) -> Pair:
    """One subject, drawn in pencil."""
    pair = of_subjects((1,))(rng, held_out)
    return replace(pair, prompt="a pencil drawing: " + pair.prompt, target=with_pencil(pair.target))


def with_target(pair: Pair, subject: Subject) -> Pair:
    """The pair with another version of its only subject in the target."""
    panel = with_subject(pair.panel, subject)
    return replace(pair, panel=panel, target=draw(panel, PANEL))


KINDS: dict[str, Callable[[np.random.Generator, bool | None], Pair]] = {
    "one": of_subjects((1,)), "two": of_subjects((2,)), "three": of_subjects((3,)), "four": of_subjects((4,)),
    "up-to-four": of_subjects((2, 3, 4)), "cropped": cropped, "recolour": recoloured, "hat": with_hat,
    "sketch": sketched, "try-on": tried_on,
}  # fmt: skip


def make_pairs(kind: str, count: int, seed: int, held_out: bool | None = False) -> list[Pair]:
    """Draw pairs of one kind; the same arguments give the same pairs.

    kind: a key of KINDS
    held_out: as for lab.world.random_subject
    Errors: ValueError for another kind
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    rng = np.random.default_rng([seed, tuple(KINDS).index(kind)])
    return [KINDS[kind](rng, held_out) for _ in tqdm(range(count), "drawing pairs", disable=None)]


def write_pairs(pairs: list[Pair], path: Path) -> None:
    """Write pairs as UNO's JSON, and their pictures into a folder of the same name beside it."""
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # it is true of the old pictures only
    rows = []
    for number, pair in enumerate(pairs):
        target = f"{folder.name}/{number:05d}.png"
        pair.target.save(path.parent / target)
        names = [f"{folder.name}/{number:05d}-{i}.png" for i in range(1, len(pair.references) + 1)]
        for name, picture in zip(names, pair.references, strict=True):
            picture.save(path.parent / name)
        rows.append({"prompt": pair.prompt, "image_paths": names, "image_tgt_path": target})
    write_atomic(path, json.dumps(rows, indent=1) + "\n")


def make(args: argparse.Namespace) -> None:
    """Draw the pairs that the command line asks for."""
    path = args.out / f"{args.kind}.json"
    write_pairs(make_pairs(args.kind, args.count, args.seed), path)
    print(f"wrote {args.count} pairs: {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.pairs", description="Draw pairs for UNO.")
    parser.add_argument("--out", type=Path, default=Path("runs/pairs"), help="folder that receives <kind>.json")
    parser.add_argument("--kind", choices=tuple(KINDS), default="one", help="what the pairs are")
    parser.add_argument("--count", type=entry.positive, default=2000, help="pairs")
    parser.add_argument("--seed", type=int, default=0)
    return entry.run(parser, make, argv)


if __name__ == "__main__":
    sys.exit(main())
