"""Compile ahead, many at once: a run of minutes has no time for a thousand kernels one after the other.

The helpers run every kind of case once and end before anything is timed. What they compile lies in Triton's cache on
disk. FLA's choices among configurations are not kept: they were made on a device that several processes shared, so
they are made again, alone, when it is FLA's turn.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

from benchmarks.cuda.cases import LENGTHS, OURS, Case
from benchmarks.cuda.crew import Helper
from benchmarks.cuda.peers import peer

# Nor are launches tuned, which would be timed on a shared device, too.
_ENVIRONMENT = {"FLA_CACHE_RESULTS": "0", "LLCOMPILE_AUTOTUNE": "0"}


def kinds(cases: Iterable[Case]) -> list[Case]:
    """One small case for everything that is compiled apart, in the order of the cases.

    2k tokens are enough: kernels differ by whether a count is 1 or a multiple of 16, not by the count itself. A forward
    pass alone runs what the one before a backward pass runs.
    """
    small = (case if _per_length(case) else replace(case, length=LENGTHS[0], batch=1) for case in cases)
    whole = (replace(case, phase="both") if case.phase == "forward" else case for case in small)
    return list(dict.fromkeys(case for case in whole if case.operator != "softmax"))


def _per_length(case: Case) -> bool:
    return case.runs != OURS and peer(case.runs).per_length


def compile_ahead(
    cases: Iterable[Case],
    seconds: float,
    helpers: int,
    make: Callable[[], Helper],
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run each of ``cases`` once on ``helpers`` processes, for at most ``seconds``; how many were done."""
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in cases:
        waiting.put(case)
    deadline, done = clock() + seconds, queue.SimpleQueue[Case]()

    def serve() -> None:
        helper = make()
        try:
            while (left := deadline - clock()) > 0:
                case = waiting.get_nowait()
                if "error" not in helper.ask({"what": "compile", "case": asdict(case)}, left):
                    done.put(case)
        except queue.Empty:
            pass
        finally:
            helper.stop()

    threads = [threading.Thread(target=serve) for _ in range(helpers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done.qsize()


def helper_for(device: str) -> Helper:
    """A helper that compiles."""
    return Helper(device, _ENVIRONMENT)
