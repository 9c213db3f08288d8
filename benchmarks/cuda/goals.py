"""The goals of the kernels, each a ratio of two times and the most it may be; every size that was measured counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.cuda.cases import OURS, Case, Family, Phase
from benchmarks.operator_plan import FAMILIES

Answer = dict[str, Any]
ROOFLINE = "roofline"
_64K, _128K = 2**16, 2**17


@dataclass(frozen=True)
class Goal:
    """Our log-linear operator's time by that of the fastest of ``rivals``, at most ``bound`` at every length given.

    ``rivals`` are peers, ``llcompile`` for our own linear operator of the same family, or the roofline.
    """

    words: str
    phases: tuple[Phase, ...]
    lengths: tuple[int, int]  # first and last
    families: tuple[Family, ...]
    rivals: tuple[str, ...]
    bound: float


_SCALAR: tuple[Family, ...] = (("scalar", "none"),)
_DELTA: tuple[Family, ...] = (("scalar", "delta"),)
GOALS = (
    Goal("fwd+bwd at 64k: at least 4x FLA's log-linear", ("both",), (_64K, _64K), _SCALAR, ("fla-log-linear",), 0.25),
    Goal("fwd+bwd at 64k: at most 1.5x FLA's simple_gla", ("both",), (_64K, _64K), _SCALAR, ("fla-simple-gla",), 1.5),
    Goal("gated delta at 64k: at most 2x FLA's linear one", ("both",), (_64K, _64K), _DELTA, ("fla-gated-delta",), 2.0),
    Goal("faster than SDPA from 4k", ("both", "forward"), (2**12, 2**30), _SCALAR + _DELTA,
         ("sdpa-flash", "sdpa-cudnn"), 1.0),
    Goal("decode after 128k: at most 1.3x the linear step", ("decode",), (_128K, _128K), _SCALAR + _DELTA,
         (OURS, "fla-simple-gla", "fla-gated-delta"), 1.3),
    Goal("within 2.5x of the roofline at 64k", ("both", "forward"), (_64K, _64K), tuple(FAMILIES), (ROOFLINE,), 2.5),
)  # fmt: skip


def evaluate(results: Iterable[Answer], goals: Iterable[Goal] = GOALS) -> list[Answer]:
    """For each goal: ``goal``, ``bound``, ``measured`` (the worst ratio, or None), ``where`` it was, and ``met``."""
    timed = [(Case(**r["case"]), r) for r in results if "milliseconds" in r]
    return [_outcome(goal, timed) for goal in goals]


def _outcome(goal: Goal, timed: list[tuple[Case, Answer]]) -> Answer:
    found = list(_ratios(goal, timed))
    worst = max(found, key=lambda pair: pair[0], default=(None, None))
    met = None if worst[0] is None else worst[0] <= goal.bound
    facts = {"bound": goal.bound, "measured": worst[0], "where": worst[1], "met": met, "comparisons": len(found)}
    return {"goal": goal.words, **facts}


def _ratios(goal: Goal, timed: list[tuple[Case, Answer]]) -> Iterator[tuple[float, str]]:
    for case, own in timed:
        first, last = goal.lengths
        ours = case.runs == OURS and case.operator == "log-linear"
        if not (ours and case.phase in goal.phases and case.family in goal.families and first <= case.length <= last):
            continue
        rivals = _rivals(goal, case, own, timed)
        if rivals:
            yield own["milliseconds"] / min(rivals), case.title


def _rivals(goal: Goal, case: Case, own: Answer, timed: list[tuple[Case, Answer]]) -> list[float]:
    """Times of the goal's rivals at the same size, length and phase."""
    if ROOFLINE in goal.rivals:
        return [own["roofline_milliseconds"]] if "roofline_milliseconds" in own else []
    return [r["milliseconds"] for other, r in timed if other.runs in goal.rivals and _comparable(case, other)]


def _comparable(case: Case, other: Case) -> bool:
    if (case.size, case.length, case.phase) != (other.size, other.length, other.phase) or case == other:
        return False
    return other.operator == "softmax" or other.family == case.family
