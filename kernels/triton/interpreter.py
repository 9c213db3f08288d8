"""Triton's interpreter, made right for bfloat16 and quicker; for tests and for counting (`cost`).

The interpreter is chosen before Triton is imported (`TRITON_INTERPRET=1`), so it has a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np


@cache
def prepare() -> None:
    """Change the interpreter of this process, once."""
    _teach_bfloat16()
    _patch_once()


def _teach_bfloat16() -> None:
    """Triton's interpreter cuts bfloat16 off instead of rounding it, and multiplies matrices of it as integers."""
    from triton import language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def cast(self: Any, x: Any, to: Any) -> Any:
        pair = (x.dtype.scalar, to.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if pair == (tl.float32, tl.bfloat16):  # to nearest, ties to even
            bits = np.ascontiguousarray(x.data).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)
        return plain_cast(self, x, to)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return plain_dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot = cast, dot  # type: ignore[method-assign]


def _patch_once() -> None:
    """The interpreter replaces Triton's language anew in each call of a device function: a quarter of its time.

    A launch has replaced it already, and puts back what it replaced at its end; what a device function's own module
    sees besides (`tl.core`) stays replaced from its first call on.
    """
    from triton.runtime import interpreter

    patched: set[Callable[..., Any]] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call  # type: ignore[method-assign]
