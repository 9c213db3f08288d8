"""Per-level readouts on Triton kernels: pairs of tokens inside chunks, sums of chunks in a Fenwick tree above them.

A forward pass is two launches, and one more for a final state; its gradient is two. Sequences are read where they lie,
and nothing waits for the device. What is rare is left to ATen: the gradients of states, and states of packed sequences,
for which these become rows first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llcompile.kernels import routing_state
from llcompile.kernels.aten import readouts as aten
from llcompile.kernels.grid import depth
from llcompile.kernels.readouts import Readouts, ReadoutToken, describe
from llcompile.kernels.rows import from_rows, rows_between, to_rows
from llcompile.kernels.triton.limits import current
from llcompile.kernels.triton.readout_source import BLOCK, CHUNK, TILE, kernels_of


def forward(x: Readouts, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """As `aten.readouts.forward`."""
    if not x.query.numel() or not x.rows:
        return aten.forward(x, return_final_state)
    if x.starts is not None and x.initial_state is not None:
        x, rows = aten.in_rows(x)
        readouts, state = forward(x, return_final_state)
        return from_rows(readouts, rows), state
    with current(x.query):
        return Call(x).forward(return_final_state)


def backward(x: Readouts, grad: Tensor, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    """As `aten.readouts.backward`."""
    if not x.query.numel() or not x.rows:
        return aten.backward(x, grad, grad_state)
    with_states = x.initial_state is not None or grad_state is not None
    if x.starts is not None and with_states:
        assert x.lengths is not None
        rows = rows_between(x.starts, x.lengths, x.query.shape[1])
        one, _ = aten.in_rows(x)
        d_query, d_key, d_state = backward(one, to_rows(grad, rows), grad_state)
        return *(t if t is None else from_rows(t, rows) for t in (d_query, d_key)), d_state
    with current(x.query):
        d_query, d_key = Call(x).backward(grad.to(x.dtype).contiguous())
    if not with_states:
        return d_query, d_key, None
    more_query, more_key, d_state = aten.gradients(aten.of_states, x, grad, grad_state)
    assert more_query is not None
    assert more_key is not None
    return d_query + more_query, d_key + more_key, d_state


def step(x: ReadoutToken) -> tuple[Tensor, Tensor]:
    """As `aten.readouts.step`."""
    routing_state.check_position(x.state, 1, "state")
    if not x.query.numel():
        return aten.step(x)
    batch, sets, channels = x.query.shape
    state = x.state.contiguous()
    readouts = x.query.new_empty(batch, sets, x.levels, dtype=x.dtype)
    new = x.query.new_empty(batch, sets, routing_state.size(x.levels, channels), dtype=x.dtype)
    operands = [part for t in map(_dense, (x.query, x.key)) for part in (t, t.stride(0), t.stride(1))]
    old = (state, state.stride(0), state.stride(1))
    with current(x.query):
        where = routing_state.layout(x.state, sets, x.levels * channels)
        grid = (batch * sets, 1, 1)
        kernels_of(describe(x))["readouts_step"](grid, [*operands, *old, new, readouts, sets, *where])
    return readouts, new


class Call:
    """One call, without the gradients of states."""

    def __init__(self, x: Readouts) -> None:
        self.x, self.kernels = x, kernels_of(describe(x))
        _, self.tokens, self.sets, self.channels = x.query.shape
        edge, longest = max(self.tokens - 1, 0).bit_length(), self.tokens
        if x.initial_state is not None:
            longest += (1 << edge) - 1  # what continues is moved in the grid: see `grid`
        self.longest, self.depth = longest, depth(-(-longest // CHUNK))
        self.blocks = -(-self.channels // BLOCK)
        self.query, self.key = ([t, *t.stride()[:3]] for t in map(_dense, (x.query, x.key)))
        old = None if x.initial_state is None else x.initial_state.to(x.dtype).contiguous()
        self.where = [x.starts, x.lengths, old]
        self.sizes = [self.tokens, self.sets, self._parts(CHUNK), x.rows, edge]

    def forward(self, return_final_state: bool) -> tuple[Tensor, Tensor]:
        """Readouts `[B, T, W, L]`, and the final state (an empty tensor when not asked for)."""
        x, nodes = self.x, self._nodes()
        readouts = self._for_tokens(x.levels, x.dtype)
        self._launch("key_nodes", TILE * CHUNK, *self.key, *self.where, nodes, *self.sizes, second=self.blocks)
        more = (*self.where, nodes)
        self._launch("readouts", CHUNK, *self.query, *self.key, *more, readouts, *self.sizes, self.depth)
        if not return_final_state:
            return readouts, x.query.new_empty(0, dtype=x.dtype)
        state = self._empty(x.rows, self.sets, routing_state.size(x.levels, self.channels))
        grid = (x.rows * self.sets, 1, 1)
        self.kernels["final_state"](grid, [*self.key, *more, state, *self.sizes, self.depth])
        return readouts, state

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of query and key, from that of readouts."""
        d_query, d_key = (self._for_tokens(self.channels, self.x.query.dtype) for _ in range(2))
        nodes = (self._nodes(), self._nodes())
        given = (*self.query, *self.key, *self.where, grad, *nodes)
        self._launch("both_nodes", TILE * CHUNK, *given, *self.sizes, second=2 * self.blocks)
        self._launch("readouts_gradient", CHUNK, *given, d_query, d_key, *self.sizes, self.depth)
        return d_query, d_key

    def _parts(self, size: int) -> int:
        """Parts of `size` tokens that a row has, or that there is room for where sequences lie one after another."""
        return -(-self.longest // size) if self.x.starts is None else self.tokens // size + self.x.rows

    def _nodes(self) -> Tensor:
        """Memory for a node of each chunk, `[chunks, W, R]`."""
        rows = self.x.rows if self.x.starts is None else 1
        return self._empty(rows * self._parts(CHUNK), self.sets, self.channels)

    def _empty(self, *shape: int) -> Tensor:
        return self.x.query.new_empty(shape, dtype=self.x.dtype)

    def _for_tokens(self, columns: int, dtype: torch.dtype) -> Tensor:
        make = torch.empty if self.x.lengths is None else torch.zeros
        return make((*self.x.query.shape[:3], columns), dtype=dtype, device=self.x.query.device)

    def _launch(self, name: str, size: int, *arguments: Any, second: int = 1) -> None:
        """Run a kernel over all parts of `size` tokens."""
        rows = self.x.rows if self.x.starts is None else 1
        self.kernels[name]((rows * self._parts(size) * self.sets, second, 1), arguments)


def _dense(x: Tensor) -> Tensor:
    """With channels side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
