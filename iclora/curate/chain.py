"""The stages of the factory, in order, over one folder.

Each stage takes the items that all stages before it have kept and that it has no row for, so a run that was stopped
goes on where it was. What is random of an item comes from the seed, its number and the stage.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from ..checkpoint import only_run
from ..plan import Note
from ..training import PATIENCE, lost_process_is_one_line
from .catalogue import NAME, STAGES, Catalogue, data_of, passed, reader, selected
from .options import CHAIN, CurateConfig, Tools
from .page import write_page
from .stages import EXPORTS, FOLDERS, Workshop


def curate(config: CurateConfig, note: Note, tools: Tools = Tools()) -> None:
    """Run the stages that are asked for, and write the summary page.

    Under torchrun every process takes its share of the items, and the first one does what concerns all.

    note: is called with what a user should know, in one line
    Errors: ValueError in one line for whatever cannot work; what was finished is kept
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    workshop = Workshop(config, tools, note)
    path = workshop.out / NAME
    with only_run(workshop.out) if rank == 0 else nullcontext(), lost_process_is_one_line(), whole(path):
        if world_size > 1:
            if workshop.device == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        if rank == 0:
            start(workshop, path)
        for stage in (stage for stage in CHAIN if stage in config.chosen):
            if rank == 0:
                prepare(workshop, stage, path)
            if stage != "taxonomy" and stage not in EXPORTS:
                run_share(workshop, stage, path, rank, world_size)
        if rank == 0:
            with closing(reader(path)) as db:
                write_page(workshop.out, db, {stage: config.bar(stage) for stage in STAGES})
            note(f"what was kept and dropped: {workshop.out / 'index.html'}")
        if world_size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def start(workshop: Workshop, path: Path) -> None:
    """Make the folder and its catalogue, clear away what a kill left, and refuse a condition that is none."""
    with closing(Catalogue(path)) as catalogue:
        for folder in FOLDERS:
            (workshop.out / folder).mkdir(exist_ok=True)
        for left in workshop.out.glob("**/.*.tmp"):
            left.unlink(missing_ok=True)
        catalogue.merge_parts()
        if workshop.config.redo:
            catalogue.forget(CHAIN[CHAIN.index(workshop.config.redo) :])
    if workshop.config.where is not None:
        with closing(reader(path)) as db:
            selected(db, "export", workshop.config.where)


def prepare(workshop: Workshop, stage: str, path: Path) -> None:
    """Do what concerns all items of a stage. Errors: ValueError if its results were made with other settings"""
    with closing(Catalogue(path)) as catalogue:
        catalogue.settle(stage, workshop.settings(stage))
        if stage == "taxonomy":
            workshop.taxonomy(catalogue)
        elif stage in EXPORTS:
            workshop.export(stage, catalogue)
        else:
            catalogue.judge_again(stage, workshop.config.bar(stage))


def run_share(workshop: Workshop, stage: str, path: Path, rank: int, world_size: int) -> None:
    """Run one stage over this process's share of the items.

    All read the catalogue while nobody writes to it; then the others write a file of their own, which the first one
    takes over. So a catalogue may lie where several machines see it, though SQLite's log and locks end at each.
    """
    meet(world_size)
    with closing(reader(path, shared=False)) as db:
        items, boxes = passed(db, stage, rank, world_size), data_of(db, "find")
    meet(world_size)
    if items:
        with closing(Catalogue(path.with_name(f"part-{rank}.sqlite") if rank else path)) as catalogue:
            for item, outcome in tqdm(workshop.work(stage, items, boxes), stage, len(items), unit="item", disable=None):
                catalogue.record(item.id, stage, outcome, workshop.config.bar(stage))
    meet(world_size)
    if world_size > 1 and rank == 0:
        with closing(Catalogue(path)) as catalogue:
            catalogue.merge_parts()


def meet(world_size: int) -> None:
    """Wait until all processes are here."""
    if world_size > 1:
        torch.distributed.barrier()


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Turn what SQLite raises into one line. Errors: ValueError"""
    try:
        yield
    except sqlite3.Error as error:
        advice = "free space if there is none; else put a whole copy of the file there, or give another --out"
        raise ValueError(f"{path}: {error}; {advice}") from None
