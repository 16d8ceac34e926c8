"""Pictures shared by processes that torchrun has started: the same files under the same names as from one process.

The processes must see one folder. Process r of n takes pictures r, r + n, ..., in the order of requests and seeds, and
the number of a picture's files is known before any is made.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from sampling.images import open_picture

from .pipeline import Pipeline
from .plan import Plan
from .processes import join_processes, leave_processes, lost_process_is_one_line, meet, processes
from .record import describe, next_number, save_as, save_sheet


def make_share(pipeline: Pipeline, plans: Sequence[Plan]) -> list[Path]:
    """Make and save this process's share of the pictures; the first process also makes the sheet of a job.

    pipeline: with the command line's configuration
    Returns the files that were written
    Errors: ValueError if the folder cannot be written, or another process has ended; FileExistsError if somebody else
        writes there
    """
    config, (rank, world_size) = pipeline.config, processes()
    folder, written = Path(config.out), []
    seeds = [(plan, plan.config.seed + number) for plan in plans for number in range(plan.config.num)]
    requests = [replace(plan, config=replace(plan.config, seed=seed, num=1)) for plan, seed in seeds]
    with lost_process_is_one_line():
        join_processes(plans[0].config.device)
        first = [next_number(folder) if rank == 0 else 0]
        torch.distributed.broadcast_object_list(first)  # before anybody writes
        stems = [f"{number:04d}" for number in range(first[0], first[0] + len(requests))]
        own = list(islice(zip(stems, requests, strict=True), rank, None, world_size))
        pipeline.read_captions([request for _, request in own])
        for stem, request in own:
            (result,) = pipeline.run(request)
            written += save_as(stem, result, {**describe(request), "seconds": dict(result.seconds)}, folder)
        meet(world_size)
        if rank == 0 and config.jobs is not None:
            written.append(save_sheet({stem: open_picture(folder / f"{stem}.png") for stem in stems}, folder))
        leave_processes(world_size)
    return written
