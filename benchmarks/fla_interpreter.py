"""FLA's own kernels in Triton's interpreter, on CPU tensors: an independent author's form to compare with and to count.

FLA (flash-linear-attention, tried with 0.6) is imported from its wheel as it is. What of it the interpreter cannot run
is changed where the interpreter reads it: numbers from Python's loops have no `.to`, masks may be integers, and there
is nothing to time, so an autotuner takes its first configuration.
"""

from __future__ import annotations

import ast
from functools import cache
from typing import Any

import numpy as np

from llcompile.kernels.triton import interpreter as ours


@cache
def prepare() -> None:
    """Change the interpreter of this process, once; before FLA is imported."""
    from triton.runtime import autotuner, interpreter

    ours.prepare()
    interpreter.FunctionRewriter.ast_transformer = _casts()
    vars(interpreter)["_as_number"] = _as_number
    builder: Any = interpreter.InterpreterBuilder
    for name, mask_at in (("create_masked_load", 1), ("create_masked_store", 2)):
        setattr(builder, name, _with_boolean_mask(getattr(builder, name), mask_at))
    autotuner.Autotuner._bench = lambda *args, **kwargs: [0.0, 0.0, 0.0]  # type: ignore[method-assign]


def _with_boolean_mask(plain: Any, mask_at: int) -> Any:
    def access(self: Any, *args: Any) -> Any:
        mask = args[mask_at]
        mask.data = np.asarray(mask.data, dtype=bool)
        return plain(self, *args)

    return access


def _casts() -> Any:
    from triton.runtime.interpreter import ASTTransformer

    class Casts(ASTTransformer):  # type: ignore[misc, unused-ignore]
        """`x.to(t)` where `x` may be a number of Python's."""

        def visit_Call(self, node: ast.Call) -> ast.AST:
            """Have numbers made tensors first."""
            self.generic_visit(node)
            if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
                node.func.value = ast.Call(ast.Name("_as_number", ast.Load()), [node.func.value], [])
            return node

    return Casts()


def _as_number(x: Any) -> Any:
    """A tensor of one number for one of Python's; anything else as it is."""
    from triton.runtime import interpreter

    return interpreter.interpreter_semantic.to_tensor(x) if isinstance(x, (int, float)) else x
