"""The state of `level_readouts`, and the place in a mixer's level state where it is kept.

A routing state is a tensor `[B, W, 8 + L * R]`, for W sets of level weights with L levels and keys of R channels: the
position in `header`'s digits, then the sums of the keys in each level's bucket, as the last query saw them. Zeros are
an empty state.

A model's cache has one tensor per mixer, the level state `[B, H, 1 + L, K, V]` (`state`). Its slot 0 is a header of
`K * V` numbers for each head, of which the position takes eight. The other `K * V - 8` have room for a routing state:
the sums of a set begin in the header of the first of its `H / W` heads, in equal parts where they need several. The
position is the mixer's own. So caches, beams and saved states hold both, and a level state without routing is
the empty routing state at its position.

Sums are kept as precisely as the dtype of the cache allows, just as the level states are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llcompile.errors import StateError
from llcompile.kernels import header
from llcompile.kernels.state import check_positions, is_level_state
from llcompile.kernels.state import merge as merge_levels


def size(levels: int, channels: int) -> int:
    """The numbers of a routing state for each set of level weights."""
    return header.DIGITS + levels * channels


def empty(
    batch: int,
    sets: int,
    levels: int,
    channels: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """An empty routing state `[B, W, 8 + L * R]` at position 0."""
    return torch.zeros(batch, sets, size(levels, channels), dtype=dtype, device=device)


def pack(sums: Tensor, position: Tensor) -> Tensor:
    """Join sums of keys `[B, W, L, R]` and positions `[B]` into a routing state."""
    first = header.write(position, header.DIGITS, 1, sums.dtype)[:, None, :, 0]
    return torch.cat([first.expand(-1, sums.shape[1], -1), sums.flatten(2)], 2)


def unpack(state: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Split a routing state into sums of keys `[B, W, L, R]` and positions `[B]` (int64)."""
    return state[:, :, header.DIGITS :].unflatten(2, (levels, -1)), header.read(state[:, 0, :, None])


def merge(sums: Tensor, position: Tensor) -> Tensor:
    """Sums `[B, W, L, R]` with room for the token at `position [B]`, as `state.merge`."""
    return merge_levels(sums[..., None], position)[..., 0]


def check(state: Tensor, batch: int, sets: int, levels: int, channels: int, name: str = "initial_state") -> None:
    """Raise `StateError` unless the routing state `state` can start readouts of these sizes."""
    want = (batch, sets, size(levels, channels))
    if tuple(state.shape) != want:
        raise StateError(
            f"{name} has shape {list(state.shape)}; readouts of these operands need a routing state "
            f"[B, W, 8 + L * R] = {list(want)} with L={levels}, R={channels}; it belongs to another operator or batch"
        )
    if not state.dtype.is_floating_point or not header.keeps(state.dtype, header.DIGITS):
        raise StateError(f"{name} has dtype {state.dtype}, which cannot hold a position; keep this state in float32")


def check_position(state: Tensor, tokens: int, name: str = "initial_state") -> None:
    """Raise `StateError` where a position cannot be counted `tokens` further, as `state.check_positions`."""
    check_positions(state if is_level_state(state) else state[:, :, None, : header.DIGITS, None], tokens, name)


# -- in the header of a level state -----------------------------------------------------------------------------------


def room(heads: int, sets: int, key_dim: int, value_dim: int) -> int:
    """How many numbers `L * R` a set of level weights can keep in the headers of a level state.

    `H = heads` are those of the mixer, `W = sets` those of the level weights.
    """
    return heads // sets * max(key_dim * value_dim - header.DIGITS, 0)


def check_either(state: Tensor, batch: int, sets: int, levels: int, channels: int, name: str) -> None:
    """As `check`, where `state` may be a mixer's level state, whose headers hold the routing state."""
    if not is_level_state(state):
        return check(state, batch, sets, levels, channels, name)
    heads, entries = state.shape[1], state.shape[-2] * state.shape[-1]
    if state.shape[0] != batch or not sets or heads % sets:
        raise StateError(
            f"{name} has shape {list(state.shape)}; readouts of {sets} sets for a batch of {batch} need a level state "
            f"[B, H, 1 + L, K, V] with B={batch} and H a multiple of {sets}, or a routing state "
            f"[B, W, 8 + L * R] = {[batch, sets, size(levels, channels)]}; it belongs to another operator or batch"
        )
    _place(_sizes(state), sets, levels * channels)
    if not state.dtype.is_floating_point or not header.keeps(state.dtype, entries):
        raise StateError(f"{name} has dtype {state.dtype}, which cannot hold a position; keep this state in float32")
    return None


def layout(state: Tensor, sets: int, numbers: int) -> tuple[int, int]:
    """Where the sums of a set are, in a routing state or in a mixer's level state.

    Returns the rows of axis 1 that a set has, and how many of its `numbers` each has behind the position's digits.
    """
    if not is_level_state(state):
        return 1, numbers
    return state.shape[1] // sets, _place(_sizes(state), sets, numbers)[1]


def shares(state: Tensor, routing: Tensor) -> tuple[int, int, int]:
    """How a routing state is written into the headers of a level state `[B, H, 1 + L, K, V]`; raises as `write`.

    Returns the heads of a set, how many of its sums each of their headers takes in turn, and how many there are.
    """
    check_written(state, routing)
    _, sets, whole = routing.shape
    return *layout(state, sets, whole - header.DIGITS), whole - header.DIGITS


