"""What a state tensor looks like, and how to make, open and describe one.

A state is one plain floating tensor with the batch first, so that caches can store, move and reorder it like any other:

* linear state (no level weights): `[B, H, K, V]`;
* level state of `L` levels: `[B, H, 1 + L, K, V]`. Slot 0 of the level axis is a header: `[b, h, 0]` holds the
  position of row `b` (tokens absorbed so far), as `header` writes it. Slots `1 .. L` are the states of levels
  `0 .. L - 1` as the last query saw them; the last level also holds everything that belongs higher.

A tensor of zeros is a valid empty state at position 0. The operators give float32 and float64 states; a cache may hold
them in any dtype that keeps the header. Positions are exact up to 2**24 (2**53 in float64), and a state that would
count further, or whose header is damaged, is an error where its values are at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llcompile.errors import StateError
from llcompile.kernels import header
from llcompile.kernels.levels import trailing_zeros


def state_dtype(operand: torch.dtype) -> torch.dtype:
    """States are float32, or float64 when the operands are."""
    return torch.float64 if operand == torch.float64 else torch.float32


def empty_state(
    batch: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    levels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """An empty state at position 0: `[B, H, K, V]`, or `[B, H, 1 + levels, K, V]` with level weights."""
    middle = () if levels is None else (1 + levels,)
    return torch.zeros(batch, heads, *middle, key_dim, value_dim, dtype=dtype, device=device)


def is_level_state(state: Tensor) -> bool:
    """Whether `state` is of the kind with levels (5 axes) rather than a linear state (4 axes)."""
    return state.dim() == 5


def pack_state(levels: Tensor, position: Tensor) -> Tensor:
    """Join level states `[B, H, L, K, V]` and positions `[B]` into a state `[B, H, 1 + L, K, V]`."""
    _, heads, _, key_dim, value_dim = levels.shape
    first = header.write(position, key_dim, value_dim, levels.dtype)
    return torch.cat([first[:, None, None].expand(-1, heads, -1, -1, -1), levels], dim=2)


def unpack_state(state: Tensor) -> tuple[Tensor, Tensor]:
    """Split a level state `[B, H, 1 + L, K, V]` into its levels `[B, H, L, K, V]` and positions `[B]` (int64)."""
    return state[:, :, 1:], position_of(state)


def position_of(state: Tensor) -> Tensor:
    """Positions `[B]` (int64) of a level state's rows."""
    return header.read(state[:, 0, 0])


def level_states(state: Tensor) -> Tensor:
    """The states of the levels alone, `[B, H, L, K, V]`; their sum over `L` is the linear state."""
    return state[:, :, 1:]


def linear_state(state: Tensor) -> Tensor:
    """The linear state `[B, H, K, V]` that `state` refines: the sum of its levels, or itself if it has none."""
    return level_states(state).sum(2) if is_level_state(state) else state


def in_levels(state: Tensor, levels: int | None) -> Tensor:
    """`state` of the kind that an operator of `levels` (None: linear) keeps, sharing memory where it is that kind.

    A linear state is one bucket of the last level, and positions count from 0.
    """
    if levels is None:
        return linear_state(state)
    if is_level_state(state):
        return state
    last = state[:, :, None]
    return torch.cat([last.new_zeros(*state.shape[:2], levels, *state.shape[2:]), last], 2)


