"""The routing state in the header of a level state: room, reading, writing, gradients, and every operator's form."""

from __future__ import annotations

import pytest
import torch

from llcompile.errors import StateError
from llcompile.kernels import choice, routing_state
from llcompile.kernels.state import empty_state, pack_state, position_of
from llcompile.ops import level_readouts, level_readouts_step, loglinear_attention, loglinear_attention_step
from tests.kernels.kernel_cases import operands

LEVELS, CHANNELS = 6, 4
# heads, sets, K, V: one head holds a set's numbers; two do; eight of nine free entries in each of four.
SIZES = [(4, 2, 8, 8), (4, 2, 5, 4), (8, 2, 4, 4)]


@pytest.mark.parametrize(("heads", "sets", "key_dim", "value_dim"), SIZES)
def test_what_is_written_is_read(heads, sets, key_dim, value_dim):
    """Sums come back, positions and level states stay, other headers as well."""
    state = empty_state(2, heads, key_dim, value_dim, LEVELS)
    position = torch.tensor([5, 1000])
    _, state = loglinear_attention(
        *torch.randn(2, 2, 9, 1, key_dim), torch.randn(2, 9, heads, value_dim), torch.ones(2, 9, 1, LEVELS),
        initial_state=state, return_final_state=True,
    )  # fmt: skip
    before = state.clone()
    routing = routing_state.pack(torch.randn(2, sets, LEVELS, CHANNELS), position)
    routing_state.write(state, routing)
    found = routing_state.read(state, sets, LEVELS, CHANNELS)
    assert torch.equal(found[:, :, 8:], routing[:, :, 8:])
    assert routing_state.unpack(found, LEVELS)[1].tolist() == position_of(state).tolist() == [9, 9]
    assert torch.equal(state[:, :, 1:], before[:, :, 1:])
    assert torch.equal(state[:, :, 0].flatten(2)[:, :, :8], before[:, :, 0].flatten(2)[:, :, :8])
    assert (state != before).sum() == routing[:, :, 8:].numel()


def test_zeros_and_linear_states_are_empty():
    """What a cache begins with."""
    for state in (empty_state(2, 4, 8, 8, LEVELS), torch.randn(2, 4, 8, 8)):
        routing = routing_state.read(state, 2, LEVELS, CHANNELS)
        assert torch.equal(routing, routing_state.empty(2, 2, LEVELS, CHANNELS))


def test_too_little_room():
    """The message says how many numbers there are room for, and what to do."""
    assert routing_state.room(4, 2, 4, 4) == 16
    assert routing_state.room(4, 4, 2, 3) == 0
    state = empty_state(1, 4, 4, 4, LEVELS)
    with pytest.raises(StateError, match=r"room for 16 numbers .* L \* R = 24 .* fewer channels R"):
        routing_state.read(state, 2, LEVELS, CHANNELS)
    with pytest.raises(StateError, match="room for 16"):
        routing_state.write(state, routing_state.empty(1, 2, LEVELS, CHANNELS))
    with pytest.raises(StateError, match="is linear"):
        routing_state.write(state[:, :, 1], routing_state.empty(1, 2, LEVELS, CHANNELS))
    with pytest.raises(StateError, match="sets of level weights that divide H=4"):
        routing_state.write(state, routing_state.empty(1, 3, LEVELS, 1))


@pytest.mark.parametrize("kernels", ["aten", "cpp"])
@pytest.mark.parametrize(("decay", "delta"), [("token", False), ("channel", True), ("rate", False)])
def test_states_of_the_operator_hold_it(decay, delta, kernels):
    """A prefill and steps, with both states in one tensor, as one pass over the whole."""
    heads = {"key_dim": 8, "value_dim": 8}
    x = {n: t for n, t in operands(30, decay, delta, LEVELS, **heads).items() if t is not None}
    query, key = torch.randn(2, 2, 30, 2, CHANNELS, dtype=torch.float64)
    whole, final = level_readouts(query, key, LEVELS, return_final_state=True)
    state, found = empty_state(2, 4, 8, 8, LEVELS, torch.float64), []
    with choice.use(kernels):
        for start, end in ((0, 13), (13, 21)):
            piece = {n: t if n == "decay_rate" else t[:, start:end] for n, t in x.items()}
            old = routing_state.read(state, 2, LEVELS, CHANNELS)
            read, routing = level_readouts(query[:, start:end], key[:, start:end], LEVELS, old, return_final_state=True)
            _, state = loglinear_attention(**piece, initial_state=state, return_final_state=True, routing_state=routing)
            found.append(read)
        for t in range(21, 30):
            token = {n: a if n == "decay_rate" else a[:, t] for n, a in x.items()}
            old = routing_state.read(state, 2, LEVELS, CHANNELS)
            read, routing = level_readouts_step(query[:, t], key[:, t], old, LEVELS)
            _, state = loglinear_attention_step(**token, state=state, routing_state=routing)
            found.append(read[:, None])
        _, plain = loglinear_attention(**x, return_final_state=True)
    torch.testing.assert_close(torch.cat(found, 1), whole)
    torch.testing.assert_close(routing_state.read(state, 2, LEVELS, CHANNELS), final)
    torch.testing.assert_close(state[:, :, 1:], plain[:, :, 1:])


