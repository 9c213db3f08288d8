"""A replayed state: against single steps and the definition, and what a rollback leaves."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llcompile.errors import DerivativeError, DistributedError, OperandError, StateError
from llcompile.kernels import spread
from llcompile.kernels.reference import reference_attention
from llcompile.kernels.state import merged_state, pack_state
from llcompile.ops import ReplayState, level_readouts, loglinear_attention, loglinear_attention_step
from tests.kernels.kernel_cases import Operands, operands, relative_error

FAMILIES = [
    *itertools.product((None, "head", "token", "channel"), (False, True)),
    ("rate", False),
    ("token", "erase"),
    ("channel", "erase"),
]
SCALE = 0.7


def tokens(x: Operands, first: int, last: int) -> Operands:
    return {n: t if t is None or t.dim() < 3 else t[:, first:last] for n, t in x.items()}


def one(x: Operands, t: int) -> Operands:
    return {n: a if a is None or a.dim() < 3 else a[:, t] for n, a in x.items()}


def start(x: Operands) -> Tensor:
    state = x.pop("initial_state")
    assert state is not None
    return state


def tensors(state: ReplayState) -> list[Tensor]:
    """All that can be read of the state from here on."""
    ring = [] if state._ring is None else [t[:, state._half, : state._count] for t in state._ring if t is not None]
    return [state.state(), state._base.state, *ring]


def same(a: ReplayState, b: ReplayState) -> bool:
    pairs = zip(tensors(a), tensors(b), strict=True)
    return a.absorbed == b.absorbed and all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("kind", ["level", "linear", None])
def test_drafts_are_single_steps(family, kind):
    """Calls of several tokens, over the borders of chunks, against steps of the operator and the definition."""
    decay, correction = family
    levels = None if kind is None else 7
    x = operands(23, decay, correction, levels, kind or "linear", dtype=torch.float32)
    first = start(x)
    want, _ = reference_attention(
        **{n: t if t is None else t.double() for n, t in x.items()}, scale=SCALE, initial_state=first.double()
    )
    state, single, plain = ReplayState(first, 3, 5), ReplayState(first, 3, 5), first
    found, calls = [], [1, 4, 2, 7, 9]
    for stop, count in zip(itertools.accumulate(calls), calls, strict=True):
        found.append(state.step(**tokens(x, stop - count, stop), scale=SCALE))
    for t in range(23):
        o = single.step(**tokens(x, t, t + 1), scale=SCALE)
        step, plain = loglinear_attention_step(**one(x, t), state=plain, scale=SCALE)
        assert relative_error(o[:, 0], torch.cat(found, 1)[:, t]) <= 1e-6
        assert relative_error(o[:, 0], step) <= 2e-6
    assert relative_error(torch.cat(found, 1), want) <= 5e-6
    assert same(state, single)
    assert state.absorbed == 23
    ours, theirs = state.state(), plain
    if levels is not None:
        assert torch.equal(ours[:, :, 0], theirs[:, :, 0])
        ours, theirs = ours[:, :, 1:], theirs[:, :, 1:]
    assert relative_error(ours, theirs) <= 2e-6


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize(("before", "drafts", "accepted"), [(2, 3, 0), (4, 3, 1), (5, 2, 0), (13, 3, 0), (3, 3, 3)])
def test_a_rollback_leaves_no_trace(family, before, drafts, accepted):
    """Bit for bit what fewer tokens give, also back over the border of a chunk; and what comes after is the same."""
    decay, correction = family
    x = operands(24, decay, correction, 6, "level", dtype=torch.float32)
    first = start(x)
    state, without = ReplayState(first, 3, 5), ReplayState(first, 3, 5)
    state.step(**tokens(x, 0, before), scale=SCALE)
    state.step(**tokens(x, 15, 15 + drafts), scale=SCALE)
    without.step(**tokens(x, 0, before), scale=SCALE)
    if accepted:
        without.step(**tokens(x, 15, 15 + accepted), scale=SCALE)
    if drafts > accepted:
        assert not same(state, without)
    state.rollback(drafts - accepted)
    assert same(state, without)
    after = [s.step(**tokens(x, 14, 24), scale=SCALE) for s in (state, without)]
    assert torch.equal(*after)
    assert same(state, without)


def test_many_rounds_of_drafts():
    """As in speculative decoding: each round some drafts are refused."""
    x = operands(120, "token", True, 9, "level", dtype=torch.float32)
    first = start(x)
    state, plain = ReplayState(first, 4, 6), ReplayState(first, 4, 6)
    make, done = torch.Generator().manual_seed(3), 0
    while done < 100:
        drafts, refused = (int(n) for n in torch.randint(0, 5, (2,), generator=make))
        drafts, refused = max(drafts, 1), min(refused, max(drafts, 1))
        state.step(**tokens(x, done, done + drafts), scale=SCALE)
        state.rollback(refused)
        for t in range(done, done + drafts - refused):
            plain.step(**tokens(x, t, t + 1), scale=SCALE)
        done += drafts - refused
        if done:
            assert same(state, plain)


def test_how_far_back():
    x = operands(40, "token", False, 6, "level", dtype=torch.float32)
    state = ReplayState(torch.zeros_like(start(x)), window=3, chunk=5)
    assert state.depth == state.absorbed == 0
    for t in range(20):
        state.step(**tokens(x, t, t + 1))
        assert state.depth >= min(t + 1, 3)
    state.step(**tokens(x, 20, 24))
    assert state.depth == 4  # the state of the chunk before is gone
    with pytest.raises(StateError, match=r"cannot roll back 5 tokens: 4 of the 24"):
        state.rollback(5)
    with pytest.raises(StateError, match="cannot roll back -1"):
        state.rollback(-1)
    state.rollback(4)
    assert (state.absorbed, state.depth) == (20, 0)


def test_a_fork_goes_its_own_way():
    x = operands(20, "token", True, 6, "level", dtype=torch.float32)
    first = start(x)
    state = ReplayState(first, 3, 5)
    state.step(**tokens(x, 0, 7))
    before = state.state()
    other = state.fork()
    other.step(**tokens(x, 7, 20))
    assert torch.equal(state.state(), before)
    assert not torch.equal(other.state(), before)
    first.zero_()  # it was copied
    state.step(**tokens(x, 7, 20))
    assert same(state, other)


@pytest.mark.parametrize(("levels", "positions"), [(9, (13, 70)), (9, (16, 0)), (3, (13, 70)), (1, (7, 8))])
def test_what_is_said_to_be_occupied_is(levels, positions):
    """What the host counts, through many chunks and a rollback, and after a state that no operator made."""
    rows = [operands(max(p, 1), "token", True, levels, batch=1, dtype=torch.float32) for p in positions]
    states = [loglinear_attention(**x, return_final_state=True)[1] for x in rows]
    first = torch.cat([state if p else torch.zeros_like(state) for state, p in zip(states, positions, strict=True)])  # type: ignore[type-var]
    odd = first.clone()
    odd[:, :, max(levels - 1, 1)] += 1
    x = operands(60, "token", True, levels, dtype=torch.float32)
    del x["initial_state"]
    for given in (first, odd):
        state = ReplayState(given, 3, 8)
        for stop in (1, 9, 20, 31, 60):
            state.step(**tokens(x, state.absorbed, stop))
            found = state._base.state[:, :, 1:].ne(0).flatten(3).any(3).any(1)
            assert state._base.occupied is not None
            assert torch.equal(found, state._base.occupied > 0)
            if given is first and levels == 9:
                assert found.sum(1).tolist() == [p.bit_count() for p in state._base.positions]
            state.rollback(min(2, state.depth))
        assert state._base.positions[0] % 8 == 0


def test_level_weights_act():
    x = operands(9, "token", False, 6, "level", dtype=torch.float32)
    first = start(x)
    plain = ReplayState(first).step(**x)
    assert x["level_weights"] is not None
    x["level_weights"][:, 8, :, 3] += 1
    changed = (ReplayState(first).step(**x) - plain).abs().amax((0, 2, 3))
    assert not changed[:8].any()
    assert changed[8] > 1e-3


def test_heads_that_share_and_shorter_operands():
    """Level weights for two heads each, bfloat16 operands, no tokens at all."""
    x = operands(11, "token", True, 6, "level", dtype=torch.bfloat16)
    first = start(x).float()
    assert x["level_weights"] is not None
    x["level_weights"] = x["level_weights"][:, :, :2]
    state = ReplayState(first, 2, 4)
    o = torch.cat([state.step(**tokens(x, t, t + 1)) for t in range(11)], 1)
    want, _ = loglinear_attention(**x, initial_state=first)
    assert o.dtype == torch.bfloat16
    assert relative_error(o, want) <= 0.02
    assert state.step(**tokens(x, 0, 0)).shape == (2, 0, 4, 3)


def test_bytes():
    state = ReplayState(torch.zeros(2, 4, 7, 5, 3), window=3, chunk=5)
    assert state.nbytes == 2 * 4 * 7 * 5 * 3 * 4
    x = operands(6, "token", False, 6, dtype=torch.float32)
    del x["initial_state"]
    state.step(**x)  # a fold, of which the state before is kept
    ring = 2 * 2 * 5 * (2 * 5 + 4 * 3 + 4) * 4
    occupied = 2 * 2 * 6 * 4
    assert state.nbytes == 2 * 2 * 4 * 7 * 5 * 3 * 4 + occupied + ring


def test_errors():
    x = operands(5, "token", False, 6, "level", dtype=torch.float32)
    first = start(x)
    with pytest.raises(OperandError, match="window is 9 and chunk 8"):
        ReplayState(first, 9, 8)
    with pytest.raises(StateError, match=r"shape \[4, 5, 3\]"):
        ReplayState(first[0, :, 0])
    with pytest.raises(StateError, match=r"dtype torch.int64"):
        ReplayState(first.long())
    _, sums = level_readouts(torch.randn(1, 3, 1, 2), torch.randn(1, 3, 1, 2), 2, return_final_state=True)
    x1 = operands(3, "token", False, 2, batch=1, key_dim=8, dtype=torch.float32)
    with_sums = loglinear_attention(**x1, return_final_state=True, routing_state=sums)[1]
    assert with_sums is not None
    with pytest.raises(StateError, match="key sums of level readouts"):
        ReplayState(with_sums)
    state = ReplayState(first)
    with pytest.raises(StateError, match="levels"):
        state.step(**{**x, "level_weights": torch.ones(2, 5, 4, 3)})
    state.step(**x)
    with pytest.raises(OperandError, match=r"beta is .* in this call and was absent before"):
        state.step(**{**x, "beta": torch.rand(2, 5, 4)})
    with pytest.raises(OperandError, match="log_decay must be at most 0"):
        state.step(**{**x, "log_decay": torch.ones(2, 5, 4)})
    with pytest.raises(DerivativeError, match=r"v \[2, 5, 4, 3\] requires a gradient"):
        state.step(**{**x, "v": x["v"].requires_grad_()})  # type: ignore[union-attr]
    assert state.absorbed == 5
    rates = operands(5, "rate", False, 6, dtype=torch.float32)
    del rates["initial_state"]
    state = ReplayState(torch.zeros(2, 4, 7, 5, 3))
    state.step(**rates)
    with pytest.raises(OperandError, match=r"decay_rate .* differs"):
        state.step(**{**rates, "decay_rate": torch.ones(4, 5)})


@pytest.mark.parametrize("occupied", [None, torch.tensor([[1.0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]])])
def test_opcheck(occupied):
    """Its schema, its shapes and its fake form: 2 tokens of 7 are read."""
    x = operands(7, "token", True, 6, "level", dtype=torch.float32)
    state, q, w = start(x), x.pop("q"), x.pop("level_weights")
    assert q is not None
    assert w is not None
    given = (q[:, -2:], x["k"], x["v"], w[:, -2:], x["log_decay"], None, x["beta"], None, None, state, occupied, SCALE)
    operator = torch.ops.llcompile.loglinear_attention_replay.default
    torch.library.opcheck(operator, given)
    want, _ = loglinear_attention(q=q, **x, level_weights=w, initial_state=state, scale=SCALE)
    assert relative_error(operator(*given), want[:, -2:]) <= 1e-6


@pytest.mark.parametrize("levels", [None, 6])
@pytest.mark.parametrize("merged", [False, True])
def test_opcheck_of_fold(levels, merged):
    """Likewise of the state after 7 tokens: the operator's final state, merged for the next token or not."""
    x = operands(7, "token", True, levels, "level" if levels else "linear", dtype=torch.float32)
    state = start(x)
    given = (x["k"], x["v"], x["log_decay"], None, x["beta"], None, None, state, None, merged)
    operator = torch.ops.llcompile.loglinear_attention_fold.default
    torch.library.opcheck(operator, given)
    _, want = loglinear_attention(**x, initial_state=state, scale=SCALE, return_final_state=True)
    if levels is not None and merged:
        assert not torch.equal(want, merged_state(want))
        want = merged_state(want)
    assert torch.equal(operator(*given), want)


def test_a_position_that_counts_no_further():
    """An error when the chunk's state would be made, which leaves the tokens out, and again with the next try."""
    x = operands(5, "token", False, 6, "level", batch=1, dtype=torch.float32, key_dim=8, value_dim=8)
    state = pack_state(torch.zeros_like(start(x)[:, :, 1:]), torch.tensor([2**24 - 4]))
    replayed = ReplayState(state, 2, 4)
    replayed.step(**tokens(x, 0, 4), scale=SCALE)
    replayed.step(**tokens(x, 0, 3), scale=SCALE)
    for _ in range(2):
        with pytest.raises(StateError, match=f"is at position {2**24} in row 0 and 4 more tokens come in"):
            replayed.step(**tokens(x, 0, 1), scale=SCALE)
        assert replayed.absorbed == 7


def test_not_on_a_sequence_in_pieces():
    x = operands(3, "token", False, 6, "level", dtype=torch.float32)
    state = ReplayState(start(x))
    with (
        spread.run_by(object()),
        pytest.raises(DistributedError, match=r"ReplayState holds whole sequences .*\[2, 3, 4"),
    ):  # type: ignore[arg-type]
        state.step(**x)
