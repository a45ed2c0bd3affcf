"""Timing side by side: each contender once a round, in changing order, so that a drift of the machine hits all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bench import bandwidth
from bench.matmul import Matmul

WARM_UPS = 2
CLOCK_RAMP_SECONDS = 0.3
HEAD_START_CYCLES = 2_000_000  # about 1 ms at 2 GHz


@dataclass(frozen=True)
class Contender:
    name: str
    run: Callable[[], tuple[Tensor, ...]]  # what is timed; its results are dropped after the clock has stopped
    prepare: Callable[[], None] = lambda: None  # before each run, not timed
    impl: str = ""  # which implementation of fastkd ran
    error: float | None = None  # of what it computes, where contenders do not compute the same


@dataclass(frozen=True)
class Case:
    """One problem and those who solve it."""

    labels: dict[str, object]  # the columns that tell this case from others
    contenders: Sequence[Contender]
    inputs: Sequence[Tensor] = ()  # what memory is counted beside
    absent: dict[str, str] = field(default_factory=dict)  # who cannot run, and why
    least_bytes: int | None = None  # what no implementation can do without; None where launches are the cost
    least_exponentials: int | None = None  # the same
    matmul: Matmul | None = None  # the matmuls that no implementation can do without
    calls: int = 1  # runs per reading of the clock; above 1 all of them find the caches as the one before left them


class Sample(NamedTuple):
    wall: float  # seconds
    cpu: float | None  # seconds of all threads of this process


class Figures(NamedTuple):
    median: float
    p20: float
    p80: float


class Clock(Protocol):
    def time(self, contender: Contender) -> Sample: ...


class HostClock:
    """Wall time, and CPU time of all threads: the fair measure between codes that use different numbers of them."""

    def __init__(self, device: torch.device, calls: int = 1) -> None:
        self.device, self.calls = device, calls
        self.evict = bandwidth.cache_filler(device) if calls == 1 else None

    def time(self, contender: Contender) -> Sample:
        contender.prepare()
        if self.evict is None:
            contender.run()
        else:
            self.evict.add_(1)
        bandwidth.synchronize(self.device)
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(self.calls):
            result = contender.run()
        bandwidth.synchronize(self.device)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        del result
        return Sample(wall / self.calls, cpu / self.calls if self.device.type == "cpu" else None)


class EventClock:
    """Time on the GPU alone: it sleeps before the clock starts, and by then the host has queued what is timed.

    Without that the clock would also count Python and the launches: filling the L2 keeps the device busy for some 60 us
    only, which is less than they take.
    """

    def __init__(self, device: torch.device) -> None:
        self.evict = bandwidth.cache_filler(device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ramp_clocks(device)

    def time(self, contender: Contender) -> Sample:
        contender.prepare()
        self.evict.add_(1)
        torch.cuda._sleep(HEAD_START_CYCLES)
        self.start.record()
        result = contender.run()
        self.end.record()
        torch.cuda.synchronize()
        del result
        return Sample(self.start.elapsed_time(self.end) / 1e3, None)


def clock_for(device: torch.device, calls: int = 1) -> Clock:
    return EventClock(device) if device.type == "cuda" and calls == 1 else HostClock(device, calls)


def interleave(
    contenders: Sequence[Contender], clock: Clock, rounds: int, step: Callable[[], object] = lambda: None
) -> dict[str, list[Sample]]:
    """Samples by name. ``step`` is called between runs, for a progress bar."""
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in contenders}
    with _no_garbage_collection():
        for contender in contenders:
            for _ in range(WARM_UPS):
                clock.time(contender)
        for contender in _orders(contenders, rounds):
            samples[contender.name].append(clock.time(contender))
            step()
    return samples


def figures(seconds: Sequence[float]) -> Figures:
    if len(seconds) == 1:
        return Figures(seconds[0], seconds[0], seconds[0])
    p20, _, _, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    return Figures(statistics.median(seconds), p20, p80)


def ramp_clocks(device: torch.device) -> None:
    """An idle GPU runs at a fraction of its clock."""
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    until = time.perf_counter() + CLOCK_RAMP_SECONDS
    while time.perf_counter() < until:
        a @ a
        torch.cuda.synchronize()


def _orders(contenders: Sequence[Contender], rounds: int) -> Iterator[Contender]:
    """Rotated every round and reversed every other: nobody always runs after the same one."""
    for turn in range(rounds):
        first = turn % len(contenders)
        order = [*contenders[first:], *contenders[:first]]
        yield from reversed(order) if turn % 2 else order


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