def in_kind_of(state: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `state` from that of `in_levels` of it."""
    if is_level_state(state) == is_level_state(grad):
        return grad
    if is_level_state(grad):  # a linear state was the last level
        return grad[:, :, -1]
    found = grad[:, :, None].expand(state.shape).clone()
    found[:, :, 0] = 0  # a position has no gradient
    return found


def merge(states: Tensor, position: Tensor) -> Tensor:
    """Make room for the token at `position [B]`: levels below the one that fills up empty into it.

    The states are `[B, H, L, K, V]`. At position 0 level 0 fills up, and nothing moves.
    """
    last = states.shape[2] - 1
    full = (trailing_zeros(position) + 1).clamp(max=last)[:, None, None, None, None]
    index = torch.arange(last + 1, device=states.device)[:, None, None]
    below = index < full
    moved = torch.where(below, states, 0).sum(2, keepdim=True)
    return torch.where(below, 0, states) + torch.where(index == full, moved, 0)


def merged_state(state: Tensor) -> Tensor:
    """A level state `[B, H, 1 + L, K, V]` with the levels that its next token sees."""
    levels, position = unpack_state(state)
    return pack_state(merge(levels, position), position)


def check_state(
    state: Tensor, batch: int, heads: int, key_dim: int, value_dim: int, levels: int | None, name: str = "initial_state"
) -> None:
    """Raise `StateError` unless `state` can start an operator of these sizes (`levels`: None = linear)."""
    shape = tuple(state.shape)
    want = f"[{batch}, {heads}, {key_dim}, {value_dim}]"
    if state.dim() not in (4, 5):
        raise StateError(f"{name} has shape {list(shape)}; expected a linear state {want} or a level state with 5 axes")
    if (*shape[:2], *shape[-2:]) != (batch, heads, key_dim, value_dim):
        raise StateError(
            f"{name} has shape {list(shape)}, but these operands need [B, H, (1 + L,) K, V] with "
            f"B={batch}, H={heads}, K={key_dim}, V={value_dim}; it belongs to another operator or batch"
        )
    if state.dim() == 5 and levels is not None and shape[2] != levels + 1:
        raise StateError(
            f"{name} has {shape[2] - 1} levels (shape {list(shape)}), but level_weights has {levels}; "
            "use the level weights the state was made with, or pad them to the same number of levels"
        )
    if state.dim() == 5 and shape[2] < 2:
        raise StateError(f"{name} has shape {list(shape)}: a level state needs a header and at least one level")
    if not state.dtype.is_floating_point:
        raise StateError(f"{name} has dtype {state.dtype}; expected float32 or float64")
    if state.dim() == 5 and not header.keeps(state.dtype, key_dim * value_dim):
        raise StateError(
            f"{name} has shape {list(shape)} and dtype {state.dtype}, which cannot hold the position in a header of "
            f"K * V = {key_dim * value_dim} numbers; keep this state in float32"
        )


def check_kind(state: object, name: str = "state") -> None:
    """Raise `StateError` unless `state` is one, of whatever sizes."""
    if not isinstance(state, Tensor) or state.dim() not in (4, 5):
        found = f"shape {list(state.shape)}" if isinstance(state, Tensor) else f"type {type(state).__name__}"
        raise StateError(f"{name} has {found}; expected [B, H, K, V] or [B, H, 1 + L, K, V]; zeros are an empty state")
    check_state(state, state.shape[0], state.shape[1], state.shape[-2], state.shape[-1], None, name)


def check_positions(state: Tensor, tokens: int, name: str = "initial_state") -> None:
    """Raise `StateError` where a level state cannot count `tokens` more; on a CPU only, others would wait."""
    if not is_level_state(state) or state.device.type != "cpu" or not state.numel():
        return
    first = state[:, 0, 0]  # [B, K, V]
    largest = header.largest(state.dtype, first[0].numel())
    position = header.read(first)
    if bool((wrong := header.damage(first)).any()):
        row = int(wrong.nonzero()[0])
        raise StateError(
            f"{name} of dtype {state.dtype} has lost the position of row {row}: its header begins with "
            f"{first[row].detach().flatten()[: header.DIGITS].tolist()}. It was rounded (by a cache with fewer bits, "
            "if an earlier version wrote it or K * V < 8), scaled or quantised; start from an empty state, and "
            "keep states in float32"
        )
    if bool((wrong := position + tokens > largest).any()):
        row = int(wrong.nonzero()[0])
        raise StateError(
            f"{name} is at position {int(position[row])} in row {row} and {tokens} more tokens come in, but "
            f"a {state.dtype} state counts whole tokens from 0 to {largest}; start from an empty state, or keep it in "
            "float64"
        )
