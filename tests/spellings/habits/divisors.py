"""More that divides a row of scores: sums without a gradient, sums of gates, counts in a buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.spellings.habits.layer import misses
from tests.spellings.habits.normalisers import LENGTH, Divided, Gated, at
from tests.spellings.registry import Operands, negative, positive


@positive(
    "scores over their own detached sum",
    decay="scalar",
    length=LENGTH,
    twins={"absolute": "the divisor sums the sizes of scores"},
)
class DetachedScores(Divided):
    """RetNet as torchscale has it: the scores are divided before they meet the values."""

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "normaliser": lambda d: d.abs().clamp(min=0.5)}

    def divide(self, scores: Tensor, kernel: Tensor, v: Tensor) -> Tensor:
        held = scores.detach()
        size = (held.abs() if self.miss == "absolute" else held).sum(-1, keepdim=True).abs().clamp(min=0.5)
        return at((held if self.miss == "detached" else scores) / size, v)


@negative("scores without a gradient over their own sum", "scores are detached, values are not", length=LENGTH)
class DetachedAll(DetachedScores):
    """The control of the spelling above that no number tells from it."""

    def __init__(self) -> None:
        super().__init__("detached")


@positive("counts in a buffer", decay="scalar", length=LENGTH, twins=misses("linear"))
class Counted(Divided):
    """Each row times a number of the model for its position."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.register_buffer("share", 1 / torch.arange(1, LENGTH + 1).sqrt(), persistent=False)

    def operands(self, x: Tensor) -> Operands:
        given = super().operands(x)
        return {**given, "q": given["q"] * self.share[: x.shape[1], None, None]}

    def divide(self, scores: Tensor, kernel: Tensor, v: Tensor) -> Tensor:
        return at(scores * self.share[: v.shape[1], None], v)


@positive(
    "scores over the sum of their gates",
    decay="scalar",
    length=LENGTH,
    twins={"columns": "columns are divided by their sums: not causal", "exponentiated": "softmax-like attention"},
)
class OverGates(Gated):
    """What each token has written is weighed by gates alone, whose sum divides, a row's largest taken off both."""

    def operands(self, x: Tensor) -> Operands:
        given, pairs = super().operands(x), self.pairs(x)
        size = pairs.exp().sum(-1).transpose(1, 2).unsqueeze(-1)
        return {**given, "q": given["q"] / size}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        log, scores = self.pairs(x), torch.einsum("bthk,bshk->bhts", q, k)
        if self.miss == "exponentiated":
            log, scores = log + scores, torch.ones_like(scores)
        weights = torch.exp(log - log.amax(-1, keepdim=True))
        size = weights.sum(-2 if self.miss == "columns" else -1, keepdim=True)
        return x + self.out(self.read(at(scores * weights / size, v)).flatten(2))
