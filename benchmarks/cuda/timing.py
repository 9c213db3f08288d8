"""How a call is timed: on the device's clock, warm, with an empty cache, the median of several."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch

Run = Callable[[], object]
# More than the L2 of any chip there is (an H200 has 60 MB): writing it evicts what the last run left.
_FLUSHED = 256 * 2**20


class Watch(Protocol):
    """Times one call: milliseconds on the device, and milliseconds until the host had sent off all of it."""

    def __call__(self, run: Run) -> tuple[float, float]:
        """Run it once."""
        ...


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median and the range of ``runs`` calls, and the median of the host's part."""

    milliseconds: float
    low: float
    high: float
    host_milliseconds: float
    runs: int


class CudaWatch:
    """Events around the call. The flush runs meanwhile, so that the host is ahead of the device where it can be."""

    def __init__(self, device: str) -> None:
        self.buffer = torch.empty(_FLUSHED, dtype=torch.int8, device=device)

    def __call__(self, run: Run) -> tuple[float, float]:
        """Run it once, on a cache full of something else."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.buffer.zero_()
        start.record()
        sent = time.perf_counter()
        run()
        sent = time.perf_counter() - sent
        end.record()
        end.synchronize()
        return start.elapsed_time(end), sent * 1e3


class HostWatch:
    """For a CPU, where only tests time anything."""

    def __call__(self, run: Run) -> tuple[float, float]:
        """Run it once."""
        start = time.perf_counter()
        run()
        spent = (time.perf_counter() - start) * 1e3
        return spent, spent


def watch_for(device: str) -> Watch:
    """The watch of a device."""
    return CudaWatch(device) if device.startswith("cuda") else HostWatch()


def timed(
    run: Run,
    watch: Watch,
    warm: float = 0.15,
    seconds: float = 0.4,
    least: int = 5,
    most: int = 50,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time ``run``: at least two calls and ``warm`` seconds first, then ``least`` to ``most`` calls in ``seconds``.

    The first call compiles and counts neither as a measurement nor as warm. Slow calls (a second and more) are timed
    three times.
    """
    watch(run)
    started, spent = clock(), watch(run)[0]
    while clock() - started < warm:
        spent = watch(run)[0]
    least = 3 if spent > 1e3 else least
    found: list[tuple[float, float]] = []
    started = clock()
    while len(found) < least or (len(found) < most and clock() - started < seconds):
        found.append(watch(run))
    device = [ms for ms, _ in found]
    return Timing(median(device), min(device), max(device), median(ms for _, ms in found), len(found))


def as_graph(run: Run) -> tuple[Run, str | None]:
    """``run`` as a CUDA graph's replay, so that a step of microseconds is not the host's launches; else why not."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except Exception as error:  # a step that synchronises raises one of several
        torch.cuda.synchronize()
        return run, f"{type(error).__name__}: {error}".splitlines()[0]
    return graph.replay, None
