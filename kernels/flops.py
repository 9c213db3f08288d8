"""FLOP formulas: what `torch.utils.flop_counter` counts for the operators, that is the products of their ATen form.

They are counted by running that form on `meta` tensors, so they are exact for it; the C++ and Triton kernels compute
the same products in tiles of other sizes. Packed and padded sequences count as whole rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from llcompile.kernels.aten import sequence, token
from llcompile.kernels.operands import DIFFERENTIABLE, Operands, Token, weights_per_head

_Like = tuple[tuple[int, ...], torch.dtype] | None  # shape and dtype of a tensor, None where there is none


def _counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@lru_cache(maxsize=256)
def _sequence(operands: tuple[_Like, ...], backward: bool) -> int:
    x = Operands(*map(_empty, operands))
    if not backward:
        return _counted(lambda: sequence.forward(x, 1.0, False))
    return _counted(lambda: sequence.backward(x, 1.0, torch.empty_like(x.v), None))


@lru_cache(maxsize=256)
def _step(operands: tuple[_Like, ...]) -> int:
    x = Token(*map(_empty, operands))
    return _counted(lambda: token.step(x._replace(level_weights=weights_per_head(x.level_weights, x.v))))


def _like(x: Any) -> _Like:
    return (tuple(map(int, x.shape)), x.dtype) if isinstance(x, Tensor) else None


def _empty(like: _Like) -> Any:
    return None if like is None else torch.empty(like[0], dtype=like[1], device="meta")


def _tensors(given: tuple[Any, ...], count: int) -> tuple[_Like, ...]:
    return tuple(map(_like, given[:count]))


def _forward_flops(*given: Any, out_val: Any = None, **named: Any) -> int:
    return _sequence(_tensors(given, DIFFERENTIABLE), backward=False)


def _backward_flops(grad_o: Tensor, grad_state: Tensor, *given: Any, out_val: Any = None, **named: Any) -> int:
    return _sequence(_tensors(given, DIFFERENTIABLE), backward=True)


def _step_flops(*given: Any, out_val: Any = None, **named: Any) -> int:
    return _step(_tensors(given, len(Token._fields) - 1))


def register() -> None:
    """Has flop_counter use the formulas; the operators must be defined."""
    for operator, formula in (
        (torch.ops.llcompile.loglinear_attention, _forward_flops),
        (torch.ops.llcompile.loglinear_attention_backward, _backward_flops),
        (torch.ops.llcompile.loglinear_attention_step, _step_flops),
    ):
        register_flop_formula(operator, get_raw=True)(formula)


def register_in_place() -> None:
    """Likewise, of a step in place."""
    register_flop_formula(torch.ops.llcompile.loglinear_attention_step_, get_raw=True)(_step_flops)
