"""The operator against its definition: all families, states, lengths and sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from llcompile.kernels import choice
from llcompile.kernels.reference import reference_attention
from llcompile.kernels.state import level_states, position_of
from llcompile.ops import loglinear_attention, loglinear_attention_step
from tests.kernels.kernel_cases import DECAYS, assert_agrees, both, operands, relative_error

CELLS = list(itertools.product((None, "token", "channel"), (False, True)))


@pytest.fixture
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test by the implementation that `on_both_forms` names."""
    with choice.use(request.param):
        yield


def on_both_forms(names: str, *axes: Iterable[Any], few: Callable[..., bool]) -> pytest.MarkDecorator:
    """All families and combinations of `axes` on C++ and on ATen; those on ATen that are not `few` are slow."""
    cases = []
    for cell, *case in itertools.product(CELLS, *axes):
        marks = () if few(*case) else (pytest.mark.slow,)
        cases += [pytest.param(*cell, *case, "cpp"), pytest.param(*cell, *case, "aten", marks=marks)]
    return pytest.mark.parametrize(f"decay, delta, {names}, form", cases, indirect=["form"])


@on_both_forms(
    "levels, state",
    (None, 12, 3),
    (None, "linear", "level"),
    few=lambda levels, state: (levels, state) in ((None, "linear"), (12, "level")),
)
def test_definition(decay, delta, levels, state, form):
    """Every family, with every kind of state, on lengths around the chunk size."""
    for length in (1, 3, 65):
        assert_agrees(operands(length, decay, delta, levels, state, seed=length))


@on_both_forms("levels", (None, 9), few=lambda levels: levels == 9)
def test_several_chunks(decay, delta, levels, form):
    """A tree with a partial last block."""
    assert_agrees(operands(330, decay, delta, levels, "linear", batch=1, groups=1, heads=2))


@pytest.mark.parametrize("delta", [False, True])
def test_decay_per_head(delta):
    """A fixed decay per head, as in RetNet; its gradient sums over batch and time."""
    assert_agrees(operands(70, "head", delta))


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 127, 200, 1000])
@pytest.mark.parametrize(("decay", "delta"), list(itertools.product(DECAYS, (False, True))))
@pytest.mark.parametrize("levels", [None, 11])
def test_grid_of_lengths(length, decay, delta, levels):
    """All lengths."""
    for state in (None, "linear", "level"):
        assert_agrees(operands(length, decay, delta, levels, state, key_dim=16, value_dim=5))


@pytest.mark.slow
@pytest.mark.parametrize(("key_dim", "value_dim"), list(itertools.product((1, 5, 16, 64, 80), repeat=2)))
def test_grid_of_sizes(key_dim, value_dim):
    """All head sizes, whatever their remainder."""
    for (decay, delta), levels in itertools.product(CELLS, (None, 8)):
        assert_agrees(operands(127, decay, delta, levels, "level", key_dim=key_dim, value_dim=value_dim))


@on_both_forms("dtype", (torch.float32, torch.bfloat16, torch.float16), few=lambda dtype: dtype == torch.bfloat16)
def test_error_budget(decay, delta, dtype, form):
    """Half precision operands lose what rounding them and the results loses, and no more.

    The definition gets the very same rounded operands, in float64. What remains is float32 arithmetic (a few hundred
    roundings in sequence, so 200 eps) and, of results in a short dtype, their own rounding (one eps, 2 for safety).
    """
    for levels in (None, 9):
        x = operands(200, decay, delta, levels, "linear", dtype=dtype, key_dim=16)
        for name, (ours, definition) in both(x).items():
            budget = 200 * torch.finfo(torch.float32).eps + 2 * torch.finfo(ours.dtype).eps
            assert relative_error(ours, definition) <= budget, name


