"""Costs of the mixers of every family: bytes of states by hand, and a time."""

from __future__ import annotations

from typing import Any

import pytest

from llcompile.ops import level_readouts_step
from llcompile.report import Certificate, Converted, Report
from llcompile.trials import costs as measured
from llcompile.trials.costs import costs

HEADS, KEY, VALUE, LEVELS = 2, 4, 8, 5


def mixer(decay: str, correction: str) -> Converted:
    value = 1 if decay == "rate" else VALUE
    proof = Certificate(0.0, "float64", 1)
    return Converted("m", "", decay, correction, "graph", proof, 0, HEADS, KEY, value, "linear", HEADS)  # type: ignore[arg-type]


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
@pytest.mark.parametrize("correction", ["none", "delta", "erase"])
def test_states_of_one_sequence(decay: str, correction: str) -> None:
    linear, loglinear, routed = costs(Report((mixer(decay, correction),) * 3), LEVELS, 11, "cpu")
    assert linear.state_bytes == 3 * 4 * HEADS * KEY * VALUE
    assert loglinear.state_bytes == (1 + LEVELS) * linear.state_bytes
    assert routed.state_bytes == loglinear.state_bytes  # the sums of the keys lie in the header
    assert min(linear.token_ms, loglinear.token_ms, routed.token_ms) > 0


def test_rates() -> None:
    linear, loglinear, _ = costs(Report((mixer("rate", "none"),)), LEVELS, 11, "cpu")
    assert loglinear.state_bytes == (1 + LEVELS) * linear.state_bytes == (1 + LEVELS) * 4 * HEADS * KEY


def test_routed_level_weights_read_the_buckets_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*given: Any) -> Any:
        calls.append(given)
        return level_readouts_step(*given)

    monkeypatch.setattr(measured, "level_readouts_step", counted)
    costs(Report((mixer("scalar", "none"),)), LEVELS, 11, "cpu")
    query, _, state, levels = calls[0]
    assert list(query.shape) == [1, HEADS, (KEY * VALUE - 8) // LEVELS]  # as many features as there is room for
    assert (state.shape[2], levels) == (1 + LEVELS, LEVELS)
