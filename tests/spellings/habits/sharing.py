"""Operands that are one tensor, groups of heads, and layouts other than [B, T, H, K]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.habits.layer import Layer, faded, masked, misses, stepped, summed
from tests.spellings.registry import WIDTH, Mixer, Operands, negative, positive

LENGTH = 15


@positive("query, key and value are one tensor", length=LENGTH, twins=misses("softmax"))
class AllOne(Layer):
    """The tokens themselves, in heads of five."""

    value = 10

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = x.unflatten(-1, (2, 10))
        return z, z, z

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "scale": 0.1}

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked(q, k, v, self.miss) / 10


@positive("a tensor times itself, twice", length=LENGTH, twins=misses("abs", "window"))
class ProductOfItself(AllOne):
    """tril(x x^T) x by matmul, with a transpose of the tokens and nothing else in between."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        z = q.transpose(1, 2)
        scores = (z @ z.mT).tril()
        if self.miss:
            scores = scores.abs() if self.miss == "abs" else scores.triu(-4)
        return (scores @ z / 10).transpose(1, 2)


@positive("the value is the query", decay="scalar", length=LENGTH, twins=misses("one ahead"))
class ValueIsQuery(Layer):
    """What is read is what others read by."""

    value = 6

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.q(x).unflatten(-1, (2, 6))
        return z, self.k(x).unflatten(-1, (2, 6)), z

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "log_decay": torch.tensor([-0.1, -0.3])}

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return faded(q, k, v, torch.tensor([-0.1, -0.3]), self.miss)


@positive("the key is the value", length=LENGTH, fixed=True, twins=misses("tanh"))
class KeyIsValue(Layer):
    """One projection for both, outer products of which are summed up: no features of keys."""

    value = 6

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.k(x).unflatten(-1, (2, 6))
        return self.q(x).unflatten(-1, (2, 6)), z, z

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return stepped(q, k, v, self.miss)


@positive("keys and values repeated for a group", decay="scalar", length=LENGTH, twins=misses("linear"))
class Repeated(Layer):
    """repeat_kv of an LLM: expand and reshape, three query heads to a key head."""

    heads, value = 6, 4

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.k, self.v = nn.Linear(WIDTH, 2 * 6), nn.Linear(WIDTH, 2 * 4)
        self.rate = nn.Parameter(torch.linspace(0.05, 0.6, 6))

    def repeat(self, z: Tensor) -> Tensor:
        b, t, h, d = z.shape
        return z[:, :, :, None].expand(b, t, h, 3, d).reshape(b, t, 3 * h, d)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (h, -1)) for f, h in ((self.q, 6), (self.k, 2), (self.v, 2)))
        return q, self.repeat(k), self.repeat(v)

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "log_decay": -self.rate}

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return faded(q, k, v, -self.rate, self.miss)


@positive("one key for all heads", length=LENGTH, twins=misses("cummax"))
class OneKey(Layer):
    """A single key head and a single value head, broadcast to four queries."""

    heads = 4

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.k, self.v = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 7)

    def operands(self, x: Tensor) -> Operands:
        v = self.v(x).unsqueeze(2).expand(-1, -1, 4, -1)
        return {"q": self.q(x).unflatten(-1, (4, 6)), "k": self.k(x).unsqueeze(2).expand(-1, -1, 4, -1), "v": v}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x).unflatten(-1, (4, 6)), self.k(x), self.v(x)
        state = k[..., None] * v[..., None, :]
        state = state.cummax(1).values if self.miss == "cummax" else torch.cumsum(state, 1)
        return x + self.out((q @ state).flatten(2))


@positive("time first, heads in the batch", length=LENGTH, twins=misses("abs"))
class TimeFirst(Layer):
    """nn.MultiheadAttention's way: [T, B, D] -> [T, B * H, K] -> bmm."""

    layout = "tbd"
    value = 6

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed.transpose(0, 1)

    def operands(self, x: Tensor) -> Operands:
        return super().operands(x.transpose(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        t, b, _ = x.shape
        q, k, v = (f(x).contiguous().view(t, b * 2, -1).transpose(0, 1) for f in (self.q, self.k, self.v))
        scores = torch.bmm(q, k.transpose(1, 2)).tril()
        scores = scores.abs() if self.miss == "abs" else scores
        y = torch.bmm(scores, v).transpose(0, 1).contiguous().view(t, b, -1)
        return x + self.out(y)


@positive("a list of heads", length=LENGTH, twins=misses("window"))
class ListOfHeads(Layer):
    """Each head has projections of its own; what they give is stacked as [B, H, T, K]."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.each = nn.ModuleList(nn.Linear(WIDTH, 6 + 6 + 7) for _ in range(2))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = torch.stack([head(x) for head in self.each], dim=2).split([6, 6, 7], dim=-1)
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.mT).tril()
        scores = scores.triu(-4) if self.miss == "window" else scores
        return (scores @ v).transpose(1, 2)


@positive("q, k and v in front of the batch", length=LENGTH, twins=misses("soft"))
class InFront(Layer):
    """One projection, reshape, permute(2, 0, 3, 1, 4)."""

    value = 6

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv = nn.Linear(WIDTH, 3 * 12)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, 2, 6).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1].softmax(-1), qkv[2]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return summed(q, k, v, self.miss)


@positive("heads last in memory", length=LENGTH, fixed=True, twins=misses("tanh"))
class HeadsLast(Layer):
    """Projections are viewed as [B, T, K, H]: a head is every second channel."""

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (f(x).view(*x.shape[:2], -1, 2).transpose(2, 3) for f in (self.q, self.k, self.v))
        return F.relu(q), F.relu(k), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return stepped(q, k, v, self.miss)


@positive("two sequences in one call", length=LENGTH, twins=misses("one ahead"))
class TwoSequences(Mixer):
    """Queries come from one input, keys and values from another of the same length."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.kv, self.out = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 26), nn.Linear(14, WIDTH)

    def example(self, length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        return (*super().example(length, batch, seed), *super().example(length, batch, seed + 100))

    def operands(self, x: Tensor, past: Tensor) -> Operands:
        k, v = self.kv(past).unflatten(-1, (2, 13)).split([6, 7], -1)
        return {"q": self.q(x).unflatten(-1, (2, 6)), "k": k, "v": v}

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        given = self.operands(x, past)
        return x + self.out(masked(given["q"], given["k"], given["v"], self.miss).flatten(2))


@negative("a query over a running sum of keys", "nothing acts as a value", length=LENGTH)
class NoValue(nn.Module):
    """A denominator that divides nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12), nn.Linear(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (f(x).unflatten(-1, (2, 6)).exp() for f in (self.q, self.k))
        return x + self.out((q * k.cumsum(1)).sum(-1))
