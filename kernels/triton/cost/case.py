"""What is counted: one pass of one member of the family, of given sizes, with operands on any device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llcompile.kernels.description import CHUNK, Decay, describe
from llcompile.kernels.implementations import IMPLEMENTATIONS
from llcompile.kernels.operands import DIFFERENTIABLE, Operands, Token
from llcompile.kernels.operators import as_input
from llcompile.kernels.replay import without_queries
from llcompile.kernels.state import pack_state
from llcompile.kernels.triton import blocks, engine, segment_plan, segments, step
from llcompile.kernels.triton.cost.families import FAMILIES, Pass
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.segment_call import Next, empty, held_levels, maker

SCALE = 0.5


@dataclass(frozen=True)
class Case:
    """One pass. `groups` share query and key; `levels` is the level weights per token, None for the linear operator.

    For a step, `length` tokens were absorbed before it. With `in_blocks`, a forward pass goes in blocks however
    short the sequence is. With `segment`, the pass is that over one of the segments of `segment` tokens (`segments`):
    over `length` tokens of it, from a state to a state.
    """

    family: str
    operation: Pass
    key_dim: int = 128
    value_dim: int = 128
    heads: int = 32
    groups: int = 32
    batch: int = 1
    length: int = 65_536
    dtype: str = "bfloat16"
    levels: int | None = None
    in_blocks: bool = False
    segment: int | None = None

    @property
    def decay(self) -> Decay:
        """The family's decay."""
        return FAMILIES[self.family].decay

    @property
    def goes_in_blocks(self) -> bool:
        """Whether programs walk over blocks of chunks (`blocks`)."""
        if self.in_blocks or self.operation != "forward":
            return self.in_blocks
        d = Description.of(describe(operands_of(self, "meta"), False))
        return blocks.serves(d, self.batch, self.length, self.heads)

    @property
    def in_segments_of(self) -> int | None:
        """Tokens of the segments that the pass goes in; None if it takes the sequence whole."""
        if self.goes_in_blocks or (self.operation != "forward" and self.operation != "backward"):
            return None
        return self.segment or segment_plan.length(operands_of(self, "meta"), self.operation)

    @property
    def unit(self) -> int:
        """Tokens that programs take at a time."""
        if self.goes_in_blocks:
            return blocks.WALK * CHUNK
        return 1 if self.decay == "rate" else CHUNK

    def runner(self, device: str) -> Callable[[], object]:
        """The pass on operands that exist before it is called."""
        if self.operation == "step":
            token = token_of(self, device)
            return lambda: step.step(token, None)
        if self.operation == "step in place":
            token = token_of(self, device)
            return lambda: IMPLEMENTATIONS["triton"].step_in_place(token)
        if self.operation == "replay":
            ring, occupied = replayed_of(self, device)
            return lambda: IMPLEMENTATIONS["triton"].replay(ring, occupied, SCALE)
        if self.operation == "fold":
            chunk, occupied = folded_of(self, device)
            return lambda: IMPLEMENTATIONS["triton"].fold(chunk, occupied, True)
        x, grad = operands_of(self, device), self._tensor(device, self.length, self.heads, self.value_dim)
        if self.segment is not None:
            return partial(_segment, x, grad, self.operation, self.segment)
        if self.operation == "forward":
            return partial(_forward, x, self.in_blocks)

        def backward() -> list[Tensor]:
            found = segments.backward(x, SCALE, grad, None)
            return [as_input(y, g, x.q) for y, g in zip(x[:DIFFERENTIABLE], found, strict=True)]

        return backward

    def _tensor(self, device: str, *shape: int) -> Tensor:
        return torch.full((self.batch, *shape), 0.01, dtype=getattr(torch, self.dtype), device=device)


def _forward(x: Operands, in_blocks: bool) -> object:
    with blocks.always() if in_blocks else nullcontext():
        return segments.forward(x, SCALE, False)


