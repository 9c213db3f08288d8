"""The level states at a row's last token, collected while the tree is walked.

The end of a row is one more reader of the tree: at each level where its chunk's index has a bit set, the left sibling
holds a bucket, which reaches the end through the transition from there (`e`), and `e` grows over the sibling. The
buckets inside the last chunk are sums over its tokens. Rows may end at different places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llcompile.kernels.aten.chunk import Chunks
from llcompile.kernels.levels import level


class EndPoint:
    """Level states at grid position `last [M]`."""

    def __init__(self, r: Chunks, last: Tensor) -> None:
        size = r.keys.shape[2]
        self.kind, self.chunk = r.kind, last // size
        self.rows = torch.arange(last.shape[0], device=last.device)
        offset, token = (last % size)[:, None], torch.arange(size, device=last.device)
        found = torch.where(token <= offset, level(offset, token), -1)  # [M, C]
        bucket = found[:, None] == torch.arange(size.bit_length(), device=last.device)[:, None]  # [M, log2 C + 1, C]
        keys, values = r.keys[self.rows, self.chunk], r.values[self.rows, self.chunk]
        self.pieces = [(keys.mT[:, None] * bucket[:, :, None]) @ values[:, None]]
        self.e = r.p[self.rows, self.chunk][:, None]

    def pass_level(self, m: int, p: Tensor, x: Tensor) -> None:
        """Read the left sibling among the blocks of level `m`."""
        index = self.chunk >> m
        left, exists = (index - 1).clamp(min=0), (index & 1 == 1)[:, None]
        pushed = self.kind.push(self.e, x[self.rows, left][:, None])
        self.pieces.append(pushed * exists[..., None, None])
        composed = self.kind.compose(self.e, p[self.rows, left][:, None])
        self.e = torch.where(exists.view(-1, *[1] * (composed.dim() - 1)), composed, self.e)

    def states(self, old: Tensor | None) -> Tensor:
        """States of the grid's levels at the end, and those of `old` carried there, `[M, levels, K, V]`."""
        return torch.cat(self.pieces if old is None else [*self.pieces, self.kind.push(self.e, old)], 1)
