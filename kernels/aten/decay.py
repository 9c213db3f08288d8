"""Decays inside one chunk: scores between its tokens, and factors from its start and to its end.

Everything is built from sums of the log decays that lie *between* two tokens, each summed on its own; nothing is the
difference of two cumulative sums. So exponents are at most 0, a log decay of -1e4 next to one of -1e-4 costs no
precision, and -inf is a factor of exactly 0 with a gradient of exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Decay:
    """Log decays `g [..., N, C, K]`, one per key channel, or `[..., N, C, 1]`, one for all.

    For each scale `h = 1, 2, 4, ...` tokens in the right half of a block of `2 h` see those in its left half through
    the point between the halves: queries decayed from there, keys decayed to there, both by exponents of at most 0.
    Every pair of tokens belongs to exactly one scale, which is its level, and no tensor is larger than the operands.
    """

    def __init__(self, g: Tensor) -> None:
        self.between: list[tuple[Tensor, Tensor]] = []  # for each scale, factors from the point and to it
        start, end = g, torch.zeros_like(g)  # sums from the start and to the end of blocks of h tokens
        for i in range(g.shape[-2].bit_length() - 1):
            (left, right), (to_right, to_end) = _halves(start, 1 << i), _halves(end, 1 << i)
            self.between.append((right.exp(), to_right.exp()))
            start = torch.cat([left, right + left[..., -1:, :]], -2).flatten(-3, -2)
            end = torch.cat([to_right + right[..., -1:, :], to_end], -2).flatten(-3, -2)
        self.from_start, self.to_end = start.exp(), end.exp()  # up to and with each token; after it
        self.before = torch.cat([torch.ones_like(self.from_start[..., :1, :]), self.from_start[..., :-1, :]], -2)
        self.total = start[..., -1, :]  # the logarithm of whole chunks' decay

    def scores(self, rows: Tensor, k: Tensor) -> Tensor:
        """Decayed products of `rows` and `k`, `[..., N, C, K] -> [..., N, C, C]`, causal."""
        if self.total.shape[-1] == 1:  # the heads of a group have one product
            factors = _assembled(torch.ones_like(self.from_start[..., 0]), [a * b.mT for a, b in self.between])
            return rows @ k.mT * factors
        across = [
            (_halves(rows, 1 << i)[1] * from_left) @ (_halves(k, 1 << i)[0] * to_right).mT
            for i, (from_left, to_right) in enumerate(self.between)
        ]
        return _assembled((rows * k).sum(-1).expand(self.from_start.shape[:-1]), across)

    def scores_before(self, rows: Tensor, k: Tensor) -> Tensor:
        """As `scores`, with rows that do not see their own token and its decay: strictly causal."""
        sooner = torch.cat([rows[..., 1:, :], torch.zeros_like(rows[..., :1, :])], -2)
        scores = self.scores(sooner, k)
        return torch.cat([torch.zeros_like(scores[..., :1, :]), scores[..., :-1, :]], -2)


def _assembled(diagonal: Tensor, across: list[Tensor]) -> Tensor:
    """`[..., C, C]` from its diagonal `[..., C]` and the blocks `[..., C / 2h, h, h]` across halves at each scale."""
    inside = diagonal[..., None, None]  # blocks [..., C / h, h, h]
    for block in across:
        left, right = inside.unflatten(-3, (-1, 2)).unbind(-3)
        inside = torch.cat([torch.cat([left, torch.zeros_like(left)], -1), torch.cat([block, right], -1)], -2)
    return inside.squeeze(-3)


def _halves(x: Tensor, h: int) -> tuple[Tensor, ...]:
    """The left and the right halves of blocks of `2 h` tokens: `[..., C, K] -> 2 x [..., C / 2h, h, K]`."""
    return x.unflatten(-2, (-1, 2, h)).unbind(-3)
