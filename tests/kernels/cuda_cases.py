"""Operands on a GPU, and the Triton kernels' results beside those of the definition and of the ATen lowering."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llcompile.kernels.aten import sequence as aten
from llcompile.kernels.operands import DIFFERENTIABLE, Operands
from llcompile.kernels.reference import reference_attention
from llcompile.kernels.triton import engine
from tests.kernels.kernel_cases import operands, relative_error

NAMES = Operands._fields[:DIFFERENTIABLE]
SCALE = 0.7
Results = dict[str, Tensor]
Passes = Callable[[Operands, Tensor], Results]


def on_gpu(dtype: torch.dtype, shared: int = 1, **case: object) -> Operands:
    """Random operands on the GPU, rounded to ``dtype``, log decays to float32 as models have them.

    ``shared`` heads have the same level weights.
    """
    x = operands(**{"batch": 1, "groups": 1, "heads": 2, **case})  # type: ignore[arg-type]
    if x["level_weights"] is not None:
        x["level_weights"] = x["level_weights"][:, :, ::shared]
    types = [torch.float32 if name in ("log_decay", "decay_rate", "initial_state") else dtype for name in x]
    found = (t if t is None else t.to("cuda", to) for t, to in zip(x.values(), types, strict=True))
    return Operands(*found, None)  # type: ignore[arg-type]


def doubled(x: Operands) -> Operands:
    return Operands(*(t if t is None else t.double() for t in x))  # type: ignore[arg-type]


def kernels(x: Operands, grad: Tensor) -> Results:
    return {"o": engine.forward(x, SCALE, False)[0], **named(engine.backward(x, SCALE, grad, None))}


def lowering(x: Operands, grad: Tensor) -> Results:
    x, grad = doubled(x), grad.double()
    return {"o": aten.forward(x, SCALE, False)[0], **named(aten.backward(x, SCALE, grad, None))}


def definition(x: Operands, grad: Tensor) -> Results:
    leaves = {n: t.detach().cpu().double().requires_grad_() for n, t in zip(NAMES, x, strict=False) if t is not None}
    o = reference_attention(**leaves, scale=SCALE)[0]
    found = torch.autograd.grad(o, list(leaves.values()), grad.cpu().double())
    return {"o": o.detach(), **dict(zip(leaves, found, strict=True))}


def named(grads: list[Tensor | None]) -> Results:
    return {n: t for n, t in zip(NAMES, grads, strict=True) if t is not None}


def compare(x: Operands, want: Passes, ours: Passes = kernels) -> None:
    """Output and all gradients of `ours` within what the operands' dtype loses; bitwise the same twice."""
    grad = torch.randn(x.v.shape, generator=torch.Generator().manual_seed(1)).to("cuda", x.v.dtype)
    found, again, target = ours(x, grad), ours(x, grad), want(x, grad)
    # Matrix products of fp32 operands may use TF32, ten bits of mantissa; bf16 has seven, fp16 ten.
    loss = max(torch.finfo(x.q.dtype).eps, 2**-10)
    for name, value in target.items():
        assert torch.isfinite(found[name]).all(), f"{name} is not finite"
        assert torch.equal(found[name], again[name]), f"{name} differs from run to run"
        error = relative_error(found[name].cpu().reshape(value.shape), value.cpu())
        assert error <= 4 * loss, f"{name}: {error:.2e} > {4 * loss:.2e}"