def own(state: Tensor, sets: int, levels: int, channels: int) -> Tensor:
    """A copy of the routing state in either kind of state; nothing else of it."""
    return read(state, sets, levels, channels) if is_level_state(state) else state.clone()


def gradient_of(grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a state of `shape`, of either kind, from that of the routing state that was read of it."""
    return grad if grad.shape == shape else written(grad.new_zeros(shape), grad)


def read(state: Tensor, sets: int, levels: int, channels: int) -> Tensor:
    """The routing state `[B, W, 8 + L * R]` in a mixer's state, which may be linear `[B, H, K, V]`: then it is empty.

    Differentiable. Raises `StateError` where the headers have no room for it.
    """
    if not is_level_state(state):
        return state.new_zeros(state.shape[0], sets, size(levels, channels))
    return read_as(state, _sizes(state), sets, levels, channels)


def read_as(state: Any, sizes: tuple[int, int, int], sets: int, levels: int, channels: int) -> Any:
    """As `read`, of a level state whose `sizes` H, K and V are known: for `fx.Proxy` objects, which have none."""
    position = state[:, :1, 0].flatten(2)[:, :, : header.DIGITS].detach()
    return torch.cat([position.expand(-1, sets, -1), _sums(state, sizes, sets, levels * channels)], 2)


def write(state: Tensor, routing: Tensor) -> None:
    """Write a routing state `[B, W, 8 + L * R]` into a mixer's level state, in place; its position stays as it is.

    Raises `StateError` where the state is linear, or its headers have no room.
    """
    used, width, sums = _parts(state, routing)
    heads = state.view(state.shape[0], routing.shape[1], -1, state.stride(1))  # each begins with its header
    heads.narrow(2, 0, used).narrow(3, header.DIGITS, width).copy_(sums)


def written(state: Tensor, routing: Tensor) -> Tensor:
    """As `write`, into a copy; in operations that change nothing in place."""
    used, width, sums = _parts(state, routing)
    headers = state[:, :, 0].flatten(2).unflatten(1, (routing.shape[1], -1))  # [B, W, H / W, K * V]
    first, rest = headers[:, :, :used], headers[:, :, used:]
    first = torch.cat([first[..., : header.DIGITS], sums.to(first), first[..., header.DIGITS + width :]], 3)
    whole = torch.cat([first, rest], 2).flatten(1, 2).unflatten(2, state.shape[3:])
    return torch.cat([whole[:, :, None], state[:, :, 1:]], 2)


def check_written(state: Tensor, routing: Tensor) -> None:
    """Raise `StateError` unless a level state has room for the routing state, as `write` does."""
    if not is_level_state(state):
        raise StateError(
            f"routing_state has shape {list(routing.shape)}, but the state {list(state.shape)} is linear and has no "
            "header to keep it in; pass level_weights, or no routing_state"
        )
    (batch, heads), sets = state.shape[:2], routing.shape[1]
    if routing.shape[0] != batch or not sets or heads % sets or routing.shape[2] <= header.DIGITS:
        raise StateError(
            f"routing_state has shape {list(routing.shape)} and the state {list(state.shape)}; expected "
            f"[B, W, 8 + L * R] with B={batch} and W sets of level weights that divide H={heads} heads"
        )


def _parts(state: Tensor, routing: Tensor) -> tuple[int, int, Tensor]:
    """Of how many of a set's heads the headers take sums, how many each, and those, `[B, W, used, width]`."""
    check_written(state, routing)
    sets = routing.shape[1]
    numbers = routing.shape[2] - header.DIGITS
    used, width = _place(_sizes(state), sets, numbers)
    sums = routing.narrow(2, header.DIGITS, numbers)
    if used * width != numbers:
        sums = torch.nn.functional.pad(sums, (0, used * width - numbers))
    return used, width, sums.reshape(*routing.shape[:2], used, width)


def gradient(grad: Tensor, sets: int, numbers: int) -> Tensor:
    """The gradient of a routing state `[B, W, numbers]` from that of the state that it was written into."""
    return torch.nn.functional.pad(_sums(grad, _sizes(grad), sets, numbers - header.DIGITS), (header.DIGITS, 0))


def _sums(state: Any, sizes: tuple[int, int, int], sets: int, numbers: int) -> Any:
    """What stands in the headers of a level state beside the position, `[B, W, numbers]`."""
    used, width = _place(sizes, sets, numbers)
    headers = state[:, :, 0].flatten(2).unflatten(1, (sets, -1))  # [B, W, H / W, K * V]
    return headers[:, :, :used, header.DIGITS : header.DIGITS + width].flatten(2)[:, :, :numbers]


def _sizes(state: Tensor) -> tuple[int, int, int]:
    """H, K and V."""
    return state.shape[1], state.shape[-2], state.shape[-1]


def _place(sizes: tuple[int, int, int], sets: int, numbers: int) -> tuple[int, int]:
    """Of how many of a set's heads the headers hold its `numbers`, and how many each."""
    heads, key_dim, value_dim = sizes
    available = room(heads, sets, key_dim, value_dim)
    if numbers > available:
        raise StateError(
            f"the headers of a level state with H={heads}, K={key_dim} and V={value_dim} have room for {available} "
            f"numbers beside the position in each of {sets} sets of level weights, and L * R = {numbers} are more; "
            "use routing keys of fewer channels R, or fewer levels L"
        )
    used = -(-numbers // (key_dim * value_dim - header.DIGITS))
    return used, -(-numbers // used)
