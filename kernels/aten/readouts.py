"""Per-level readouts as ATen operations: a pyramid of block sums, of which each token reads one block per level.

Block `j` of level `l >= 1` holds `2 ** (l - 1)` tokens; those of an odd block read the sum of the block before it. So
there are O(T log T) products of a query and a sum, in O(log T) operations, and O(T) sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llcompile.kernels import header, routing_state
from llcompile.kernels.aten.tree import siblings
from llcompile.kernels.grid import Grid, make_grid
from llcompile.kernels.readouts import Readouts, ReadoutToken
from llcompile.kernels.rows import from_rows, rows_between, to_rows


def forward(x: Readouts, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """Readouts `[B, T, W, L]` and final state (an empty tensor when not asked for)."""
    state = x.initial_state
    x = x._replace(
        query=x.query.to(x.dtype), key=x.key.to(x.dtype), initial_state=state if state is None else state.to(x.dtype)
    )
    if x.starts is None:
        return _of_rows(x, return_final_state)
    assert x.lengths is not None
    rows = rows_between(x.starts, x.lengths, x.query.shape[1])
    x = x._replace(query=to_rows(x.query, rows), key=to_rows(x.key, rows), lengths=rows.lengths, starts=None)
    readouts, state = _of_rows(x, return_final_state)
    return from_rows(readouts, rows), state


def backward(x: Readouts, grad: Tensor, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and initial state; None where there is no operand."""
    with torch.inference_mode(False), torch.enable_grad():  # an operator runs below autograd; this lifts it above
        given = (x.query, x.key, x.initial_state)
        inputs = [t if t is None else t.detach().to(x.dtype).requires_grad_() for t in given]
        query, key, state = inputs
        assert query is not None
        assert key is not None
        results = forward(x._replace(query=query, key=key, initial_state=state), grad_state is not None)
        asked = [pair for pair in zip(results, (grad, grad_state), strict=True) if pair[1] is not None]
        wanted = [t for t in inputs if t is not None]
        outputs, grads = zip(*asked, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True, materialize_grads=True))
    return tuple(None if t is None else next(found) for t in inputs)


def step(x: ReadoutToken) -> tuple[Tensor, Tensor]:
    """Absorb one token and read out: `[B, W, L]` and the new state.

    Raises `StateError` where a row's position is damaged or cannot be counted further.
    """
    routing_state.check_position(x.state, 1, "state")
    dtype = x.dtype
    sums, position = routing_state.unpack(x.state.to(dtype), x.levels)
    sums = routing_state.merge(sums, position)
    sums = torch.cat([sums[:, :, :1] + x.key.to(dtype)[:, :, None], sums[:, :, 1:]], 2)
    return (x.query.to(dtype)[:, :, None] * sums).sum(-1), routing_state.pack(sums, position + 1)


def _of_rows(x: Readouts, return_final_state: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, _, _ = x.query.shape
    if not tokens or not x.query.numel():
        return x.query.new_zeros(*x.query.shape[:3], x.levels), _unchanged(x, return_final_state)
    grid = make_grid(tokens, x.position, x.lengths, chunk=1)
    query, key = grid.place(x.query), grid.place(x.key)  # [B, W, N, R]
    last = grid.last(batch, key.device)
    columns, ends = [(query * key).sum(-1)], [_at(key, last)]
    for level in range(grid.levels - 1):  # blocks of 2 ** level tokens
        right, left = siblings(grid.chunks, level, key.device)
        read = (query[:, :, right] * key[:, :, left]).sum(-1)
        columns.append(torch.zeros_like(columns[0]).index_copy(2, right, read))
        block = last >> level
        ends.append(_at(key, (block - 1).clamp(min=0)) * (block & 1)[:, None, None])
        key = _joined(key)
    levels = grid.true_levels(batch, key.device).clamp(max=x.levels - 1)  # [B, levels of the grid]
    readouts = _summed(grid.take(torch.stack(columns, -1)), levels[:, None, None], x.levels)
    sums = _summed(torch.stack(ends, -1).transpose(1, 2), levels[:, None, None], x.levels)  # [B, R, W, L]
    if x.initial_state is not None:
        old, final = _old(x, grid)
        readouts, sums = readouts + old, sums + final
    return readouts, _final(x, sums.permute(0, 2, 3, 1)) if return_final_state else _no_state(x)


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


def _old(x: Readouts, grid: Grid) -> tuple[Tensor, Tensor]:
    """What queries read of the initial state `[B, T, W, L]`, and where its sums are in the end `[B, R, W, L]`."""
    assert x.initial_state is not None
    assert x.position is not None
    sums = routing_state.merge(routing_state.unpack(x.initial_state, x.levels)[0], x.position)
    seen, end = grid.old_levels(x.query.shape[0], sums.device, x.levels)
    read = torch.einsum("btwr,bwlr->btwl", x.query, sums)
    if x.lengths is not None:
        real = torch.arange(grid.tokens, device=sums.device) < x.lengths[:, None]
        read = torch.where(real[:, :, None, None], read, 0)
    return _summed(read, seen[:, :, None], x.levels), _summed(sums.permute(0, 3, 1, 2), end[:, None, None], x.levels)


def _final(x: Readouts, sums: Tensor) -> Tensor:
    """The state after the last token, from sums `[B, W, L, R]`; rows without tokens keep theirs."""
    batch, tokens = x.query.shape[:2]
    position = torch.full((batch,), tokens, device=sums.device) if x.lengths is None else x.lengths
    state = routing_state.pack(sums, position if x.position is None else position + x.position)
    if x.lengths is None:
        return state
    return torch.where((x.lengths == 0)[:, None, None], _unchanged(x, True), state)


def _unchanged(x: Readouts, return_final_state: bool) -> Tensor:
    """The state of rows without tokens."""
    if not return_final_state:
        return _no_state(x)
    if x.initial_state is None:
        shape = (x.query.shape[0], x.query.shape[2], routing_state.size(x.levels, x.query.shape[3]))
        return x.query.new_zeros(shape)
    position, sums = x.initial_state.split([header.DIGITS, x.levels * x.query.shape[3]], 2)
    return torch.cat([position.detach(), sums], 2)  # a position has no gradient


def _no_state(x: Readouts) -> Tensor:
    """What stands for a final state that was not asked for."""
    return x.query.new_empty(0)
