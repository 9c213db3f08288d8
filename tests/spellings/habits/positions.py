"""Parameters and constants that have an axis of positions, before and behind the mixer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.habits.layer import Layer, faded, masked, misses, stepped, summed
from tests.spellings.registry import WIDTH, Operands, positive

LENGTH = 18


@positive(
    "learned positions are added",
    length=LENGTH,
    fixed=True,
    twins={"pairs": "each pair of tokens has a learned factor of its own", **misses("full")},
)
class Added(Layer):
    """x + pos, as in a ViT."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.pos = nn.Parameter(torch.randn(1, LENGTH, WIDTH) / 2)
        self.pairs = nn.Parameter(torch.rand(LENGTH, LENGTH))

    def tokens(self, x: Tensor) -> Tensor:
        return x + self.pos

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.miss != "pairs":
            return masked(q, k, v, self.miss)
        scores = torch.einsum("bthk,bshk->bhts", q, k) * self.pairs
        return torch.einsum("bhts,bshv->bthv", scores.tril(), v)


@positive("rows of a table of positions", length=LENGTH, twins=misses("cummax"))
class TableRows(Layer):
    """wpe.weight[:T] as a small GPT has it, a layer norm, then the mixer."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.wpe, self.ln = nn.Embedding(64, WIDTH), nn.LayerNorm(WIDTH)

    def tokens(self, x: Tensor) -> Tensor:
        return self.ln(x + self.wpe.weight[: x.size(1)])

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return summed(q, k, v, self.miss)


@positive("layer norm over time and width", decay="scalar", length=LENGTH, fixed=True, twins=misses("linear"))
class NormOfAll(Layer):
    """The norm's weight is [T, D]; heads forget at rates of their own."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.norm = nn.LayerNorm([LENGTH, WIDTH])
        nn.init.normal_(self.norm.weight, 1.0, 0.2)
        self.rate = nn.Parameter(torch.tensor([0.1, 0.5]))

    def tokens(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "log_decay": -self.rate}

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return faded(q, k, v, -self.rate, self.miss)


@positive("a head over all tokens", length=12, fixed=True, twins=misses("tanh"))
class HeadOfAll(Layer):
    """A classifier over flatten(1), as models of time series have it."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.head = nn.Linear(12 * WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.out(stepped(*self.parts(x), self.miss).flatten(2))).flatten(1))


@positive("a gate for each position, behind", length=LENGTH, fixed=True, twins=misses("softmax"))
class PositionGates(Layer):
    """The mixer's output times a learned number of its position, and a linear map along time at the very end."""

    mixed_at = "read"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.read, self.gate = nn.Identity(), nn.Parameter(torch.rand(LENGTH, 1))
        self.along = nn.Linear(LENGTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read(masked(*self.parts(x), self.miss).flatten(2)) * self.gate
        return self.along((x + self.out(y)).transpose(1, 2))


@positive("sines beside the features", length=LENGTH, twins=misses("window"))
class SinesBeside(Layer):
    """A buffer of sines, cut to the length, is concatenated to the tokens of each sequence."""

    pe: Tensor

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        angle = torch.arange(64.0)[:, None] * torch.exp(-torch.arange(4.0))
        self.register_buffer("pe", torch.cat([angle.sin(), angle.cos()], -1)[None])
        self.enter = nn.Linear(WIDTH + 8, WIDTH)

    def tokens(self, x: Tensor) -> Tensor:
        return self.enter(torch.cat([x, self.pe[:, : x.size(1)].expand(x.size(0), -1, -1)], dim=-1))


@positive("queries grow with the logarithm of their position", length=LENGTH, twins=misses("soft"))
class LogScaled(Layer):
    """q * log(t + 2): what some models do so that long contexts do not flatten."""

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        grown = torch.arange(2, x.shape[1] + 2, device=x.device).to(x.dtype).log() / math.log(LENGTH)
        return q * grown[:, None, None], k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return summed(q, k, v, self.miss)


@positive("positions of keys, for each head", length=LENGTH, fixed=True, twins=misses("abs"))
class KeyPositions(Layer):
    """A parameter [H, T, K] is added to what is projected, in [B, H, T, K]."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.of_keys = nn.Parameter(torch.randn(self.heads, LENGTH, self.key))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        return q, F.relu((k.transpose(1, 2) + self.of_keys).transpose(1, 2)), v
