"""The process that measures: a line of JSON in, a line of JSON out, until its input ends.

A case's error is its result. Where an error breaks the device for the whole process, the answer is marked as its
``last``, and :mod:`.crew` starts another one.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.cuda import chip, ours
from benchmarks.cuda.cases import OURS, Case
from benchmarks.cuda.operands import bytes_of, leaves, make
from benchmarks.cuda.peers import PEERS, peer, presence
from benchmarks.cuda.timing import Run, Watch, as_graph, timed, watch_for
from llcompile.kernels.choice import VARIABLE as KERNELS

Answer = dict[str, Any]


class Worker:
    """Answers requests on one device; :data:`REQUESTS` has them."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cuda = device.startswith("cuda")
        self.watch: Watch = watch_for(device)

    def answer(self, request: Answer) -> Answer:
        """The answer to one request. What goes wrong is one, too: ``error``, or ``skipped`` for lack of memory."""
        try:
            return REQUESTS[request["what"]](self, request)
        except torch.OutOfMemoryError as error:
            return {"skipped": f"does not fit in memory: {_first_line(error)}"}
        except Exception as error:  # a peer may raise anything, and the run goes on
            return {"error": f"{type(error).__name__}: {_first_line(error)}"}
        finally:
            self.tidy()

    def tidy(self) -> None:
        """Give back what the last case took."""
        gc.collect()
        if self.cuda and usable():
            torch.cuda.empty_cache()

    def case(self, request: Answer) -> Answer:
        """Measure one case: times in ms, ``peak_mib`` beyond the operands, ``no_graph``: why a step ran without one."""
        case = Case(**request["case"])
        reason = self.impossible(case)
        if reason is not None:
            return {"skipped": reason}
        run, no_graph = self.callable(case), None
        peak = self.peak_mib(run)
        if case.phase == "decode" and self.cuda:
            run, no_graph = as_graph(run) if _capturable(case) else (run, "it synchronises with the host")
        return {**asdict(timed(run, self.watch)), "peak_mib": peak, "no_graph": no_graph}

    def compile(self, request: Answer) -> Answer:
        """Run a case once, so that what it compiles lies in the caches on disk."""
        case = Case(**request["case"])
        reason = self.impossible(case)
        if reason is None:
            self.callable(case)()
        return {"skipped": reason} if reason else {"compiled": True}

    def impossible(self, case: Case) -> str | None:
        """Why a case cannot run here: a peer's limit, or operands that alone are larger than the memory."""
        limit = None if case.runs == OURS else peer(case.runs).limits(case)
        if limit is not None or not self.cuda:
            return limit
        needed, there = bytes_of(case), torch.cuda.mem_get_info()[0]
        if needed <= there:
            return None
        return f"does not fit in memory: operands and results take {needed / 2**30:.0f} of {there / 2**30:.0f} GiB"

    def callable(self, case: Case) -> Run:
        """What to time."""
        if case.phase == "decode":
            token = make(replace(case, length=1), self.device)
            step = ours.step(token, case) if case.runs == OURS else _peer_step(case, token)
            return _without_gradients(step)
        x = make(case, self.device)
        call = ours.attention(x) if case.runs == OURS else _peer_call(case, x)
        if case.phase == "forward":
            return _without_gradients(call)
        return lambda: torch.autograd.grad(call(), leaves(x), x["grad"])

    def peak_mib(self, run: Run) -> float | None:
        """Memory at its highest during a call, less what was taken before it; None on a CPU."""
        run()
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


REQUESTS: dict[str, Callable[[Worker, Answer], Answer]] = {
    "case": Worker.case,
    "compile": Worker.compile,
    "chip": lambda worker, request: chip.measure(worker.device),
    "peers": lambda worker, request: {"peers": [presence(p) for p in PEERS]},
}


def _peer_call(case: Case, x: Any) -> Callable[[], Any]:
    row = peer(case.runs)
    function = row.load()
    return lambda: row.call(function, x)


def _peer_step(case: Case, token: Any) -> Run:
    row = peer(case.runs)
    return row.step(row.load("decode"), token, case)


def _capturable(case: Case) -> bool:
    return case.runs == OURS or peer(case.runs).graph


def _without_gradients(run: Run) -> Run:
    return torch.no_grad()(run)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"


def usable() -> bool:
    """Whether the device still answers: after some errors it never does again in the same process."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def main(device: str) -> None:
    """Serve until the input ends."""
    # Libraries print; answers go out on a channel of their own, and what was standard output joins standard error.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if device.startswith("cuda"):
        os.environ.setdefault(KERNELS, "triton")  # nothing else may run in their place unseen
    worker = Worker(device)
    for line in sys.stdin:
        answer = worker.answer(json.loads(line))
        broken = worker.cuda and not usable()
        print(json.dumps({**answer, "last": True} if broken else answer), file=channel, flush=True)
        if broken:
            return


if __name__ == "__main__":
    main(sys.argv[1])
