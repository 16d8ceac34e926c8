"""Make a set of pictures that belong together; panels that you keep come back unchanged, the others follow them.

python sample.py --grid 2x2 --mask 3                        a bundled example, panel 3 made from the other three
python sample.py --grid 1x2 --mask all --prompt "..."       from text alone
python sample.py --mask 2,4 --panels a.png b.png --panel-prompt "..." "..." "..." "..."
python sample.py --ref cat.png --ref robot.png --prompt "a cat beside a robot"        with subjects of references
python sample.py --config out/0001.json                     the same picture again
python sample.py --jobs jobs.jsonl                          many requests, the model loaded once
torchrun --nproc-per-node 2 -- sample.py --jobs jobs.jsonl    shared by two processes
"""

import os
import sys
from pathlib import Path

from iclora.cli import check_folder, guard, note, parse, read_jobs, read_record
from iclora.config import SampleConfig

MEMORY = "try a smaller --panel-size, fewer panels or --ref, --tile or --device cpu"


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return the exit status: 0 done, 2 a mistake (one line on stderr), 130 interrupted."""
    return guard(lambda: run(parse(SampleConfig, argv, __doc__)), MEMORY)


def run(config: SampleConfig) -> None:
    """Check everything, then make the pictures and save each as soon as it is finished."""
    folder = Path(config.out)
    check_folder(folder)
    from tqdm import tqdm

    from iclora.memory import add_memory_plans
    from iclora.pipeline import pipeline_for
    from iclora.plan import Plan, make_plan
    from iclora.record import compare, describe, save, save_sheet
    from sampling.inpaint import steps_left

    notes: list[str] = []
    plans: list[Plan] = []
    for source, request in (read_jobs(config) if config.jobs is not None else {"": config}).items():
        try:
            plans.append(make_plan(request, notes.append))  # a mistake is one line, without notes before it
        except ValueError as error:
            raise ValueError(f"{source}: {error}" if source else str(error)) from None
    plans = add_memory_plans(plans)
    if config.dry_run:
        return print(plans[0].memory_plan) if os.environ.get("RANK", "0") == "0" else None
    for line in dict.fromkeys(notes):
        note(line)
    if plans[0].memory_plan:
        note(plans[0].memory_plan.line)
    pipeline = pipeline_for(plans[0])(config, note)
    if os.environ.get("WORLD_SIZE", "1") != "1":  # torchrun has started several
        from iclora.shards import make_share

        return print("".join(f"{path}\n" for path in make_share(pipeline, plans)), end="")
    sets = {}
    if config.jobs is not None:
        pipeline.read_captions(plans)
    for plan in plans:
        record = describe(plan)
        if config.config:
            compare(record, read_record(config.config), config.config, note)
        steps = plan.config.num * steps_left(plan.config.steps, plan.config.strength)
        with tqdm(total=steps, unit="step", disable=None) as bar:
            for result in pipeline.run(plan, bar.update):
                paths = save(result, record, folder)
                print(*paths, sep="\n")
                sets[paths[0].stem] = result.composite
    if config.jobs is not None:
        print(save_sheet(sets, folder))


if __name__ == "__main__":
    sys.exit(main())
