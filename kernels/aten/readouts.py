"""Per-level readouts as ATen operations: a pyramid of block sums, of which each token reads one block per level.

Block `j` of level `l >= 1` holds `2 ** (l - 1)` tokens; those of an odd block read the sum of the block before it. So
there are O(T log T) products of a query and a sum, in O(log T) operations, and O(T) sums.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llcompile.kernels import header, routing_state
from llcompile.kernels.aten.tree import siblings
from llcompile.kernels.grid import Grid, make_grid
from llcompile.kernels.readouts import Readouts, ReadoutToken
from llcompile.kernels.rows import Rows, from_rows, rows_between, to_rows
from llcompile.kernels.state import is_level_state


def forward(x: Readouts, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """Readouts `[B, T, W, L]` and final state (an empty tensor when not asked for)."""
    if x.starts is not None:
        x, rows = in_rows(x)
        readouts, state = forward(x, return_final_state)
        return from_rows(readouts, rows), state
    x = _widened(x)
    old, state = of_states(x, return_final_state)
    readouts = _of_tokens(x)
    return readouts if old is None else readouts + old, state


def backward(x: Readouts, grad: Tensor, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and initial state; None where there is no operand."""
    return gradients(forward, x, grad, grad_state)


def gradients(
    function: Callable[[Readouts, bool], tuple[Tensor | None, Tensor]],
    x: Readouts,
    grad: Tensor,
    grad_state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Those of a function of the operands, by autograd."""
    with torch.inference_mode(False), torch.enable_grad():  # an operator runs below autograd; this lifts it above
        given = (x.query, x.key, x.initial_state)
        inputs = [t if t is None else t.detach().to(x.dtype).requires_grad_() for t in given]
        query, key, state = inputs
        assert query is not None
        assert key is not None
        results = function(x._replace(query=query, key=key, initial_state=state), grad_state is not None)
        asked = [(t, d) for t, d in zip(results, (grad, grad_state), strict=True) if t is not None and d is not None]
        wanted = [t for t in inputs if t is not None]
        outputs, grads = zip(*asked, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True, materialize_grads=True))
    return tuple(None if t is None else next(found) for t in inputs)


def step(x: ReadoutToken) -> tuple[Tensor, Tensor]:
    """Absorb one token and read out: `[B, W, L]` and the new state.

    Raises `StateError` where a row's position is damaged or cannot be counted further.
    """
    routing_state.check_position(x.state, 1, "state")
    return absorb(x)


def absorb(x: ReadoutToken) -> tuple[Tensor, Tensor]:
    """As `step`, without a look at the position: what may be traced."""
    dtype, state = x.dtype, x.state
    if is_level_state(state):
        state = routing_state.read(state, x.query.shape[1], x.levels, x.query.shape[2])
    sums, position = routing_state.unpack(state.to(dtype), x.levels)
    sums = routing_state.merge(sums, position)
    sums = torch.cat([sums[:, :, :1] + x.key.to(dtype)[:, :, None], sums[:, :, 1:]], 2)
    return (x.query.to(dtype)[:, :, None] * sums).sum(-1), routing_state.pack(sums, position + 1)


def in_rows(x: Readouts) -> tuple[Readouts, Rows]:
    """Each sequence at the start of a row of its own, and where the rows' tokens are."""
    assert x.starts is not None
    assert x.lengths is not None
    rows = rows_between(x.starts, x.lengths, x.query.shape[1])
    query, key = to_rows(x.query, rows), to_rows(x.key, rows)
    return x._replace(query=query, key=key, lengths=rows.lengths, starts=None), rows


def grid_of(x: Readouts) -> Grid:
    """The grid of the tokens of rows, a chunk for each."""
    return make_grid(x.query.shape[1], x.position, x.lengths, chunk=1)


def of_states(x: Readouts, return_final_state: bool) -> tuple[Tensor | None, Tensor]:
    """What the tokens of rows read of the initial state (None without one), and the final state."""
    x = _widened(x)
    if not x.query.numel():
        return None, _unchanged(x) if return_final_state else _no_state(x)
    grid = grid_of(x)
    old = None if x.initial_state is None else _old(x, grid)
    if not return_final_state:
        return old, _no_state(x)
    return old, _final(x, _ends(x, grid))


def _widened(x: Readouts) -> Readouts:
    """In the dtype of sums."""
    state = None if x.initial_state is None else x.initial_state.to(x.dtype)
    return x._replace(query=x.query.to(x.dtype), key=x.key.to(x.dtype), initial_state=state)


def _of_tokens(x: Readouts) -> Tensor:
    """What the tokens of rows read of one another."""
    if not x.query.numel():
        return x.query.new_zeros(*x.query.shape[:3], x.levels)
    grid = grid_of(x)
    query, key = grid.place(x.query), grid.place(x.key)  # [B, W, N, R]
    columns = [(query * key).sum(-1)]
    for level in range(grid.levels - 1):  # blocks of 2 ** level tokens
        right, left = siblings(grid.chunks, level, key.device)
        read = (query[:, :, right] * key[:, :, left]).sum(-1)
        columns.append(torch.zeros_like(columns[0]).index_copy(2, right, read))
        key = _joined(key)
    return _summed(grid.take(torch.stack(columns, -1)), _levels(x, grid)[:, None, None], x.levels)


def _ends(x: Readouts, grid: Grid) -> Tensor:
    """The sums `[B, R, W, L]` of each level at the rows' last tokens."""
    key, last = grid.place(x.key), grid.last(x.key.shape[0], x.key.device)
    ends = [_at(key, last)]
    for level in range(grid.levels - 1):
        block = last >> level
        ends.append(_at(key, (block - 1).clamp(min=0)) * (block & 1)[:, None, None])
        key = _joined(key)
    sums = _summed(torch.stack(ends, -1).transpose(1, 2), _levels(x, grid)[:, None, None], x.levels)
    if x.initial_state is None:
        return sums
    end = grid.old_levels(x.query.shape[0], sums.device, x.levels)[1]
    return sums + _summed(_old_sums(x).permute(0, 3, 1, 2), end[:, None, None], x.levels)


def _levels(x: Readouts, grid: Grid) -> Tensor:
    """The level `[B, levels of the grid]` that each of the grid's levels is."""
    return grid.true_levels(x.query.shape[0], x.query.device).clamp(max=x.levels - 1)


def _joined(key: Tensor) -> Tensor:
    """Sums of the blocks of one level `[B, W, N, R]` -> those of the next; an unpaired last block moves up as it is."""
    even = key.shape[2] & ~1
    return torch.cat([key[:, :, :even:2] + key[:, :, 1::2], key[:, :, even:]], 2)


def _at(key: Tensor, index: Tensor) -> Tensor:
    """`key [B, W, N, R]` at `index [B]` -> `[B, W, R]`."""
    return key[torch.arange(index.shape[0], device=index.device), :, index]


def _summed(x: Tensor, levels: Tensor, count: int) -> Tensor:
    """`x [..., levels]` summed into the level that each belongs to, `[..., count]`."""
    return x.new_zeros(*x.shape[:-1], count).scatter_add(-1, levels.expand(x.shape), x)


def _old_sums(x: Readouts) -> Tensor:
    """The sums of the initial state `[B, W, L, R]`, merged for the first token."""
    assert x.initial_state is not None
    assert x.position is not None
    return routing_state.merge(routing_state.unpack(x.initial_state, x.levels)[0], x.position)


def _old(x: Readouts, grid: Grid) -> Tensor:
    """What queries read of the initial state, `[B, T, W, L]`."""
    seen, _ = grid.old_levels(x.query.shape[0], x.query.device, x.levels)
    read = torch.einsum("btwr,bwlr->btwl", x.query, _old_sums(x))
    if x.lengths is not None:
        real = torch.arange(grid.tokens, device=read.device) < x.lengths[:, None]
        read = torch.where(real[:, :, None, None], read, 0)
    return _summed(read, seen[:, :, None], x.levels)


def _final(x: Readouts, sums: Tensor) -> Tensor:
    """The state after the last token, from sums `[B, R, W, L]`; rows without tokens keep theirs."""
    batch, tokens = x.query.shape[:2]
    position = torch.full((batch,), tokens, device=sums.device) if x.lengths is None else x.lengths
    state = routing_state.pack(sums.permute(0, 2, 3, 1), position if x.position is None else position + x.position)
    if x.lengths is None:
        return state
    return torch.where((x.lengths == 0)[:, None, None], _unchanged(x), state)


def _unchanged(x: Readouts) -> Tensor:
    """The state of rows without tokens."""
    if x.initial_state is None:
        shape = (x.query.shape[0], x.query.shape[2], routing_state.size(x.levels, x.query.shape[3]))
        return x.query.new_zeros(shape)
    position, sums = x.initial_state.split([header.DIGITS, x.levels * x.query.shape[3]], 2)
    return torch.cat([position.detach(), sums], 2)  # a position has no gradient


def _no_state(x: Readouts) -> Tensor:
    """What stands for a final state that was not asked for."""
    return x.query.new_empty(0)
