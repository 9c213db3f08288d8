"""What C++ takes: the structs of its entry points, field by field as in the templates, and tensors as operands."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

_TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_Pointer, _Integer = ctypes.c_void_p, ctypes.c_int64


class Operand(ctypes.Structure):
    """One tensor: its memory, its dtype and a stride for each axis, 0 along those that it does not have."""

    _fields_ = [("data", _Pointer), *((name, _Integer) for name in ("type", "row", "token", "head", "channel"))]


# As in `operands.Operands`, in the same order.
OPERANDS = ("query", "key", "value", "weight", "decay", "rate", "beta", "erase_query", "erase_key")


class Call(ctypes.Structure):
    """One call of `forward` or `backward`."""

    _fields_ = [
        *((name, Operand) for name in (*OPERANDS, "output")),
        *((f"{name}_gradient", Operand) for name in OPERANDS),
        *((name, _Pointer) for name in ("starts", "lengths", "positions")),
        *((name, _Pointer) for name in ("initial", "final_state", "initial_gradient")),
        *((name, _Integer) for name in ("initial_row", "initial_head", "final_row", "final_head")),
        *((name, _Integer) for name in ("sequences", "tokens", "heads", "groups", "key_dim", "value_dim")),
        *((name, _Integer) for name in ("slots", "weighted", "weight_heads", "segments")),
        *((name, _Integer) for name in ("parts", "part_size", "weight_part", "kept")),
        ("scale", ctypes.c_double),
    ]


class Step(ctypes.Structure):
    """One call of `step`."""

    _fields_ = [
        *((name, Operand) for name in (*OPERANDS, "output")),
        *((name, _Pointer) for name in ("state", "next", "routing")),
        *((name, _Integer) for name in ("state_row", "state_head", "next_row", "next_head")),
        *((name, _Integer) for name in ("set_heads", "routing_width", "routing_numbers")),
        *((name, _Integer) for name in ("rows", "heads", "groups", "key_dim", "value_dim", "slots", "weighted")),
        ("scale", ctypes.c_double),
    ]


def operand(x: Tensor | None) -> Any:
    """`[B, T, H, D]` or `[B, T, H]` as an operand; a decay per head `[H]` and rates `[H, D]` have no tokens."""
    if x is None:
        return Operand()
    lead = () if x.dim() > 2 else (0, 0)
    return Operand(x.data_ptr(), _TYPES[x.dtype], *lead, *x.stride())


def token_operand(x: Tensor | None) -> Any:
    """`[B, H, D]`, `[B, H]` or `[H]` as an operand of a step."""
    if x is None:
        return Operand()
    if x.dim() == 1:
        return operand(x)
    row, head, *channel = x.stride()
    return Operand(x.data_ptr(), _TYPES[x.dtype], row, 0, head, *channel)


def pointer(x: Tensor | None) -> int | None:
    """The address of a contiguous tensor."""
    return None if x is None else x.data_ptr()
