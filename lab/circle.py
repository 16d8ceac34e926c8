"""The factory's whole way on the picture world, and how much of what it makes is true: python -m lab.circle

Diptychs of captions that name a subject by its shape alone, so that all else can differ between their pictures; seams,
DINOv2 and the tiny CLIP filter them, stage I learns from what is kept, draws the second subjects again, and stage II
learns from those. The picture world's reader, which filters nothing here, says which pairs are true: those whose
pictures agree in all that it sees of the subjects. `python -m lab.experiments filters circle` judges what is learnt.
"""

import argparse
import json
import sys
from contextlib import closing
from pathlib import Path

import numpy as np

from iclora.cli import note
from iclora.curate.catalogue import NAME, reader
from iclora.curate.chain import curate
from iclora.curate.options import CurateConfig
from iclora.curate.taxonomy import HERE
from model.checkpoint import read_json, write_atomic
from sampling.images import open_picture

from . import entry
from .curate import TruthJudge, WorldLocator
from .judge_uno import SEED
from .pages import save_values
from .pairs import make_pairs
from .scores import interval, percent
from .truth import load_reader

COUNT, STEPS = 1000, None  # pairs that are tried, steps of every picture
EVERYTHING = "seam >= 0.65"
FILTERS = {  # what stage I learns from, as conditions of iclora.curate --where
    "made": EVERYTHING,
    "made-dino": f"{EVERYTHING} AND dino >= 0.5",
    "made-judge-3": f"{EVERYTHING} AND dino >= 0.5 AND judge >= 3",
    "made-judge-4": f"{EVERYTHING} AND dino >= 0.5 AND judge >= 4",
}
SECOND = {  # what stage II learns from: what its own filters leave, or all that was drawn again
    "made-second": None,
    "made-second-all": FILTERS["made-judge-3"],
}


def options(work: Path, model: str, **more) -> CurateConfig:
    """Ask for a factory that keeps every pair, so that each has every score."""
    words = read_json(HERE / "words-tiny.json")
    path = work / "factory-words.json"
    work.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(words | {"subjects": {"bare": words["subjects"]["bare"]}}))
    keep = {"dino": -1, "judge_score": 0, "seam": 0, "count": COUNT, "steps": STEPS}
    return CurateConfig(out=str(work / "factory"), words=str(path), model=model, **keep | more)


def made_pairs(what: str, lora: Path | None, work: Path, model: str) -> Path:
    """Make the pairs that a training learns from, as far as they are not made yet.

    what: a key of FILTERS or of SECOND
    lora: of stage I, which draws the second subjects again
    Returns UNO's JSON
    """
    config = options(work, model)
    folder = Path(config.out)
    path = folder / f"{what}.json"
    if path.exists():
        return path
    if what in SECOND:
        locator = "world", WorldLocator(load_reader(model))
        filters = {"dino": 0.5, "judge_score": 3, "seam": 0.65, "lora": str(lora), "where": SECOND[what]}
        curate(options(work, model, **filters), note, locator=locator)
        made = "pairs-2.json"
    else:
        curate(options(work, model, where=FILTERS[what]), note)
        made = "pairs.json"
    write_atomic(path, (folder / made).read_bytes())  # another filter writes over it
    return path


def report(args: argparse.Namespace) -> None:
    """Run stage I of the factory and write how much of it is true, by filter."""
    made_pairs("made", None, args.work, args.model)
    folder, judge = args.work / "factory", TruthJudge(load_reader(args.model))
    with closing(reader(folder / NAME)) as db:
        rows = db.execute("SELECT id, seam, dino, judge, second FROM pairs WHERE judge IS NOT NULL").fetchall()
        passing = {
            name: {row[0] for row in db.execute(f"SELECT id FROM pairs WHERE {where}")}
            for name, where in FILTERS.items()
        }
    ids = np.array([row[0] for row in rows])
    scores = [judge(*(open_picture(folder / f"pairs/{i:08d}-{n}.png") for n in (1, 2))).score for i in ids]
    true = np.array(scores) == 4
    drawn = make_pairs("one", args.count, SEED, held_out=False)
    ceiling = [judge(pair.references[0], pair.target).score == 4 for pair in drawn]
    lines = [
        "# The data factory in the picture world: how much of what it makes is true", "",
        f"{len(rows)} diptychs of the base {Path(args.model).name}; captions name subjects by their shape alone. True "
        "is a pair whose pictures agree in every trait that the world's reader sees of their subjects; of pairs that "
        f"the world drew it calls {percent(interval(np.array(ceiling, dtype=float)))} true. Precision: which share of "
        "what a filter keeps is true; recall: which share of what is true it keeps.", "",
        "| filter | kept | yield | precision | recall |", "|---|---|---|---|---|",
        f"| none at all, not even the seam | {len(rows)} | 100.0 | {percent(interval(true.astype(float)))} | 100.0 |",
    ]  # fmt: skip
    for name in FILTERS:
        kept = np.isin(ids, list(passing[name]))
        shares = kept.astype(float), true[kept].astype(float), kept[true].astype(float)
        cells = [percent(interval(share)) if share.size else "" for share in shares]
        lines.append(f"| {name} | {kept.sum()} | {' | '.join(cells)} |")
    values = {"ids": ids.tolist(), "true": true.tolist(), "scores": scores, "rows": [row[1:4] for row in rows]}
    args.out.mkdir(parents=True, exist_ok=True)
    save_values(values, args.out / "factory.json")
    page = "\n".join([*lines, "", f"Made by `python -m lab.circle --model {args.model} --count {args.count}`."]) + "\n"
    write_atomic(args.out / "factory.md", page)
    print(page, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.circle", description=__doc__)
    parser.add_argument("--model", default="tiny", help="the base, as for train.py")
    parser.add_argument("--count", type=entry.positive, default=500, help="pairs of the world that tell the ceiling")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"), help="folder of the factory")
    parser.add_argument("--out", type=Path, default=Path("lab/results"), help="folder for the page and its values")
    return entry.run(parser, report, argv)


if __name__ == "__main__":
    sys.exit(main())
