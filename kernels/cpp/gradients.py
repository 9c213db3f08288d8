"""Memory for the gradients of one backward pass: what C++ writes, or adds to, and what is summed after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llcompile.kernels.cpp.call import OPERANDS, operand
from llcompile.kernels.description import Description
from llcompile.kernels.operands import WITH_TOKENS, Operands

# What all heads of a group have in common.
_GROUPED = ("query", "key", "erase_query", "erase_key")


def for_tokens(x: Operands, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for a result with tokens: zeros where some may belong to no sequence."""
    return (torch.empty if x.lengths is None else torch.zeros)(tuple(shape), dtype=dtype)


class Gradients:
    """A tensor for each operand. Those that are added to, by one head after another, have an axis of parts of the heads
    in front: each part is one thread's alone, and their sum is the gradient.
    """

    def __init__(self, x: Operands, d: Description, sums: torch.dtype) -> None:
        self.x, self.sums, self.scan = x, sums, d.decay == "rate"
        self.added = (*_GROUPED, "weight") if self.scan else _GROUPED if d.repeat > 1 else ()
        self.parts = self._parts(d.repeat)
        inputs = zip(OPERANDS, x[:WITH_TOKENS], strict=True)
        self.made = {name: t if t is None else self._memory(name, t) for name, t in inputs}  # type: ignore[arg-type]

    def fields(self) -> dict[str, Any]:
        """Fields of a call."""
        found = {name: t[0] if name in self.added else t for name, t in self.made.items() if t is not None}
        sizes = {"parts": self.parts, "part_size": found["query"].numel()}
        w = self.made["weight"]
        if w is not None and "weight" in self.added and len(w) > 1:
            sizes["weight_part"] = w[0].numel()
        return {f"{name}_gradient": operand(t) for name, t in found.items()} | sizes

    def summed(self) -> list[Tensor | None]:
        """The gradients, in the order of the operands."""
        return [t if t is None else self._sum(name, t) for name, t in self.made.items()]

    def _parts(self, repeat: int) -> int:
        """Enough for all threads: of a group's heads, or in a scan of all heads of a sequence."""
        tasks, most = (1, self.x.v.shape[2]) if self.scan else (self.x.q.shape[2], repeat)
        return max(min(most, -(-torch.get_num_threads() // max(self.x.rows * tasks, 1))), 1)

    def _memory(self, name: str, t: Tensor) -> Tensor:
        if name == "rate":  # of each sequence
            return torch.empty(self.x.rows, 1, *t.shape, dtype=self.sums)
        if t.dim() == 1:  # a decay per head, of each token
            return for_tokens(self.x, self.x.v.shape[:3], self.sums)
        if name not in self.added:
            return for_tokens(self.x, t.shape, t.dtype)
        parts = 1 if name == "weight" and t.shape[2] == self.x.v.shape[2] else self.parts  # no head shares its own
        shape = (parts, *t.shape)
        return torch.zeros(shape, dtype=self.sums) if self.scan else for_tokens(self.x, shape, self.sums)

    def _sum(self, name: str, t: Tensor) -> Tensor:
        if name in self.added:
            return t.sum(0) if len(t) > 1 else t[0]
        per_head = name == "decay" and self.x.log_decay is not None and self.x.log_decay.dim() == 1
        return t.sum((0, 1)) if name == "rate" or per_head else t
