"""Where a sequence is cut, agreed on before each call, and what this means for levels.

A process holds the tokens `[start, end)` of the sequence. Queries behind `end` see its tokens in the buckets that the
Fenwick partition of `[0, end)` has, never in smaller ones: one for each set bit of `end`. So a shard's
summary is the states of these buckets, and the transition over the whole of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from llcompile.distributed.collectives import gather
from llcompile.errors import DistributedError
from llcompile.kernels.levels import bucket_start, level
from llcompile.kernels.operands import Operands
from llcompile.kernels.state import is_level_state, position_of

# Why a process cannot take part. The number is exchanged, so that all processes raise and none waits.
_TROUBLES = (
    "",
    "it was given sequences of different lengths (cu_seqlens, seq_idx, or an attention_mask with padding); give whole "
    "rows of equal lengths, or run these calls outside of context_parallel",
    "its initial_state has rows at different positions; give rows at one position",
    "it was given an initial_state, which only the first process may have; pass None on the others",
)
_SIZES = ("B", "H", "G", "K", "V", "levels", "axes of log_decay", "decay_rate", "beta", "erase keys")


@dataclass(frozen=True)
class Cut:
    """The shards of a sequence.

    `starts` and `ends` are positions in the sequence. `continued` says that the first process has an initial state.
    `levels` is the number of levels of a state, 1 without level weights.
    """

    rank: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    continued: bool
    levels: int

    @property
    def ranks(self) -> int:
        """How many processes there are."""
        return len(self.starts)

    @property
    def last(self) -> bool:
        """Whether this process has the end of the sequence."""
        return self.rank == self.ranks - 1

    def slots(self, rank: int) -> list[int]:
        """The levels, as the query at `ends[rank]` sees them, that hold tokens of that shard."""
        start, end = self.starts[rank], self.ends[rank]
        if end == start and not (self.continued and rank == 0):
            return []
        start = 0 if self.continued and rank == 0 else start
        bits = [lvl for lvl in range(1, end.bit_length() + 1) if end >> (lvl - 1) & 1]
        seen = {lvl for lvl in bits if bucket_start(end, lvl) + (1 << (lvl - 1)) > start}
        if self.continued and rank == 0:  # a linear state is one bucket of the last level
            seen.add(self.levels - 1)
        return sorted({min(lvl, self.levels - 1) for lvl in seen})

    def moves(self, before: int, after: int) -> list[int]:
        """The level at which the query at `after` sees each bucket of the query at `before`.

        The last level never changes: what is merged into it has no level of its own any more.
        """
        top = self.levels - 1
        buckets = [bucket_start(before, slot) for slot in range(top)]
        return [min(max(level(after, first), slot), top) for slot, first in enumerate(buckets)] + [top]


def agree(x: Operands, group: dist.ProcessGroup) -> Cut:
    """The cut of a call, from 14 numbers of each process.

    Raises:
        DistributedError: on all processes, where one of them cannot take part or has operands of other sizes.
    """
    rank, given = dist.get_rank(group), _exchanged(x, group)
    for other, (_, _, _, trouble, *_) in enumerate(given):
        if trouble:
            raise DistributedError(f"process {other} of {len(given)} cannot share a sequence: {_TROUBLES[trouble]}")
    first = given[0]
    for other, numbers in enumerate(given):
        differing = [n for n, a, b in zip(_SIZES, first[4:], numbers[4:], strict=True) if a != b]
        if differing:
            raise DistributedError(
                f"processes 0 and {other} differ in {', '.join(differing)}: {_named(first)} and {_named(numbers)}; "
                "each process must pass its part of the same sequences, cut along T alone"
            )
    ends = torch.tensor([tokens for tokens, *_ in given]).cumsum(0) + given[0][1]
    bounds = [given[0][1], *ends.tolist()]
    levels = 1 if x.level_weights is None else x.level_weights.shape[-1]
    return Cut(rank, tuple(bounds[:-1]), tuple(bounds[1:]), bool(given[0][2]), levels)


def _exchanged(x: Operands, group: dist.ProcessGroup) -> list[list[int]]:
    """The numbers of each process: tokens, position, whether it has a state, its trouble, and sizes."""
    position, trouble = 0, 0
    if x.lengths is not None:
        trouble = 1
    elif x.initial_state is not None and dist.get_rank(group):
        trouble = 3
    elif x.initial_state is not None and x.level_weights is not None and is_level_state(x.initial_state):
        positions = position_of(x.initial_state).tolist()
        position, trouble = (positions or [0])[0], 2 * (len(set(positions)) > 1)
    numbers = [x.v.shape[1], position, int(x.initial_state is not None), trouble, *_sizes(x)]
    mine = torch.tensor(numbers, dtype=torch.int64, device=x.v.device)
    return gather(mine, group).tolist()


def _sizes(x: Operands) -> list[int]:
    batch, _, heads, value_dim = x.v.shape
    levels = -1 if x.level_weights is None else x.level_weights.shape[-1]
    axes = 0 if x.log_decay is None else x.log_decay.dim()
    given = (int(t is not None) for t in (x.decay_rate, x.beta, x.erase_key))
    return [batch, heads, x.q.shape[2], x.q.shape[3], value_dim, levels, axes, *given]


def _named(numbers: list[Any]) -> str:
    return ", ".join(f"{name}={number}" for name, number in zip(_SIZES, numbers[4:], strict=True))
