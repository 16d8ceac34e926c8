"""Training adapters: the loss, the one loop, and all that it draws at random.

Letters: B batch, I image tokens, T text tokens, C and V widths of the text features; h, w in latent cells.

Every random number of a step is drawn for the whole batch from a generator seeded by (seed, step), and each process
takes its share: a run gives the same on one process as on several, and goes on after a kill without generator state.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.flux import Flux
from model.position import grid_ids
from sampling.flow import interpolate, time_stretch
from sampling.latents import pack

from .config import TrainConfig
from .layout import Layout
from .loader import Batch, Loader

GUIDANCE = 1.0  # the guidance embedding that LoRAs of FLUX.1-dev are trained at
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass
class State:
    """All that changes while training; a checkpoint holds it whole.

    average: of the parameters, in their order
    step: steps done
    """

    parameters: list[nn.Parameter]
    average: list[Tensor]
    optimizer: torch.optim.Optimizer
    step: int = 0


def new_state(parameters: list[nn.Parameter]) -> State:
    """Start training from the parameters as they are."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    return State(parameters, [p.detach().clone() for p in parameters], optimizer)


@contextlib.contextmanager
def averaged(state: State) -> Iterator[None]:
    """Put the averaged weights in place of the trained ones for a while."""
    trained = [p.detach().clone() for p in state.parameters]
    with torch.no_grad():
        torch._foreach_copy_(state.parameters, state.average)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(state.parameters, trained)


# what is drawn


@dataclass(frozen=True)
class Drawn:
    """The random part of one batch.

    noise: (B, I, 64), t: (B,)
    kept: the panels that each example keeps clean, from 1; none of them unless the run is conditional
    dropped: which captions are left out
    posterior: (B, R, 64) noise of the references; None takes the mean of their posterior
    """

    noise: Tensor
    t: Tensor
    kept: list[tuple[int, ...]]
    dropped: list[bool]
    posterior: Tensor | None

    def part(self, share: slice) -> "Drawn":
        posterior = None if self.posterior is None else self.posterior[share]
        return Drawn(self.noise[share], self.t[share], self.kept[share], self.dropped[share], posterior)


def draw(config: TrainConfig, step: int, count: int, layout: Layout) -> Drawn:
    """Draw everything random of a step, for all processes.

    count: examples in the batch
    """
    tokens = layout.tokens_high * layout.tokens_wide
    generator = torch.Generator("cpu").manual_seed((config.seed * 1_000_003 + step) % 2**63)
    t = draw_times(config.times, count, tokens, generator)
    dropped = (torch.rand(count, generator=generator) < config.dropout).tolist()
    kept = [draw_kept(layout.panels, generator) if config.condition == "clean" else () for _ in range(count)]
    noise, posterior = torch.randn(count, tokens, 64, generator=generator), None
    if layout.references and config.posterior == "sample":
        posterior = torch.randn(count, layout.reference_tokens, 64, generator=generator)
    return Drawn(noise, t, kept, dropped, posterior)


