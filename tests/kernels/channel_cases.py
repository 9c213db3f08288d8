"""Decays per channel around the span up to which a block's scores are products; run with the interpreter on."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from llcompile.kernels.operands import Operands
from llcompile.kernels.reference import reference_attention
from llcompile.kernels.triton import engine
from llcompile.kernels.triton.cost.counter import counting
from llcompile.kernels.triton.description import BLOCK, LARGEST, SPAN
from tests.kernels import triton_cases
from tests.kernels.kernel_cases import operands, relative_error

# Spans of log decays around the limit; sums of them are exact in float32.
STEP = 0.125
BELOW, AT, ABOVE = SPAN - STEP, SPAN, SPAN + STEP
KERNELS = ("chunk_scores", "chunk_scores_gradient")


def strong_blocks(log_decay: Tensor, spans: list[float], begins: list[int]) -> None:
    """Give blocks of each sequence, counted from its begin, a channel whose decays add up to the next of `spans`.

    The block's first token decays by far more, which lies between no two tokens of it.
    """
    for begin, end in zip(begins, [*begins[1:], log_decay.shape[1]], strict=True):
        for i, first in enumerate(range(begin, end, BLOCK)):
            tokens = min(BLOCK, end - first) - 1
            if tokens < 2:
                continue
            channel = log_decay[:, first : first + tokens + 1, :, i % log_decay.shape[-1]]
            channel[:] = 0
            channel[:, 0] = -1e4
            channel[:, tokens // 2] = -STEP
            channel[:, tokens] = STEP - spans[i % len(spans)]


def border(case: dict[str, Any], spans: list[float], bounds: list[int], size: float = 1.0) -> dict[str, Any]:
    """Errors and budget against the definition; products of fp32 tiles, in FLOPs, of the kernels of scores.

    `bounds` are those of packed sequences, or of one. The largest query is `size`.
    """
    x = operands(bounds[-1], **case)
    assert x["q"] is not None
    assert x["log_decay"] is not None
    x["log_decay"] = x["log_decay"].float()  # as models have them
    strong_blocks(x["log_decay"], spans, bounds[:-1])
    x["q"] *= size / x["q"].abs().max()
    packed = {}
    if len(bounds) > 2:
        starts = torch.tensor(bounds)
        packed = {"lengths": starts.diff(), "starts": starts[:-1]}
    call = Operands(*x.values(), **packed)  # type: ignore[arg-type]
    want = _definition(x, bounds)
    grad = triton_cases._gradients(want["o"], None)[0]
    with counting(lambda *_: None) as launches:
        o, _ = engine.forward(call, triton_cases.SCALE, False)
        found = engine.backward(call, triton_cases.SCALE, grad.to(o.dtype), None)
    ours = {"o": o, **dict(zip(x, found, strict=True))}
    errors = {}
    for name, target in want.items():
        mine = ours[name]
        assert mine is not None
        assert torch.isfinite(mine).all(), f"{name} is not finite"
        errors[name] = relative_error(mine, target)
    products = {
        kernel: sum(n for one in launches if one.kernel == kernel for k, n in one.numbers.items() if "tf32" in k)
        for kernel in KERNELS
    }
    return {"errors": errors, "budget": triton_cases.budget(x), "products": products}


def _definition(x: dict[str, Tensor | None], bounds: list[int]) -> dict[str, Tensor]:
    """Of each sequence by itself, put together; gradients with the output gradient that all have."""
    whole = triton_cases._definition(x, False, None)
    if len(bounds) == 2:
        return whole
    leaves = {n: t if t is None else t.detach().double().requires_grad_() for n, t in x.items()}
    parts = []
    for begin, end in itertools.pairwise(bounds):
        one = {n: t if t is None or t.dim() < 3 else t[:, begin:end] for n, t in leaves.items()}
        parts.append(reference_attention(**one, scale=triton_cases.SCALE)[0])  # type: ignore[arg-type]
    o = torch.cat(parts, 1)
    wanted = {n: t for n, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(o, list(wanted.values()), triton_cases._gradients(o, None)[0])
    return {"o": o.detach(), **dict(zip(wanted, grads, strict=True))}


def limits() -> tuple[float, float]:
    """The largest span and the largest operand of products."""
    return SPAN, LARGEST
