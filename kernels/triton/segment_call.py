"""The call of one segment of a long sequence (`segments`), and the state between two segments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llcompile.kernels.grid import Grid
from llcompile.kernels.levels import bucket_start, level, trailing_zeros
from llcompile.kernels.operands import Operands
from llcompile.kernels.state import empty_state, in_kind_of, in_levels, is_level_state
from llcompile.kernels.triton.call import Call

Make = Callable[[Operands, float, bool], Call]


def aligned(x: Operands) -> bool:
    """Whether the host knows at which position each segment of `x` starts: rows that begin at 0."""
    if x.level_weights is None or x.lengths is not None or x.decay_rate is not None:
        return False
    return x.initial_state is None or not is_level_state(x.initial_state)


def maker(x: Operands, segment: int, first: int, asked: bool) -> Make:
    """What makes the call of the segment from token `first` of `x` on, in segments of `segment` tokens.

    `asked`: it is the last one, whose final state the caller of the whole asked for.
    """
    if not aligned(x):
        return Call
    return lambda part, scale, final: AlignedCall(part, scale, final, segment, first, asked)


def begin(x: Operands, segment: int) -> Tensor:
    """The state before the first segment: as a call takes it, or the slots of `AlignedCall`."""
    levels = None if x.level_weights is None else x.level_weights.shape[-1]
    old = x.initial_state
    if aligned(x):
        assert levels is not None
        slots = len(_slots(levels, segment))
        state = x.v.new_zeros(*_heads(x), slots, *_sizes(x), dtype=torch.float32)
        if old is not None:
            state[:, :, -1] = old
        return state
    if old is None:
        return empty_state(*_heads(x), *_sizes(x), levels, device=x.v.device)
    return in_levels(old.float(), levels)


def gradient_of_initial(x: Operands, grad: Tensor) -> Tensor | None:
    """The gradient of the initial state of `x` from that of `begin`."""
    if x.initial_state is None:
        return None
    return grad[:, :, -1] if aligned(x) else in_kind_of(x.initial_state, grad)


def _slots(levels: int, segment: int) -> range:
    """Levels that hold anything at a multiple of `segment`, a power of two: those of whole segments, or the last."""
    return range(min(segment.bit_length(), levels - 1), levels)


def _heads(x: Operands) -> tuple[int, int]:
    return x.rows, x.v.shape[2]


def _sizes(x: Operands) -> tuple[int, int]:
    return x.q.shape[3], x.v.shape[3]


class AlignedCall(Call):
    """A segment of rows that began at position 0: it starts at `first`, a multiple of `segment`, a power of two.

    So the levels inside are those of its own grid, with no room for an offset, and all its tokens see an older bucket
    at one level. The state before it has the levels alone that hold anything, merged for its first token:
    `[B, H, slots, K, V]`, without a header. So is the state after it, unless the caller of the whole `asked` for that.
    """

    def __init__(
        self, x: Operands, scale: float, final_state: bool, segment: int, first: int, asked: bool = False
    ) -> None:
        self.segment, self.first, self.asked = segment, first, asked
        super().__init__(x, scale, final_state)

    def _make_grid(self) -> Grid:
        device, chunk = self.x.v.device, self.d.chunk
        position = torch.full((self.batch,), self.first, dtype=torch.int64, device=device)
        edge = max(self.tokens - 1, 0).bit_length()
        chunks = -(-self.tokens // chunk)
        return Grid(self.tokens, chunk, chunks, edge, position, torch.zeros_like(position), None)

    # -- levels -------------------------------------------------------------------------------------------------------

    def _level_index(self) -> Tensor:
        assert self.levels is not None
        found = torch.arange(self.grid.levels, device=self.x.v.device).clamp(max=self.levels - 1)
        return found.expand(self.batch, -1)

    def _old_slots(self) -> range:
        assert self.levels is not None
        return _slots(self.levels, self.segment)

    def _old_index(self) -> tuple[Tensor, Tensor]:
        assert self.levels is not None
        seen = torch.empty(self.levels, dtype=torch.int64, device=self.x.v.device)
        for slot in range(self.levels):
            seen[slot] = self._seen(slot)
        return seen.expand(self.batch, self.tokens, -1), seen.expand(self.batch, -1)

    def _seen(self, slot: int) -> int:
        """The level at which the tokens see the bucket of `slot`; bits inside a segment make no difference to it."""
        assert self.levels is not None
        if slot == self.levels - 1:
            return slot
        return min(max(level(self.first, bucket_start(self.first, slot)), slot), self.levels - 1)

    # -- states -------------------------------------------------------------------------------------------------------

    def _old_states(self) -> Tensor | None:
        assert self.x.initial_state is not None
        return self._fold_state(self.x.initial_state)

    def _final(self, states: Tensor) -> Tensor:
        """Levels `[M, levels, K, V]` of the last token -> slots of the next segment, whose first token merges some."""
        if self.asked:
            return super()._final(states)
        merged, kept = self._merge()
        found = states.new_zeros(states.shape[0], len(self._old_slots()), *states.shape[2:])
        found[:, merged] = states[:, :kept].sum(1)
        found[:, merged + 1 :] = states[:, kept:]
        return self._unfold_state(found)

    def _final_grad(self, d: Tensor) -> Tensor:
        if self.asked:
            return super()._final_grad(d)
        merged, kept = self._merge()
        d = self._fold_state(d)
        return torch.cat([d[:, merged, None].expand(-1, kept, -1, -1), d[:, merged + 1 :]], 1)

    def _merge(self) -> tuple[int, int]:
        """The slot that the first token after this segment fills, and how many levels of its end come into it."""
        slots = self._old_slots()
        merged = min(trailing_zeros((self.first + self.segment) // self.segment), len(slots) - 1)
        return merged, self.grid.levels + merged + 1
