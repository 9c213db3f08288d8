"""The operator on whole sequences: chunks, then the tree (log-linear) or a scan over chunks (linear).

The backward pass gets the operands only and runs the same code again below autograd: nothing but inputs is kept between
the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llcompile.kernels.aten.chunk import ChunkOperands, Chunks, inside
from llcompile.kernels.aten.endpoint import EndPoint
from llcompile.kernels.aten.tree import arriving, blocks, siblings
from llcompile.kernels.grid import depth, make_grid
from llcompile.kernels.layout import Layout
from llcompile.kernels.operands import DIFFERENTIABLE, Operands
from llcompile.kernels.rows import from_rows, in_rows, rows_of
from llcompile.kernels.state import is_level_state, position_of, state_dtype


def forward(x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """Output `[B, T, H, V]` and final state (an empty tensor when not asked for)."""
    o, state = _run(x, scale, return_final_state)
    return o.to(x.v.dtype), state


def backward(x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
    """Gradients of the differentiable operands; None where there is no operand, or no gradient."""
    dtype = state_dtype(x.v.dtype)
    with torch.inference_mode(False), torch.enable_grad():  # an operator runs below autograd; this lifts it above
        inputs = [None if t is None else t.detach().to(dtype).requires_grad_() for t in x[:DIFFERENTIABLE]]
        results = _run(Operands(*inputs, *x[DIFFERENTIABLE:]), scale, grad_state is not None)  # type: ignore[arg-type]
        given = grad_o.to(dtype), grad_state
        asked = [(t, d) for t, d in zip(results, given, strict=True) if d is not None and t.requires_grad]
        if not asked:
            return [None] * len(inputs)
        tensors, grads = zip(*asked, strict=True)
        wanted = [t for t in inputs if t is not None]
        found = iter(torch.autograd.grad(tensors, wanted, grads, allow_unused=True))
    return [None if t is None else next(found) for t in inputs]


def _run(x: Operands, scale: float, final_state: bool) -> tuple[Tensor, Tensor]:
    """As `forward`, the output in the dtype of states; sequences that lie one after another become rows."""
    if x.starts is not None:
        rows = rows_of(x)
        o, state = _run(in_rows(x, rows), scale, final_state)
        return from_rows(o, rows), state
    call = Call(_per_head(x))
    if call.empty:
        return x.v.new_zeros(x.v.shape, dtype=call.dtype), call.unchanged_state() if final_state else call.no_state()
    o, state = call.run(final_state)
    return o * scale, state


def _per_head(x: Operands) -> Operands:
    """With level weights for each head, and a log decay for each channel in place of rates."""
    x = x.with_weights_per_head()
    if x.decay_rate is None or x.log_decay is None:
        return x
    g = x.log_decay.to(state_dtype(x.v.dtype)).expand(x.v.shape[:3])
    return x._replace(log_decay=g[..., None] * x.decay_rate, decay_rate=None)


class Call(Layout):
    """One call of the operator on rows."""

    def __init__(self, x: Operands) -> None:
        self.x = x
        self.dtype = state_dtype(x.v.dtype)
        self.batch, self.tokens, self.heads, self.value_dim = x.v.shape
        self.key_dim = x.q.shape[3]
        self.empty = x.v.numel() == 0 or x.q.numel() == 0
        self.levels = None if x.level_weights is None else x.level_weights.shape[-1]
        if self.empty:
            return
        position = None
        if self.levels is not None and x.initial_state is not None and is_level_state(x.initial_state):
            position = position_of(x.initial_state)
        self.grid = make_grid(self.tokens, position, x.lengths)

    def run(self, final_state: bool) -> tuple[Tensor, Tensor]:
        """Output, not scaled, and final state."""
        x, w = self.x, None
        inner = None
        if x.level_weights is not None:
            inner, w = self._weights(x.level_weights).tensor_split([self.grid.inner + 1], -1)
        g = x.v.new_zeros(1) if x.log_decay is None else x.log_decay
        g = g.expand(x.v.shape[:3]) if g.dim() == 1 else g
        q, k = self._chunked(x.q), self._chunked(x.k)
        v, g = self._per_head(x.v), self._per_head(g if g.dim() == 4 else g[..., None])
        beta = None if x.beta is None else self._per_head(x.beta)
        erase = [None if t is None else self._chunked(t)[:, :, None] for t in (x.erase_query, x.erase_key)]
        r = inside(ChunkOperands(q[:, :, None], k[:, :, None], v, inner, g, beta, *erase))
        contributions = r.keys.mT @ r.values
        if w is None:
            o, state = self._linear(r, contributions)
        else:
            o, state = self._loglinear(r, contributions, w.flatten(0, 2), final_state)
        o = self.grid.take(o.flatten(1, 2).unflatten(0, (self.batch, self.heads)))
        return o, state if final_state else self.no_state()

    def _linear(self, r: Chunks, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output and final state where all levels have a weight of 1."""
        old = self._old_states()
        states = arriving(r.kind, r.p, x, torch.zeros_like(x[:, :1]) if old is None else old)
        last = r.kind.push(r.p[:, -1:], states[:, -1:]) + x[:, -1:]
        return r.o + r.rows @ states, self._unfold_state(last)[:, :, 0].contiguous()

    def _loglinear(self, r: Chunks, x: Tensor, w: Tensor, final_state: bool) -> tuple[Tensor, Tensor]:
        """Output and final state; `w [M, N, C, depth]` are the weights of levels between chunks."""
        old, o, rows, levels = self._old_states(), r.o, r.rows, depth(self.grid.chunks)
        last = self.grid.last(self.batch, o.device).repeat_interleave(self.heads)
        end = EndPoint(r, last) if final_state else None
        for m, (p, states) in enumerate(blocks(r.kind, r.p, x)):
            right, left = siblings(self.grid.chunks, m, o.device)
            here = rows[:, right]
            o = o.index_add(1, right, w[:, right][..., m, None] * (here @ states[:, left]))
            if old is not None or m + 1 < levels:  # somebody reads further back
                rows = rows.index_copy(1, right, r.kind.pull(here, p[:, left]))
            if end is not None:
                end.pass_level(m, p, states)
        if old is not None:
            for state, weight in zip(
                old.unbind(1), self._old_weights().unbind(-1)[self._old_slots().start :], strict=True
            ):
                o = o + weight[..., None] * (rows @ state[:, None])
        return o, self.no_state() if end is None else self._final(end.states(old))

    # -- operands on the grid -----------------------------------------------------------------------------------------

    def _chunked(self, x: Tensor) -> Tensor:
        """`[B, T, A, ...] -> [B, A, N, C, ...]`."""
        return self.grid.place(x.to(self.dtype)).unflatten(2, (self.grid.chunks, self.grid.chunk))

    def _per_head(self, x: Tensor) -> Tensor:
        """`[B, T, H, ...] -> [B, G, R, N, C, ...]`."""
        return self._chunked(x).unflatten(1, (self.x.q.shape[2], -1))

    def _weights(self, w: Tensor) -> Tensor:
        """`[B, T, H, L] -> [B, G, R, N, C, levels of the grid]`."""
        index = self._level_index().expand(self.batch, -1)[:, None, None]
        return self._per_head(w.gather(-1, index.expand(*w.shape[:-1], -1)))

    def _old_weights(self) -> Tensor:
        """Weights of the initial state's levels, `[M, N, C, L]`."""
        w = self.x.level_weights
        assert w is not None
        return self._chunked(w.gather(-1, self._old_index()[0][:, :, None].expand(*w.shape))).flatten(0, 1)
