"""What the comparison with FLA runs in a process of its own, where Triton's interpreter is on from the start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.fla_calls import TWINS
from benchmarks.fla_interpreter import prepare
from llcompile.kernels import choice

HEADS, KEY_DIM, VALUE_DIM, LEVELS = 2, 64, 16, 9
Leaves = dict[str, Tensor]


def errors(name: str, tokens: int, change: str | None = None) -> dict[str, float]:
    """Largest differences of output and gradients by the largest value of FLA's, in fp32; both in the interpreter.

    The operand named by `change` is another one for ours.
    """
    prepare()
    twin = TWINS[name]
    leaves = twin.leaves(tokens, HEADS, KEY_DIM, VALUE_DIM, torch.float32, LEVELS)
    theirs = _results(twin.theirs(), leaves)
    if change is not None:
        leaves[change] = (leaves[change].detach() * 0.9).requires_grad_()
    with choice.use("triton"):  # raises where these kernels cannot run
        ours = _results(twin.ours(), leaves)
    return {n: ((ours[n] - x).abs().max() / x.abs().max()).item() for n, x in theirs.items()}


def _results(run: Callable[..., Tensor], leaves: Leaves) -> Leaves:
    """The output, and gradients for one that differs from token to token."""
    o = run(**leaves)
    grad = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    return {"o": o.detach()} | dict(zip(leaves, torch.autograd.grad(o, list(leaves.values()), grad), strict=True))
