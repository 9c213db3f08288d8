"""What is not finite at one token leaves the tokens before it as they are, on a CPU.

A chunk's products take a token that is not yet seen times 0, and 0 times NaN is NaN. So a call whose output is not
finite is run again without the tokens from which that may have come, for the outputs of the tokens before them. That
costs nothing but a sum where all is finite. On an accelerator this is not checked, because the check would wait for the
device. Gradients are left as they are: those of the code that a mixer replaces are not finite either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llcompile.kernels.operands import Operands
from llcompile.kernels.rows import from_rows, in_rows, rows_of, to_rows
from llcompile.kernels.state import state_dtype

# A forward pass (operands, scale, return_final_state) -> (output, final state)
Forward = Callable[[Operands, float, bool], tuple[Tensor, Tensor]]

# Operands beyond one of these are taken for the cause, in this order: what is not finite, what overflows when it is
# squared, and what does with two more factors.
_BOUNDS = (math.inf, 1e18, 1e9)


def forward(run: Forward, x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """As `run`, with what is not finite kept from the tokens before it."""
    o, state = run(x, scale, return_final_state)
    if o.device.type != "cpu" or _is_finite(o):
        return o, state
    if x.starts is None:
        return _with_the_past(run, x, scale, o), state
    rows = rows_of(x)
    return from_rows(_with_the_past(run, in_rows(x, rows), scale, to_rows(o, rows)), rows), state


def _is_finite(o: Tensor) -> bool:
    return math.isfinite(o.sum(dtype=state_dtype(o.dtype)).item())


def _with_the_past(run: Forward, x: Operands, scale: float, o: Tensor) -> Tensor:
    """The output of rows, with what the tokens before the first cause would be without it."""
    token = torch.arange(x.v.shape[1])
    for bound in _BOUNDS:
        wrong = ~o.isfinite().flatten(2).all(2)  # [B, T]
        before = token < _first_beyond(x, bound)[:, None]
        if not bool((wrong & before).any()):
            continue
        past = x.map_tokens(partial(_zeroed, before))
        kept = run(past, scale, False)[0]
        o = torch.where((wrong & before)[:, :, None, None], kept, o)
    return o


def _first_beyond(x: Operands, bound: float) -> Tensor:
    """The first token `[B]` of each row with an operand beyond `bound`; T where there is none."""
    rows, tokens = x.v.shape[:2]
    beyond = torch.zeros(rows, tokens, dtype=torch.bool)
    for operand in (x.q, x.k, x.v, x.level_weights, x.beta, x.erase_query, x.erase_key):
        if operand is not None:
            beyond |= ~(operand.abs() < bound).flatten(2).all(2)
    if x.log_decay is not None and x.log_decay.dim() > 2:  # -inf is a decay like others
        beyond |= ~(x.log_decay < math.inf).reshape(rows, tokens, -1).all(2)
    if x.lengths is not None:
        beyond &= torch.arange(tokens) < x.lengths[:, None]
    return torch.where(beyond.any(1), beyond.to(torch.int8).argmax(1), tokens)


def _zeroed(kept: Tensor, x: Tensor) -> Tensor:
    """`x [B, T, ...]` with 0 at the tokens that are not kept `[B, T]`."""
    return torch.where(kept[(...,) + (None,) * (x.dim() - 2)], x, 0)
