"""The operator on whole sequences: chunks, then the tree (log-linear) or the scan (linear).

The backward pass gets the operands only and runs the same code again below autograd: nothing but inputs is kept between
the two. It computes no outputs; an inner product with their gradient stands for each of them (`dot`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llcompile.kernels.aten.chunk import ChunkOperands, Chunks, inside
from llcompile.kernels.aten.dot import dot
from llcompile.kernels.aten.endpoint import EndPoint
from llcompile.kernels.aten.scan import LinearStates
from llcompile.kernels.aten.tree import Readers, blocks
from llcompile.kernels.grid import CHUNK, SHORT_CHUNK, depth, make_grid
from llcompile.kernels.layout import Layout
from llcompile.kernels.operands import Operands
from llcompile.kernels.state import is_level_state, position_of, state_dtype

# (o, q, rows, states, weights): what is read goes into o, or an inner product in its place is collected
Read = Callable[[Tensor, "Tensor | None", Any, Tensor, "Tensor | None"], None]


def forward(x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """Output `[B, T, H, V]` and final state (an empty tensor when not asked for)."""
    call = Call(x, scale)
    if call.empty:
        return x.v.new_zeros(x.v.shape), call.unchanged_state() if return_final_state else call.no_state()
    o, state = call.forward(return_final_state)
    return o, call.no_state() if state is None else state


def backward(x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
    """Gradients of the first seven operands; None where there is no operand, or no gradient."""
    dtype = state_dtype(x.v.dtype)
    with torch.inference_mode(False), torch.enable_grad():  # an operator runs below autograd; this lifts it above
        inputs = [None if t is None else t.detach().to(dtype).requires_grad_() for t in x[:7]]
        call = Call(Operands(*inputs[:7], x.lengths), scale)  # type: ignore[call-arg, arg-type]
        found = call.gradients([t for t in inputs if t is not None], grad_o, grad_state)
    return [None if t is None else next(found) for t in inputs]


class Call(Layout):
    """One call of the operator: the two passes."""

    def __init__(self, x: Operands, scale: float) -> None:
        self.x, self.scale = x, scale
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
        self.grid = make_grid(self.tokens, position, x.lengths, chunk)
        self.groups = (x.q.shape[2], self.heads // x.q.shape[2])
        self.fold = self.groups if shared else (self.heads, 1)

    # -- passes -------------------------------------------------------------------------------------------------------

    def forward(self, return_final_state: bool) -> tuple[Tensor, Tensor | None]:
        """Output and final state."""
        operands, w = self._operands()
        r = inside(operands)
        read = (r.scores @ operands.v).reshape(self.batch, *self.fold, *operands.v.shape[3:])
        folded = read.movedim(2, 4).contiguous().flatten(0, 1)  # [M, N, C, R, V]
        final = self._between(r, w, folded, r.kind.read, return_final_state, in_place=True)
        o = self._unfold(folded)
        out = torch.empty(o.shape, dtype=self.x.v.dtype, device=o.device)
        if out.dtype == o.dtype:
            torch.mul(o, self.scale, out=out)
        else:
            out.copy_(o * self.scale)
        return out, final if return_final_state else None

    def gradients(self, inputs: list[Tensor], grad_o: Tensor, grad_state: Tensor | None) -> Iterator[Tensor | None]:
        """Gradients of `inputs`; None where nothing depends on one."""
        dots: list[Tensor] = []
        state: Tensor | None = None
        if self.empty:
            state = self.unchanged_state()
        else:
            dots, state = self._dots(grad_o, grad_state is not None)
        outputs = [(t, torch.ones_like(t)) for t in dots]
        if grad_state is not None and state is not None and state.requires_grad:
            outputs.append((state, grad_state))
        if not outputs:
            return iter([None] * len(inputs))
        tensors, grads = zip(*outputs, strict=True)
        return iter(torch.autograd.grad(tensors, inputs, grads, allow_unused=True))

    def _dots(self, grad_o: Tensor, with_state: bool) -> tuple[list[Tensor], Tensor | None]:
        """What stands for the output, and the final state."""
        operands, w = self._operands()
        r = inside(operands)
        do = self._fold(grad_o) * self.scale
        own = do.unflatten(0, (self.batch, -1)).movedim(4, 2).reshape(operands.v.shape)
        dots = [dot(own, r.scores.expand(*own.shape[:-1], -1), operands.v)]

        def read(*operands: Any) -> None:
            dots.append(r.kind.read_dot(*operands))

        final = self._between(r, w, do, read, with_state, in_place=False)
        return dots, final

    def _between(
        self, r: Chunks, w: Tensor | None, o: Tensor, read: Read, with_state: bool, in_place: bool
    ) -> Tensor | None:
        """What passes between chunks: reads into `o`, and the final state."""
        contributions = r.keys.mT @ r.values  # [M, N, K, R * V]
        old = self._old_states()
        if w is None:
            start = None if old is None else old[:, 0]
            states, last = LinearStates.apply(r.kind, r.p, contributions, start)
            read(o, r.q, r.rows, states, None)
            return self._unfold_state(last)[:, :, 0].contiguous()
        end = None
        if with_state:
            last = self.grid.last(self.batch, o.device).repeat_interleave(self.fold[0])
            end = EndPoint(r.kind, last, self.grid.chunk, r.p, r.keys, r.values)
        readers = Readers(r.kind, r.q, r.rows, w, o, read, in_place)
        for m, (p, x) in enumerate(blocks(r.kind, r.p, contributions)):
            if end is not None:
                end.pass_level(m, p, x)
            readers.pass_level(m, p, x, pull=old is not None or m + 1 < depth(self.grid.chunks))
        if old is not None:
            o, q, rows = (_one_block(t) for t in (o, r.q, readers.rows))
            w_old = self._old_weights().unbind(-1)
            for state, slot in zip(old.unbind(1), self._old_slots(), strict=True):
                read(o, q, rows, state[:, None], _one_block(w_old[slot]))
        if end is None:
            return None
        states = end.states()
        return self._final(states if old is None else torch.cat([states, end.push_old(old)], 1))

    # -- operands on the grid -----------------------------------------------------------------------------------------

    def _operands(self) -> tuple[ChunkOperands, Tensor | None]:
        """Operands inside chunks, and the level weights between them `[M, N, C, R, depth]`."""
        x, groups = self.x, (self.groups[0], 1)
        g = x.log_decay
        if g is not None and g.dim() == 1:
            g = g.expand(self.batch, self.tokens, self.heads)
        inner = outer = None
        if x.level_weights is not None:
            w = self._grid_weights(x.level_weights)
            inner, outer = w.split([self.grid.inner + 1, w.shape[-1] - self.grid.inner - 1], -1)
        q, k = self._chunked(x.q, groups), self._chunked(x.k, groups)
        v, inner, g, beta = (None if t is None else self._chunked(t, self.groups) for t in (x.v, inner, g, x.beta))
        assert v is not None
        return ChunkOperands(q, k, v, inner, g, beta), None if outer is None else self._fold(outer)

    def _chunked(self, x: Tensor, heads: tuple[int, int]) -> Tensor:
        """`[B, T, A, ...] -> [B, G, A / G, N, C, ...]`."""
        placed = self.grid.place(x, self.dtype)
        return placed.unflatten(2, (self.grid.chunks, self.grid.chunk)).unflatten(1, heads)

    def _fold(self, x: Tensor) -> Tensor:
        """`[B, T, H, ...] -> [M, N, C, R, ...]` on the grid."""
        placed = self.grid.place(x, self.dtype).unflatten(1, self.fold)  # [B, G', R', N * C, ...]
        folded = placed.movedim(2, 3).contiguous().flatten(0, 1)
        return folded.unflatten(1, (self.grid.chunks, self.grid.chunk))

    def _unfold(self, x: Tensor) -> Tensor:
        """`[M, N, C, R, ...] -> [B, T, H, ...]`."""
        x = x.flatten(1, 2).unflatten(0, (self.batch, -1)).movedim(3, 2).flatten(1, 2)  # [B, H, N * C, ...]
        return self.grid.take(x)

    def _grid_weights(self, w: Tensor) -> Tensor:
        """`[B, T, H, L] -> [B, T, H, levels of the grid]`."""
        index = self._level_index()
        if index.dim() == 1:
            return w[..., : self.grid.levels] if self.grid.levels <= w.shape[-1] else w.index_select(-1, index)
        return w.gather(-1, index[:, None, None].expand(*w.shape[:-1], -1))

    def _old_weights(self) -> Tensor:
        """Weights of the initial state's levels, `[M, N, C, R, L]`."""
        w = self.x.level_weights
        assert w is not None
        seen, _ = self._old_index()
        return self._fold(w.gather(-1, seen[:, :, None].expand(*w.shape)))


def _one_block(x: Any) -> Any:
    """`[M, N, C, ...] -> [M, 1, N * C, ...]`: all rows as one block."""
    return None if x is None else x.flatten(1, 2)[:, None]
