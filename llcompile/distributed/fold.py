"""The tree above the shards: the level states at the start of a shard, from the summaries of those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llcompile.distributed.cut import Cut
from llcompile.distributed.shard import Summary
from llcompile.kernels.aten.transitions import Transition


def states_at_start(kind: Transition, cut: Cut, before: Sequence[Summary], like: Tensor) -> Tensor:
    """Level states as the first token of this process's shard sees them, `[B, H, L, K, V]` as `like`.

    Shard by shard: buckets merge as they recede, the transition over a shard carries what was there before it, and the
    shard adds its own buckets. `[L]` moves of at most `[B, H, L, K, V]`, and a product with the transition, a shard.
    """
    states = torch.zeros_like(like)
    for rank, (p, own) in enumerate(before):
        if cut.starts[rank] < cut.ends[rank]:
            states = _moved(states, cut.moves(cut.starts[rank], cut.ends[rank]))
        states = kind.push(p, states)
        slots = cut.slots(rank)
        if slots:
            states = states.index_add(2, torch.tensor(slots, device=states.device), own)
    return states


def _moved(states: Tensor, moves: list[int]) -> Tensor:
    """Each level added to the one that it moves to."""
    return torch.zeros_like(states).index_add(2, torch.tensor(moves, device=states.device), states)
