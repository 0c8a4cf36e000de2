"""Times as ratios: in each round everything runs once, in turn, and is compared with the reference of the same round."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ratio:
    """Times of one thing.

    Attributes:
        wall: median over rounds of wall-clock ratios to the reference.
        cpu: median over rounds of ratios of the process's CPU time, which other programs disturb less.
        best: smallest CPU time over the reference's smallest.
        milliseconds: smallest CPU time.
    """

    wall: float
    cpu: float
    best: float
    milliseconds: float


def interleaved(work: Mapping[str, Callable[[], Any]], reference: str, *, rounds: int, warm: int = 2) -> dict[str, Ratio]:
    """Ratios to work[reference]; every round runs all of it, starting one place later each time."""
    names = list(work)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for step in range(warm + rounds):
        shift = step % len(names)
        gc.collect()
        gc.disable()
        for name in names[shift:] + names[:shift]:
            before = time.perf_counter(), time.process_time()
            work[name]()
            after = time.perf_counter(), time.process_time()
            if step >= warm:
                wall[name].append(after[0] - before[0])
                cpu[name].append(after[1] - before[1])
        gc.enable()
    return {
        name: Ratio(
            statistics.median(mine / base for mine, base in zip(wall[name], wall[reference], strict=True)),
            statistics.median(mine / base for mine, base in zip(cpu[name], cpu[reference], strict=True)),
            min(cpu[name]) / min(cpu[reference]),
            1e3 * min(cpu[name]),
        )
        for name in names
    }


def cpu_milliseconds(work: Callable[[], Any], *, repeats: int = 1) -> float:
    """The smallest CPU time of some runs."""
    times = []
    for _ in range(repeats):
        before = time.process_time()
        work()
        times.append(time.process_time() - before)
    return 1e3 * min(times)
