"""The one training loop of the lab: steps, learning rate, EMA, and checkpoints that survive any kill.

Checkpoints are those of train.py, see iclora.checkpoint.
Every random number of step n comes from a generator seeded by (seed, n): a resumed run needs no RNG state and
repeats an uninterrupted one.
"""

import copy
import math
import multiprocessing
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
    load_checkpoint,
    only_run,
    read_checkpoint,
    save_checkpoint,
    update_average,
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One stage of pretraining: how long, how fast, and what is averaged."""

    name: str
    steps: int
    batch: int
    lr: float  # of AdamW
    muon_lr: float = 0.0  # of Muon, for hidden matrices; 0 leaves everything to AdamW
    warmup: int = 100
    decay_from: float = 0.0  # share of the steps after which the rate falls to 0 along a cosine; 1 never
    ema: float = 0.999
    clip: float = 1.0


@dataclass(frozen=True)
class Work:
    """Where a run keeps its checkpoints, and what tells it from other runs."""

    folder: Path
    seed: int = 0
    device: str = "cpu"
    origin: str = ""  # what the weights started from or stand on, and another shape; see lab.pretrain.origin
    processes: int = 1  # that train and encode together, a core each


def step_generator(seed: int, step: int, process: int = 0) -> torch.Generator:
    """Give the generator that makes every random choice of one step in one process."""
    return torch.Generator("cpu").manual_seed((seed + 1009 * process) * 1_000_003 + step)


def rate(stage: Stage, step: int) -> float:
    """The factor on the learning rate: linear warm-up, flat, then a cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, stage.warmup))
    start = stage.decay_from * stage.steps
    if step < start:
        return warm
    done = (step - start) / max(1, stage.steps - start)
    return warm * 0.5 * (1 + math.cos(math.pi * done))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: every direction of a matrix learns at the same speed.

    torch.optim.Muon takes 2-D weights only and computes in bfloat16, which a CPU without bfloat16 units does at
    a quarter of its float32 speed; this one takes convolutions too and stays in the weight's dtype.
    Source: Jordan et al. 2024, Muon; the factor 0.2 sqrt(max side) of arXiv:2502.16982 matches AdamW's rates
    """

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


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """Move the singular values of matrices (N, rows, columns) towards 1 with Muon's quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.mT if g.shape[1] > g.shape[2] else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
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
    def start(cls, module: nn.Module, loss_at: Callable, seed: int, number: int) -> "Helper":
        trained = [p for p in module.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p).share_memory_() for p in trained]
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()

        def work() -> None:
            while (step := theirs.recv()) is not None:
                losses = loss_at(step, step_generator(seed, step, number))
                losses["loss"].backward()
                torch._foreach_copy_(gradients, [p.grad for p in trained])
                module.zero_grad(set_to_none=True)
                theirs.send({name: float(value.detach()) for name, value in losses.items()})

        context.Process(target=work, daemon=True).start()
        return cls(ours, gradients)


def gradients_of(step: int, module: nn.Module, loss_at: Callable, seed: int, helpers: list[Helper]) -> dict[str, float]:
    """Leave the mean gradients of all processes' batches in the module; gives the mean losses by name."""
    for helper in helpers:
        helper.pipe.send(step)
    losses = loss_at(step, step_generator(seed, step))
    losses["loss"].backward()
    found = [{name: float(value.detach()) for name, value in losses.items()}]
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
) -> nn.Module:
    """Train a module to the end of its stage, from its last checkpoint if there is one.

    loss_at: (step, generator) -> losses by name; "loss" is minimised, the others are shown
    work: `<stage>.safetensors` is kept in its folder; a stage that is finished there is loaded, not run
    every: seconds between checkpoints
    processes: each works on a batch of its own in every step; more than one needs a CPU and fork
    Errors: ValueError if the folder holds a checkpoint of a run with another seed or origin, or a run that works
    Returns the averaged (EMA) copy of the module
    """
    with only_run(work.folder, f".{stage.name}.lock"):
        return train_stage(stage, module, loss_at, work, is_hidden, every, processes, report)


def train_stage(
    stage: Stage, module: nn.Module, loss_at: Callable, work: Work, is_hidden: Callable, every: float, processes: int,
    report: Callable,
) -> nn.Module:  # fmt: skip
    """Do what run says, in a folder that is its own."""
    path = work.folder / f"{stage.name}.safetensors"
    average = copy.deepcopy(module).requires_grad_(False)
    state = State(values(module), values(average), optimizers(module, stage, is_hidden))
    if path.exists():
        refuse_other_run(path, work)
        load_checkpoint(path, state)
    start = state.step
    helpers = []
    if processes > 1 and start < stage.steps:
        torch.set_num_threads(1)
        module.share_memory()
        helpers = [Helper.start(module, loss_at, work.seed, number) for number in range(1, processes)]
    shown: dict[str, float] = {}
    began = saved = time.monotonic()
    for step in range(start, stage.steps):
        factor = rate(stage, step)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
        losses = gradients_of(step, module, loss_at, work.seed, helpers)
        nn.utils.clip_grad_norm_(module.parameters(), stage.clip)
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(list(average.parameters()), list(module.parameters()), stage.ema, step)
        for kept, now in zip(average.buffers(), module.buffers(), strict=True):
            kept.copy_(now)
        state.step = step + 1
        for name, value in losses.items():
            shown[name] = 0.98 * shown.get(name, value) + 0.02 * value
        done = step + 1 - start
        if done % 50 == 0 or step + 1 == stage.steps:
            speed = done / (time.monotonic() - began)
            figures = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            left = (stage.steps - step - 1) / speed / 60
            report(f"{stage.name} {step + 1}/{stage.steps}  {figures}  {speed:.2f} steps/s  {left:.1f} min left")
        if time.monotonic() - saved > every or step + 1 == stage.steps:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(path, state, settings(work), {})
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
    return path.exists() and read_checkpoint(path)[2] >= stage.steps


def refuse_other_run(path: Path, work: Work) -> None:
    """Refuse a checkpoint of a run with another origin or another seed. Errors: ValueError"""
    if change := first_change(path, settings(work), {}):
        name, before, now = change
        was = f"{path} belongs to a run whose {name} is {before!r}, not {now!r}"
        raise ValueError(f"{was}; give another --work, or remove the file")
