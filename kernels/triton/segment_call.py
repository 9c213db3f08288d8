"""The call of one segment of a long sequence (`segments`), and the state between two segments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llcompile.kernels.grid import Grid
from llcompile.kernels.levels import trailing_zeros
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
    started = x.initial_state is not None
    return lambda part, scale, final: AlignedCall(part, scale, final, segment, first, started, asked)


def begin(x: Operands, segment: int) -> Tensor:
    """The state before the first segment: as a call takes it, or the slots of `AlignedCall`."""
    old = x.initial_state
    if aligned(x):
        return empty(x, segment, 0) if old is None else old.float()[:, :, None]
    levels = None if x.level_weights is None else x.level_weights.shape[-1]
    if old is None:
        return empty_state(*_heads(x), *_sizes(x), levels, device=x.v.device)
    return in_levels(old.float(), levels)


def empty(x: Operands, segment: int, first: int) -> Tensor:
    """Zeros like the state before token `first` of `x`, the begin of a segment or the end of the last one."""
    if not aligned(x):
        return torch.zeros_like(begin(x, segment))
    assert x.level_weights is not None
    held = _held(x.level_weights.shape[-1], segment, first, x.initial_state is not None)
    return x.v.new_zeros(*_heads(x), len(held), *_sizes(x), dtype=torch.float32)


def gradient_of_initial(x: Operands, grad: Tensor) -> Tensor | None:
    """The gradient of the initial state of `x` from that of `begin`."""
    if x.initial_state is None:
        return None
    return grad[:, :, -1] if aligned(x) else in_kind_of(x.initial_state, grad)


def _held(levels: int, segment: int, first: int, started: bool) -> list[int]:
    """Levels that hold anything at `first`, a multiple of `segment`, a power of two.

    `started`: the last one also holds what was before token 0.
    """
    last = levels - 1
    least = min(segment.bit_length(), last)
    found = [level for level in range(least, last) if first >> (level - 1) & 1]
    return found + [last] * (started or first >> (last - 1) > 0)


def _heads(x: Operands) -> tuple[int, int]:
    return x.rows, x.v.shape[2]


def _sizes(x: Operands) -> tuple[int, int]:
    return x.q.shape[3], x.v.shape[3]


class AlignedCall(Call):
    """A segment of rows that began at position 0: it starts at `first`, a multiple of `segment`, a power of two.

    So the levels inside are those of its own grid, with no room for an offset, and all its tokens see an older bucket
    at one level. The state before it has the levels alone that hold anything, merged for its first token:
    `[B, H, slots, K, V]`, without a header. So is the state after it, unless the caller of the whole `asked` for that.
    `started`: there is a state before the first segment, which is seen at the last level.
    """

    def __init__(
        self, x: Operands, scale: float, final_state: bool, segment: int, first: int, started: bool, asked: bool
    ) -> None:
        self.segment, self.first, self.started, self.asked = segment, first, started, asked
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

    def _levels_held(self) -> list[int]:
        assert self.levels is not None
        return _held(self.levels, self.segment, self.first, self.started)

    def _old_slots(self) -> range:
        return range(len(self._levels_held()))

    def _old_index(self) -> tuple[Tensor, Tensor]:
        """The level at which the tokens see each slot: its own, whatever the bits inside a segment are."""
        # Filled on the device: a copy from the host would wait for it, and no capture of a graph allows one.
        held = [self.x.v.new_full((1,), level, dtype=torch.int64) for level in self._levels_held()]
        seen = torch.cat([self.x.v.new_empty(0, dtype=torch.int64), *held])
        return seen.expand(self.batch, self.tokens, -1), seen.expand(self.batch, -1)

    # -- states -------------------------------------------------------------------------------------------------------

    def _old_states(self) -> Tensor | None:
        assert self.x.initial_state is not None
        return self._fold_state(self.x.initial_state)

    def _final(self, states: Tensor) -> Tensor:
        """Levels `[M, levels, K, V]` of the last token -> slots of the next segment, whose first token merges some."""
        if self.asked:
            return super()._final(states)
        kept = self._kept()
        return self._unfold_state(torch.cat([states[:, :kept].sum(1, keepdim=True), states[:, kept:]], 1))

    def _final_grad(self, d: Tensor) -> Tensor:
        if self.asked:
            return super()._final_grad(d)
        d = self._fold_state(d)
        return torch.cat([d[:, :1].expand(-1, self._kept(), -1, -1), d[:, 1:]], 1)

    def _kept(self) -> int:
        """How many levels at the end of this segment the first token after it finds in one bucket."""
        assert self.levels is not None
        merged = min(trailing_zeros(self.first + self.segment) + 1, self.levels - 1)
        return self.grid.levels + sum(level <= merged for level in self._levels_held())
