"""What passes may cost: ceilings, which are what was counted last and fail a test when exceeded, and goals beside them.

To lower a ceiling, count again (`llcompile kernels cost --budgets`) and write down what came out, rounded up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from llcompile.kernels.description import CHUNK
from llcompile.kernels.levels import level_count
from llcompile.kernels.triton.cost.case import Case
from llcompile.kernels.triton.cost.compilations import LENGTHS, compilations
from llcompile.kernels.triton.cost.count import Cost, costs
from llcompile.kernels.triton.cost.families import Pass


class Budget(NamedTuple):
    """One number of one pass, its unit, its ceiling, and the goal where there is one (issue 17)."""

    measure: str
    case: Case
    ceiling: float
    goal: float | None = None


def _taken_whole(case: Case) -> list[int]:
    """The lengths of which a call goes in no segments."""
    return [n for n in LENGTHS if replace(case, length=n).in_segments_of is None]


MEASURES: dict[str, Callable[[Cost], float]] = {
    "moved, KB a chunk": lambda c: c.moved / c.chunks / 1e3,
    "moved, MB a step": lambda c: c.moved / 1e6,  # on average over positions
    "moved, MB a token": lambda c: c.moved / CHUNK / 1e6,  # of what is done once a chunk
    "moved at most, MB a step": lambda c: (c.most["read"] + c.most["written"] + c.around.moved) / 1e6,
    "workspace, GB": lambda c: c.around.workspace / 1e9,
    "launches": lambda c: len(c.around.launches),
    # The case's own length, too: short calls go in no segments.
    "compilations": lambda c: sum(compilations(c.case, (*LENGTHS, c.case.length)).values()),
    "compilations, whole calls": lambda c: sum(compilations(c.case, _taken_whole(c.case)).values()),
}

_L = level_count(65_536)
_SCALAR, _SCALAR_BACK = (Case("scalar/none", p, 128, 64, groups=1, levels=_L) for p in ("forward", "backward"))
_DELTA, _DELTA_BACK = (Case("scalar/delta", p, levels=_L) for p in ("forward", "backward"))
# Long calls that go in no segments yet.
_SCALAR_WHOLE, _DELTA_WHOLE = (replace(c, length=n) for c, n in ((_SCALAR_BACK, 8192), (_DELTA_BACK, 2048)))
_STEPS = {f: Case(f, "step", length=131_072, levels=level_count(131_073)) for f in ("scalar/none", "scalar/delta")}
_OTHERS: tuple[Pass, ...] = ("step in place", "replay", "fold")
_IN_PLACE, _REPLAY, _FOLD = ([replace(case, operation=o) for case in _STEPS.values()] for o in _OTHERS)
BUDGETS = (
    Budget("moved, KB a chunk", _SCALAR, 94, 100),
    # In segments: of the one that reads most levels, so the mean is lower.
    Budget("moved, KB a chunk", _SCALAR_BACK, 1013),
    Budget("moved, KB a chunk", _SCALAR_WHOLE, 840),
    Budget("moved, KB a chunk", _DELTA, 276, 300),
    Budget("moved, KB a chunk", _DELTA_BACK, 4145),
    Budget("moved, KB a chunk", _DELTA_WHOLE, 3267),
    Budget("workspace, GB", _SCALAR_BACK, 1.73, 2),
    Budget("workspace, GB", _DELTA_BACK, 6.94, 8),
    Budget("moved, MB a step", _STEPS["scalar/none"], 82, 25),
    Budget("moved, MB a step", _STEPS["scalar/delta"], 82, 25),
    *(Budget("moved, MB a step", case, 52, 25) for case in _IN_PLACE),
    *(Budget("moved at most, MB a step", case, 80, 25) for case in _IN_PLACE),
    *(Budget("moved, MB a step", case, 14, 25) for case in _REPLAY),
    *(Budget("moved at most, MB a step", case, 25, 25) for case in _REPLAY),
    *(Budget("moved, MB a token", case, 1) for case in _FOLD),
    Budget("compilations, whole calls", _DELTA_BACK, 14, 15),
    Budget("compilations", _DELTA_BACK, 15, 15),
)


def measured(budgets: Iterable[Budget]) -> list[float]:
    """What each of `budgets` is now."""
    budgets = list(budgets)
    cases = list(dict.fromkeys(b.case for b in budgets))
    found = dict(zip(cases, costs(cases), strict=True))
    return [MEASURES[b.measure](found[b.case]) for b in budgets]


def lines(budgets: Iterable[Budget] = BUDGETS) -> Iterator[str]:
    """A Markdown table of `budgets` with what was counted now."""
    yield "| family | pass | sizes | what | counted | ceiling | goal | goal is |"
    yield "|---|---|---|---|---|---|---|---|"
    budgets = list(budgets)
    for b, now in zip(budgets, measured(budgets), strict=True):
        case = b.case
        sizes = f"K={case.key_dim} V={case.value_dim} H={case.heads} G={case.groups} T={case.length}"
        goal = ("-", "-") if b.goal is None else (f"{b.goal:g}", "met" if now <= b.goal else "not met")
        cells = (case.family, case.operation, sizes, b.measure, f"{now:.1f}", f"{b.ceiling:g}", *goal)
        yield f"| {' | '.join(cells)} |"
