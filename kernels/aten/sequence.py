"""The operator on whole sequences: chunks, then the tree (log-linear) or the scan (linear), and both in reverse.

The backward pass gets the operands only and recomputes what it needs: nothing but inputs is kept between the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llcompile.kernels.aten.chunk import ChunkGradient, ChunkOperands, ChunkResult, Stage, make_stage
from llcompile.kernels.aten.endpoint import EndPoint
from llcompile.kernels.aten.scan import Scan
from llcompile.kernels.aten.transitions import add_, zeros_like
from llcompile.kernels.aten.tree import Tree
from llcompile.kernels.grid import CHUNK, SHORT_CHUNK, Grid, make_grid
from llcompile.kernels.layout import Layout
from llcompile.kernels.operands import Operands
from llcompile.kernels.state import is_level_state, position_of, state_dtype


def forward(x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """Output ``[B, T, H, V]`` and final state (an empty tensor when not asked for)."""
    call = Call(x, scale, keep=False)
    if call.empty:
        return x.v.new_zeros(x.v.shape), call.unchanged_state() if return_final_state else call.no_state()
    o, state = call.forward(return_final_state)
    return o, call.no_state() if state is None else state


def backward(x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
    """Gradients of the first seven operands; None where there is no operand, or no gradient."""
    call = Call(x, scale, keep=True)
    if call.empty:
        if grad_state is None or x.initial_state is None or x.v.shape[0] == 0:
            return [None] * 7
        return [None] * 6 + [call.unchanged_state_grad(grad_state)]
    return call.backward(grad_o, grad_state)


class Call(Layout):
    """One call of the operator: the two passes."""

    def __init__(self, x: Operands, scale: float, keep: bool) -> None:
        self.x, self.scale, self.keep = x, scale, keep
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
        # Heads that share queries are folded into the value axis; elsewhere each head stands alone.
        shared = x.beta is None and (x.log_decay is None or x.log_decay.dim() != 4)
        chunk = SHORT_CHUNK if shared and self.levels is None else CHUNK
        self.grid: Grid = make_grid(self.tokens, position, x.lengths, chunk)
        self.stage: Stage = make_stage(self._chunk_operands())
        self.fold = (x.q.shape[2], self.heads // x.q.shape[2]) if shared else (self.heads, 1)

    # -- layouts ------------------------------------------------------------------------------------------------------

    def _chunked(self, x: Tensor, heads: tuple[int, int]) -> Tensor:
        """``[B, T, A, ...] -> [B, G, A / G, N, C, ...]``."""
        placed = self.grid.place(x, self.dtype)
        return placed.unflatten(2, (self.grid.chunks, self.grid.chunk)).unflatten(1, heads)

    def _chunk_operands(self) -> ChunkOperands:
        x = self.x
        groups = (x.q.shape[2], 1)
        heads = (x.q.shape[2], self.heads // x.q.shape[2])
        g = x.log_decay
        if g is not None and g.dim() == 1:
            g = g.expand(self.batch, self.tokens, self.heads)
        self.inner_w = None
        if x.level_weights is not None:
            self.grid_w = self._grid_weights(x.level_weights)
            split = self.grid.inner + 1
            self.inner_w = self._chunked(self.grid_w[..., :split], heads)
        return ChunkOperands(
            self._chunked(x.q, groups),
            self._chunked(x.k, groups),
            self._chunked(x.v, heads),
            self.inner_w,
            None if g is None else self._chunked(g, heads),
            None if x.beta is None else self._chunked(x.beta, heads),
        )

    def _fold(self, x: Tensor) -> Tensor:
        """``[B, T, H, ...] -> [M, N, C, R, ...]`` on the grid."""
        placed = self.grid.place(x, self.dtype).unflatten(1, self.fold)  # [B, G', R', N * C, ...]
        folded = placed.movedim(2, 3).contiguous().flatten(0, 1)
        return folded.unflatten(1, (self.grid.chunks, self.grid.chunk))

    def _unfold(self, x: Tensor) -> Tensor:
        """``[M, N, C, R, ...] -> [B, T, H, ...]``."""
        x = x.flatten(1, 2).unflatten(0, (self.batch, -1)).movedim(3, 2).flatten(1, 2)  # [B, H, N * C, ...]
        return self.grid.take(x)

    def _grid_weights(self, w: Tensor) -> Tensor:
        """``[B, T, H, L] -> [B, T, H, levels of the grid]``."""
        index = self._level_index()
        if index.dim() == 1:
            return w[..., : self.grid.levels] if self.grid.levels <= w.shape[-1] else w.index_select(-1, index)
        return w.gather(-1, index[:, None, None].expand(*w.shape[:-1], -1))

    def _add_weight_grad(self, dw: Tensor, d: Tensor) -> None:
        index = self._level_index()
        if index.dim() == 1 and self.grid.levels <= dw.shape[-1]:
            dw[..., : self.grid.levels] += d
        elif index.dim() == 1:
            dw.index_add_(-1, index, d)
        else:
            dw.scatter_add_(-1, index[:, None, None].expand(*d.shape), d)

    def _old_weights(self) -> Tensor:
        """Weights of the initial state's levels, ``[M, N, C, R, L]``."""
        w = self.x.level_weights
        assert w is not None
        seen, _ = self._old_index()
        return self._fold(w.gather(-1, seen[:, :, None].expand(*w.shape)))

    def forward(self, return_final_state: bool) -> tuple[Tensor, Tensor | None]:
        """Output and final state."""
        r = self.stage.forward()
        contributions = r.keys.mT @ r.values  # [M, N, K, R * V]
        final: Tensor | None
        if self.levels is None:
            final = self._linear(r, contributions)
        else:
            final = self._log_linear(r, contributions, return_final_state)
        o = self._unfold(r.o)
        out = torch.empty(o.shape, dtype=self.x.v.dtype, device=o.device)
        if out.dtype == o.dtype:
            torch.mul(o, self.scale, out=out)
        else:
            out.copy_(o * self.scale)
        return out, final if return_final_state else None

    def _linear(self, r: ChunkResult, contributions: Tensor) -> Tensor:
        old = self._old_states()
        start = None if old is None else old[:, 0]
        states = Scan(self.stage.kind, r.p, self.grid.chunks).states(contributions, start)
        self.stage.kind.read(r.o, r.q, r.rows, states, None)
        last = self.stage.kind.push(None if r.p is None else r.p[:, -1:], states[:, -1:]) + contributions[:, -1:]
        return self._unfold_state(last)[:, :, 0].contiguous()

    def _log_linear(self, r: ChunkResult, contributions: Tensor, return_final_state: bool) -> Tensor | None:
        _, end = self._walk(r, contributions, r.o, return_final_state)
        old = self._old_states()
        if old is not None:
            w = self._old_weights()
            for i, slot in enumerate(self._old_slots()):
                self._read_old(r, old[:, i], w[..., slot])
        if end is None:
            return None
        states = end.states()
        if old is not None:
            states = torch.cat([states, end.push_old(old)], 1)
        return self._final(states)

    def _walk(
        self, r: ChunkResult, contributions: Tensor, o: Tensor | None, final: bool
    ) -> tuple[Tree, EndPoint | None]:
        w = self._fold(self.grid_w[..., self.grid.inner + 1 :])
        end = None
        if final:
            last = self.grid.last(self.batch, r.o.device).repeat_interleave(self.fold[0])
            end = EndPoint(self.stage.kind, last, self.grid.chunk, r.p, r.keys, r.values)
        tree = Tree(self.stage.kind, r.q, w, self.keep)
        for m, (p, x) in enumerate(tree.forward(o, r.rows, r.p, contributions)):
            if end is not None:
                end.pass_level(m, p, x)
        return tree, end

    def _read_old(self, r: ChunkResult, state: Tensor, w: Tensor) -> None:
        """Rows that were pulled back to the start of the grid read one old state ``[M, K, R * V]``."""
        o, q, rows, w = (_one_block(t) for t in (r.o, r.q, r.rows, w))
        self.stage.kind.read(o, q, rows, state[:, None], w)

    def backward(self, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
        """Gradients of the seven operands."""
        r = self.stage.forward(output=False)
        contributions = r.keys.mT @ r.values
        do = self._fold(grad_o).mul_(self.scale)
        if self.levels is None:
            d, d_contributions, dw, d_old = self._linear_grad(r, contributions, do, grad_state)
        else:
            d, d_contributions, dw, d_old = self._log_linear_grad(r, contributions, do, grad_state)
        d = d._replace(
            keys=add_(d.keys, r.values @ d_contributions.mT), values=add_(d.values, r.keys @ d_contributions)
        )
        del r, contributions, d_contributions
        grads = self.stage.backward(d)
        skipped = None
        if grad_state is not None and self.x.lengths is not None and d_old is not None and self.levels is not None:
            skipped = self.unchanged_state_grad(grad_state - self._with_tokens(grad_state))
        return self._operand_grads(grads, dw, d_old, skipped)

    def _operand_grads(
        self, grads: Any, dw_outer: Tensor | None, d_old: Tensor | None, skipped: Tensor | None
    ) -> list[Tensor | None]:
        def back(d: Tensor | None) -> Tensor | None:
            return None if d is None else self.grid.take(d.flatten(1, 2).flatten(2, 3))

        dg = back(grads.g)
        g = self.x.log_decay
        if dg is not None and g is not None and g.dim() == 1:
            dg = dg.sum((0, 1))
        dw = None
        if self.x.level_weights is not None and dw_outer is not None:
            dw = torch.zeros(self.x.level_weights.shape, dtype=self.dtype, device=self.x.v.device)
            inner = back(grads.w)
            assert inner is not None
            self._add_weight_grad(dw, torch.cat([inner, self._unfold(dw_outer)], -1))
            if d_old is not None and self.old_dw is not None:
                seen, _ = self._old_index()
                dw.scatter_add_(-1, seen[:, :, None].expand(*dw.shape), self._unfold(self.old_dw))
        d_state = None if d_old is None else self._old_grad(d_old)
        if d_state is not None and skipped is not None:
            d_state = d_state + skipped
        return [back(grads.q), back(grads.k), back(grads.v), dw, dg, back(grads.beta), d_state]

    def _linear_grad(
        self, r: ChunkResult, contributions: Tensor, do: Tensor, grad_state: Tensor | None
    ) -> tuple[ChunkGradient, Tensor, None, Tensor | None]:
        kind, old = self.stage.kind, self._old_states()
        scan = Scan(kind, r.p, self.grid.chunks)
        states = scan.states(contributions, None if old is None else old[:, 0])
        dq, drows, dstates, _ = kind.read_grad(do, r.q, r.rows, states, None)
        d_final = None if grad_state is None else self._fold_state(grad_state[:, :, None])[:, 0]
        # What reaches a chunk's end from everything after it is the gradient of its contribution.
        later = scan.states(dstates, d_final, reverse=True)
        dp = None if r.p is None else kind.push_p_grad(r.p, states, later)
        d_old = None
        if old is not None:
            d_old = dstates[:, :1] + kind.push_t(None if r.p is None else r.p[:, :1], later[:, :1])
        d = ChunkGradient(do, drows, dq, dp, None, None)
        return d, later, None, d_old

    def _log_linear_grad(
        self, r: ChunkResult, contributions: Tensor, do: Tensor, grad_state: Tensor | None
    ) -> tuple[ChunkGradient, Tensor, Tensor, Tensor | None]:
        tree, end = self._walk(r, contributions, None, grad_state is not None)
        dq = None if r.q is None else torch.zeros_like(r.q)
        drows = zeros_like(r.rows)
        dkeys = dvalues = None
        old = self._old_states()
        d_old = self._old_read_grad(r, old, do, dq, drows)
        if end is not None and grad_state is not None:
            d_states = self._final_grad(self._with_tokens(grad_state))
            d_end = end.backward(d_states[:, : self.grid.levels], old, d_states[:, self.grid.levels :])
            if d_old is not None and d_end is not None:
                d_old += d_end
        dw = torch.zeros_like(tree.w)
        dp, dx = tree.backward(do, drows, dq, dw, None if end is None else end.add_level_grad)
        dp = zeros_like(r.p) if dp is None else dp
        dx = torch.zeros_like(contributions) if dx is None else dx
        if end is not None:
            dkeys, dvalues = torch.zeros_like(r.keys), torch.zeros_like(r.values)
            end.add_chunk_grad(dp, dkeys, dvalues)
        return ChunkGradient(do, drows, dq, dp, dkeys, dvalues), dx, dw, d_old

    def _with_tokens(self, grad_state: Tensor) -> Tensor:
        """The part of a final state's gradient that goes through the operator."""
        if self.x.lengths is None:
            return grad_state
        return torch.where(self._without_tokens(grad_state), 0, grad_state)

    def _old_read_grad(self, r: ChunkResult, old: Tensor | None, do: Tensor, dq: Tensor | None, drows: Any) -> Any:
        """Reverse of all :meth:`_read_old`; also keeps the gradient of their weights."""
        self.old_dw: Tensor | None = None
        if old is None:
            return None
        w = self._old_weights()
        self.old_dw, d_old = torch.zeros_like(w), torch.zeros_like(old)
        do, q, rows = (_one_block(t) for t in (do, r.q, r.rows))
        for i, slot in enumerate(self._old_slots()):
            w_slot = _one_block(w[..., slot])
            dq_part, drows_part, dx, dw = self.stage.kind.read_grad(do, q, rows, old[:, i, None], w_slot)
            d_old[:, i] = dx[:, 0]
            if dw is not None:
                self.old_dw[..., slot] = dw.view(w.shape[:-1])
            if dq is not None and dq_part is not None:
                dq += dq_part.view(dq.shape)
            if drows is not None and drows_part is not None:
                drows += drows_part.view(drows.shape)
        return d_old


def _one_block(x: Any) -> Any:
    """``[M, N, C, ...] -> [M, 1, N * C, ...]``: all rows as one block."""
    return None if x is None else x.flatten(1, 2)[:, None]
