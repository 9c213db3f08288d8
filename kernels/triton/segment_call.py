"""The call of one segment of a long sequence (`segments`), and the state between two segments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from llcompile.kernels.description import describe
from llcompile.kernels.grid import Grid, depth
from llcompile.kernels.levels import trailing_zeros
from llcompile.kernels.operands import Operands
from llcompile.kernels.state import empty_state, in_kind_of, in_levels, is_level_state
from llcompile.kernels.triton.call import Call
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.launch import Launch
from llcompile.kernels.triton.schedule import Entry

Make = Callable[[Operands, float, bool], Call]
# What comes after a segment: another one, the state that the caller of the whole asked for, or nothing.
Next = Literal["segment", "state", "nothing"]


def aligned(x: Operands) -> bool:
    """Whether the host knows at which position each segment of `x` starts: rows that begin at 0."""
    if x.level_weights is None or x.lengths is not None or x.decay_rate is not None:
        return False
    return x.initial_state is None or not is_level_state(x.initial_state)


def maker(x: Operands, segment: int, first: int, following: Next) -> Make:
    """What makes the call of the segment from token `first` of `x` on, in segments of `segment` tokens."""
    if not aligned(x):
        return Call
    started = x.initial_state is not None
    return lambda part, scale, final: AlignedCall(part, scale, segment, first, started, following)


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
    held = held_levels(x.level_weights.shape[-1], segment, first, x.initial_state is not None)
    return x.v.new_zeros(*_heads(x), len(held), *_sizes(x), dtype=torch.float32)


def gradient_of_initial(x: Operands, grad: Tensor) -> Tensor | None:
    """The gradient of the initial state of `x` from that of `begin`."""
    if x.initial_state is None:
        return None
    return grad[:, :, -1] if aligned(x) else in_kind_of(x.initial_state, grad)


def held_levels(levels: int, segment: int, first: int, started: bool) -> list[int]:
    """Levels that hold anything at `first`, a multiple of `segment`, a power of two.

    `started`: the last one also holds what was before token 0.
    """
    last = levels - 1
    least = min(segment.bit_length(), last)
    found = [level for level in range(least, last) if first >> (level - 1) & 1]
    return found + [last] * (started or first >> max(last - 1, 0) > 0)


def _heads(x: Operands) -> tuple[int, int]:
    return x.rows, x.v.shape[2]


def _sizes(x: Operands) -> tuple[int, int]:
    return x.q.shape[3], x.v.shape[3]


class AlignedCall(Call):
    """A segment of rows that began at position 0: it starts at `first`, a multiple of `segment`, a power of two.

    So the levels inside are those of its own grid, with no room for an offset, and all its tokens see an older bucket
    at one level. The state before it has the levels alone that hold anything, merged for its first token:
    `[B, H, slots, K, V]`, without a header. `started`: there is a state before the first segment, which is seen at the
    last level.

    To the next segment, this one is a block of the tree, which is joined one level further than a whole call needs. So
    the state after it takes no kernels of its own: its own bucket is that block's state, and older ones pass the block.
    """

    def __init__(self, x: Operands, scale: float, segment: int, first: int, started: bool, following: Next) -> None:
        self.segment, self.first, self.started, self.following = segment, first, started, following
        self.gradient_after: Tensor | None = None
        super().__init__(x, scale, following == "state")

    def _description(self, final_state: bool) -> Description:
        # Its tokens need no offsets, as those after a linear state: the kernels are those of whole calls.
        return dataclasses.replace(Description.of(describe(self.x, final_state)), initial_state="linear")

    def _make_grid(self) -> Grid:
        device, chunk = self.x.v.device, self.d.chunk
        position = torch.full((self.batch,), self.first, dtype=torch.int64, device=device)
        edge = max(self.tokens - 1, 0).bit_length()
        chunks = -(-self.tokens // chunk)
        return Grid(self.tokens, chunk, chunks, edge, position, torch.zeros_like(position), None)

    def _joined_levels(self, chunks: int) -> int:
        return depth(chunks) - (self.following != "segment")

    # -- levels -------------------------------------------------------------------------------------------------------

    def _level_index(self) -> Tensor:
        assert self.levels is not None
        found = torch.arange(self.grid.levels, device=self.x.v.device).clamp(max=self.levels - 1)
        return found.expand(self.batch, -1)

    def _levels_held(self) -> list[int]:
        assert self.levels is not None
        return held_levels(self.levels, self.segment, self.first, self.started)

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

    def final_state(self) -> Tensor:
        """What the caller of the whole asked for, or the slots of the next segment."""
        if self.following == "state":
            return super().final_state()
        if self.following == "nothing":
            return self.no_state()
        return self._slots_after(*self._block())

    def add_final_gradient(self, grad_state: Tensor) -> None:
        """Likewise."""
        if self.following == "state":
            super().add_final_gradient(grad_state)
        elif self.following == "segment":
            self.gradient_after = grad_state

    def _launches(self, needed: Mapping[str, Entry]) -> Iterator[Launch]:
        if self.gradient_after is None:
            yield from super()._launches(needed)
            return
        # The gradients of the block of all chunks have a place among those that go down the tree.
        for name, entry in needed.items():
            if name == "tree_down":
                self._add_gradients_of_block(self.gradient_after)
            yield from super()._launches({name: entry})

    def _block(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The buckets before the segment `[B, H, slots, K, V]`; the state `[B, H, K, V]` and the transition of the
        block of all chunks: a matrix `[B, H, K, K]`, or log decays `[B, H (, K)]`."""
        old, found = self.arguments["old_states"].unflatten(0, (self.batch, self.heads)), self.arguments
        passing = self._passing()
        return old, found["states"][:, :, -1], None if passing is None else found[passing][0, :, :, -1]

    def _passing(self) -> str | None:
        """The buffer with what blocks do to states."""
        return "transitions" if self.d.dense else "totals" if self.d.decay != "none" else None

    def _slots_after(self, old: Tensor, own: Tensor, passing: Tensor | None) -> Tensor:
        """The state for the next segment, whose first token finds this one and some older ones in one bucket."""
        if self.d.dense:
            assert passing is not None
            old = passing[:, :, None] @ old
        elif passing is not None:
            old = passing.exp().reshape(*passing.shape[:2], 1, -1, 1) * old
        merged = self._merged()
        return torch.cat([own[:, :, None] + old[:, :, :merged].sum(2, keepdim=True), old[:, :, merged:]], 2)

    def _add_gradients_of_block(self, grad: Tensor) -> None:
        """Reverse of `_slots_after`: of the buckets before, the block's state, and its transition."""
        with torch.inference_mode(False), torch.enable_grad():
            given = [None if t is None else t.detach().requires_grad_() for t in self._block()]
            after = self._slots_after(*given)  # type: ignore[arg-type]
            leaves = [t for t in given if t is not None]
            old, own, *passing = torch.autograd.grad(after, leaves, grad, materialize_grads=True)
        found = self.arguments
        found["state_gradients"][:, :, -1] += own
        found["old_gradients"] += old
        if passing:
            found["transition_gradients" if self.d.dense else "total_gradients"][0, :, :, -1] += passing[0]

    def _merged(self) -> int:
        """How many of the older buckets the first token after this segment finds in one with it."""
        assert self.levels is not None
        highest = min(trailing_zeros(self.first + self.segment) + 1, self.levels - 1)
        return sum(level <= highest for level in self._levels_held())
