"""The run itself: case after case in order of importance until the time is up, everything kept as it comes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from benchmarks.cuda.cases import Case
from benchmarks.cuda.roofline import count

Answer = dict[str, Any]
Measure = Callable[[Case, float], Answer]
# Seconds that one case may take, what it still compiles included.
CASE_LIMIT = 75.0
# Failures of one runner on one family and phase, after which it is not tried again.
PATIENCE = 2


def run_plan(
    cases: Iterable[Case],
    measure: Measure,
    deadline: float,
    keep: Callable[[list[Answer], list[str]], None],
    ceilings: tuple[float, float] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[list[Answer], list[str]]:
    """Measure until ``deadline``; results (``case`` and its answer) and the titles of what was left out.

    ``measure(case, seconds)`` gives up by itself after ``seconds``. ``keep(results, left out)`` is called after every
    case, so that nothing is lost. ``ceilings`` are bytes/s and operations/s, for the roofline beside each.
    """
    results: list[Answer] = []
    left_out: list[str] = []
    failures: Counter[tuple[object, ...]] = Counter()
    for case in cases:
        if clock() >= deadline:
            left_out.append(case.title)
            continue
        kind = (case.runs, case.operator, case.family, case.phase)
        if failures[kind] >= PATIENCE:
            answer: Answer = {"skipped": f"failed {PATIENCE} times before"}
        else:
            answer = measure(case, min(CASE_LIMIT, max(deadline - clock(), 1.0)))
        if "error" in answer and clock() >= deadline:  # cut off by the end, which is nobody's failure
            left_out.append(case.title)
            continue
        failures[kind] = failures[kind] + 1 if "error" in answer else 0 if "milliseconds" in answer else failures[kind]
        results.append({"case": asdict(case), **answer, **_floor(case, answer, ceilings)})
        keep(results, left_out)
    keep(results, left_out)
    return results, left_out


def _floor(case: Case, answer: Answer, ceilings: tuple[float, float] | None) -> Answer:
    """Bytes, operations and the roofline of a measured case."""
    if "milliseconds" not in answer:
        return {}
    needed = count(case)
    found: Answer = asdict(needed)
    return found if ceilings is None else {**found, "roofline_milliseconds": needed.milliseconds(*ceilings)}
