"""Rectified flow: the straight path between data and noise, its times, and Euler's method along it.

The convention of the whole repository: t = 1 is noise, t = 0 is data, x = (1 - t) data + t noise, and the
velocity is v = dx/dt = noise - data. A velocity is any callable (x, t) -> v; this module knows no network.
"""

import math
from collections.abc import Callable

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
AfterStep = Callable[[Tensor, float], Tensor]


def times(steps: int, tokens: int, shift: bool = True, schedule: str = "tokens") -> list[float]:
    """Noise-to-data times; longer sequences spend more steps near noise.

    steps: Euler steps; the list has steps + 1 entries, 1.0 to 0.0
    tokens: target image tokens I; read it off the tensor, never recompute it
    shift: False gives even times, as FLUX.1-schnell wants
    schedule: "uno-release" counts tokens as UNO's released sampler does, 64 times too few; "tokens" counts them all
    Errors: ValueError if steps < 1
    Source: arXiv:2403.03206 section 5.3.2; black-forest-labs/flux@802fb47 sampling.py get_schedule;
        bytedance/UNO@d305981 uno/flux/pipeline.py:259
    """
    if steps < 1:
        raise ValueError(f"{steps} steps cannot reach the data; use 1 or more")
    even = [1 - i / steps for i in range(steps + 1)]
    if not shift:
        return even
    stretch = time_stretch(tokens // 64 if schedule == "uno-release" else tokens)  # (w/8)(h/8)/256 of its w x h pixels
    return [stretch / (stretch + 1 / t - 1) if t > 0 else 0.0 for t in even]


def time_stretch(tokens: int) -> float:
    """How much more of the way is spent near noise for so many tokens: t becomes s t / (1 + (s - 1) t).

    Source: black-forest-labs/flux@802fb47 sampling.py get_lin_function, time_shift
    """
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))  # 0.5 at 256 tokens, 1.15 at 4096, not clamped


def interpolate(data: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """The point at time t on the straight path from data (0) to noise (1).

    data, noise: same shape
    t: a number, or a tensor that broadcasts against them, such as (B, 1, 1)
    """
    return (1 - t) * data + t * noise


def euler(velocity: Velocity, x: Tensor, times: list[float], after_step: AfterStep | None = None) -> Tensor:
    """Follow the velocity along the times with Euler's method.

    velocity: callable (x, t) -> dx/dt; called once a step
    x: the point at times[0], any shape
    times: descending; from sampling.flow.times
    after_step: callable (x, t_next) -> x, applied after every step
    """
    for t, t_next in zip(times, times[1:], strict=False):
        x = x + (t_next - t) * velocity(x, t)
        if after_step is not None:
            x = after_step(x, t_next)
    return x
