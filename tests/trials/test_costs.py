"""Costs of the mixers of every family: bytes of states by hand, and a time."""

from __future__ import annotations

import pytest

from llcompile.report import Certificate, Converted, Report
from llcompile.trials.costs import costs

HEADS, KEY, VALUE, LEVELS = 2, 4, 8, 5


def mixer(decay: str, correction: str) -> Converted:
    value = 1 if decay == "rate" else VALUE
    proof = Certificate(0.0, "float64", 1)
    return Converted("m", "", decay, correction, "graph", proof, 0, HEADS, KEY, value, "linear", HEADS)  # type: ignore[arg-type]


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
@pytest.mark.parametrize("correction", ["none", "delta", "erase"])
def test_states_of_one_sequence(decay: str, correction: str) -> None:
    linear, loglinear = costs(Report((mixer(decay, correction),) * 3), LEVELS, 11, "cpu")
    assert linear.state_bytes == 3 * 4 * HEADS * KEY * VALUE
    assert loglinear.state_bytes == (1 + LEVELS) * linear.state_bytes
    assert linear.token_ms > 0
    assert loglinear.token_ms > 0


def test_rates() -> None:
    linear, loglinear = costs(Report((mixer("rate", "none"),)), LEVELS, 11, "cpu")
    assert loglinear.state_bytes == (1 + LEVELS) * linear.state_bytes == (1 + LEVELS) * 4 * HEADS * KEY
