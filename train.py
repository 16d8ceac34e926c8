"""Trains a LoRA: a relation between panels, from 20 to 100 sets that show it (In-Context LoRA), or how to draw the
subjects of reference pictures, from many pairs of references and target (UNO, in two stages).

  python train.py --data sets/ --rank 16              the bundled sets on the bundled model: minutes on a CPU
  python train.py --data my-sets --model flux-dev     the same on FLUX.1-dev, as the paper does
  python train.py --data sets/sketch --condition clean    learn to make panels from clean given ones
  python train.py --data sets/walk --concat tokens --text panel    as in Group Diffusion Transformers, to compare
  python train.py --method uno --data pairs.json --out runs/one       UNO's first stage: one reference
  python train.py --method uno --stage 2 --init-lora runs/one/lora.safetensors --data more.json    and its second
  torchrun --nproc-per-node 2 train.py --data sets/    every batch shared by two processes

The same command goes on where a run was stopped.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from iclora.cli import check_folder, guard, parse, tell
from iclora.config import TrainConfig

if TYPE_CHECKING:  # torch loads after the command line was found to be right
    from iclora.checkpoint import State
    from iclora.loader import Loader
    from iclora.monitor import Monitor
    from model.flux import Flux

MEMORY = "try --checkpointing, a larger --accumulate or a smaller --panel-size"


def main(argv: list[str] | None = None) -> int:
    """Run one command line. Returns the exit status: 0 done, 2 a mistake (one line on stderr), 130 interrupted"""
    return guard(lambda: run(parse(TrainConfig, argv, __doc__)), MEMORY)


def run(config: TrainConfig) -> None:
    """Check all that can be checked without a network, read the data, train, and write the LoRA."""
    check_folder(Path(config.out))
    # realpath, as Path.resolve raises for links in a circle
    if Path(os.path.realpath(config.out)).is_relative_to(os.path.realpath(config.data)):
        raise ValueError(f"--out {config.out} lies in --data, where the next run would read it; choose one outside")
    from iclora.checkpoint import only_run
    from iclora.monitor import Monitor
    from iclora.processes import leave_processes, lost_process_is_one_line, processes
    from iclora.training import plan_training, start_training, try_command

    rank, world_size = processes()
    say = tell if rank == 0 else lambda line: None
    plan = plan_training(config, world_size, say)
    if config.dry_run:  # which always makes a memory plan
        return print(plan.memory_plan) if rank == 0 else None
    if plan.memory_plan:
        say(plan.memory_plan.line)
    with lost_process_is_one_line(), only_run(Path(config.out)) if rank == 0 else contextlib.nullcontext():
        loader, flux, state = start_training(plan, rank, world_size, say)
        with Monitor(plan, loader, flux, state, say) if rank == 0 else contextlib.nullcontext() as monitor:
            train(plan.config, flux, loader, state, monitor)
        leave_processes(world_size)
    if state.step < (steps := plan.config.steps):
        raise KeyboardInterrupt(f"stopped after step {state.step} of {steps}; the same command goes on there")
    say(try_command(config, loader.layouts[0]))


def train(config: TrainConfig, flux: "Flux", loader: "Loader", state: "State", monitor: "Monitor | None") -> None:
    """Train to config.steps from wherever the state is: THE training loop.

    Ctrl-C in any process makes the step under way the last one in all of them.

    config: with all defaults resolved
    monitor: shows and saves, in the first process
    Errors: ValueError if the loss or its gradient is not finite; the state is that of the step before then
    """
    import torch

    from iclora.ahead import look_ahead
    from iclora.checkpoint import update_average
    from iclora.processes import processes, sum_over_processes
    from iclora.training import flow_loss, learning_rate, micro_batches, sample_step

    (rank, world_size), (optimizer,), device = processes(), state.optimizers, state.parameters[0].device
    with stop_between_steps() as signals:
        stopping = False
        while state.step < config.steps and not stopping:
            look_ahead(config, flux, loader, state.step, rank, world_size)  # for large models; else does nothing
            layout, examples = loader.batch(state.step)
            step_noise = sample_step(config, state.step, len(examples), layout)

            loss = torch.zeros((), device=device)
            for rows in micro_batches(len(examples), rank, world_size, config.accumulate):
                drawn = step_noise[rows]
                batch = loader.collate(layout, examples[rows], drawn.kept, drawn.dropped)
                batch = batch.sample_posterior(drawn.ref_noise, drawn.z_noise).to(device)
                share = flow_loss(flux, batch, drawn.noise.to(device), drawn.t.to(device)).sum() / len(examples)
                share.backward()
                loss += share.detach()
            stopping = torch.full((), float(len(signals)), device=device)
            sum_over_processes([loss, stopping, *(p.grad for p in state.parameters)], world_size)
            norm = torch.nn.utils.clip_grad_norm_(state.parameters, 1.0)
            if not torch.isfinite(loss + norm):
                raise ValueError(
                    f"training diverged: in step {state.step + 1} the loss is {float(loss):.4g}, its gradient "
                    f"{float(norm):.4g}; start anew with a lower --lr and another --out"
                )

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, state.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            update_average(state.average, state.parameters, config.ema, state.step)
            state.step += 1

            if monitor:
                monitor.log(float(loss))
                if monitor.due(config.save_every):
                    monitor.save()
                if monitor.due(config.sample_every):
                    monitor.draw_sheet()
        if monitor:
            monitor.save()


@contextlib.contextmanager
def stop_between_steps() -> Iterator[list[int]]:
    """Collect Ctrl-C, SIGTERM and SIGHUP, so that a step is never left half done; the second one stops at once."""
    signals: list[int] = []

    def handle(number: int, frame: object) -> None:
        signals.append(number)
        if len(signals) > 1:
            raise KeyboardInterrupt("interrupted; the same command goes on from the last checkpoint")
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step; once more stops at once and loses the steps since the save\n")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
