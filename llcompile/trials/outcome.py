"""The outcome of a trial: its verdict, and every number behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from llcompile.report import Report
from llcompile.trials.arms import Arm
from llcompile.trials.costs import Cost
from llcompile.trials.measures import Half
from llcompile.trials.plan import Plan
from llcompile.trials.student import Interval, interval
from llcompile.trials.training import Record
from llcompile.trials.verdict import Bins, Records, Verdict, gain_of


@dataclass(frozen=True)
class Row:
    """One arm in the table; means over seeds on the half that judges, None where they are unknown.

    Args:
        arm: its name.
        diverged: seeds whose run diverged; such an arm has no means.
        loss, accuracy: over the judged positions.
        gain: over the control of the verdict, in the judged metric, with an interval for this arm alone.
        inside, beyond: the metric up to the training length, and beyond it.
        reset: the metric with the level weights put back to 1.
        trained: parameters that are trained.
        state_bytes, token_ms: of all mixers' states for one sequence, and of one decoded token in all mixers.
        step_ms: of a training step, the median over steps, averaged over seeds.
    """

    arm: str
    diverged: tuple[int, ...]
    loss: float | None
    accuracy: float | None
    gain: Interval | None
    inside: float | None
    beyond: float | None
    reset: float | None
    trained: int
    state_bytes: int | None
    token_ms: float | None
    step_ms: float | None


@dataclass(frozen=True)
class Gain:
    """The gain of the verdict's arm over its control in a range of positions or distances, from `low` to `high`."""

    low: int
    high: int
    control: float
    arm: float
    gain: Interval
    labels: int


@dataclass(frozen=True)
class Outcome:
    """What a trial found.

    Args:
        verdict: whether to convert, and why.
        report: of the conversion.
        arms: what was trained.
        left_out: arms that were not tried, with the reason.
        records: every run, by arm and seed.
        plan: the settings.
        bounds: of the bins of positions.
        bins: which of them are "inside" the training length, "beyond" it, and "all".
        trained: tokens of a training sequence.
        longest: tokens of a held-out sequence.
        linear, loglinear, routed: costs of the mixers before and after, and with routed level weights; None where none
            is converted.
        folder: where finished runs are, if a folder was named.
    """

    verdict: Verdict
    report: Report
    arms: tuple[Arm, ...]
    left_out: dict[str, str]
    records: Records
    plan: Plan
    bounds: tuple[int, ...]
    bins: Bins
    trained: int
    longest: int
    linear: Cost | None
    loglinear: Cost | None
    routed: Cost | None
    folder: Path | None

    @property
    def rows(self) -> tuple[Row, ...]:
        """One row for each arm."""
        return tuple(self._row(arm) for arm in self.arms)

    @property
    def by_position(self) -> tuple[Gain, ...]:
        """The gain in each range of positions that has labels."""
        ranges = zip(self.bounds[:-1], self.bounds[1:], strict=True)
        return self._gains("position", [(low, high - 1) for low, high in ranges])

    @property
    def by_distance(self) -> tuple[Gain, ...]:
        """The gain for each octave of distance, where the batches told it."""
        halves = [r.judge for seeds in self.records.values() for r in seeds.values() if r.judge is not None]
        octaves = max((len(half.distance.count) for half in halves), default=0)
        return self._gains("distance", [(2**n, 2 ** (n + 1) - 1) for n in range(octaves)])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists and numbers, ready for JSON."""
        return {
            "verdict": asdict(self.verdict),
            "plan": asdict(self.plan),
            "training length": self.trained,
            "held-out length": self.longest,
            "arms": [asdict(row) for row in self.rows],
            "left out": self.left_out,
            "by position": [asdict(gain) for gain in self.by_position],
            "by distance": [asdict(gain) for gain in self.by_distance],
            "runs": [record.to_dict() for seeds in self.records.values() for record in seeds.values()],
            "report": self.report.to_dict(),
        }

    def _row(self, arm: Arm) -> Row:
        runs = list(self.records[arm.name].values())
        diverged = tuple(record.seed for record in runs if record.diverged is not None)
        metric, part = self.plan.metric, self.bins[self.plan.part]
        cost = self.routed if arm.kind == "routed" else self.loglinear if arm.converted else self.linear

        def value(name: str, bins: Sequence[int], half: str = "judge") -> float | None:
            found = [_value(getattr(record, half), name, bins) for record in runs]
            known = [v for v in found if v is not None]
            return mean(known) if not diverged and known and len(known) == len(found) else None

        return Row(
            arm.name, diverged, value("loss", part), value("accuracy", part), self._gain(arm.name),
            value(metric, self.bins["inside"]), value(metric, self.bins["beyond"]), value(metric, part, "reset"),
            runs[0].trained, cost.state_bytes if cost else None, cost.token_ms if cost else None,
            _mean(record.step_ms for record in runs),
        )  # fmt: skip

    def _gain(self, name: str) -> Interval | None:
        control = self.verdict.control
        if not control or name == control:
            return None
        pairs = [(self.records[name][seed], self.records[control][seed]) for seed in self.plan.seeds]
        gains = [gain_of(*pair, self.plan.metric, self.bins[self.plan.part]) for pair in pairs]
        known = [gain for gain in gains if gain is not None]
        return interval(known) if len(known) == len(gains) else None

    def _gains(self, axis: str, ranges: Iterable[tuple[int, int]]) -> tuple[Gain, ...]:
        if self.verdict.gain is None:
            return ()
        found = []
        metric = self.plan.metric
        runs = self.records[self.verdict.arm], self.records[self.verdict.control]
        for number, (low, high) in enumerate(ranges):
            arm, control = ([_binned(r[seed], axis, number, metric) for seed in self.plan.seeds] for r in runs)
            pairs = [(a, c) for a, c in zip(arm, control, strict=True) if a is not None and c is not None]
            if len(pairs) == len(self.plan.seeds):
                sign = 1 if metric == "accuracy" else -1
                gain = interval([sign * (a - c) for a, c in pairs])
                labels = getattr(next(iter(runs[0].values())).judge, axis).count[number]
                found.append(Gain(low, high, mean(c for _, c in pairs), mean(a for a, _ in pairs), gain, labels))
        return tuple(found)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _value(half: Half | None, metric: str, bins: Sequence[int]) -> float | None:
    return None if half is None or not bins else half.position.value(metric, bins)


def _binned(record: Record, axis: str, bin_: int, metric: str) -> float | None:
    sums = getattr(record.judge, axis)
    return sums.value(metric, [bin_]) if bin_ < len(sums.count) else None
