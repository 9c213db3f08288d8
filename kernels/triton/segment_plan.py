"""How long segments are (`segments`): the longest whose counted bytes keep to a budget.

The budget is `LLCOMPILE_WORKSPACE_GB`, or twice what operands, output and their gradients take: memory that the caller
needs anyway says what is too much, and the number of segments does not grow with length, rows or heads. It does not
depend on what is free now: the bits of a result would, too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from llcompile.errors import OptionError
from llcompile.kernels.operands import DIFFERENTIABLE, Operands
from llcompile.kernels.triton import memory
from llcompile.kernels.triton.call import Call
from llcompile.kernels.triton.engine import per_channel
from llcompile.kernels.triton.scan import READ, WRITE, Scan
from llcompile.kernels.triton.schedule import GRADIENTS, OUTPUT, STATES
from llcompile.kernels.triton.segment_call import Make, empty, maker

VARIABLE = "LLCOMPILE_WORKSPACE_GB"
# Tokens of the shortest segment: 16 chunks, whose launches still have work.
LEAST = 1024
# Without an option, what takes less than this is never cut.
_FREELY = 2 * 10**9
_SHARE = 2

Sweep = Literal["forward", "backward"]
# Shape and dtype of each operand: all that counted bytes depend on.
Shapes = tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
_KERNELS = {"forward": STATES | OUTPUT, "backward": STATES | GRADIENTS}


def length(x: Operands, sweep: Sweep) -> int | None:
    """Tokens of a segment of `x`, a power of two; None if it is taken whole.

    Raises:
        KernelMemoryError: there is not enough memory for that; the message names the option with which there is.
        OptionError: the option is not a number of GB.
    """
    budget = _option()
    if x.v.shape[1] <= LEAST or not x.v.numel() or not x.q.numel():
        return None
    shapes = _shapes(x)
    if budget is None:
        budget = max(_FREELY, _SHARE * _callers(x))
    found = _longest(shapes, sweep, budget)
    _check(x, shapes, sweep, found)
    return found


def _longest(shapes: Shapes, sweep: Sweep, budget: float) -> int | None:
    """The longest segment whose bytes keep to `budget`, or else the one with the fewest."""
    fewest: tuple[int, int | None] | None = None
    for tokens in _candidates(shapes):
        found = wanted(shapes, sweep, tokens)
        if found <= budget:
            return tokens
        if fewest is None or found < fewest[0]:
            fewest = found, tokens
    assert fewest is not None
    return fewest[1]


def _candidates(shapes: Shapes) -> Iterator[int | None]:
    """The whole call, then segments, the longest first."""
    yield None
    assert shapes[2] is not None
    tokens = 1 << ((shapes[2][0][1] - 1).bit_length() - 1)
    while tokens >= LEAST:
        yield tokens
        tokens //= 2


def _check(x: Operands, shapes: Shapes, sweep: Sweep, tokens: int | None) -> None:
    """Raise `KernelMemoryError` if segments of `tokens` do not fit now."""
    found = wanted(shapes, sweep, tokens)
    free = memory.free_bytes(x.v.device) if found > memory.SMALL else None
    if free is None or found <= free:
        return
    instead, least = _longest(shapes, sweep, free), ""
    if wanted(shapes, sweep, instead) <= free:
        gigabytes = math.ceil(wanted(shapes, sweep, instead) / 1e7) / 100
        least = f"{VARIABLE}={gigabytes:.2f} takes them in segments of {instead} tokens, which fit; "
    raise memory.error(x, found, free, least)


@lru_cache(maxsize=1024)
def wanted(shapes: Shapes, sweep: Sweep, tokens: int | None) -> int:
    """Bytes that a pass takes beside operands and results, in segments of `tokens` (None: whole)."""
    x = Operands(*(None if row is None else torch.empty(row[0], dtype=row[1], device="meta") for row in shapes))  # type: ignore[arg-type]
    if tokens is None:
        return _buffers(x, sweep, Call)
    begins = range(0, x.v.shape[1], tokens)
    states = [_bytes(empty(x, tokens, first)) for first in begins]
    fullest = begins[states.index(max(states))]
    kept = (sum(states) if sweep == "backward" else 0) + 2 * max(states)  # and a gradient and what it becomes
    part = x.map_tokens(lambda t: t[:, :tokens])._replace(initial_state=empty(x, tokens, fullest))
    if sweep == "backward" and x.decay_rate is not None:  # sums over tiles, before they go into those of the whole call
        kept += sum(4 * t.numel() for t in part[: DIFFERENTIABLE - 1] if t is not None)
    return _buffers(part, sweep, maker(x, tokens, fullest, "segment"), True) + kept


def _buffers(x: Operands, sweep: Sweep, make: Make, final: bool = False) -> int:
    """Bytes of the buffers of one call, of the tables for it, and of copies of operands."""
    names: Iterable[str]
    call: Scan | Call
    if x.decay_rate is not None:
        call, names = Scan(x, 1.0, final), READ if sweep == "forward" else WRITE
    else:
        call = make(per_channel(x), 1.0, final)
        names = [name for name, entry in _KERNELS[sweep].items() if entry.when(call.d)]
    operands = {t.untyped_storage()._cdata for t in x if t is not None}
    made = [t for t in call.arguments.values() if isinstance(t, Tensor) and t.untyped_storage()._cdata not in operands]
    return memory.workspace(call.arguments, call.kernels, names) + sum(map(_bytes, made))


def _callers(x: Operands) -> int:
    """Bytes that whoever calls has anyway: operands, output, and the gradients of these."""
    return 2 * sum(_bytes(t) for t in (*x, x.v) if t is not None)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _shapes(x: Operands) -> Shapes:
    return tuple(None if t is None else (tuple(t.shape), t.dtype) for t in x)


def _option() -> float | None:
    """The budget that was asked for, in bytes."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        found = float(text) * 1e9
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise OptionError(f"{VARIABLE} is {text!r}; expected what the Triton kernels may take beside operands, in GB")
    return found
