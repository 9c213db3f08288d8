"""The level states at a row's last token, collected while the tree is walked.

The end of a row is one more reader of the tree: at each level where its chunk's index has a bit set, the left sibling
holds a bucket, which reaches the end through the transition from there (`e`), and `e` grows over the sibling. The
buckets inside the last chunk are sums over its tokens. Rows may end at different places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llcompile.kernels.aten.transitions import Transition
from llcompile.kernels.levels import level


class EndPoint:
    """Level states at grid position `last [M]`."""

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
        self.pieces = [(self.keys.mT[:, None] * self.bucket[:, :, None]) @ self.values[:, None]]

    def pass_level(self, m: int, p: Any, x: Tensor) -> None:
        """Read the left sibling among the blocks of level `m`."""
        index = self.chunk >> m
        left, exists = (index - 1).clamp(min=0), (index & 1) == 1
        p_left = None if p is None else p[self.rows, left][:, None]
        x_left = x[self.rows, left][:, None]
        self.pieces.append(self.kind.push(self.e, x_left) * _like(exists, x_left))
        if self.e is not None:
            self.e = torch.where(_like(exists, self.e), self.kind.compose(self.e, p_left), self.e)

    def states(self) -> Tensor:
        """States of the grid's levels at the end, `[M, levels, K, R * V]`."""
        return torch.cat(self.pieces, 1)

    def push_old(self, x: Tensor) -> Tensor:
        """Carry states `[M, L, K, R * V]` from the start of the grid to the end (after the last level)."""
        return self.kind.push(self.e, x)


def _like(flag: Tensor, x: Tensor) -> Tensor:
    """`flag [M]` with as many axes as `x`."""
    return flag[(...,) + (None,) * (x.dim() - 1)]
