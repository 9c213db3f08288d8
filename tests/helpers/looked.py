"""A model with mixers of several kinds to look at."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.helpers import small

ACT = "<script>"  # stands in the source of a mixer


class Handmade(nn.Module):
    """Decayed scores with a mask, all written out."""

    diagonal = 1

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.qkv, self.fade = nn.Linear(width, 3 * width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        total = torch.log(torch.sigmoid(self.fade(x))).cumsum(1)
        decay = total - total.transpose(1, 2)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(self.diagonal)
        weights = decay.masked_fill(future, -math.inf).exp()
        return (q @ k.transpose(1, 2) * weights) @ v if ACT else v


class Ahead(Handmade):
    """A near miss: a token sees the next one."""

    diagonal = 2


class Mixed(nn.Module):
    """A call of a known function, a mixer that is written out, a near miss, attention."""

    def __init__(self) -> None:
        super().__init__()
        layers = [small.Attention(), small.DeltaMixer(), Handmade(), small.DeltaMixer(), Ahead()]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def inputs(length: int = 40) -> Tensor:
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(0))