@pytest.mark.parametrize("kernels", ["aten", "cpp"])
@pytest.mark.parametrize(("heads", "sets", "key_dim", "value_dim"), SIZES)
def test_a_step_reads_the_headers(kernels, heads, sets, key_dim, value_dim):
    """Readouts, new state and gradients are those of the routing state that stands there; nothing else is read."""
    state = written_state(heads, sets, key_dim, value_dim)
    query, key = torch.randn(2, 2, sets, CHANNELS, dtype=torch.float64)
    results = []
    for given in (state, routing_state.read(state, sets, LEVELS, CHANNELS)):
        leaves = [t.clone().requires_grad_() for t in (query, key, given)]
        with choice.use(kernels):
            found = level_readouts_step(*leaves, LEVELS)
            grads = torch.autograd.grad(found[0].square().sum() + found[1][:, :, 8:].square().sum(), leaves)
        results.append([*found, *grads[:2], grads[2] if given is not state else read(grads[2], sets)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
    assert results[0][0][:, :, -1].abs().min() > 0  # a level that the token leaves as it was
    spoilt = state.clone()
    spoilt[:, :, 1:] = torch.nan
    with choice.use(kernels):
        assert torch.equal(level_readouts_step(query, key, spoilt, LEVELS)[0], results[0][0])


def written_state(heads, sets, key_dim, value_dim):
    """A level state `[2, H, 1 + L, K, V]` at positions 5 and 1000 with a routing state in its headers."""
    levels = torch.randn(2, heads, LEVELS, key_dim, value_dim, dtype=torch.float64)
    state = pack_state(levels, torch.tensor([5, 1000]))
    sums = torch.randn(2, sets, LEVELS, CHANNELS, dtype=torch.float64)
    routing_state.write(state, routing_state.pack(sums, torch.tensor([5, 1000])))
    return state


def read(grad, sets):
    """The gradient of the routing state in that of a level state, which has no other part."""
    found = routing_state.gradient(grad, sets, 8 + LEVELS * CHANNELS)
    assert (grad != 0).sum() == (found != 0).sum()
    return found


def test_a_step_refuses_other_states():
    """Of another batch, of heads that sets do not divide, without room, and with a damaged position."""
    query, key = torch.randn(2, 2, 2, CHANNELS, dtype=torch.float64)
    state = written_state(4, 2, 8, 8)
    for wrong in (state[:1], state[:, :3]):
        with pytest.raises(StateError, match=r"need a level state \[B, H, 1 \+ L, K, V\] with B=2"):
            level_readouts_step(query, key, wrong, LEVELS)
    with pytest.raises(StateError, match="room for"):
        level_readouts_step(query, key, state[..., :2, :], LEVELS)
    with pytest.raises(StateError, match="cannot hold a position"):
        level_readouts_step(query, key, state.long(), LEVELS)
    for kernels in ("aten", "cpp"):
        with choice.use(kernels), pytest.raises(StateError, match="has lost the position of row 0"):
            level_readouts_step(query, key, state + 0.5, LEVELS)


@pytest.mark.parametrize("step", [True, False])
def test_gradients_go_through_the_header(step):
    """From the state that comes out to the routing state, and from what is read to the state that came in."""
    x = {n: t for n, t in operands(3, "token", False, LEVELS, key_dim=8, value_dim=8).items() if t is not None}
    routing = torch.randn(2, 2, 8 + LEVELS * CHANNELS, dtype=torch.float64, requires_grad=True)
    if step:
        token = {n: t[:, 0] for n, t in x.items()}
        state = empty_state(2, 4, 8, 8, LEVELS, torch.float64)
        _, final = loglinear_attention_step(**token, state=state, routing_state=routing)
    else:
        _, final = loglinear_attention(**x, return_final_state=True, routing_state=routing)
    factor = torch.randn(2, 2, 8 + LEVELS * CHANNELS, dtype=torch.float64)
    (grad,) = torch.autograd.grad((routing_state.read(final, 2, LEVELS, CHANNELS) * factor).sum(), routing)
    assert torch.equal(grad[:, :, 8:], factor[:, :, 8:])
    assert not grad[:, :, :8].any()


def test_opcheck():
    """The optional argument is one that torch's transforms know."""
    x = operands(7, "token", True, LEVELS, key_dim=8, value_dim=8)
    given = [t if t is None else t.requires_grad_() for t in x.values()]
    routing = torch.randn(2, 2, 8 + LEVELS * CHANNELS, dtype=torch.float64, requires_grad=True)
    operator = torch.ops.llcompile.loglinear_attention.default
    torch.library.opcheck(operator, (*given, 0.7, True), {"routing_state": routing})
    state = empty_state(2, 4, 8, 8, LEVELS, torch.float64)
    token = [t if t is None else t[:, 0].detach() for n, t in x.items() if n != "initial_state"]
    step = torch.ops.llcompile.loglinear_attention_step.default
    torch.library.opcheck(step, (*token[:4], state, *token[4:], 0.7), {"routing_state": routing})
