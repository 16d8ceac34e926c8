"""Measuring: implementations that take turns, medians with quartiles, memory that one call takes, operators.

Sound whatever it measures: it knows calls without arguments, by name.
"""

import gc
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

Calls = dict[str, Callable[[], object]]

REPEATS = 3  # of a call whose operators are listed
GROUPS = (
    ("matrix products", re.compile(r"::(add|b|baddb|addb|_scaled_|_int_)?mm_?$|linear|matmul")),
    ("attention", re.compile(r"scaled_dot_product|attention")),
    ("everything else", re.compile("")),
)


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    low: float
    median: float
    high: float

    def show(self, scale: float = 1.0) -> str:
        """Write them as 1.23 (1.20 to 1.31), to three significant digits of the median."""
        largest = abs(self.median * scale)
        places = max(0, 2 - (math.floor(math.log10(largest)) if largest > 0 else 0))
        low, median, high = (f"{value * scale:.{places}f}" for value in (self.low, self.median, self.high))
        return f"{median} ({low} to {high})"


def spread(values: Sequence[float]) -> Spread:
    """Summarise measurements. Errors: ValueError for none"""
    if not values:
        raise ValueError("there is no measurement to summarise")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def times_as_fast(own: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times as fast the own call is as the other, compared round by round, so that drift cancels."""
    return spread([theirs / ours for ours, theirs in zip(own, other, strict=True)])


def wait(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def collector_off() -> Iterator[None]:
    """Keep Python's garbage collector from running into somebody's measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def take_turns(
    calls: Calls,
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = 0.3,
) -> dict[str, list[float]]:
    """Measure seconds of a call: in every round each implementation once, whoever began coming last in the next.

    clock: gives seconds
    seconds: what one measurement takes at least, by repeating the call, equally often for all
    Returns one number a round, by name
    """
    slowest = 0.0
    for call in calls.values():
        call()  # twice, as the first one also sets up
        slowest = max(slowest, elapsed(call, 1, device, clock))
    repeats = max(1, math.ceil(seconds / slowest))
    measured: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    with collector_off():
        for _ in range(rounds):
            for name in order:
                measured[name].append(elapsed(calls[name], repeats, device, clock) / repeats)
            order = order[1:] + order[:1]
    return measured


def elapsed(call: Callable[[], object], repeats: int, device: torch.device, clock: Callable[[], float]) -> float:
    """Give the seconds on the clock that several calls take together."""
    wait(device)
    start = clock()
    for _ in range(repeats):
        call()
    wait(device)
    return clock() - start


def size(tensors: Sequence[Tensor]) -> int:
    """Give the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Give the most bytes that a call holds at a time, beyond what was there before it.

    Counted is what torch's allocator hands out: exact on both devices, and free of what libraries and processes keep.
    """
    call()
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(0, *itertools.accumulate(event.nbytes() for event in events))


@dataclass(frozen=True)
class Operator:
    """What one operator took in one call, without the operators that it called."""

    seconds: float
    calls: float


def operators(call: Callable[[], object], device: torch.device) -> dict[str, Operator]:
    """Give the operators of a call by name, on the device where they compute."""
    return {
        event.key: Operator(
            (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total) / REPEATS / 1e6,
            event.count / REPEATS,
        )
        for event in events(call, device)
        if event.device_type == DeviceType.CPU  # of a kernel's own entry the time is in its operator already
    }


def kernels(call: Callable[[], object], device: torch.device) -> dict[str, Operator]:
    """Give what computes in a call by name: the kernels of a GPU; on a CPU operators, and what the compiler made."""
    if device.type != "cuda":
        return operators(call, device)
    return {
        event.key: Operator(event.self_device_time_total / REPEATS / 1e6, event.count / REPEATS)
        for event in events(call, device)
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation  # of a whole compiled graph
    }


def events(call: Callable[[], object], device: torch.device) -> Sequence[FunctionEventAvg]:
    """Profile a call, REPEATS times."""
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    wait(device)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(REPEATS):
            call()
        wait(device)
    return profile.key_averages()


def group(name: str) -> str:
    """Say what kind of work an operator is."""
    return next(title for title, pattern in GROUPS if pattern.search(name))


def operator_table(found: dict[str, dict[str, Operator]]) -> list[str]:
    """Write operators of several implementations beside each other, the 15 largest first, after sums by kind."""
    nothing = Operator(0.0, 0.0)

    def cell(operator: Operator, whole: float) -> str:
        return f"{1e3 * operator.seconds:.2f} ms, {operator.seconds / whole:.1%}, {operator.calls:.0f}"

    whole = {name: sum(o.seconds for o in own.values()) or 1.0 for name, own in found.items()}
    lines = []
    for title, _ in GROUPS:
        row = [f"**{title}**"]
        for name, own in found.items():
            members = [o for key, o in own.items() if group(key) == title]
            row.append(cell(Operator(sum(o.seconds for o in members), sum(o.calls for o in members)), whole[name]))
        lines.append(row)
    keys = {key for own in found.values() for key in own}
    largest = sorted(keys, key=lambda key: -max(own.get(key, nothing).seconds for own in found.values()))
    for key in largest[:15]:
        lines.append([f"`{key}`", *(cell(own.get(key, nothing), whole[name]) for name, own in found.items())])
    return table(["operator: time of a call, share, calls", *found], lines)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Write a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)]