def _segment(x: Operands, grad: Tensor, operation: Pass, tokens: int) -> None:
    """All kernels that a segment has in a pass, before which all levels hold something: others read fewer."""
    first = tokens if x.level_weights is None else ((1 << x.level_weights.shape[-1]) - 1) * tokens
    # A part of a segment, as counts at small lengths take, has no state after it; that takes no kernel of its own.
    following: Next = "segment" if x.v.shape[1] == tokens else "nothing"
    state, make = empty(x, tokens, first), maker(x, tokens, first, following)
    after = empty(x, tokens, first + tokens)
    x = x._replace(initial_state=state)
    if operation == "forward":
        engine.forward(x, SCALE, True, make)
        return
    engine.final_state(x, SCALE, make)
    engine.backward(x, SCALE, grad, after, make)


def operands_of(case: Case, device: str, tokens: int | None = None) -> Operands:
    """Operands of a sequence; decays and factors are fp32, as models have them."""
    time = (case.length if tokens is None else tokens,)
    shared, per_head = (*time, case.groups), (*time, case.heads)
    weighted = shared if case.decay == "rate" else per_head  # as `operators` hands them on

    def fine(*shape: int) -> Tensor:
        return torch.full((case.batch, *shape), -0.1, device=device)

    q, k = (case._tensor(device, *shared, case.key_dim) for _ in range(2))
    erase = tuple(case._tensor(device, *shared, case.key_dim) for _ in range(2))
    erases, dense = FAMILIES[case.family].correction == "erase", FAMILIES[case.family].correction != "none"
    channel = (case.key_dim,) if case.decay == "channel" else ()
    return Operands(
        q,
        k,
        case._tensor(device, *per_head, case.value_dim),
        None if case.levels is None else case._tensor(device, *weighted, case.levels),
        None if case.decay == "none" else fine(*per_head, *channel),
        torch.ones(case.heads, case.key_dim, device=device) if case.decay == "rate" else None,
        -fine(*per_head) if dense else None,
        *(erase if erases else (None, None)),
    )


def token_of(case: Case, device: str) -> Token:
    """Operands of a step, after `case.length` tokens."""
    x = operands_of(case, device, 1)
    one = x.map_tokens(lambda t: t[:, 0])
    return Token(*one[:4], _state(case, device, case.length), *one[4:9], SCALE)


def replayed_of(case: Case, device: str) -> tuple[Operands, Tensor | None]:
    """Operands of a replayed token after `case.length` others, those since the last whole chunk beside the state, and
    which levels of the state hold something."""
    since = case.length % CHUNK
    x = operands_of(case, device, since + 1)
    weights = None if x.level_weights is None else x.level_weights[:, -1:]
    x = x._replace(q=x.q[:, -1:], level_weights=weights, initial_state=_state(case, device, case.length - since))
    return x, _occupied(case, device, case.length - since)


def folded_of(case: Case, device: str) -> tuple[Operands, Tensor | None]:
    """Likewise, of a chunk of tokens on the state after the whole chunks of `case.length` tokens."""
    position = case.length - case.length % CHUNK
    x = operands_of(case, device, CHUNK)._replace(initial_state=_state(case, device, position))
    return without_queries(x), _occupied(case, device, position)


def _occupied(case: Case, device: str, position: int) -> Tensor | None:
    """As `replay.Base` has it, after whole chunks."""
    if case.levels is None:
        return None
    held = held_levels(case.levels, CHUNK, position, False)
    return torch.tensor([[i in held for i in range(case.levels)]] * case.batch, dtype=torch.float32).to(device)


def _state(case: Case, device: str, position: int) -> Tensor:
    shape = (case.batch, case.heads, *(() if case.levels is None else (case.levels,)), case.key_dim, case.value_dim)
    state = torch.zeros(shape, device=device)
    return state if case.levels is None else pack_state(state, torch.full((case.batch,), position, device=device))
