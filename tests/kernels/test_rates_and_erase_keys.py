"""Decays by rates, an erase key of its own, and level weights that heads share: against the definition."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

from llcompile.kernels import choice
from llcompile.kernels.state import level_states, position_of
from llcompile.ops import loglinear_attention, loglinear_attention_step
from tests.kernels.kernel_cases import assert_agrees, both, operands, relative_error

# (decay, delta) beyond the cells of test_operator
CELLS = [("rate", False), ("rate", True), *itertools.product((None, "token", "channel", "rate"), ("erase",))]
# Those that C++ has, too. Each is a library to compile: two of them, which differ least from others, are slow.
CPP = {
    ("rate", False): (),
    ("channel", "erase"): (),
    **dict.fromkeys([(None, "erase"), ("token", "erase")], pytest.mark.slow),
}


@pytest.fixture
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test by the implementation that `on_forms` names."""
    with choice.use(request.param):
        yield


def on_forms(
    names: str = "", values: Iterable[tuple[Any, ...]] = ((),), cells: Iterable[tuple[Any, Any]] = CELLS
) -> pytest.MarkDecorator:
    """All `cells` and `values` on ATen, and on C++ where it has the cell."""
    cases = []
    for cell, value in itertools.product(cells, values):
        cases.append(pytest.param(*cell, *value, "aten"))
        if cell in CPP:
            cases.append(pytest.param(*cell, *value, "cpp", marks=CPP[cell]))
    return pytest.mark.parametrize(f"decay, delta, {names and names + ', '}form", cases, indirect=["form"])


@on_forms("levels, state", [(None, "linear"), (12, "level"), (12, None), (3, "linear")])
def test_definition(decay, delta, levels, state, form):
    """Lengths around the chunk size, all kinds of state, forward and gradients."""
    for length in (1, 3, 65):
        assert_agrees(operands(length, decay, delta, levels, state, seed=length))


@on_forms()
def test_several_chunks(decay, delta, form):
    """A tree with a partial last block."""
    for levels in (None, 9):
        assert_agrees(operands(330, decay, delta, levels, "linear", batch=1, groups=1, heads=2))


def test_an_erase_key_without_a_factor():
    """beta is a factor on the erase key; without it the factor is 1, and an erase key is no delta rule."""
    x = operands(70, "channel", "erase")
    assert_agrees({**x, "beta": None})
    ones = {**x, "beta": torch.ones_like(x["beta"])}
    o, without = loglinear_attention(**ones)[0], loglinear_attention(**{**x, "beta": None})[0]
    torch.testing.assert_close(o, without, rtol=1e-12, atol=1e-12)


@on_forms(cells=[(None, "erase"), ("token", "erase"), ("channel", "erase")])
def test_the_delta_rule_is_an_erase_key(decay, delta, form):
    """S = (D - (beta k) (D k)^T) S + (beta k) v^T, so the delta rule is one of these."""
    x = operands(90, decay, True, 8)
    want = loglinear_attention(**x)[0]
    beta, repeat = x["beta"][..., None], 2
    q, k = (x[n].repeat_interleave(repeat, 2) for n in ("q", "k"))
    g = x["log_decay"]
    factor = 1.0 if g is None else g.exp() if g.dim() == 4 else g.exp()[..., None]
    other = {**x, "q": q, "k": beta * k, "erase_key": beta * k, "erase_query": factor * k, "beta": None}
    torch.testing.assert_close(loglinear_attention(**other)[0], want, rtol=1e-10, atol=1e-10)


def test_rates_are_a_decay_per_channel():
    """The same as the product given as one tensor."""
    x = operands(90, "rate", False, 8)
    product = x["log_decay"][..., None] * x["decay_rate"]
    want = loglinear_attention(**{**x, "log_decay": product, "decay_rate": None})[0]
    torch.testing.assert_close(loglinear_attention(**x)[0], want, rtol=1e-10, atol=1e-10)


@on_forms(cells=[*CELLS, ("token", True), ("channel", False)])
def test_heads_that_share_level_weights(decay, delta, form):
    """W level weights for H heads, also in packed sequences and with a state."""
    x = operands(70, decay, delta, 5, "level")
    shared = {**x, "level_weights": x["level_weights"][:, :, :2]}
    assert_agrees(shared)
    y = operands(70, decay, delta, 5, batch=1)
    assert_agrees({**y, "level_weights": y["level_weights"][:, :, :1]}, cu_seqlens=torch.tensor([0, 3, 3, 70]))


@pytest.mark.slow
@on_forms("key_dim, value_dim", list(itertools.product((1, 16, 80), repeat=2)))
def test_grid_of_sizes(decay, delta, key_dim, value_dim, form):
    """All head sizes, with a state at another position in each row."""
    for levels in (None, 8):
        assert_agrees(operands(127, decay, delta, levels, "level", key_dim=key_dim, value_dim=value_dim))


@on_forms()
def test_pieces_and_steps_equal_one_pass(decay, delta, form):
    """Prefill in pieces, then decode token by token; with weights that heads share."""
    x = operands(100, decay, delta, 9)
    x["level_weights"] = x["level_weights"][:, :, :2]
    whole, final = loglinear_attention(**x, return_final_state=True)
    per_token = {n for n, t in x.items() if t is not None and t.dim() > 2}
    cut = lambda at: {n: t[:, at] if n in per_token else t for n, t in x.items() if n != "initial_state"}  # noqa: E731
    o, state = loglinear_attention(**cut(slice(0, 90)), return_final_state=True)
    outputs = [o]
    for t in range(90, 100):
        o, state = loglinear_attention_step(**cut(t), state=state)
        outputs.append(o[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)
    assert position_of(state).tolist() == [100, 100]
    linear = loglinear_attention(**{**x, "level_weights": None}, return_final_state=True)[1]
    torch.testing.assert_close(level_states(state).sum(2), linear, rtol=1e-10, atol=1e-10)


@on_forms("dtype", [(torch.float32,), (torch.bfloat16,)])
def test_error_budget(decay, delta, dtype, form):
    """As test_operator has it for the other families."""
    x = operands(200, decay, delta, 9, "linear", dtype=dtype, key_dim=16)
    for name, (ours, definition) in both(x).items():
        budget = 200 * torch.finfo(torch.float32).eps + 2 * torch.finfo(ours.dtype).eps
        assert relative_error(ours, definition) <= budget, name


@pytest.mark.parametrize("delta", [False, "erase"])
def test_strong_decays(delta):
    """Decays of 0 beside mild ones, and rates of 0: finite, and right."""
    for decay in ("rate", "channel") if delta else ("rate",):
        x = operands(200, decay, delta, 9, batch=1)
        x["log_decay"][:, 5::7] = -1e4
        if decay == "rate":
            x["decay_rate"][0, 0] = 0
        assert_agrees(x)


@pytest.mark.parametrize(("decay", "delta"), [("rate", False), ("channel", "erase")])
def test_gradcheck_of_a_step(decay, delta):
    """A step is the operator on one token, gradients included."""
    x = operands(1, decay, delta, 3, "linear", batch=1, groups=1, heads=2, key_dim=2, value_dim=2)
    names = [n for n, t in x.items() if t is not None and n != "initial_state"]
    tensors = [(x[n][:, 0] if x[n].dim() > 2 else x[n]).requires_grad_() for n in names]

    def call(state, *given):
        return loglinear_attention_step(**dict(zip(names, given, strict=True)), state=state)

    assert torch.autograd.gradcheck(call, [x["initial_state"].requires_grad_(), *tensors])
