"""Long calls in segments: the memory between kernels is that of a segment, whatever the sequence's length.

A segment is a call of its own with the state before it as initial state, so nothing is approximate. The forward pass
goes through the segments from first to last. The backward pass does so, too, for the state before each; then it goes
from last to first, makes what is between chunks of a segment again, and hands on the gradient of the state before it.
How long a segment is says `segment_plan`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from llcompile.kernels.description import Description, describe
from llcompile.kernels.operands import DIFFERENTIABLE, Operands
from llcompile.kernels.triton import blocks, engine, segment_plan
from llcompile.kernels.triton.description import Description as Kernels
from llcompile.kernels.triton.segment_call import Next, aligned, begin, empty, gradient_of_initial, maker

Sweep = Literal["forward", "backward"]
Tested = tuple[Description, Sweep]
_log = logging.getLogger("llcompile.kernels")
_always: ContextVar[int | None] = ContextVar("segments_of", default=None)


class Tests(Protocol):
    """The tests of kernels that a call takes besides those of its own description."""

    def rejection(self, d: Description, sweep: Sweep) -> str | None:
        """Why kernels of a description must not run a pass; None if they may."""

    def watched(self, d: Description, sweep: Sweep) -> AbstractContextManager[None]:
        """Around a pass that may run: what must be known of it while it does."""


class Segment(NamedTuple):
    """Tokens `first` to `end` of a call, as operands without a state."""

    x: Operands
    first: int
    end: int


def forward(x: Operands, scale: float, return_final_state: bool, tests: Tests | None = None) -> tuple[Tensor, Tensor]:
    """As `engine.forward`, in segments where the memory asks for it; kernels that `tests` reject run no segment.

    Raises:
        KernelMemoryError: the buffers do not fit.
        OptionError: `LLCOMPILE_WORKSPACE_GB` is no number of GB.
    """
    tokens = None if _in_blocks(x, return_final_state) else _length(x, return_final_state, "forward", tests)
    if tokens is None:
        return engine.forward(x, scale, return_final_state)
    return forward_by(x, scale, return_final_state, tokens, tests)


def backward(
    x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None, tests: Tests | None = None
) -> list[Tensor | None]:
    """As `engine.backward`, likewise; raises what `forward` does."""
    tokens = _length(x, grad_state is not None, "backward", tests)
    if tokens is None:
        return engine.backward(x, scale, grad_o, grad_state)
    return backward_by(x, scale, grad_o, grad_state, tokens, tests)


def forward_by(
    x: Operands, scale: float, return_final_state: bool, tokens: int, tests: Tests | None = None
) -> tuple[Tensor, Tensor]:
    """As `engine.forward`, in segments of `tokens`, a power of two."""
    state, o = begin(x, tokens), x.v.new_empty(x.v.shape)
    with _watched(tests, _tested(x, return_final_state, "forward", tokens)[-1]):
        # A Python loop: the memory is that of a turn, and turns are few, whatever the length (`segment_plan`).
        for part in cut(x, tokens):
            make = maker(x, tokens, part.first, _next(x, part, return_final_state))
            o[:, part.first : part.end], state = engine.forward(_after(part, state), scale, True, make)
    return o, state if return_final_state else x.v.new_empty(0, dtype=state.dtype)


def backward_by(
    x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None, tokens: int, tests: Tests | None = None
) -> list[Tensor | None]:
    """As `engine.backward`, in segments of `tokens`, a power of two."""
    tested = _tested(x, grad_state is not None, "backward", tokens)
    parts = list(cut(x, tokens))
    with _watched(tests, tested[0]):
        states = _states(x, scale, parts, tokens)
    grad = grad_state
    if grad is None and not aligned(x):
        # One description for all segments, so that each kernel is compiled once: the last one has a final state, too.
        grad = empty(x, tokens, parts[-1].end)
    found = Gradients(x)
    with _watched(tests, tested[-1]):
        for part in reversed(parts):
            make = maker(x, tokens, part.first, _next(x, part, grad_state is not None))
            given = grad_o[:, part.first : part.end]
            *grads, grad = engine.backward(_after(part, states.pop()), scale, given, grad, make)
            found.put(part, grads)
    assert grad is not None
    return [*found.all, gradient_of_initial(x, grad)]


def _states(x: Operands, scale: float, parts: list[Segment], tokens: int) -> list[Tensor]:
    """The state before each segment."""
    states = [begin(x, tokens)]
    for part in parts[:-1]:
        make = maker(x, tokens, part.first, "segment")
        states.append(engine.final_state(_after(part, states[-1]), scale, make))
    return states


class Gradients:
    """Gradients of a whole call in the operands' dtypes, filled in segment by segment; sums over tokens in fp32."""

    def __init__(self, x: Operands) -> None:
        self.all = [None if t is None else _empty(t) for t in x[: DIFFERENTIABLE - 1]]

    def put(self, part: Segment, grads: list[Tensor | None]) -> None:
        """The gradients of one segment."""
        for whole, grad in zip(self.all, grads, strict=True):
            if whole is None or grad is None:
                continue
            if whole.dim() < 3:
                whole += grad
            else:
                here = whole[:, part.first : part.end]
                here.copy_(grad.reshape(here.shape))


