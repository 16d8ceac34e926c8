"""The one training loop of the lab: steps, learning rate, EMA, and checkpoints that survive any kill.

Checkpoints are those of train.py, see iclora.checkpoint.
Every random number of step n comes from a generator seeded by (seed, n): a resumed run needs no RNG state and
repeats an uninterrupted one. A stage by the clock counts the seconds it has taken instead of steps, which a checkpoint
keeps too; how many steps fit in them is another number each time, so only its length is repeated.
"""

import copy
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, nn

from iclora.checkpoint import (
    State,
    first_change,
    last_good,
    load_checkpoint,
    only_run,
    read_checkpoint,
    save_checkpoint,
    update_average,
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One stage of pretraining: how long, how fast, and what is averaged.

    seconds: how long, by the clock; 0 goes by the steps
    bfloat16: under autocast, which computes products in bfloat16; weights, optimizers and averages stay float32
    """

    name: str
    steps: int
    batch: int
    lr: float  # of AdamW
    muon_lr: float = 0.0  # of Muon, for hidden matrices; 0 leaves everything to AdamW
    warmup: int = 100
    decay_from: float = 0.0  # share of the stage after which the rate falls to 0 along a cosine; 1 never
    ema: float = 0.999
    clip: float = 1.0
    seconds: float = 0.0
    bfloat16: bool = False


@dataclass(frozen=True)
class Work:
    """Where a run keeps its checkpoints, and what tells it from other runs."""

    folder: Path
    seed: int = 0
    device: str = "cpu"
    origin: str = ""  # what the weights started from or stand on, and another shape; see lab.pretrain.origin
    processes: int = 1  # that train and encode together, a core each


class Clock:
    """How much of a stage is done, by its steps or by the time it has taken.

    The first step of every process is not timed, as it may compile; so a stage that goes on does one step at least.

    seconds: that the stage has taken in all processes that trained it
    done: share of the stage, from 0; it is over at 1
    """

    def __init__(self, stage: Stage, now: Callable[[], float] = time.monotonic):
        self.stage, self.now = stage, now
        self.seconds = self.done = 0.0
        self.last: float | None = None

    def resume(self, step: int, seconds: float) -> None:
        """Go on from a checkpoint."""
        self.seconds = seconds
        self.done = seconds / self.stage.seconds if self.stage.seconds else step / self.stage.steps

    def tick(self, step: int) -> None:
        """Count another step: `step` are done."""
        now = self.now()
        passed, self.last = now - (now if self.last is None else self.last), now
        self.resume(step, self.seconds + passed)

    def left(self, step: int, speed: float) -> float:
        """Seconds to the end of the stage. speed: steps a second"""
        return max(0, self.stage.seconds - self.seconds) if self.stage.seconds else (self.stage.steps - step) / speed


def step_generator(seed: int, step: int, process: int = 0, device: str = "cpu") -> torch.Generator:
    """Give the generator that makes every random choice of one step in one process, on the device that uses them."""
    return torch.Generator(device).manual_seed((seed + 1009 * process) * 1_000_003 + step)


def rate(stage: Stage, step: int, done: float) -> float:
    """The factor on the learning rate: linear warm-up, flat, then a cosine to zero.

    done: share of the stage
    """
    warm = min(1.0, (step + 1) / max(1, stage.warmup))
    if done < stage.decay_from:
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * (done - stage.decay_from) / (1 - stage.decay_from)))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: every direction of a matrix learns at the same speed.

    torch.optim.Muon takes 2-D weights only and computes in bfloat16, which a CPU without bfloat16 units does at
    a quarter of its float32 speed; this one takes convolutions too and stays in the weight's dtype.
    Source: Jordan et al. 2024, Muon; the factor 0.2 sqrt(max side) of arXiv:2502.16982 matches AdamW's rates
    """

    moments = ("momentum_buffer",)  # that a checkpoint keeps of a parameter

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for alike in by_shape.values():
                self._step_alike(alike, group)

    def _step_alike(self, params: list[nn.Parameter], group: dict) -> None:
        """Update parameters of one shape together: one batched iteration instead of many small ones."""
        grads = [p.grad for p in params]
        buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        nesterov = [g.lerp(m, group["momentum"]).flatten(1) for g, m in zip(grads, buffers, strict=True)]
        update = orthogonal(torch.stack(nesterov))
        scale = 0.2 * max(update.shape[1:]) ** 0.5
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        changes = [u.view_as(p) for u, p in zip(update, params, strict=True)]
        torch._foreach_add_(params, changes, alpha=-group["lr"] * scale)


def orthogonal(g: Tensor) -> Tensor:
    """Move the singular values of matrices (N, rows, columns) towards 1 with Muon's quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.mT if g.shape[1] > g.shape[2] else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if g.shape[1] > g.shape[2] else x


def optimizers(module: nn.Module, stage: Stage, is_hidden: Callable[[str, Tensor], bool]) -> list:
    """Muon for the hidden matrices where the stage asks for it, AdamW for the rest."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if stage.muon_lr and is_hidden(name, p)]
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in chosen]
    made = [torch.optim.AdamW(rest, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.01)]
    if hidden:
        made.append(Muon(hidden, lr=stage.muon_lr))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return made


