"""Operands of a case, the same for ours and for peers: random, never zeros, which run faster and hide mistakes."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cuda.cases import LEVELS, Case

Tensors = dict[str, Tensor]


def make(case: Case, device: str, tokens: int | None = None) -> Tensors:
    """``q, k [B, T, G, K]``, ``v, grad [B, T, H, V]``, ``level_weights [B, T, H, 19]``, ``beta [B, T, H]`` (bf16),
    ``log_decay [B, T, H]`` or ``[B, T, H, K]`` (fp32), as far as the case has them.

    Keys have unit length, as every delta rule's have. ``tokens`` in place of T. Only ``both`` makes leaves.
    """
    random = torch.Generator(device).manual_seed(0)
    b, t, h = case.batch, case.length if tokens is None else tokens, case.heads

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(generator=random)

    def uniform(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).uniform_(generator=random)

    x = {
        "q": _unit(normal(b, t, case.groups, case.key_dim)),
        "k": _unit(normal(b, t, case.groups, case.key_dim)),
        "v": normal(b, t, h, case.value_dim),
    }
    if case.operator == "log-linear":
        x["level_weights"] = uniform(b, t, h, LEVELS)
    if case.operator != "softmax" and case.decay != "none":
        channels = (case.key_dim,) if case.decay == "channel" else ()
        x["log_decay"] = uniform(b, t, h, *channels, dtype=torch.float32).mul_(-0.1).sub_(1e-4)
    if case.operator != "softmax" and case.correction == "delta":
        x["beta"] = uniform(b, t, h)
    if case.phase == "both":
        x = {name: tensor.requires_grad_() for name, tensor in x.items()}
        x["grad"] = normal(b, t, h, case.value_dim)
    return x


def _unit(x: Tensor) -> Tensor:
    """In place, row by row of the batch: temporaries of the largest cases would not fit."""
    for row in x:
        row /= torch.linalg.vector_norm(row, dim=-1, keepdim=True)
    return x


def leaves(x: Tensors) -> list[Tensor]:
    """What has a gradient."""
    return [tensor for tensor in x.values() if tensor.requires_grad]


def bytes_of(case: Case) -> int:
    """The least that a case keeps in memory at once: operands and output, and with ``both`` also their gradients."""
    if case.phase == "decode":
        return 0
    per_head = 2 * case.value_dim + (LEVELS if case.operator == "log-linear" else 0) + (case.correction == "delta")
    elements = 2 * case.groups * case.key_dim + case.heads * per_head
    decays = {"none": 0, "scalar": 1, "channel": case.key_dim}[case.decay] * case.heads
    total = case.batch * case.length * (2 * elements + 4 * decays)
    return total * (2 if case.phase == "both" else 1)
