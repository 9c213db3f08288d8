"""What C++ takes for per-level readouts: the structs of the entry points, field by field as in the template."""

from __future__ import annotations

import ctypes

from llcompile.kernels.cpp.call import Operand

_Pointer, _Integer = ctypes.c_void_p, ctypes.c_int64


class Call(ctypes.Structure):
    """One call of `forward` or `backward`."""

    _fields_ = [
        *((name, Operand) for name in ("query", "key", "output", "query_gradient", "key_gradient")),
        *((name, _Pointer) for name in ("starts", "lengths", "positions")),
        *((name, _Pointer) for name in ("initial", "final_state", "initial_gradient")),
        *((name, _Integer) for name in ("sequences", "tokens", "sets", "levels", "channels")),
    ]


class Step(ctypes.Structure):
    """One call of `step`."""

    _fields_ = [
        *((name, Operand) for name in ("query", "key")),
        *((name, _Pointer) for name in ("state", "next", "output")),
        *((name, _Integer) for name in ("state_row", "state_head", "heads", "width")),
        *((name, _Integer) for name in ("rows", "sets", "levels", "channels")),
    ]
