"""Timings: what the steps of one `inspect` took, added up over the model's graphs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from llcompile.folding import grouped
from llcompile.passes.session import Session
from llcompile.patterns.records import Timing

# What each step does, the passes as in docs/architecture.md.
STEPS = {
    "trace": "Dynamo traces the example run, and the model's own code runs",
    "functions": "inlines each autograd.Function whose backward is the gradient of its forward",
    "discover": "finds calls of known functions",
    "recognise": "finds hand-written mixers",
    "names": "assigns level weights to mixers",
    "one_token": "finds mixers in graphs of a single token",
    "withhold": "declines mixers that failed in convert",
    "identify": "names the other mechanisms",
    "bind": "reads the arguments of known functions as operands",
    "states": "checks initial and final states",
    "placing": "finds where results are read and operands are changed",
    "proofs of hand-written code": "compare it with the operator on random numbers",
    "prove": "compares known functions with the operator",
    "padding": "finds the padding mask",
    "attach": "finds or creates level weights",
    "rewrite": "writes the operator into the graph",
    "show": "counts products, and writes graphs as code and drawings",
}


class Stopwatch:
    """Runs from its creation on, and takes in what the sessions have measured themselves."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._measured: list[Timing] = []

    def add(self, session: Session, since: float) -> None:
        """Takes in a session that was collected since then (`time.perf_counter()`); its rewrite counts as a pass."""
        rewrite = sum(t.seconds for t in session.timings if t.step == "rewrite")
        shown = Timing("show", time.perf_counter() - since - rewrite)
        self._measured += [*session.timings, shown]

    def timings(self) -> tuple[Timing, ...]:
        """Dynamo's part, which is what nothing else accounts for, then the steps in order, each before its parts."""
        spent = time.perf_counter() - self._start - sum(t.seconds for t in self._measured if not t.within)
        summed = [_sum(alike) for alike in grouped([Timing("trace", spent), *self._measured], _step)]
        return tuple(t for whole in summed if not whole.within for t in (whole, *_parts(whole, summed)))


def _step(timing: Timing) -> tuple[str, str, str]:
    return timing.step, timing.within, timing.what


def _sum(alike: tuple[Timing, ...]) -> Timing:
    first = alike[0]
    seconds, count = sum(t.seconds for t in alike), sum(t.count for t in alike)
    return replace(first, seconds=seconds, count=count, what=first.what or STEPS.get(first.step, ""))


def _parts(whole: Timing, timings: Iterable[Timing]) -> Iterable[Timing]:
    return [t for t in timings if t.within == whole.step]
