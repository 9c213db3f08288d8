"""A step in place: as the step that returns a new state, on every implementation, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llcompile.errors import DerivativeError, StateError
from llcompile.kernels import choice, routing_state
from llcompile.kernels.header import DIGITS
from llcompile.kernels.reference import reference_attention
from llcompile.ops import compact_state, level_readouts, loglinear_attention, loglinear_attention_step_
from tests.kernels.kernel_cases import operands, relative_error

FAMILIES = [(None, False), ("head", False), ("token", False), ("token", True), ("channel", True), ("rate", False),
            ("channel", "erase")]  # fmt: skip
STEPS = 20


def tokens_of(x: dict[str, Tensor | None]) -> list[dict[str, Tensor | None]]:
    """The operands of each token."""
    return [{n: t if t is None or t.dim() < 3 else t[:, i] for n, t in x.items()} for i in range(STEPS)]


def memory_like(state: Tensor, kind: str) -> Tensor:
    """A copy of the state: in one piece, between other numbers, or with heads behind values."""
    if kind == "contiguous":
        return state.clone()
    if kind == "between":
        room = torch.full((2 * state.shape[0], state.shape[1] + 1, *state.shape[2:]), 7.0, dtype=state.dtype)
        return room[::2, 1:].copy_(state)
    return state.clone().transpose(1, -1).contiguous().transpose(1, -1)


@pytest.mark.parametrize("kernels", ["aten", "cpp"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_as_the_definition(kernels: str, family: tuple[str | None, bool]) -> None:
    """Token by token from states of either kind, past the last level, in memory of any kind."""
    for levels, state, memory in ((7, "level", "contiguous"), (3, "level", "between"), (2, "level", "behind"),
                                  (None, "linear", "contiguous"), (None, "linear", "between")):  # fmt: skip
        x = operands(STEPS, *family, levels, state)  # type: ignore[arg-type]
        before = x.pop("initial_state")
        assert before is not None
        want, want_state = reference_attention(**x, initial_state=before, scale=0.7, return_final_state=True)  # type: ignore[arg-type]
        assert want_state is not None
        held = memory_like(before, memory)
        with choice.use(kernels):
            found = [loglinear_attention_step_(**token, state=held, scale=0.7) for token in tokens_of(x)]  # type: ignore[arg-type]
        assert relative_error(torch.stack(found, 1), want) <= 1e-12
        assert relative_error(held, want_state) <= 1e-12
        around = held._base if memory == "between" else None
        assert around is None or bool((around[1::2] == 7).all() and (around[:, 0] == 7).all())


@pytest.mark.parametrize("kernels", ["aten", "cpp"])
def test_from_states_that_were_stored(kernels: str) -> None:
    """A compact state has the level that fills up next merged; a cache may keep fewer bits."""
    x = operands(STEPS, "token", True, 6, dtype=torch.float32)
    del x["initial_state"]
    for position in (1, 8, 12, 31):
        past = operands(position, "token", True, 6, dtype=torch.float32, seed=1)
        state = loglinear_attention(**past, return_final_state=True)[1]  # type: ignore[arg-type]
        assert state is not None
        want, _ = reference_attention(**x, initial_state=state)  # type: ignore[arg-type]
        for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 1e-1)):
            held = compact_state(state, 0).restore().to(dtype)
            with choice.use(kernels):
                found = [loglinear_attention_step_(**token, state=held) for token in tokens_of(x)]  # type: ignore[arg-type]
            assert held.dtype == dtype
            assert relative_error(torch.stack(found, 1), want) <= allowed


@pytest.mark.parametrize("kernels", ["aten", "cpp"])
def test_what_stands_in_the_header(kernels: str) -> None:
    """Key sums stay, unless new ones are given."""
    _, sums = level_readouts(*torch.randn(2, 2, 9, 2, 2), 3, return_final_state=True)
    assert sums is not None
    x = operands(STEPS, "token", False, 3, state="level", key_dim=8, value_dim=8, dtype=torch.float32)
    held = x.pop("initial_state")
    assert held is not None
    routing_state.write(held, sums)
    sums = routing_state.read(held, 2, 3, 2)[:, :, DIGITS:].clone()
    with choice.use(kernels):
        loglinear_attention_step_(**tokens_of(x)[0], state=held)  # type: ignore[arg-type]
        assert torch.equal(routing_state.read(held, 2, 3, 2)[:, :, DIGITS:], sums)
        new = routing_state.pack(sums.unflatten(2, (3, 2)) + 1, torch.zeros(2))
        loglinear_attention_step_(**tokens_of(x)[1], state=held, routing_state=new)  # type: ignore[arg-type]
    assert torch.equal(routing_state.read(held, 2, 3, 2)[:, :, DIGITS:], sums + 1)


def arguments(**changes: object) -> tuple[object, ...]:
    """Of the torch operator, in its order."""
    x = operands(1, "token", True, 4, state="level", dtype=torch.float32)
    state = x.pop("initial_state")
    token = {n: None if t is None else t[:, 0] for n, t in x.items()}
    names = ("q", "k", "v", "level_weights", "state", "log_decay", "decay_rate", "beta", "erase_query", "erase_key")
    return (*({**token, "state": state, **changes}[name] for name in names), 0.7)


def test_opcheck() -> None:
    operator = torch.ops.llcompile.loglinear_attention_step_.default
    torch.library.opcheck(operator, arguments())


def test_autograd_knows_of_the_change() -> None:
    given = arguments()
    state = given[4]
    assert isinstance(state, Tensor)
    factor = torch.ones((), requires_grad=True)
    (product := factor * state).sum()
    version = state._version
    torch.ops.llcompile.loglinear_attention_step_(*given)
    assert state._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_errors() -> None:
    with pytest.raises(DerivativeError, match="changes its state in place and has no derivative"):
        torch.ops.llcompile.loglinear_attention_step_(*arguments(v=torch.zeros(2, 4, 3, requires_grad=True)))
    with pytest.raises(StateError, match=r"state \[2, 4, 5, 3\] cannot become a level state in place"):
        torch.ops.llcompile.loglinear_attention_step_(*arguments(state=torch.zeros(2, 4, 5, 3)))
    with pytest.raises(StateError, match="cannot become a linear state in place"):
        torch.ops.llcompile.loglinear_attention_step_(*arguments(level_weights=None))
    damaged = torch.zeros(2, 4, 5, 5, 3)
    damaged[1, :, 0] = 0.5
    for kernels in ("aten", "cpp"):
        with choice.use(kernels), pytest.raises(StateError, match="lost the position of row 1"):
            torch.ops.llcompile.loglinear_attention_step_(*arguments(state=damaged))
        assert not damaged[0].any()
