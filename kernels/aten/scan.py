"""The linear operator's states at the start of every chunk: an exclusive scan over chunks, in log depth.

Up: blocks pair up as in the tree. Down: a block hands its starting state to its left half, and that state carried
through the left half to its right half. Work and memory are linear in the number of chunks. The gradient is the same
scan from the other end with transposed transitions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llcompile.kernels.aten.transitions import Transition


class LinearStates(torch.autograd.Function):
    """The states that reach each chunk, and the one after the last."""

    @staticmethod
    def forward(ctx: Any, kind: Transition, p: Tensor | None, x: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """States `[M, N, K, R * V]` and `[M, 1, K, R * V]`.

        Args:
            kind: the algebra. p: transitions `[M, N, ...]` of the chunks. x: what each adds `[M, N, K, R * V]`.
            start: `[M, K, R * V]`, the state that reaches the first.
        """
        scan = Scan(kind, p, x.shape[1])
        states = scan.states(x, start)
        ctx.scan = scan
        ctx.save_for_backward(p, states)
        return states, kind.push(None if p is None else p[:, -1:], states[:, -1:]) + x[:, -1:]

    @staticmethod
    def backward(ctx: Any, d: Tensor, d_last: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """What reaches a chunk's end from everything after it is the gradient of what it adds."""
        kind, (p, states) = ctx.scan.kind, ctx.saved_tensors
        later = ctx.scan.states(d, d_last[:, 0], reverse=True)
        dp = None if p is None else kind.push_p_grad(p, states, later)
        d_start = d[:, 0] + kind.push_t(None if p is None else p[:, 0:1], later[:, :1])[:, 0]
        return None, dp, later, d_start if ctx.needs_input_grad[3] else None


class Scan:
    """Exclusive scans over the transitions `p` of N chunks (None: identities)."""

    def __init__(self, kind: Transition, p: Any, chunks: int) -> None:
        self.kind = kind
        self.transitions: list[Any] = [p]  # of the blocks of each level
        while chunks > 2:
            even = chunks - chunks % 2
            if p is not None:
                joined = kind.compose(p[:, 1:even:2], p[:, 0:even:2])
                p = torch.cat([joined, p[:, -1:]], 1) if chunks % 2 else joined
            self.transitions.append(p)
            chunks = (chunks + 1) // 2

    def states(self, x: Tensor, start: Tensor | None, reverse: bool = False) -> Tensor:
        """What reaches each chunk, `[M, N, K, R * V]`, when chunk i contributes `x[:, i]` to what passes it.

        `start [M, K, R * V]` enters at the first chunk (at the last one in reverse).
        """
        first, second = (1, 0) if reverse else (0, 1)  # the half of a pair that is passed first
        push = self.kind.push_t if reverse else self.kind.push
        blocks = [x]
        for p in self.transitions[:-1]:
            x = blocks[-1]
            even = x.shape[1] - x.shape[1] % 2
            carried = push(_at(p, second, even), x[:, first:even:2])
            joined = carried + x[:, second:even:2] if p is None else carried.add_(x[:, second:even:2])
            blocks.append(torch.cat([joined, x[:, -1:]], 1) if x.shape[1] % 2 else joined)
        return self._down(blocks, start, reverse)

    def _down(self, blocks: list[Tensor], start: Tensor | None, reverse: bool) -> Tensor:
        first, second = (1, 0) if reverse else (0, 1)
        push = self.kind.push_t if reverse else self.kind.push
        top = blocks[-1]
        above = top.new_zeros(top.shape[0], 1, *top.shape[2:]) if start is None else start[:, None]
        for p, x in zip(reversed(self.transitions), reversed(blocks), strict=True):
            n = x.shape[1]
            even = n - n % 2
            here = torch.empty_like(x)
            if n % 2:
                here[:, -1:] = above[:, -1:]
            if even:
                entering = above[:, : even // 2]
                here[:, first:even:2] = entering
                passed = push(_at(p, first, even), entering)
                torch.add(passed, x[:, first:even:2], out=here[:, second:even:2])
            above = here
        return above


def _at(p: Any, parity: int, even: int) -> Any:
    return None if p is None else p[:, parity:even:2]
