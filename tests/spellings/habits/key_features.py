"""Loops that go over something else than tokens: the key's features, the value's columns, the heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.spellings.habits.layer import Layer, misses
from tests.spellings.registry import Operands, positive

LENGTH = 16


@positive("a cumulative sum for each feature of the key", length=LENGTH, twins=misses("cummax"))
class EachFeature(Layer):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.zeros_like(v)
        for i in range(self.key):
            written = k[..., i : i + 1] * v
            y = y + q[..., i : i + 1] * (written.cummax(1).values if self.miss == "cummax" else written.cumsum(1))
        return y


@positive("a list of sums over features, normalised", length=LENGTH, twins=misses("cummax"))
class ListOfSums(Layer):
    """unbind, stack and sum; the divisor is made in the same way."""

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        return F.elu(q) + 1, F.elu(k) + 1, v

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "normaliser": lambda d: d + 1e-4}

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        above, below = [], []
        for a, b in zip(q.unbind(-1), k.unbind(-1), strict=True):
            written = b.unsqueeze(-1) * v
            past = written.cummax(1).values if self.miss == "cummax" else written.cumsum(1)
            above.append(a.unsqueeze(-1) * past)
            below.append(a * b.cumsum(1))
        return torch.stack(above).sum(0) / (torch.stack(below).sum(0).unsqueeze(-1) + 1e-4)


@positive("one channel of the value at a time", length=LENGTH, twins=misses("soft"))
class EachColumn(Layer):
    """A cumulative sum of keys times one number, for each column."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        columns = []
        for j in range(self.value):
            state = torch.cumsum(k * v[..., j, None], dim=1)
            columns.append((q * (state.tanh() if self.miss == "soft" else state)).sum(-1))
        return torch.stack(columns, dim=-1)


@positive("scores added feature by feature", length=LENGTH, twins=misses("abs"))
class ScoresByFeature(Layer):
    """Outer products over time, one feature after the other."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        scores: Tensor | float = 0.0
        for i in range(self.key):
            scores = scores + q[..., i].unsqueeze(-1) * k[..., i].unsqueeze(-2)
        assert isinstance(scores, Tensor)
        scores = scores.abs() if self.miss == "abs" else scores
        return (scores.tril() @ v).transpose(1, 2)
