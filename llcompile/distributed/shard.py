"""The summary of a shard: one transition, and a state for each bucket that it ends with.

Both come out of one call of the operator, so that every implementation of it serves. For a transition that is a matrix
the values have K more columns: zeros, and an identity for their initial state, which the transition then carries to
the end of the shard.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llcompile.distributed.cut import Cut
from llcompile.kernels import choice
from llcompile.kernels.aten.transitions import Dense, Diagonal, Transition
from llcompile.kernels.operands import Operands
from llcompile.kernels.state import in_levels, merge, pack_state, state_dtype


class Summary(NamedTuple):
    """A shard as the others see it; `p` as `kind` stores it, for one block."""

    p: Tensor  # [B, H, 1, 1 or K] logarithms or [B, H, 1, K, K]
    states: Tensor  # [B, H, n, K, V] the buckets `cut.slots(rank)`, carried to the end of the shard


def kind_of(x: Operands) -> Transition:
    """What the transitions of a call are: matrices where there is a correction."""
    return Diagonal() if x.beta is None and x.erase_key is None else Dense()


def before(x: Operands, cut: Cut) -> Tensor:
    """The levels `[B, H, L, K, V]` that the operator itself starts from: the first process's initial state, or none."""
    batch, _, heads, value_dim = x.v.shape
    if x.initial_state is None:
        size = (batch, heads, cut.levels, x.q.shape[3], value_dim)
        return x.v.new_zeros(size, dtype=state_dtype(x.v.dtype))
    state = in_levels(x.initial_state.to(state_dtype(x.v.dtype)), None if x.level_weights is None else cut.levels)
    return state[:, :, None] if x.level_weights is None else state[:, :, 1:]


def packed(x: Operands, levels: Tensor, position: int) -> Tensor:
    """Levels `[B, H, L, K, V]` as an initial state of this call."""
    if x.level_weights is None:
        return levels[:, :, 0].contiguous()
    return pack_state(levels, torch.full((levels.shape[0],), position, device=levels.device))


def call(x: Operands, cut: Cut) -> Operands:
    """The operands of the call that makes the summary; its outputs are not read, and its level weights are 0."""
    levels, v = before(x, cut), x.v
    if isinstance(kind_of(x), Dense):
        size = x.q.shape[3]
        eye = torch.eye(size, dtype=levels.dtype, device=v.device).expand(*levels.shape[:2], 1, size, size)
        columns = torch.cat([eye.new_zeros(*levels.shape[:2], cut.levels - 1, size, size), eye], 2)
        levels, v = torch.cat([levels, columns], -1), torch.cat([v, v.new_zeros(*v.shape[:3], size)], -1)
    weights = None if x.level_weights is None else torch.zeros_like(x.level_weights)
    state = packed(x, levels, cut.starts[cut.rank])
    return x._replace(q=torch.zeros_like(x.q), v=v, level_weights=weights, initial_state=state)


def final_state(x: Operands) -> Tensor:
    """The state after the last token of what `call` made."""
    return choice.forward(x, 1.0, True)[1]


def summary(x: Operands, cut: Cut, final: Tensor) -> Summary:
    """The summary from that state; differentiable in it and in the decays."""
    levels = final[:, :, None] if x.level_weights is None else final[:, :, 1:]
    value_dim, slots = x.v.shape[3], cut.slots(cut.rank)
    if isinstance(kind_of(x), Dense):
        p = levels[..., value_dim:].sum(2, keepdim=True)
    else:
        p = _log_transition(x)[:, :, None].to(levels.dtype)
    states = levels[..., :value_dim]
    if x.level_weights is not None:
        states = merge(states, torch.full((states.shape[0],), cut.ends[cut.rank], device=states.device))
    return Summary(p, states[:, :, slots])


def _log_transition(x: Operands) -> Tensor:
    """The logarithm of the decay over all tokens, `[B, H, 1 or K]`."""
    g = x.log_decay
    if g is None:
        return x.v.new_zeros(x.v.shape[0], x.v.shape[2], 1, dtype=state_dtype(x.v.dtype))
    g = g.to(state_dtype(x.v.dtype))
    g = g.expand(x.v.shape[:3]) if g.dim() == 1 else g
    total = g.sum(1)
    total = total if total.dim() == 3 else total[..., None]
    return total if x.decay_rate is None else total * x.decay_rate.to(total.dtype)
