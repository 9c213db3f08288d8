"""Operands that mix time themselves: short convolutions by hand, token shifts, running means and maxima."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.habits.layer import Layer, faded, masked, misses, stepped, summed
from tests.spellings.registry import WIDTH, Operands, negative, positive

LENGTH = 16


def before(x: Tensor, by: int = 1) -> Tensor:
    """The token `by` steps earlier, zeros at the start; time is the second axis."""
    return torch.cat([torch.zeros_like(x[:, :by]), x[:, :-by]], dim=1)


@positive("keys of two tokens", length=LENGTH, twins=misses("softmax"))
class TwoTokenKeys(Layer):
    """A key is its token's plus the one before it: an induction head's way to look one back."""

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        return q, k + before(k), v


@positive("short convolutions as a sum of shifts", length=LENGTH, twins=misses("cummax"))
class Shifts(Layer):
    """Three taps for each channel of queries, keys and values, then silu."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.taps = nn.Parameter(torch.randn(3, 3, WIDTH))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = []
        for taps, project in zip(self.taps, (self.q, self.k, self.v), strict=True):
            rows = F.pad(x, (0, 0, 2, 0))
            y = sum(rows[:, i : i + x.shape[1]] * taps[i] for i in range(3))
            made.append(F.silu(project(y)).unflatten(-1, (2, -1)))
        q, k, v = made
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return summed(q, k, v, self.miss)


@positive("lerp with the token before, behind the projections", length=LENGTH, fixed=True, twins=misses("tanh"))
class Lerped(Layer):
    """RWKV's token shift, but of keys and values."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.mu = nn.Parameter(torch.rand(2, 1))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        return q, torch.lerp(k, before(k), self.mu), torch.lerp(v, before(v), self.mu)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return stepped(q, k, v, self.miss)


@positive("running means as keys", length=LENGTH, fixed=True, twins=misses("full"))
class RunningMeans(Layer):
    """An exponential moving average of the keys, made by a loop before the mixer."""

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        mean, means = torch.zeros_like(k[:, 0]), []
        for t in range(x.shape[1]):
            mean = 0.8 * mean + 0.2 * k[:, t]
            means.append(mean)
        return q, torch.stack(means, 1), v


@positive("exponentials of keys less their running maximum", length=LENGTH, twins=misses("abs"))
class LessMaximum(Layer):
    """exp(k - cummax k): no key is larger than one."""

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        return q - 1, torch.exp(k - k.cummax(dim=1).values), v


@positive("a depthwise convolution of q, k and v together", decay="scalar", length=LENGTH, twins=misses("linear"))
class Depthwise(Layer):
    """nn.Conv1d over all channels, cut at the end of time, silu, split."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv = nn.Linear(WIDTH, 38)
        self.conv = nn.Conv1d(38, 38, 4, padding=3, groups=38)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = F.silu(self.conv(self.qkv(x).transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        q, k, v = (z.unflatten(-1, (2, -1)) for z in y.split([12, 12, 14], -1))
        return q, k, v

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "log_decay": torch.tensor([-0.3, -0.05]).to(x)}

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return faded(q, k, v, torch.tensor([-0.3, -0.05]).to(q), self.miss)


@positive("keys less the mean of the past", length=LENGTH, twins=misses("one ahead"))
class Centred(Layer):
    """Keys are centred by a cumulative mean."""

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        count = torch.arange(1, x.shape[1] + 1, device=x.device).view(-1, 1, 1)
        return q, k - k.cumsum(1) / count, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked(q, k, v, self.miss)


@positive("keys less a weighed mean of the past", length=LENGTH, twins=misses("full", "softmax"))
class Weighed(Layer):
    """The mean is of keys times a gate, over the sum of gates; values are centred, too."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.gate = nn.Linear(WIDTH, 2)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        gate = torch.sigmoid(self.gate(x)).unsqueeze(-1)
        sums = gate.cumsum(1)
        return q, k - (gate * k).cumsum(1) / sums, v - (gate * v).cumsum(1) / sums


@positive("keys less the mean of the past, in a loop", length=LENGTH, fixed=True, twins=misses("tanh"))
class CentredLoop(Layer):
    """Keys centred by a cumulative mean; the state is a loop's."""

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        count = torch.arange(1, x.shape[1] + 1, device=x.device).view(-1, 1, 1)
        return q, k - torch.cumsum(k, dim=1) / count, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return stepped(q, k, v, self.miss)


@negative("keys less a mean that looks ahead", "not causal: a key depends on the token after it", length=LENGTH)
class Ahead(Layer):
    """Keys less a mean that takes in the token after."""

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        count = torch.arange(1, x.shape[1] + 1, device=x.device).view(-1, 1, 1)
        ahead = torch.cat([k[:, 1:], torch.zeros_like(k[:, :1])], 1)
        return q, k - ahead.cumsum(1) / count, v


@negative("keys less the mean of all tokens", "not causal: a key depends on all tokens", length=LENGTH)
class OfAll(Layer):
    """Another control."""

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        return q, k - k.mean(1, keepdim=True), v
