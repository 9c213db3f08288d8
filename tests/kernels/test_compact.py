"""Compact states: what they keep, what they lose, and what follows from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llcompile import few_bits
from llcompile.errors import OperandError, StateError
from llcompile.kernels import header, routing_state
from llcompile.kernels.levels import level_table
from llcompile.ops import (
    CompactState,
    ReplayState,
    compact_state,
    level_readouts,
    loglinear_attention,
    loglinear_attention_step,
)
from tests.kernels.kernel_cases import operands, relative_error

STEPS = 40


def state_at(position: int, levels: int = 9, seed: int = 0) -> Tensor:
    """The state `[1, 4, 1 + L, 5, 3]` after so many tokens of the gated delta rule."""
    x = operands(position, "token", True, levels, batch=1, dtype=torch.float32, seed=seed)
    state = loglinear_attention(**x, return_final_state=True)[1]
    assert state is not None
    return state


def full_state(position: int, levels: int = 18, size: int = 32) -> Tensor:
    """A state `[1, 2, 1 + L, K, V]` whose levels are as large as many tokens without decay make them."""
    make = torch.Generator().manual_seed(position)
    state = torch.zeros(1, 2, 1 + levels, size, size)
    state[:, :, 0] = header.write(torch.tensor([position]), size, size, torch.float32)[:, None]
    for level in {0, *(i + 1 for i in range(levels - 1) if (position - 1) >> i & 1)}:
        state[:, :, 1 + level] = torch.randn(1, 2, size, size, generator=make) * 2 ** (max(level - 1, 0) / 2)
    return state


def following(state: Tensor, **changes: Tensor) -> list[Tensor]:
    """What decoding, a sequence and a replay give after it."""
    x = operands(STEPS, "token", True, state.shape[2] - 1, batch=state.shape[0], dtype=torch.float32, seed=7) | changes
    del x["initial_state"]
    o, end = loglinear_attention(**x, initial_state=state, return_final_state=True)
    assert end is not None
    found = [o, end[:, :, 1:], end[:, :, 0], ReplayState(state, 3, 7).step(**x)]
    for t in range(STEPS):
        token = {n: a if a is None else a[:, t] for n, a in x.items()}
        o, state = loglinear_attention_step(**token, state=state)
        found.append(o)
    return found


@pytest.mark.parametrize("position", [1, 2, 7, 8, 52, 63, 64, 101])
@pytest.mark.parametrize("levels", [9, 3])
def test_without_tolerance_nothing_is_lost(position, levels):
    """What follows is the same to rounding, at any position, though levels have been merged."""
    state = state_at(position, levels)
    compact = compact_state(state, 0)
    assert compact.error == 0
    again = compact.restore()
    assert again.dtype == torch.float32
    for o, want in zip(following(again), following(state), strict=True):
        assert relative_error(o, want) <= 1e-6


@pytest.mark.parametrize("position", [7, 52, 63])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-2])
def test_the_error_is_that_of_what_follows(position, tolerance):
    state = torch.cat([state_at(position), state_at(position + 12, seed=1)])
    compact = compact_state(state, tolerance)
    assert 0 < compact.error <= tolerance
    assert torch.allclose(compact.errors.square().sum(1).sqrt().max(), torch.tensor(compact.error), rtol=0.5)
    assert compact.nbytes < compact_state(state, 0).nbytes
    ones = torch.ones(2, STEPS, 4, 9)
    for o, want in zip(
        following(compact.restore(), level_weights=ones), following(state, level_weights=ones), strict=True
    ):
        assert relative_error(o, want) <= 3 * tolerance


def test_a_bucket_for_each_bit_of_the_position():
    for position in (1, 6, 7, 8, 100):
        compact = compact_state(state_at(position), 0)
        assert sum(len(part.values) for part in compact.parts) == 4 * max(position.bit_count(), 1)  # of each head
    seen = set(level_table(101)[100, :100].tolist())  # by the next query, at 100
    assert {int(place) % 9 for part in compact.parts for place in part.places} == seen


def test_rows_at_positions_of_their_own():
    state = torch.cat([state_at(7), torch.zeros(1, 4, 10, 5, 3), state_at(8), state_at(52)])
    compact = compact_state(state, 1e-3)
    again = compact.restore()
    assert torch.equal(again[:, :, 0], state[:, :, 0])
    assert not again[1].any()
    for o, want in zip(following(again), following(state), strict=True):
        assert relative_error(o, want) <= 2e-2


def test_bytes_at_128k():
    """At most 5 times the linear state at 1e-3, at the worst of all positions, too, where 17 buckets are held."""
    linear = 2 * 32 * 32 * 4
    sizes = {}
    for position in (2**17, 87_381, 2**17 - 1):
        compact = compact_state(full_state(position))
        assert 5e-4 <= compact.error <= 1e-3
        sizes[position] = compact.nbytes / linear
    assert sizes[2**17] <= 0.4
    assert sizes[87_381] <= 3
    assert sizes[2**17 - 1] <= 5
    assert compact_state(full_state(2**17 - 1), 1e-2).nbytes / linear <= 3.2


def test_where_every_level_counts_alike():
    """It takes most where all levels have one norm: more than 5 times, which `nbytes` tells; `error` holds."""
    state = full_state(2**17 - 1)
    state[:, :, 1:] /= state[:, :, 1:].flatten(3).norm(dim=3).clamp(min=1e-9)[..., None, None]
    compact = compact_state(state)
    assert compact.error <= 1e-3
    assert 5 < compact.nbytes / (2 * 32 * 32 * 4) <= 6


def test_bits_are_chosen_by_what_they_lose():
    """The large levels in many bits, small ones in few, and what is small enough in none; each head for itself."""
    state = full_state(2**17 - 1)
    state[:, 1, 1:] *= torch.full((18,), 2.0).pow(-torch.arange(18))[:, None, None]  # levels of the second head shrink
    state[:, 1, -1] = 1e-9
    bits = torch.zeros(2, 18, dtype=torch.int64)
    compact = compact_state(state)
    for part in compact.parts:
        bits.view(-1)[part.places.long()] = part.bits
    assert compact.error <= 1e-3
    held = bits[:, 1:17]  # the next token merges level 0 into level 1
    assert held[0].tolist() == sorted(held[0].tolist())
    assert held[1].tolist() == sorted(held[1].tolist(), reverse=True)
    assert bits[1, 17] == 0
    assert not compact.restore()[0, 1, 18].any()
    assert [part.bits for part in compact_state(full_state(100), 1e-6).parts] == [32]


@pytest.mark.parametrize("bits", few_bits.BITS)
def test_numbers_in_a_few_bits(bits):
    x = torch.randn(3, 5, 7)
    x[1] *= 1e-3
    x[2, 4] = 0
    scales, factors = few_bits.scales_of(x)
    rows = few_bits.row_scales(scales, factors)
    integers = few_bits.rounded(x, rows, bits)
    packed = few_bits.pack(integers, bits)
    assert packed.shape == (3, -(-5 * 7 * bits // 8))
    assert torch.equal(few_bits.unpack(packed, bits, 5, 7), integers.int())
    step = rows / (2 ** (bits - 1) - 1)
    assert bool(((few_bits.restored(integers, rows, bits) - x).abs() <= step * 0.501).all())


def test_of_an_earlier_version():
    """Levels of all heads together, in a dtype."""
    state = full_state(6)
    places = torch.tensor([[0, 0], [0, 1], [0, 3]])
    held = state[0, :, 1:].transpose(0, 1)[places[:, 1]]  # [N, H, K, V]
    part = {"places": places, "values": (held / 8).half(), "scales": torch.full((3, 1, 1, 1), 8.0)}
    d = {"shape": list(state.shape), "headers": state[:, :, 0].flatten(2)[:, :, :8], "parts": [part], "error": 0.0}
    again = CompactState.from_dict({**d, "errors": torch.zeros(1, 18)}).restore()
    assert torch.equal(again[:, :, 0], state[:, :, 0])
    assert relative_error(again, state) <= 1e-3


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e20, 1e30])
def test_any_range_of_numbers(factor):
    state = full_state(100)
    state[:, :, 1:] *= factor
    compact = compact_state(state)
    again = compact.restore()
    assert relative_error(again[:, :, 1:].sum(2) / factor, state[:, :, 1:].sum(2) / factor) <= 1e-2
    assert torch.equal(again[:, :, 0], state[:, :, 0])


def test_a_linear_state():
    state = torch.randn(2, 4, 5, 3)
    compact = compact_state(state, 0)
    assert torch.equal(compact.restore(), state)
    assert compact_state(state).nbytes < state.nbytes


def test_key_sums_stay():
    _, sums = level_readouts(torch.randn(1, 13, 1, 2), torch.randn(1, 13, 1, 2), 3, return_final_state=True)
    x = operands(13, "token", False, 3, batch=1, key_dim=8, dtype=torch.float32)
    state = loglinear_attention(**x, return_final_state=True, routing_state=sums)[1]
    assert state is not None
    assert sums is not None
    again = compact_state(state, 1e-2).restore()
    assert torch.equal(routing_state.read(again, 1, 3, 2), sums)


def test_to_a_file(tmp_path):
    compact = compact_state(state_at(52))
    torch.save(compact.to_dict(), tmp_path / "state.pt")
    again = CompactState.from_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again.restore(), compact.restore())
    assert again.error == compact.error
    with pytest.raises(StateError, match=r"not a compact state, but \['a'\]"):
        CompactState.from_dict({"a": 1})


def test_errors():
    state = state_at(5)
    with pytest.raises(OperandError, match="tolerance must be a number of at least 0, got -1"):
        compact_state(state, -1)
    with pytest.raises(StateError, match=r"state has shape \[4, 10, 5\]"):
        compact_state(state[0, :, :, :, 0])
    with pytest.raises(StateError, match="float64"):
        compact_state(state.double())
    with pytest.raises(StateError, match="not finite"):
        compact_state(torch.cat([state[:, :, :2], state[:, :, 2:] / 0], 2))
    state[:, :, 0] += 0.5
    with pytest.raises(StateError, match="lost the position"):
        compact_state(state)
