"""The stages of the factory, in order, over one folder.

Each stage takes the items that all stages before it have kept and that it has no row for, so a run that was stopped
goes on where it was. What is random of an item comes from the seed, its number and the stage.
"""

import sqlite3
from contextlib import closing, nullcontext
from pathlib import Path

from tqdm import tqdm

from ..checkpoint import only_run
from ..cli import check_folder
from ..judge import ChatJudge
from ..processes import join_processes, lost_process_is_one_line, meet, processes
from ..records import Note
from .catalogue import NAME, STAGES, Catalogue, crops_of, passed, reader, selected
from .options import CHAIN, CurateConfig
from .page import write_page
from .stages import EXPORTS, FOLDERS, NamedJudge, NamedLocator, Workshop


def curate(config: CurateConfig, note: Note, judge: NamedJudge = None, locator: NamedLocator = None) -> None:
    """Run the stages that are asked for, and write the summary page.

    Under torchrun every process takes its share of the items, and the first one does what concerns all.

    note: is called with what a user should know, in one line
    judge, locator: instead of what the options say
    Errors: ValueError in one line for whatever cannot work; what was finished is kept
    """
    rank, world_size = processes()
    check_folder(Path(config.out))
    workshop = Workshop(config, note, judge, locator)
    path = workshop.out / NAME
    with only_run(workshop.out) if rank == 0 else nullcontext(), lost_process_is_one_line():
        if world_size > 1:
            join_processes(workshop.device)
        try:
            if rank == 0:
                start(workshop, path)
            for stage in filter(config.chosen.__contains__, CHAIN):
                if rank == 0:
                    prepare(workshop, stage, path)
                if stage != "taxonomy" and stage not in EXPORTS:
                    run_share(workshop, stage, path, rank, world_size)
            if rank == 0:
                with closing(reader(path)) as db:
                    write_page(workshop.out, db, {stage: config.bar(stage) for stage in STAGES})
                note(f"what was kept and dropped: {workshop.out / 'index.html'}")
        except sqlite3.Error as error:
            advice = "free space if there is none; else put a whole copy of the file there, or give another --out"
            raise ValueError(f"{path}: {error}; {advice}") from None
        meet(world_size)


def start(workshop: Workshop, path: Path) -> None:
    """Make the folder and its catalogue, clear away what a kill left, and forget what is to be made again.

    Errors: ValueError before that for a condition that is none, or other settings of what is kept
    """
    with closing(Catalogue(path)) as catalogue:
        for folder in ("", *FOLDERS):  # the whole tree may hold others' files
            (workshop.out / folder).mkdir(exist_ok=True)
            for left in (workshop.out / folder).glob(".*.tmp"):
                left.unlink()
        catalogue.merge_parts()
        if workshop.config.where is not None:
            with closing(reader(path)) as db:
                selected(db, "export", workshop.config.where)
        kept = CHAIN.index(workshop.config.redo) if workshop.config.redo else len(CHAIN)
        for stage in filter(workshop.config.chosen.__contains__, CHAIN[:kept]):
            catalogue.settle(stage, workshop.settings(stage))
        redone = {stage.rstrip("2") for stage in workshop.config.chosen if stage in CHAIN[kept:]}
        for tool in redone & workshop.load.keys():  # what does not work ends the run before scores are lost
            if isinstance(loaded := workshop.load[tool](), ChatJudge):
                loaded.chat.ask([("user", "Say yes.", ())])
        catalogue.forget(CHAIN[kept:])


def prepare(workshop: Workshop, stage: str, path: Path) -> None:
    """Do what concerns all items of a stage. Errors: ValueError if its results were made with other settings"""
    with closing(Catalogue(path)) as catalogue:
        catalogue.settle(stage, workshop.settings(stage))
        if stage == "taxonomy":
            workshop.taxonomy(catalogue)
        elif stage in EXPORTS:
            workshop.export(stage, catalogue)
        else:
            catalogue.hold_again(stage, workshop.config.bar(stage))


def run_share(workshop: Workshop, stage: str, path: Path, rank: int, world_size: int) -> None:
    """Run one stage over this process's share of the items.

    All read the catalogue while nobody writes to it; then the others write a file of their own, which the first one
    takes over. So a catalogue may lie where several machines see it, though SQLite's log and locks end at each.
    """
    meet(world_size)
    with closing(reader(path, shared=False)) as db:
        items, crops = passed(db, stage, rank, world_size), crops_of(db)
    meet(world_size)
    if items:
        with closing(Catalogue(path.with_name(f"part-{rank}.sqlite") if rank else path)) as catalogue:
            for item, outcome in tqdm(workshop.work(stage, items, crops), stage, len(items), unit="item", disable=None):
                catalogue.record(item.id, stage, outcome, workshop.config.bar(stage))
    meet(world_size)
    if rank == 0:
        with closing(Catalogue(path)) as catalogue:
            catalogue.merge_parts()
