"""Student's t: against the printed table, and by how often an interval holds the mean."""

from __future__ import annotations

import random

import pytest

from llcompile.trials.student import interval, quantile

# Fisher's table: P = 0.975.
TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 30: 2.0423, 120: 1.9799}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_table(freedom: int) -> None:
    assert quantile(0.975, freedom) == pytest.approx(TABLE[freedom], abs=6e-5)
    assert quantile(0.5, freedom) == pytest.approx(0.0, abs=1e-9)
    assert quantile(0.99, freedom) > quantile(0.975, freedom) > quantile(0.95, freedom)


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    draws = random.Random(0)
    trials = 4000
    held = 0
    for _ in range(trials):
        found = interval([draws.gauss(3.0, 2.0) for _ in range(5)])
        held += found.low < 3.0 < found.high
    assert held / trials == pytest.approx(0.95, abs=0.011)  # three standard errors


def test_one_value_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least 2 values, got 1"):
        interval([1.0])
