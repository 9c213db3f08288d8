"""The header of level states: positions survive caches of every dtype, or the state is refused."""

from __future__ import annotations

import pytest
import torch

from llcompile.errors import StateError
from llcompile.kernels import header
from llcompile.kernels.state import level_states, pack_state, position_of
from llcompile.ops import loglinear_attention, loglinear_attention_step
from tests.kernels.kernel_cases import operands, relative_error

POSITIONS = torch.tensor([0, 1, 7, 8, 255, 256, 257, 4097, 2**20 + 1, 2**23 - 1])
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
STORAGE = (torch.float64, torch.float32, torch.bfloat16, torch.float16, *FLOAT8)


def stepped(x, start, stop, state, dtype):
    """Decodes tokens start to stop, the state cast to ``dtype`` after each."""
    out = []
    for t in range(start, stop):
        token = {n: a if a is None else a[:, t] for n, a in x.items() if n != "initial_state"}
        o, state = loglinear_attention_step(**token, state=state)
        state = state.to(dtype)
        out.append(o)
    return torch.stack(out, 1), state


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(8, 1), (1, 8), (4, 4), (5, 3)])
def test_digits_survive_every_dtype(key_dim, value_dim, dtype):
    first = header.write(POSITIONS, key_dim, value_dim, torch.float32)
    assert header.keeps(dtype, key_dim * value_dim)
    for cast in (first.to(dtype), first.to(dtype).float()):
        assert header.read(cast).tolist() == POSITIONS.tolist()
        assert not header.damage(cast).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (2, 3)])
def test_a_small_header_knows_that_it_was_rounded(key_dim, value_dim, dtype):
    """A cast there and back: right, or seen to be wrong; both happen."""
    first = header.write(POSITIONS, key_dim, value_dim, torch.float32)
    cast = first.to(dtype).float()
    wrong = header.read(cast) != POSITIONS
    assert torch.equal(header.damage(cast) | ~wrong, torch.ones_like(wrong))
    assert wrong.any()
    assert not header.damage(cast).all()
    assert not header.damage(first).any()


def test_the_last_digit_takes_the_rest():
    """float64 states count beyond 2**24."""
    far = torch.tensor([2**24, 2**40 + 12345])
    assert header.read(header.write(far, 3, 3, torch.float64)).tolist() == far.tolist()


@pytest.mark.parametrize("step", [False, True], ids=["sequence", "token"])
@pytest.mark.parametrize("dtype", STORAGE[2:])
def test_rows_at_positions_of_their_own(dtype, step):
    """Stored low, reordered, resumed: as the same rounded levels with positions that were never cast."""
    x = operands(3, "token", True, dtype=torch.float32, batch=3)
    positions = torch.tensor([300, 0, 4095])
    levels = torch.randn(3, 4, 12, 5, 3)
    order = torch.tensor([2, 0, 0])
    stored = pack_state(levels, positions).to(dtype)[order]
    exact = pack_state(levels.to(dtype).float()[order], positions[order])
    if step:
        results = [stepped(x, 0, 3, state, torch.float32) for state in (stored, exact)]
    else:
        results = [
            loglinear_attention(**{**x, "initial_state": state}, return_final_state=True) for state in (stored, exact)
        ]
    (o, state), (want, want_state) = results
    assert torch.equal(o, want)
    assert torch.equal(state, want_state)
    assert position_of(state).tolist() == [4098, 303, 303]
    moved = {**x, "initial_state": pack_state(exact[:, :, 1:], positions[order] + 1)}  # the control: positions matter
    assert relative_error(loglinear_attention(**moved)[0], want) > 1e-3


@pytest.mark.parametrize(("decay", "delta"), [("token", False), ("channel", True)])
def test_a_bfloat16_cache_past_256_tokens(decay, delta):
    """Rounding costs as much as a linear state's does; another tree would cost ten times that."""
    x = operands(290, decay, delta, dtype=torch.float32, batch=1, heads=2)
    want, _ = loglinear_attention(**x)
    _, state = loglinear_attention(**{n: a if a is None else a[:, :250] for n, a in x.items()}, return_final_state=True)
    o, state = stepped(x, 250, 290, state.bfloat16(), torch.bfloat16)
    assert position_of(state).tolist() == [290]
    assert relative_error(o, want[:, 250:]) < 0.05


@pytest.mark.parametrize("dtype", STORAGE[2:])
def test_a_small_state_is_refused_in_fewer_bits(dtype):
    x = operands(2, dtype=torch.float32, key_dim=2, value_dim=3)
    state = pack_state(torch.randn(2, 4, 12, 2, 3), torch.tensor([5, 6]))
    loglinear_attention(**{**x, "initial_state": state})
    with pytest.raises(
        StateError, match=r"cannot hold the position in a header of K \* V = 6 numbers; keep .* float32"
    ):
        loglinear_attention(**{**x, "initial_state": state.to(dtype)})


def test_states_of_earlier_versions():
    """One number in the first entry: read in float32; in bfloat16 refused where it may have been rounded."""
    x = operands(2, dtype=torch.float32)
    state = torch.zeros(2, 4, 13, 5, 3)
    level_states(state).normal_()
    for position, kept in ((77, True), (301, False)):
        state[:, :, 0, 0, 0] = position
        new = pack_state(level_states(state), torch.tensor([position, position]))
        want, _ = loglinear_attention(**{**x, "initial_state": new})
        assert torch.equal(loglinear_attention(**{**x, "initial_state": state})[0], want)
        if kept:
            loglinear_attention(**{**x, "initial_state": state.bfloat16()})
        else:
            with pytest.raises(StateError, match=r"has lost the position of row 0.*earlier version"):
                loglinear_attention(**{**x, "initial_state": state.bfloat16()})


@pytest.mark.parametrize("harm", [lambda s: s * 0.9, lambda s: -s, lambda s: s / 0, lambda s: s + 7])
def test_a_damaged_header_is_refused(harm):
    x = operands(2, dtype=torch.float32)
    state = pack_state(torch.randn(2, 4, 12, 5, 3), torch.tensor([0, 301]))
    with pytest.raises(StateError, match=r"has lost the position of row [01]"):
        loglinear_attention(**{**x, "initial_state": harm(state)})


def test_counting_ends_where_a_state_says():
    x = operands(2, dtype=torch.float32)
    for position, fits in ((2**24 - 2, True), (2**24 - 1, False)):
        state = pack_state(torch.randn(2, 4, 12, 5, 3), torch.tensor([0, position]))
        if fits:
            loglinear_attention(**{**x, "initial_state": state})
        else:
            with pytest.raises(StateError, match=r"position 16777215 in row 1 and 2 more tokens"):
                loglinear_attention(**{**x, "initial_state": state})
