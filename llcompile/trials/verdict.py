"""The verdict: whether a conversion pays, with paired intervals and a choice that does not flatter itself.

The best of several arms looks better than it is, also where all are equal. So the arm, and the control that it is
compared with, are chosen for each seed by what the *other* seeds gave on one half of the held-out sequences, and judged
by what this seed gave on the other half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from llcompile.trials.arms import Arm
from llcompile.trials.plan import Plan
from llcompile.trials.student import Interval, interval
from llcompile.trials.training import Record

CONVERT, NOT, OPEN = "convert", "do not convert", "not decided: more seeds"
NOTHING = "nothing to convert"
# records[arm name][seed]
Records = Mapping[str, Mapping[int, Record]]
Bins = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Verdict:
    """What follows from the runs.

    Args:
        decision: "convert", "do not convert", "not decided: more seeds", or "nothing to convert".
        why: in one sentence.
        gain: of the converted arm over the control, in the judged metric (positive is better); None if no runs compare.
        arm, control: the names of the converted arm and the control that the choosing half prefers.
        beyond: the gain beyond the training length, if sequences go there.
    """

    decision: str
    why: str
    gain: Interval | None = None
    arm: str = ""
    control: str = ""
    beyond: Interval | None = None

    def __str__(self) -> str:
        return f"{self.decision}: {self.why}" if self.decision != OPEN else f"not decided, more seeds: {self.why}"


def judge(arms: Sequence[Arm], records: Records, plan: Plan, bins: Bins) -> Verdict:
    """The verdict on all runs."""
    whole = [arm for arm in arms if not any(r.diverged is not None for r in records[arm.name].values())]
    controls = [arm.name for arm in whole if not arm.converted]
    converted = [arm.name for arm in whole if arm.converted]
    if not controls or not converted:
        what = "control" if not controls else "converted arm"
        return Verdict(OPEN, f"every {what} diverged with some seed; lower its learning rate")
    gain = crossed(controls, converted, records, plan, bins[plan.part])
    if gain is None:
        return Verdict(OPEN, f"the held-out sequences have no labels {WHERE[plan.part]}")
    arm, control = (_best(names, plan.seeds, records, plan, bins[plan.part]) for names in (converted, controls))
    beyond = crossed(controls, converted, records, plan, bins["beyond"]) if plan.part == "inside" else None
    decision = _decided(gain, plan.least)
    why = f"{_said(arm, control, gain, plan)}{_also(beyond, gain, plan)}"
    return Verdict(decision, why, gain, arm, control, beyond)


def crossed(
    controls: Sequence[str], converted: Sequence[str], records: Records, plan: Plan, bins: Sequence[int]
) -> Interval | None:
    """The interval of the gains, each seed's arm and control chosen without it; None where there is no label."""
    gains = []
    for seed in plan.seeds:
        others = [other for other in plan.seeds if other != seed]
        arm, control = (_best(names, others, records, plan, bins) for names in (converted, controls))
        found = gain_of(records[arm][seed], records[control][seed], plan.metric, bins)
        if found is None:
            return None
        gains.append(found)
    return interval(gains)


def gain_of(record: Record, control: Record, metric: str, bins: Sequence[int]) -> float | None:
    """How much better one run is than another on the half that judges; positive is better."""
    if record.judge is None or control.judge is None or not bins:
        return None
    mine, other = (r.judge.position.value(metric, bins) for r in (record, control) if r.judge is not None)
    if mine is None or other is None:
        return None
    return other - mine if metric == "loss" else mine - other


def _best(names: Sequence[str], seeds: Sequence[int], records: Records, plan: Plan, bins: Sequence[int]) -> str:
    sign = -1 if plan.metric == "loss" else 1

    def score(name: str) -> float:
        halves = [records[name][seed].choose for seed in seeds]
        found = [half.position.value(plan.metric, bins) for half in halves if half is not None]
        return sign * mean(value for value in found if value is not None) if None not in found else 0.0

    return max(names, key=score)


def _decided(gain: Interval, least: float) -> str:
    if gain.low > least:
        return CONVERT
    return NOT if gain.high < least else OPEN


WHERE = {
    "inside": "up to the training length",
    "beyond": "beyond the training length",
    "all": "at any position",
}


def _said(arm: str, control: str, gain: Interval, plan: Plan) -> str:
    unit = "nats" if plan.metric == "loss" else "of accuracy"
    size = f"{gain.mean:+.4f} {unit} (95 % interval {gain.low:+.4f} to {gain.high:+.4f}, {gain.count} seeds)"
    limit = f"{plan.least:g}, the least that would be worth it"
    how = {
        CONVERT: f"which lies above {limit}",
        NOT: f"which lies below {limit}",
        OPEN: f"which contains {limit}",
    }[_decided(gain, plan.least)]
    return f"with {arm} in place of {control} the gain {WHERE[plan.part]} is {size}, {how}"


def _also(beyond: Interval | None, gain: Interval, plan: Plan) -> str:
    """What is different beyond the training length."""
    if beyond is None or _decided(beyond, plan.least) == _decided(gain, plan.least):
        return ""
    how = {CONVERT: "it gains", NOT: "it does not gain", OPEN: "that is not decided"}[_decided(beyond, plan.least)]
    return f"; beyond the training length {how} ({beyond.mean:+.4f}, {beyond.low:+.4f} to {beyond.high:+.4f})"