def _empty(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape, dtype=torch.float32) if x.dim() < 3 else x.new_empty(x.shape)


def cut(x: Operands, tokens: int) -> Iterator[Segment]:
    """The segments of `x`; a packed sequence that one cuts has its parts in the same row of both."""
    for first in range(0, x.v.shape[1], tokens):
        end = min(first + tokens, x.v.shape[1])
        part = x.map_tokens(lambda t, first=first, end=end: t[:, first:end])  # type: ignore[misc]
        part = part._replace(initial_state=None)
        if x.lengths is not None:
            begins = torch.zeros_like(x.lengths) if x.starts is None else x.starts
            ends = (begins + x.lengths).clamp(first, end)
            begins = begins.clamp(first, end)
            part = part._replace(lengths=ends - begins)
            part = part if x.starts is None else part._replace(starts=begins - first)
        yield Segment(part, first, end)


def _next(x: Operands, part: Segment, asked: bool) -> Next:
    """What comes after `part`; `asked`: there is a final state, or its gradient, at the end of `x`."""
    if part.end < x.v.shape[1]:
        return "segment"
    return "state" if asked else "nothing"


def _after(part: Segment, state: Tensor) -> Operands:
    return part.x._replace(initial_state=state)


def _in_blocks(x: Operands, final: bool) -> bool:
    if x.decay_rate is not None or not x.v.numel() or not x.q.numel():
        return False
    return blocks.serves(Kernels.of(describe(x, final)), *x.v.shape[:3])


def may(d: Description) -> bool:
    """Whether calls that `d` describes may be, or are tested in, segments that hand on slots (`AlignedCall`)."""
    return d.weighted and d.initial_state == "linear" and d.decay != "rate" and not (d.padded or d.packed)


@contextmanager
def always(tokens: int) -> Iterator[None]:
    """Calls go in segments of `tokens` inside, untested, whatever the memory: what a test of them needs."""
    before = _always.set(tokens)
    try:
        yield
    finally:
        _always.reset(before)


def _length(x: Operands, final: bool, sweep: Sweep, tests: Tests | None) -> int | None:
    """Tokens of a segment of `x`; None if it is taken whole. `final`: a final state is asked for."""
    if (tokens := _always.get()) is not None:
        return tokens
    tokens = segment_plan.length(x, sweep)
    if tokens is None or tests is None:
        return tokens
    for d, needed in _tested(x, final, sweep, tokens):
        reason = tests.rejection(d, needed)
        if reason is not None:
            _tell(reason)
            return None
    return tokens


def _tested(x: Operands, final: bool, sweep: Sweep, tokens: int) -> list[Tested]:
    """What must have been tested before `x` goes in segments: for the states before them, then for the pass itself."""
    if aligned(x):  # such a test is in segments, too, and makes the states before them
        return [(dataclasses.replace(describe(x, final), initial_state="linear"), sweep)]
    d = describe(x._replace(initial_state=begin(x, tokens)), True)
    return [(d, "forward")] if sweep == "forward" else [(d, "forward"), (d, "backward")]


def _watched(tests: Tests | None, tested: Tested) -> AbstractContextManager[None]:
    """Kernels of segments are not those of the whole call, whose test would not run them."""
    return nullcontext() if tests is None or _always.get() is not None else tests.watched(*tested)


@lru_cache(maxsize=64)
def _tell(reason: str) -> None:
    _log.warning(
        "a long call is taken whole, and takes more memory than it has to, because of its segments' %s", reason
    )
