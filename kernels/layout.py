"""The states of one call as the kernels have them, before its first token and after its last; ATen's and Triton's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llcompile.kernels.grid import Grid
from llcompile.kernels.operands import Operands
from llcompile.kernels.state import in_levels, is_level_state, linear_state, merge, pack_state


class Layout:
    """One call of the operator. Who extends it sets what is declared here."""

    x: Operands
    grid: Grid
    dtype: torch.dtype  # that states are computed in
    batch: int
    tokens: int
    heads: int
    key_dim: int
    value_dim: int
    levels: int | None  # of the level weights

    def _fold_state(self, s: Tensor) -> Tensor:
        """`[B, H, L, K, V] -> [M, L, K, V]`, M is `B * H`."""
        return s.to(self.dtype).flatten(0, 1)

    def _unfold_state(self, s: Tensor) -> Tensor:
        """`[M, L, K, V] -> [B, H, L, K, V]`."""
        return s.unflatten(0, (self.batch, self.heads))

    # -- levels -------------------------------------------------------------------------------------------------------

    def _level_index(self) -> Tensor:
        """Which of the user's levels serves each level of the grid: `[levels]`, or `[B, levels]` by position."""
        assert self.levels is not None
        device = self.x.v.device
        if self.grid.position is None or self.grid.offset is None:
            return torch.arange(self.grid.levels, device=device).clamp(max=self.levels - 1)
        return self.grid.true_levels(self.batch, device).clamp(max=self.levels - 1)

    def _old_index(self) -> tuple[Tensor, Tensor]:
        assert self.levels is not None
        return self.grid.old_levels(self.batch, self.x.v.device, self.levels)

    # -- states -------------------------------------------------------------------------------------------------------

    def _old_states(self) -> Tensor | None:
        """The initial state as `[M, L, K, V]` (L = 1 for the linear operator), merged for the first token."""
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
        """The levels that `_old_states` holds: all, or the last one alone."""
        assert self.levels is not None
        assert self.x.initial_state is not None
        return range(0 if is_level_state(self.x.initial_state) else self.levels - 1, self.levels)

    def _old_grad(self, d: Tensor) -> Tensor:
        """Gradient of the initial state from that of `_old_states`."""
        return self._initial_grad(lambda call: call._old_states(), d)

    def _slots(self) -> Tensor:
        """Where the states of an end point go: user's level `[B, levels of the grid (+ old levels)]`."""
        index = self._level_index()
        index = index.expand(self.batch, -1) if index.dim() == 1 else index
        if self.x.initial_state is not None:
            index = torch.cat([index, self._old_index()[1][:, self._old_slots().start :]], 1)
        assert self.levels is not None
        base = torch.arange(self.batch, device=index.device)[:, None] * self.levels
        return (index + base).flatten()

    def _final(self, states: Tensor) -> Tensor:
        """States `[M, levels, K, V]` at the end of rows -> a level state `[B, H, 1 + L, K, V]`."""
        assert self.levels is not None
        s = self._unfold_state(states).transpose(1, 2).flatten(0, 1)  # [B * levels, H, K, V]
        out = summed(s, self._slots(), self.batch * self.levels)
        position = torch.full((self.batch,), self.tokens, device=s.device)
        position = position if self.x.lengths is None else self.x.lengths
        position = position if self.grid.position is None else position + self.grid.position
        final = pack_state(out.unflatten(0, (self.batch, -1)).transpose(1, 2), position)
        if self.x.lengths is None:
            return final
        return torch.where(self._without_tokens(final), self.unchanged_state(), final)

    def _final_grad(self, d: Tensor) -> Tensor:
        """Adjoint of `_final`."""
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
        s = self.x.initial_state
        if s is None:
            middle = () if self.levels is None else (1 + self.levels,)
            shape = (self.batch, self.heads, *middle, self.key_dim, self.value_dim)
            return self.x.v.new_zeros(shape, dtype=self.dtype)
        s = in_levels(s.to(self.dtype), self.levels)
        if self.levels is None:
            return s.clone()
        return torch.cat([s[:, :, :1].detach(), s[:, :, 1:]], 2)  # a position has no gradient

    def unchanged_state_grad(self, d: Tensor) -> Tensor:
        """Gradient of the initial state from that of `unchanged_state`."""
        return self._initial_grad(Layout.unchanged_state, d)

    def _initial_grad(self, function: Callable[[Layout], Any], d: Tensor) -> Tensor:
        """Gradient of the initial state from that of a function of it; an operator runs with autograd off."""
        assert self.x.initial_state is not None
        with torch.inference_mode(False), torch.enable_grad():
            state = self.x.initial_state.detach().requires_grad_()
            other = copy.copy(self)
            other.x = self.x._replace(initial_state=state)
            return torch.autograd.grad(function(other), state, d)[0]


def summed(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """`[rows, ...]`: the sum of the `x[i]` with `index[i] == row`, the same bits whenever it is computed.

    On a GPU `index_add` is a sum by atomics, in whatever order they come; `index_put` sorts the index first.
    """
    out = x.new_zeros(rows, *x.shape[1:])
    if x.device.type == "cpu":  # and there it is `index_add` whose order is fixed
        return out.index_add(0, index, x)
    return out.index_put((index,), x, accumulate=True)
