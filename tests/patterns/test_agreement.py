"""How far two results are apart, for every proof: at each position relative to the original's values there."""

from __future__ import annotations

import math

import pytest
import torch

from llcompile.patterns.agreement import BUDGETS, apart, difference, gradients, precision


def test_a_small_position_counts_like_a_large_one() -> None:
    theirs = torch.tensor([[1000.0, 1.0], [1e-2, 0.0]], dtype=torch.float64)
    ours = theirs.clone()
    ours[1, 0] *= 1.5
    assert difference(theirs, ours) == pytest.approx(0.5)
    assert apart([theirs], [ours]) == pytest.approx(5e-6)  # relative to the whole it would be rounding
    assert difference(theirs.flatten(1).T, ours.flatten(1).T) < 1e-5


def test_what_is_slight_is_compared_with_the_whole() -> None:
    theirs = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    assert difference(theirs, theirs + 1e-12) == pytest.approx(1e-6)
    assert apart(list(theirs), list(theirs + 1e-12), slight=0.0) > 1e200


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_agrees_with_nothing(value: float) -> None:
    one, two = torch.ones(2, 3), torch.tensor([[1.0, 1.0, 1.0], [1.0, value, 1.0]])
    for theirs, ours in ((one, two), (two, one), (two, two)):
        assert difference(theirs, ours) == math.inf
        assert apart([theirs], [ours]) == math.inf


def test_other_shapes_and_nothing_at_all() -> None:
    assert difference(torch.ones(2, 3), torch.ones(2, 4)) == math.inf
    assert apart([torch.ones(2)], [torch.ones(3)]) == math.inf
    assert apart([], []) == 0.0
    assert apart([torch.ones(0)], [torch.ones(0)]) == 0.0


def test_the_strictest_precision_that_explains_an_error() -> None:
    assert [precision(error) for error in (0.0, BUDGETS["float64"], 1e-6, BUDGETS["float32"])] == [
        "float64",
        "float64",
        "float32",
        "float32",
    ]


def test_gradients_of_several_results() -> None:
    x, y = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    both, first = gradients([2 * x, x * x], [x, y]), gradients([2 * x], [x, y])
    assert apart(first, both) > 1e-3
    assert not both[1].any()
    assert not any(g.any() for g in gradients([torch.ones(3)], [x, y]))
