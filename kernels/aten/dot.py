"""Inner products that are there for their gradients alone."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """`<a, b x>`, a scalar, for `a [..., r, V]`, `b [..., r, K]` and `x [..., K, V]`.

    With the gradient of an output in place of `a` it stands for what `b x` adds to the output: it has the same
    gradients. Its value (0) is not computed, so the product `b x` costs nothing. The gradient that reaches it must
    be 1.
    """
    return cast(Tensor, _Dot.apply(a, b, x))


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, x)
        return a.new_zeros(())

    @staticmethod
    def backward(ctx: Any, one: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:  # type: ignore[override]
        a, b, x = ctx.saved_tensors
        return b @ x if ctx.needs_input_grad[0] else None, a @ x.mT, b.mT @ a
