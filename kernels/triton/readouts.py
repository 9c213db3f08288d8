"""Per-level readouts on Triton kernels: pairs of tokens inside chunks, sums of chunks in a tree above them.

What a state adds, and what comes out as one, is small and rare (a prefill): ATen operations do it. So they do where
sequences are packed: these become rows first, for which the longest one's length has to be known.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor

from llcompile.kernels import routing_state
from llcompile.kernels.aten import readouts as aten
from llcompile.kernels.grid import Grid, depth
from llcompile.kernels.readouts import Readouts, ReadoutToken, describe
from llcompile.kernels.rows import from_rows, rows_between, to_rows
from llcompile.kernels.triton.readout_source import CHUNK, module_of, warps


def forward(x: Readouts, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """As `aten.readouts.forward`."""
    if x.starts is not None:
        x, rows = aten.in_rows(x)
        readouts, state = forward(x, return_final_state)
        return from_rows(readouts, rows), state
    if not x.query.numel():
        return aten.forward(x, return_final_state)
    with _current(x.query):
        readouts = Call(x).forward()
    if x.initial_state is None and not return_final_state:
        return readouts, x.query.new_empty(0, dtype=x.dtype)
    old, state = aten.of_states(x, return_final_state)
    return readouts if old is None else readouts + old, state


def backward(x: Readouts, grad: Tensor, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    """As `aten.readouts.backward`."""
    if not x.query.numel():
        return aten.backward(x, grad, grad_state)
    if x.starts is not None:
        assert x.lengths is not None
        rows = rows_between(x.starts, x.lengths, x.query.shape[1])
        one, _ = aten.in_rows(x)
        d_query, d_key, d_state = backward(one, to_rows(grad, rows), grad_state)
        return *(t if t is None else from_rows(t, rows) for t in (d_query, d_key)), d_state
    with _current(x.query):
        d_query, d_key = Call(x).backward(grad.to(x.dtype).contiguous())
    if x.initial_state is None and grad_state is None:
        return d_query, d_key, None
    more_query, more_key, d_state = aten.gradients(aten.of_states, x, grad, grad_state)
    assert more_query is not None
    assert more_key is not None
    return d_query + more_query, d_key + more_key, d_state


def step(x: ReadoutToken) -> tuple[Tensor, Tensor]:
    """As `aten.readouts.step`."""
    routing_state.check_position(x.state, 1, "state")
    batch, sets, _ = x.query.shape
    state = x.state.to(x.dtype).contiguous()
    readouts, new = x.query.new_empty(batch, sets, x.levels, dtype=x.dtype), torch.empty_like(state)
    if not x.query.numel():
        return aten.step(x)
    operands = [part for t in map(_dense, (x.query, x.key)) for part in (t, t.stride(0), t.stride(1))]
    with _current(x.query):
        kernel = module_of(describe(x)).readouts_step
        kernel[(batch * sets,)](*operands, state, new, readouts, sets, num_warps=warps("readouts_step"))
    return readouts, new


class Call:
    """One call on rows, without states."""

    def __init__(self, x: Readouts) -> None:
        self.x, self.kernels = x, module_of(describe(x))
        self.batch, self.tokens, self.sets, self.channels = x.query.shape
        grid = aten.grid_of(x)
        self.grid: Grid = dataclasses.replace(grid, chunk=CHUNK, chunks=-(-grid.size // CHUNK))
        self.depth = depth(self.grid.chunks)
        self.padded = 1 << self.depth
        self.query, self.key = ([t, *t.stride()[:3]] for t in map(_dense, (x.query, x.key)))
        self.rows = [None if t is None else t.to(torch.int32) for t in (self.grid.offset, x.lengths)]
        served = self.grid.true_levels(self.batch, x.query.device).clamp(max=x.levels - 1).to(torch.int32)
        self.served = [served, served.stride(0)]
        self.sizes = [self.tokens, self.sets, self.grid.chunks, self.padded]

    def forward(self) -> Tensor:
        """Readouts `[B, T, W, L]`."""
        readouts = self._for_tokens(self.x.levels, self.x.dtype)
        self._launch(
            "readouts",
            *self.query,
            *self.key,
            *self.rows,
            *self.served,
            self._nodes(),
            readouts,
            *self.sizes,
            self.depth,
        )
        return readouts

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of query and key, from that of readouts."""
        d_query, d_key = (self._for_tokens(self.channels, self.x.query.dtype) for _ in range(2))
        readers = self._zeros(self.depth, self.batch, self.sets, self.padded, self.channels)
        reading = (*self.query, *self.rows, *self.served, grad, readers, *self.sizes, self.depth, self.batch)
        self._launch("node_readers", *reading)
        nodes = self._zeros(self.batch, self.sets, 2 * self.padded, self.channels)
        for m in range(self.depth):  # a node is read by the chunks of the one to its right
            right = readers[m].unflatten(2, (-1, 2, 1 << m))[:, :, :, 1]
            torch.sum(right, 3, out=self._level(nodes, m)[:, :, ::2])
        operands = (*self.query, *self.key, *self.rows, *self.served, self._nodes(), nodes, grad)
        self._launch("readouts_gradient", *operands, d_query, d_key, *self.sizes, self.depth)
        return d_query, d_key

    def _nodes(self) -> Tensor:
        """The sums of keys `[B, W, 2 P, R]` of chunks and of blocks of them."""
        nodes = self._zeros(self.batch, self.sets, 2 * self.padded, self.channels)
        self._launch("chunk_sums", *self.key, *self.rows, nodes, *self.sizes)
        for m in range(self.depth):
            torch.sum(self._level(nodes, m).unflatten(2, (-1, 2)), 3, out=self._level(nodes, m + 1))
        return nodes

    def _level(self, nodes: Tensor, m: int) -> Tensor:
        """The nodes of a level, a view."""
        return nodes.narrow(2, 2 * self.padded - (2 * self.padded >> m), self.padded >> m)

    def _zeros(self, *shape: int) -> Tensor:
        return self.x.query.new_zeros(shape, dtype=self.x.dtype)

    def _for_tokens(self, columns: int, dtype: torch.dtype) -> Tensor:
        make = torch.empty if self.x.lengths is None else torch.zeros
        return make((*self.x.query.shape[:3], columns), dtype=dtype, device=self.x.query.device)

    def _launch(self, name: str, *arguments: Any) -> None:
        programs = self.batch * self.sets * self.grid.chunks
        getattr(self.kernels, name)[(programs,)](*arguments, num_warps=warps(name))


def _dense(x: Tensor) -> Tensor:
    """With channels side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _current(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Where the device of `x` is the current one."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