def draw_times(kind: str, count: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Draw times: (count,) in 0..1.

    kind: logit-normal, uniform, or shifted, which is uniform and moved towards noise as in sampling
    Source: arXiv:2403.03206 (logit-normal); bytedance/UNO@d305981 train.py (shifted)
    """
    if kind == "logit-normal":
        return torch.sigmoid(torch.randn(count, generator=generator))
    t = torch.rand(count, generator=generator)
    stretch = time_stretch(tokens) if kind == "shifted" else 1.0
    return stretch * t / (1 + (stretch - 1) * t)


def draw_kept(panels: int, generator: torch.Generator) -> tuple[int, ...]:
    """Draw which panels stay clean: any number of them but all, and any of them; from 1."""
    number = int(torch.randint(0, panels, (1,), generator=generator))
    return tuple(sorted((torch.randperm(panels, generator=generator)[:number] + 1).tolist()))


# the loss


def flow_loss(flux: Flux, sets: Batch, noise: Tensor, t: Tensor) -> Tensor:
    """The squared error of the velocity, a mean over the generated tokens of each example: (B,) float32.

    noise: (B, I, 64), t: (B,)
    Known panels and references stand clean in the input at every time, as they do in sampling.
    """
    data = pack(sets.z)
    x = interpolate(data, noise, t[:, None, None])
    if sets.known is not None:
        x = x.where(sets.generate_mask, pack(sets.known))
    count, text = sets.txt.shape[:2]
    ids = grid_ids(sets.z.shape[2] // 2, sets.z.shape[3] // 2).to(x.device) if sets.ids is None else sets.ids
    ids = ids.expand(count, -1, -1)  # (B, I + R, 3)
    txt_ids = torch.zeros(count, text, 3, device=x.device)
    guidance = torch.full((count,), GUIDANCE, device=x.device) if flux.config.guidance_embed else None
    v = flux(x, ids, sets.txt, txt_ids, t, sets.vec, guidance, sets.attention_mask, sets.references, sets.isolate_refs)
    error = (v.float() - (noise - data)).square().mean(dim=-1)  # (B, I)
    if sets.generate_mask is None:
        return error.mean(dim=1)
    weight = sets.generate_mask[..., 0].float()
    return (error * weight).sum(dim=1) / weight.sum(dim=1)


@torch.no_grad()
def validation_loss(flux: Flux, feed: Loader, condition: str, device: torch.device) -> float:
    """The loss on held-out examples at fixed times, noise and kept panels; unlike that of training it can be compared.

    References are the mean of their posterior.

    condition: "clean" keeps panels as training does
    """
    losses = []
    for number, (layout, examples) in enumerate(feed.held_out):
        generator = torch.Generator("cpu").manual_seed(number)
        tokens = layout.tokens_high * layout.tokens_wide
        for example in examples:
            for time in VALIDATION_TIMES:
                kept = draw_kept(layout.panels, generator) if condition == "clean" else ()
                sets = feed.collate(layout, [example], [kept], [False]).to(device)
                noise = torch.randn(1, tokens, 64, generator=generator).to(device)
                losses.append(flow_loss(flux, sets, noise, torch.full((1,), time, device=device)))
    return float(torch.cat(losses).mean()) if losses else math.nan


# the loop


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then constant, then in a straight line to 0 behind the last step."""
    left = (config.steps - step) / (config.decay * config.steps) if config.decay else 1.0
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup), left)


def train(
    config: TrainConfig, flux: Flux, feed: Loader, state: State, after_step: Callable[[float], None],
    rank: int = 0, ranks: int = 1, stop: Callable[[], bool] = lambda: False,
) -> None:  # fmt: skip
    """Train to config.steps from wherever the state is.

    config: with nothing left undecided
    after_step: is told the loss of every step, once the state is that of the step
    rank, ranks: of this process among those that share every batch
    stop: is asked once a step; when it says yes in any process, this step is the last one in all of them
    Errors: ValueError if the loss or its gradient is not finite; the state is that of the step before then
    """
    device = state.parameters[0].device
    while state.step < config.steps:
        layout, examples = feed.batch(state.step)
        drawn = draw(config, state.step, len(examples), layout)
        loss = torch.zeros((), device=device)
        for share in parts(len(examples), rank, ranks, config.accumulate):
            own = drawn.part(share)
            sets = feed.collate(layout, examples[share], own.kept, own.dropped)
            sets = sets.sample_references(own.posterior).to(device)
            part = flow_loss(flux, sets, own.noise.to(device), own.t.to(device)).sum() / len(examples)
            part.backward()
            loss += part.detach()
        stopping = torch.full((), float(stop()), device=device)
        sum_over_processes([loss, stopping, *(p.grad for p in state.parameters)], ranks)
        norm = nn.utils.clip_grad_norm_(state.parameters, 1.0)
        if not torch.isfinite(loss + norm):
            raise ValueError(
                f"training diverged: in step {state.step + 1} the loss is {float(loss):.4g}, its gradient "
                f"{float(norm):.4g}; start anew with a lower --lr and another --out"
            )
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config, state.step)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        decay = min(config.ema, (1 + state.step) / (10 + state.step))  # the first steps are forgotten sooner
        torch._foreach_lerp_(state.average, [p.detach() for p in state.parameters], 1 - decay)
        state.step += 1
        after_step(float(loss))
        if stopping:
            return


def parts(count: int, rank: int, ranks: int, accumulate: int) -> list[slice]:
    """Cut one process's share of a batch into the parts that are worked through one after the other.

    Errors: ValueError if the batch cannot be cut evenly
    """
    if count % (ranks * accumulate):
        raise ValueError(
            f"a batch of {count} cannot be cut for {ranks} processes and --accumulate {accumulate}; "
            f"use a --batch that is a multiple of {ranks * accumulate}"
        )
    size = count // (ranks * accumulate)
    first = rank * size * accumulate
    return [slice(start, start + size) for start in range(first, first + size * accumulate, size)]


def sum_over_processes(tensors: list[Tensor], ranks: int) -> None:
    """Replace each tensor by its sum over all processes, in one message."""
    if ranks == 1:
        return
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def keep_no_activations(flux: Flux) -> None:
    """Recompute every block in the backward pass instead of keeping what it computed."""
    for block in (*flux.double_blocks, *flux.single_blocks):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
