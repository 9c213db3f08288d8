"""Every spelling is the mixer that it says it is, and every twin of it is not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from tests.helpers import drawn
from tests.helpers.small import difference
from tests.spellings import EITHER, NEGATIVE, POSITIVE
from tests.spellings.composed import Composed, Recipe, recipes
from tests.spellings.family import expected
from tests.spellings.registry import seeded

TWINS = [name for name, entry in NEGATIVE.items() if entry.twin_of]


@pytest.mark.parametrize("name", POSITIVE)
def test_spelling_is_of_its_family(name: str) -> None:
    spelling = POSITIVE[name]
    layer = spelling.make().double()
    inputs = tuple(x.double() for x in spelling.example())
    with torch.no_grad():
        operands = layer.operands(*inputs)
        mixed = layer.mixed(*inputs)
        assert mixed.shape[1] == spelling.length
        assert difference(mixed, expected(operands)) < spelling.tolerance
    decay = operands.get("log_decay")
    kinds = {None: "none", 1: "scalar", 3: "scalar", 4: "channel"}
    assert kinds[None if decay is None else decay.dim()] == spelling.decay
    correction = "erase" if "erase_key" in operands else "delta" if "beta" in operands else "none"
    assert correction == spelling.correction
    if decay is not None:
        assert -4 < decay.mean() < -0.005, "neither saturated nor absent"


@pytest.mark.parametrize("name", TWINS)
def test_twin_differs(name: str) -> None:
    twin = NEGATIVE[name]
    model, original = twin.make(), POSITIVE[twin.twin_of].make()
    original.load_state_dict(model.state_dict())
    with torch.no_grad():
        outputs = [m(*twin.example()) for m in (model, original)]
    assert outputs[0].isfinite().all()
    assert difference(*outputs) > 1e-3


@pytest.mark.parametrize("name", [*EITHER, *(name for name in NEGATIVE if name not in TWINS)])
def test_other_mechanism_runs(name: str) -> None:
    other = EITHER.get(name) or NEGATIVE[name]
    assert other.property
    with torch.no_grad():
        assert other.make()(*other.example()).isfinite().all()


def test_corpus_is_large_enough() -> None:
    cells = {(s.decay, s.correction) for s in POSITIVE.values()}
    assert len(cells) == 9
    assert len(POSITIVE) >= 206
    assert len(NEGATIVE) >= 262


def error(recipe: Recipe) -> float:
    """How far a composed layer is from the definition of its family."""
    layer = seeded(Composed, recipe=recipe)().double()
    inputs = tuple(x.double() for x in layer.example(recipe.length))
    with torch.no_grad():
        return difference(layer.mixed(*inputs), expected(layer.operands(*inputs)))


@drawn.fixed(100)
@given(recipes())
def test_composed_layers_are_of_their_family(recipe: Recipe) -> None:
    assert error(recipe) < 1e-9


@drawn.fixed(100)
@given(recipes(misses=True))
def test_composed_near_misses_are_not(recipe: Recipe) -> None:
    assert error(recipe) > 1e-4


@pytest.mark.slow
@drawn.fresh(300)
@given(recipes())
def test_any_composed_layer_is_of_its_family(recipe: Recipe) -> None:
    assert error(recipe) < 1e-9


@pytest.mark.slow
@drawn.fresh(300)
@given(recipes(misses=True))
def test_any_composed_near_miss_is_not(recipe: Recipe) -> None:
    assert error(recipe) > 1e-4
