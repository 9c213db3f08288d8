"""The verdict, on runs whose numbers are made up."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import mean

import pytest

from llcompile.trials.arms import ALL, LEVELS, PASSING, STAY, Arm
from llcompile.trials.measures import Half, Sums
from llcompile.trials.plan import Plan
from llcompile.trials.student import interval
from llcompile.trials.training import Record
from llcompile.trials.verdict import CONVERT, NOT, OPEN, Verdict, crossed, judge

ARMS = (
    Arm(STAY, "", 1e-3),
    Arm(PASSING, "", 1e-3),
    Arm(LEVELS, "linear"),
    Arm(LEVELS, "mlp"),
    Arm(ALL, "linear", 1e-3),
)
NAMES = [arm.name for arm in ARMS]
BINS = {"inside": (0,), "beyond": (1,), "all": (0, 1)}
PLAN = Plan(seeds=(0, 1, 2, 3, 4))
Losses = Mapping[str, Callable[[int], tuple[float, float]]]  # by arm: seed -> loss inside and beyond


def record(arm: str, seed: int, choose: tuple[float, float], judged: tuple[float, float]) -> Record:
    halves = [Half(Sums((100 * a, 100 * b), (50.0, 50.0), (100, 100)), Sums((), (), ())) for a, b in (choose, judged)]
    return Record(arm, seed, None, halves[0], halves[1], None, None, 1, 1.0, 1.0)


def records(losses: Losses, noise: float = 0.0, seed: int = 0) -> dict[str, dict[int, Record]]:
    draws = random.Random(seed)

    def drawn(arm: str, number: int) -> Record:
        inside, beyond = losses[arm](number)
        choose, judged = ((inside + draws.gauss(0, noise), beyond + draws.gauss(0, noise)) for _ in range(2))
        return record(arm, number, choose, judged)

    return {arm: {number: drawn(arm, number) for number in PLAN.seeds} for arm in losses}


def at(**values: float) -> Losses:
    """Losses by arm; 1.0 where none is given. Underscores stand for spaces and brackets."""
    found = {
        arm.name: values.get(arm.what.split(",")[0].split()[0] + (arm.kind and f"_{arm.kind}"), 1.0) for arm in ARMS
    }
    return {
        name: lambda seed, value=value: (value + 0.001 * seed, value + 0.001 * seed) for name, value in found.items()
    }


def verdict(losses: Losses, **settings: object) -> Verdict:
    return judge(ARMS, records(losses), replace(PLAN, **settings), BINS)  # type: ignore[arg-type]


def test_a_gain_with_all_seeds_converts() -> None:
    found = verdict(at(level_mlp=0.8))
    assert (found.decision, found.arm, found.control) == (CONVERT, "level weights (mlp)", "stay")
    assert found.gain is not None
    assert found.gain.mean == pytest.approx(0.2)
    assert "level weights (mlp) in place of stay" in found.why


def test_no_gain_does_not_convert() -> None:
    assert verdict(at()).decision == NOT
    assert verdict(at(stay=0.5)).decision == NOT


def test_a_gain_too_small_to_matter_does_not_convert() -> None:
    assert verdict(at(level_linear=0.995)).decision == NOT
    assert verdict(at(level_linear=0.995), worth=0.001).decision == CONVERT


def test_state_passing_is_a_control() -> None:
    losses = dict(at(level_mlp=0.8))
    losses[NAMES[1]] = lambda seed: (0.8 + 0.001 * seed, 0.8 + 0.001 * seed)
    found = verdict(losses)
    assert (found.decision, found.control) == (NOT, "stay, state passing")


def test_a_gain_with_some_seeds_is_not_decided() -> None:
    losses = dict(at())
    losses[NAMES[2]] = lambda seed: (1.0 - 0.1 * seed, 1.0)
    found = verdict(losses)
    assert found.decision == OPEN
    assert "which contains 0.01" in found.why


def test_beyond_the_training_length_is_said_where_it_differs() -> None:
    losses = dict(at())
    losses[NAMES[4]] = lambda seed: (1.0 + 0.001 * seed, 0.5)
    found = verdict(losses)
    assert found.decision == NOT
    assert "beyond the training length it gains" in found.why
    assert verdict(losses, part="beyond").decision == CONVERT
    assert "beyond the training length it" not in verdict(at()).why


def diverged(held: dict[str, dict[int, Record]], arm: str) -> dict[str, dict[int, Record]]:
    gone = replace(held[arm][2], diverged=7, choose=None, judge=None)
    return {**held, arm: {**held[arm], 2: gone}}


def test_an_arm_that_diverged_is_not_chosen() -> None:
    held = diverged(records(at(level_mlp=0.5, level_linear=0.8)), "level weights (mlp)")
    found = judge(ARMS, held, PLAN, BINS)
    assert (found.decision, found.arm) == (CONVERT, "level weights (linear)")


def test_without_a_control_nothing_is_decided() -> None:
    held = diverged(diverged(records(at(level_mlp=0.5)), NAMES[0]), NAMES[1])
    found = judge(ARMS, held, PLAN, BINS)
    assert found.decision == OPEN
    assert "every control diverged" in found.why


def test_the_best_of_equal_arms_does_not_win_by_being_the_best() -> None:
    """Where all arms are equal and noise alone differs, at most 2.5 % of the intervals lie above 0."""
    trials, ours, naive = 1500, 0, 0
    for seed in range(trials):
        held = records(at(), noise=0.05, seed=seed)
        found = crossed(NAMES[:1], NAMES[2:], held, PLAN, BINS["inside"])
        assert found is not None
        ours += found.low > 0
        naive += best_and_judged_on_the_same(held).low > 0
    assert ours / trials < 0.037  # 2.5 % and three standard errors
    assert naive / trials > 0.045  # the test can fail


def best_and_judged_on_the_same(held: dict[str, dict[int, Record]]) -> object:
    def gains(arm: str) -> list[float]:
        return [
            held["stay"][s].judge.position.loss[0] / 100 - held[arm][s].judge.position.loss[0] / 100  # type: ignore[union-attr]
            for s in PLAN.seeds
        ]

    return interval(max((gains(arm) for arm in NAMES[2:]), key=mean))