@dataclass(frozen=True)
class Helper:
    """A forked process that works out the gradients of another batch of each step, on one core.

    Two processes of one thread each get through more than one process of two threads (docs/log.md): most of the
    tiny model's operations are too small to be worth splitting.
    """

    pipe: Connection
    gradients: list[Tensor]  # in shared memory, as the module's parameters are

    @classmethod
    def start(cls, module: nn.Module, loss_of: Callable, clock: Clock, number: int) -> "Helper":
        trained = [p for p in module.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p).share_memory_() for p in trained]
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()

        def work() -> None:
            while (message := theirs.recv()) is not None:
                step, clock.done = message
                losses = loss_of(step, number)
                losses["loss"].backward()
                torch._foreach_copy_(gradients, [p.grad for p in trained])
                module.zero_grad(set_to_none=True)
                theirs.send({name: float(value.detach()) for name, value in losses.items()})

        context.Process(target=work, daemon=True).start()
        return cls(ours, gradients)


def gradients_of(
    step: int, module: nn.Module, loss_of: Callable, clock: Clock, helpers: list[Helper]
) -> dict[str, Tensor]:  # fmt: skip
    """Leave the mean gradients of all processes' batches in the module; gives the mean losses by name.

    loss_of: (step, process) -> losses by name
    """
    for helper in helpers:
        helper.pipe.send((step, clock.done))
    losses = loss_of(step, 0)
    losses["loss"].backward()
    found = [{name: value.detach() for name, value in losses.items()}]  # still on its device, which need not be awaited
    own = [p.grad for p in module.parameters() if p.requires_grad]
    for helper in helpers:
        found.append(helper.pipe.recv())
        torch._foreach_add_(own, helper.gradients)
    if helpers:
        torch._foreach_div_(own, len(found))
    return {name: sum(values[name] for values in found) / len(found) for name in found[0]}


def run(
    stage: Stage,
    module: nn.Module,
    loss_at: Callable[[int, torch.Generator], dict[str, Tensor]],
    work: Work,
    is_hidden: Callable[[str, Tensor], bool] = lambda name, p: False,
    every: float = 60,
    processes: int = 1,
    report: Callable[[str], None] = print,
    clock: Clock | None = None,
) -> nn.Module:
    """Train a module to the end of its stage, from its last checkpoint if there is one.

    loss_at: (step, generator) -> losses by name; "loss" is minimised, the others are shown
    work: `<stage>.safetensors` is kept in its folder; a stage that is finished there is loaded, not run
    every: seconds between checkpoints
    processes: each works on a batch of its own in every step; more than one needs a CPU and fork
    clock: of the stage, where its losses ask how much is done
    Errors: ValueError if the folder holds a checkpoint of a run with another seed or origin, or a run that works
    Returns the averaged (EMA) copy of the module
    """
    with only_run(work.folder / f"{stage.name}.running"):
        return train_stage(stage, module, loss_at, work, is_hidden, every, processes, report, clock or Clock(stage))


