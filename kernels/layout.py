"""How one call lies in memory: its operands on the chunk grid, its level weights, its states before and after."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llcompile.kernels.chunk import ChunkOperands, Stage, make_stage
from llcompile.kernels.grid import CHUNK, SHORT_CHUNK, Grid, make_grid
from llcompile.kernels.state import is_level_state, linear_state, pack_state, position_of, state_dtype
from llcompile.kernels.step import merge, merge_grad


class Operands(NamedTuple):
    """The tensors of one call, shapes as in the public function.

    With ``starts``, sequences lie one after another in a batch of one: each has ``lengths`` tokens from ``starts`` on.
    Only the Triton kernels take that; to the ATen lowering, sequences are rows.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    level_weights: Tensor | None
    log_decay: Tensor | None
    beta: Tensor | None
    initial_state: Tensor | None
    lengths: Tensor | None = None
    starts: Tensor | None = None

    @property
    def rows(self) -> int:
        """How many sequences there are."""
        return self.v.shape[0] if self.starts is None else self.starts.shape[0]


class Layout:
    """One call of the operator: what it was given, and how that lies on the grid."""

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

    def _fold_state(self, s: Tensor) -> Tensor:
        """``[B, H, L, K, V] -> [M, L, K, R * V]``."""
        return s.to(self.dtype).unflatten(1, self.fold).permute(0, 1, 3, 4, 2, 5).flatten(0, 1).flatten(-2)

    def _unfold_state(self, s: Tensor) -> Tensor:
        """``[M, L, K, R * V] -> [B, H, L, K, V]``."""
        s = s.unflatten(0, (self.batch, -1)).unflatten(-1, (self.fold[1], -1))
        return s.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)

    # -- level weights ------------------------------------------------------------------------------------------------

    def _level_index(self) -> Tensor:
        """Which of the user's levels serves each level of the grid: ``[levels]``, or ``[B, levels]`` by position."""
        assert self.levels is not None
        device = self.x.v.device
        if self.grid.position is None or self.grid.offset is None:
            return torch.arange(self.grid.levels, device=device).clamp(max=self.levels - 1)
        return self.grid.true_levels(self.batch, device).clamp(max=self.levels - 1)

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

    def _old_index(self) -> tuple[Tensor, Tensor]:
        assert self.levels is not None
        return self.grid.old_levels(self.batch, self.x.v.device, self.levels)

    def _old_weights(self) -> Tensor:
        """Weights of the initial state's levels, ``[M, N, C, R, L]``."""
        w = self.x.level_weights
        assert w is not None
        seen, _ = self._old_index()
        return self._fold(w.gather(-1, seen[:, :, None].expand(*w.shape)))

    # -- states -------------------------------------------------------------------------------------------------------

    def _old_states(self) -> Tensor | None:
        """The initial state as ``[M, L, K, R * V]`` (L = 1 for the linear operator), merged for the first token."""
        s = self.x.initial_state
        if s is None:
            return None
        if self.levels is None:
            return self._fold_state(linear_state(s)[:, :, None])
        if is_level_state(s):
            assert self.grid.position is not None
            return self._fold_state(merge(s[:, :, 1:], self.grid.position))
        return self._fold_state(s[:, :, None])

    def _old_slots(self) -> range:
        """The levels that :meth:`_old_states` holds: all, or the last one alone."""
        assert self.levels is not None
        assert self.x.initial_state is not None
        return range(0 if is_level_state(self.x.initial_state) else self.levels - 1, self.levels)

    def _old_grad(self, d: Tensor) -> Tensor:
        """Gradient of the initial state from that of :meth:`_old_states`."""
        s = self.x.initial_state
        assert s is not None
        d = self._unfold_state(d)
        if not is_level_state(s):
            return d[:, :, 0]
        if self.levels is None:
            d = d.expand(-1, -1, s.shape[2] - 1, -1, -1)
        else:
            assert self.grid.position is not None
            d = merge_grad(d, self.grid.position)
        return torch.cat([torch.zeros_like(d[:, :, :1]), d], 2)

    def _slots(self) -> Tensor:
        """Where the states of an end point go: user's level ``[B, levels of the grid (+ old levels)]``."""
        index = self._level_index()
        index = index.expand(self.batch, -1) if index.dim() == 1 else index
        if self.x.initial_state is not None:
            index = torch.cat([index, self._old_index()[1][:, self._old_slots().start :]], 1)
        assert self.levels is not None
        base = torch.arange(self.batch, device=index.device)[:, None] * self.levels
        return (index + base).flatten()

    def _final(self, states: Tensor) -> Tensor:
        """States ``[M, levels, K, R * V]`` at the end of rows -> a level state ``[B, H, 1 + L, K, V]``."""
        assert self.levels is not None
        s = self._unfold_state(states).transpose(1, 2).flatten(0, 1)  # [B * levels, H, K, V]
        out = s.new_zeros(self.batch * self.levels, *s.shape[1:]).index_add_(0, self._slots(), s)
        position = torch.full((self.batch,), self.tokens, device=s.device)
        position = position if self.x.lengths is None else self.x.lengths
        position = position if self.grid.position is None else position + self.grid.position
        final = pack_state(out.unflatten(0, (self.batch, -1)).transpose(1, 2), position)
        if self.x.lengths is None:
            return final
        return torch.where(self._without_tokens(final), self.unchanged_state(), final)

    def _final_grad(self, d: Tensor) -> Tensor:
        """Adjoint of :meth:`_final`."""
        d = d.to(self.dtype)[:, :, 1:].transpose(1, 2).flatten(0, 1)  # [B * L, H, K, V]
        d = d.index_select(0, self._slots()).unflatten(0, (self.batch, -1)).transpose(1, 2)
        return self._fold_state(d)

    def _without_tokens(self, like: Tensor) -> Tensor:
        assert self.x.lengths is not None
        return (self.x.lengths == 0)[(...,) + (None,) * (like.dim() - 1)]

    def no_state(self) -> Tensor:
        """What stands for a final state that was not asked for."""
        return self.x.v.new_empty(0, dtype=self.dtype)

    def unchanged_state(self) -> Tensor:
        """The final state of rows without tokens: the initial one, in the operator's kind."""
        s, middle = self.x.initial_state, () if self.levels is None else (1 + self.levels,)
        shape = (self.batch, self.heads, *middle, self.key_dim, self.value_dim)
        if s is None:
            return self.x.v.new_zeros(shape, dtype=self.dtype)
        s = s.to(self.dtype)
        if self.levels is None:
            return linear_state(s).clone()
        if is_level_state(s):
            return s.clone()
        out = s.new_zeros(shape)
        out[:, :, -1] = s
        return out

    def unchanged_state_grad(self, d: Tensor) -> Tensor:
        """Adjoint of :meth:`unchanged_state`."""
        s = self.x.initial_state
        assert s is not None
        if self.levels is None and is_level_state(s):
            d = d[:, :, None].expand(-1, -1, s.shape[2] - 1, -1, -1)
            return torch.cat([torch.zeros_like(d[:, :, :1]), d], 2)
        if self.levels is not None and not is_level_state(s):
            return d[:, :, -1]
        if is_level_state(s):
            d = d.clone()
            d[:, :, 0] = 0
        return d
