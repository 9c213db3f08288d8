"""The level states at a row's last token, collected while the tree is walked.

The end of a row is one more reader of the tree: at each level where its chunk's index has a bit set, the left sibling
holds a bucket, which reaches the end through the transition from there (``e``), and ``e`` grows over the sibling. The
buckets inside the last chunk are sums over its tokens. Rows may end at different places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llcompile.kernels.aten.transitions import Transition, zeros_like
from llcompile.kernels.levels import level


class EndPoint:
    """Level states at grid position ``last [M]``, and their gradients."""

    def __init__(self, kind: Transition, last: Tensor, chunk: int, p: Any, keys: Tensor, values: Tensor) -> None:
        self.kind, self.chunk = kind, last // chunk
        self.rows = torch.arange(last.shape[0], device=last.device)
        self.inner = chunk.bit_length()
        offset = last % chunk
        token = torch.arange(chunk, device=last.device)
        lvl = torch.where(token <= offset[:, None], level(offset[:, None], token), -1)  # [M, C]
        self.bucket = (lvl[:, None] == torch.arange(self.inner, device=last.device)[:, None]).to(values.dtype)
        self.keys, self.values = keys[self.rows, self.chunk], values[self.rows, self.chunk]  # [M, C, K], [M, C, R * V]
        self.e = None if p is None else p[self.rows, self.chunk][:, None]  # [M, 1, ...]
        self.trail: list[tuple[Any, Any, Tensor]] = []  # e, left transition and left state of each level
        self.pieces = [(self.keys.mT[:, None] * self.bucket[:, :, None]) @ self.values[:, None]]

    def pass_level(self, m: int, p: Any, x: Tensor) -> None:
        """Read the left sibling among the blocks of level ``m``."""
        left, exists = self._left(m)
        p_left = None if p is None else p[self.rows, left][:, None]
        x_left = x[self.rows, left][:, None]
        self.pieces.append(self.kind.push(self.e, x_left) * _like(exists, x_left))
        self.trail.append((self.e, p_left, x_left))
        if self.e is not None:
            self.e = torch.where(_like(exists, self.e), self.kind.compose(self.e, p_left), self.e)

    def _left(self, m: int) -> tuple[Tensor, Tensor]:
        index = self.chunk >> m
        return (index - 1).clamp(min=0), (index & 1) == 1

    def states(self) -> Tensor:
        """States of the grid's levels at the end, ``[M, levels, K, R * V]``."""
        return torch.cat(self.pieces, 1)

    def push_old(self, x: Tensor) -> Tensor:
        """Carry states ``[M, L, K, R * V]`` from the start of the grid to the end (after the last level)."""
        return self.kind.push(self.e, x)

    def backward(self, dstates: Tensor, old: Tensor | None, dold: Tensor | None) -> Tensor | None:
        """Take in the gradients of :meth:`states` and of what :meth:`push_old` gave; the gradient of the old states."""
        de, d_initial = zeros_like(self.e), None
        if old is not None and dold is not None:
            d_initial = self.kind.push_t(self.e, dold)
            if self.e is not None:
                de = self.kind.push_p_grad(self.e, old, dold).sum(1, keepdim=True)
        self.node_grads: list[tuple[Any, Tensor]] = []
        for m in reversed(range(len(self.trail))):
            e, p_left, x_left = self.trail[m]
            exists = self._left(m)[1]
            dx = dstates[:, self.inner + m][:, None] * _like(exists, x_left)
            dp_left = None
            if e is not None:
                de_joined, dp_left = self.kind.compose_grad(e, p_left, de)
                dp_left = dp_left * _like(exists, p_left)
                de = torch.where(_like(exists, de), de_joined, de) + self.kind.push_p_grad(e, x_left, dx)
            self.node_grads.insert(0, (dp_left, self.kind.push_t(e, dx)))
        self.de = de
        dinner = dstates[:, : self.inner]  # [M, levels inside, K, R * V]
        self.dvalues = ((self.bucket[..., None] * self.keys[:, None]) @ dinner).sum(1)
        self.dkeys = ((self.bucket[..., None] * self.values[:, None]) @ dinner.mT).sum(1)
        return d_initial

    def add_level_grad(self, m: int, dp: Any, dx: Tensor) -> None:
        """Add the gradients of the blocks of level ``m``."""
        left, _ = self._left(m)
        dp_left, dx_left = self.node_grads[m]
        dx[self.rows, left] += dx_left[:, 0]
        if dp is not None:
            dp[self.rows, left] += dp_left[:, 0]

    def add_chunk_grad(self, dp: Any, dkeys: Tensor, dvalues: Tensor) -> None:
        """Add the gradients of the chunks' transitions and tokens."""
        dkeys[self.rows, self.chunk] += self.dkeys
        dvalues[self.rows, self.chunk] += self.dvalues
        if dp is not None:
            dp[self.rows, self.chunk] += self.de[:, 0]


def _like(flag: Tensor, x: Tensor) -> Tensor:
    """``flag [M]`` with as many axes as ``x``."""
    return flag[(...,) + (None,) * (x.dim() - 1)]
