"""Measurements of ``llcompile bench operator``, in a process of their own: jobs of one length take turns."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.operator_calls import Operands, Result, Run, call, operands
from llcompile.kernels import choice

WARM_LENGTH = 128
# Seconds after which a job has been run often enough, if it had that many turns, and those for which a quick one is run
# again. A run of more than SLOW seconds, that for memory included, is enough by itself.
ENOUGH, TURNS, QUICK, SLOW = 1.5, 3, 0.25, 2.5
FITS = 0.9  # of the memory that is free may be taken


def main(text: str) -> None:
    """Measure the jobs described by ``text`` (a JSON list) and print one line of JSON for each."""
    jobs = json.loads(text)
    torch.set_num_threads(jobs[0]["threads"])
    limit_memory()
    rounds = [list(group) for _, group in itertools.groupby(jobs, _together)]
    # Libraries load and are compiled, and threads start, with the first call; that is nobody's time or memory.
    firsts = {(one[0]["decay"], one[0]["correction"]): one for one in reversed(rounds)}
    for one in firsts.values():
        take_turns([{**job, "length": WARM_LENGTH, "compiled": False, "repeats": 1} for job in one], quick=0.0)
    for one in rounds:
        for answer in take_turns(one):
            print(json.dumps(answer), flush=True)


def _together(job: dict[str, Any]) -> tuple[Any, ...]:
    """What jobs that take turns have in common: their operands."""
    return job["length"], job["decay"], job["correction"], job["dtype"]


@dataclass
class Contestant:
    """One of the jobs that take turns, and what was measured of it."""

    job: dict[str, Any]
    run: Run | None = None
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    def prepare(self, x: Operands) -> None:
        """Run it for the first time, and for its memory."""
        with self._failing():
            self.run = call(self.job, x)
            started = time.perf_counter()
            if self.job["compiled"]:  # compiling takes memory of its own, which is not what is asked here
                self._call()
            self.facts = {"compile_seconds": time.perf_counter() - started, "peak_mib": self._memory() / 2**20}
            if self.wall[0] < SLOW:  # it had pages to ask for, which counts little in a slow one
                self.wall.clear()
                self.cpu.clear()

    def measure(self) -> None:
        """One turn."""
        with self._failing():
            self._timed()

    def goes_on(self, quick: float) -> bool:
        """Whether it has another turn: until there are enough, more of quick ones, fewer of slow ones."""
        done, spent, wanted = len(self.wall), sum(self.wall), self.job["repeats"]
        if self.error is not None or (self.wall and self.wall[0] >= SLOW):
            return False
        if done < wanted:
            return spent < ENOUGH or done < TURNS
        return spent < quick and done < 20 * wanted

    def answer(self) -> dict[str, Any]:
        """Times, medians but for `fastest_seconds`, and memory; or the error."""
        if self.error is not None:
            return {"error": self.error}
        times = {"seconds": median(self.wall), "cpu_seconds": median(self.cpu), "fastest_seconds": min(self.wall)}
        return {**times, "turns": len(self.wall), **self.facts}

    def _memory(self) -> int:
        """Bytes of a run beyond its operands and results."""
        before = resident()
        reset_peak()
        results = self._timed()
        return max(peak() - before - sum(t.numel() * t.element_size() for t in results), 0)

    def _timed(self) -> Result:
        _synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        results = self._call()
        _synchronize()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return results

    def _call(self) -> Result:
        assert self.run is not None
        with choice.use(self.job["kernels"]) if self.job["runs"] == "llcompile" else contextlib.nullcontext():
            return self.run()

    @contextlib.contextmanager
    def _failing(self) -> Any:
        """What one cannot do, as a size that does not fit in memory, does not end the others."""
        try:
            yield
        except Exception as error:
            lines = str(error).strip().splitlines()
            self.error = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def take_turns(jobs: list[dict[str, Any]], quick: float = QUICK) -> list[dict[str, Any]]:
    """Measure jobs that share their operands, one run of each after the other, so that a disturbance meets them all."""
    x = operands(jobs[0], any(job["weights"] for job in jobs), any(job["backward"] for job in jobs))
    contestants = [Contestant(job) for job in jobs]
    for one in contestants:
        one.prepare(x)
    while going := [one for one in contestants if one.goes_on(quick)]:
        for one in going:
            one.measure()
    return [one.answer() for one in contestants]


def limit_memory() -> None:
    """Have an allocation fail that does not fit, where it would end this process, or others of this machine."""
    with contextlib.suppress(ImportError, OSError, ValueError, StopIteration):
        import resource

        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (int(FITS * free), resource.getrlimit(resource.RLIMIT_DATA)[1]))


def repeat(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Smallest wall and CPU seconds of at least ``repeats`` runs (more of quick ones, fewer of very slow ones)."""
    wall, cpu, spent, done = [], [], 0.0, 0
    while done < repeats or (spent < 0.5 and done < 10 * repeats):
        _synchronize()
        a, c = time.perf_counter(), time.process_time()
        run()
        _synchronize()
        wall.append(time.perf_counter() - a)
        cpu.append(time.process_time() - c)
        spent, done = spent + wall[-1], done + 1
        if spent > 60:
            break
    return min(wall), min(cpu)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def resident() -> int:
    """Bytes in use now."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):  # freed memory that malloc still holds would hide what is used
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> None:
    """Has `peak` start again."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # makes VmHWM start again from the present size


def peak() -> int:
    """The most bytes in use since `reset_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(field: str) -> int:
    """A size in bytes from /proc, or the highest resident size where there is no /proc."""
    path = Path("/proc/self/status")
    if path.exists():
        return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(field)) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(sys.argv[1])