def train_stage(
    stage: Stage, module: nn.Module, loss_at: Callable, work: Work, is_hidden: Callable, every: float, processes: int,
    report: Callable, clock: Clock,
) -> nn.Module:  # fmt: skip
    """Do what run says, in a folder that is its own."""
    path = work.folder / f"{stage.name}.safetensors"
    average = copy.deepcopy(module).requires_grad_(False)
    state = State(values(module), values(average), optimizers(module, stage, is_hidden))
    if begun := last_good(path, report):
        refuse_other_run(begun, work)
        os.replace(begun, path)  # a damaged one makes room
        load_checkpoint(path, state)
        clock.resume(state.step, read_checkpoint(path)[0].get("seconds", 0.0))

    def loss_of(step: int, process: int) -> dict[str, Tensor]:
        with torch.autocast(torch.device(work.device).type, torch.bfloat16, enabled=stage.bfloat16):
            return loss_at(step, step_generator(work.seed, step, process, work.device))

    start = state.step
    helpers = []
    if processes > 1 and clock.done < 1:
        torch.set_num_threads(1)
        module.share_memory()
        helpers = [Helper.start(module, loss_of, clock, number) for number in range(1, processes)]
    shown: dict[str, Tensor] = {}
    began = saved = time.monotonic()
    while clock.done < 1:
        step = state.step
        factor = rate(stage, step, clock.done)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
        losses = gradients_of(step, module, loss_of, clock, helpers)
        nn.utils.clip_grad_norm_(module.parameters(), stage.clip)
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(list(average.parameters()), list(module.parameters()), stage.ema, step)
        for kept, now in zip(average.buffers(), module.buffers(), strict=True):
            kept.copy_(now)
        state.step = step + 1
        clock.tick(state.step)
        for name, value in losses.items():
            shown[name] = 0.98 * shown.get(name, value) + 0.02 * value
        if (state.step - start) % 50 == 0 or clock.done >= 1:
            speed = (state.step - start) / (time.monotonic() - began)
            figures = "  ".join(f"{name} {float(value):.4f}" for name, value in shown.items())
            left = f"{speed:.2f} steps/s  {clock.left(state.step, speed) / 60:.1f} min left"
            report(f"{stage.name} {state.step}{'' if stage.seconds else f'/{stage.steps}'}  {figures}  {left}")
        if time.monotonic() - saved > every or clock.done >= 1:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(path, state, {**settings(work), "seconds": clock.seconds}, {})
            saved = time.monotonic()
    for helper in helpers:
        helper.pipe.send(None)
    return average


def values(module: nn.Module) -> list[Tensor]:
    """List what a checkpoint holds of a module: parameters, then buffers."""
    return [*module.parameters(), *module.buffers()]


def settings(work: Work) -> dict[str, int | str]:
    """Give what tells the checkpoints of a run from those of others."""
    return {"seed": work.seed, "origin": work.origin}


def finished(stage: Stage, work: Work) -> bool:
    """Whether run would load the stage and not train it."""
    path = work.folder / f"{stage.name}.safetensors"
    if not path.exists():
        return False
    kept, _, step = read_checkpoint(path)
    clock = Clock(stage)
    clock.resume(step, kept.get("seconds", 0.0))
    return clock.done >= 1


def refuse_other_run(path: Path, work: Work) -> None:
    """Refuse a checkpoint of a run with another origin or another seed. Errors: ValueError"""
    if change := first_change(path, settings(work), {}):
        name, before, now = change
        was = f"{path} belongs to a run whose {name} is {before!r}, not {now!r}"
        raise ValueError(f"{was}; give another --work, or remove the file")