@pytest.mark.parametrize(("decay", "delta"), CELLS)
def test_weights_of_one_give_the_linear_operator(decay, delta):
    """The first fact every conversion leans on; and the level states sum to the linear state (the second)."""
    x = operands(150, decay, delta, 9)
    ones = {**x, "level_weights": torch.ones_like(x["level_weights"])}
    o, state = loglinear_attention(**ones, return_final_state=True)
    linear, linear_state = loglinear_attention(**{**x, "level_weights": None}, return_final_state=True)
    torch.testing.assert_close(o, linear, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(level_states(state).sum(2), linear_state, rtol=1e-10, atol=1e-10)


@on_both_forms("levels", (None, 9, 2), few=lambda levels: levels == 9)
def test_pieces_and_steps_equal_one_pass(decay, delta, levels, form):
    """Prefill in pieces of any size, then decode token by token."""
    x = operands(150, decay, delta, levels)
    whole, final = loglinear_attention(**x, return_final_state=True)
    state, outputs = None, []
    for start, end in ((0, 1), (1, 30), (30, 94), (94, 141)):
        piece = {n: t if t is None else t[:, start:end] for n, t in x.items()}
        o, state = loglinear_attention(**{**piece, "initial_state": state}, return_final_state=True)
        outputs.append(o)
    for t in range(141, 150):
        token = {n: a if a is None else a[:, t] for n, a in x.items() if n != "initial_state"}
        o, state = loglinear_attention_step(**token, state=state)
        outputs.append(o[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)
    if levels is not None:
        assert position_of(state).tolist() == [150, 150]


def test_fewer_levels_than_needed():
    """The last level serves all higher ones, also when it is the only one."""
    for levels in (1, 2, 4):
        assert_agrees(operands(100, levels=levels, state="level"))


def test_packed_and_padded():
    """Levels restart in each sequence; padding is 0 in the output and absent from the state."""
    x = operands(150, "channel", True, 9, batch=1)
    x["initial_state"] = operands(1, batch=4, state="linear")["initial_state"]
    bounds = torch.tensor([0, 3, 3, 70, 150])
    assert_agrees(x, cu_seqlens=bounds)
    y = operands(90, "token", True, 9, "level", batch=3)
    mask = torch.zeros(3, 90)
    mask[0, 20:], mask[1, :70] = 1, 1
    assert_agrees(y, attention_mask=mask)
    o, _ = loglinear_attention(**y, attention_mask=mask)
    assert not o[mask == 0].any()


@pytest.mark.parametrize("kind", ["token", "channel"])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("levels", [None, 9])
def test_strong_decays(kind, delta, levels):
    """Decays of 0 and of e^-10000 beside mild ones, with sums beyond -1e6: finite, and right."""
    x = operands(300, kind, delta, levels, batch=1)
    decay = x["log_decay"]
    decay[:, 5::7] = -1e4
    decay[:, 40] = -torch.inf
    decay[:, 100:220] = -1e4
    decay[:, 250, 0] = -torch.inf
    assert_agrees(x)
    for name, (ours, definition) in both({n: t if t is None else t.float() for n, t in x.items()}).items():
        assert relative_error(ours, definition) < 1e-4, name


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_beta_at_its_bounds(value):
    """No correction at all, and a reflection."""
    x = operands(130, delta=True)
    x["beta"] = torch.full_like(x["beta"], value)
    assert_agrees(x)


def test_empty_batch():
    """Nothing in, nothing out."""
    for length in (0, 5):
        x = operands(length, batch=0 if length else 2)
        o, state = loglinear_attention(**x, return_final_state=True)
        assert o.shape == x["v"].shape
        assert state.shape == (*x["v"].shape[::2][:1], 4, 13, 5, 3)


@pytest.mark.parametrize(("decay", "delta"), CELLS)
def test_gradcheck(decay, delta):
    """Numerical derivatives, through output and final state."""
    for levels in (None, 3):
        x = operands(5, decay, delta, levels, "linear", batch=1, groups=1, heads=2, key_dim=2, value_dim=2)
        names = [n for n, t in x.items() if t is not None]

        def call(*tensors, names=names, x=x):
            return loglinear_attention(**{**x, **dict(zip(names, tensors, strict=True))}, return_final_state=True)

        assert torch.autograd.gradcheck(call, [x[n].requires_grad_() for n in names])


def test_gradients_of_a_step():
    """A step is the operator on one token, gradients included."""
    x = operands(1, "channel", True, 5, "level")
    x = {n: t for n, t in x.items() if t is not None}
    tensors = [t.requires_grad_() for t in x.values()]
    token = {n: t[:, 0] for n, t in x.items() if n != "initial_state"}
    o, state = loglinear_attention_step(**token, state=x["initial_state"])
    ours = torch.autograd.grad(o.sum() + state.square().sum(), tensors)
    o, state = reference_attention(**x, return_final_state=True)
    for a, b in zip(ours, torch.autograd.grad(o.sum() + state.square().sum(), tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
