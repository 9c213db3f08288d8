"""Axes that happen to be as long as the sequence: widths that are cut or joined, heads, chunks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.spellings.habits.layer import Layer, faded, misses, stepped, summed
from tests.spellings.registry import WIDTH, Operands, positive


@positive("as many tokens as a head is wide, turned by halves", length=12, fixed=True, twins=misses("abs"))
class HalvesTurned(Layer):
    """RoPE by rotate-half with tables [T, K], where T = K."""

    heads, key, value = 2, 12, 5

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        angle = torch.outer(torch.arange(12.0), 10 ** -torch.arange(0, 1, 1 / 6)).to(x)
        cos, sin = (torch.cat([f, f], -1)[None, :, None] for f in (angle.cos(), angle.sin()))
        return q * cos + self.half(q) * sin, k * cos + self.half(k) * sin, v

    def half(self, z: Tensor) -> Tensor:
        return torch.cat((-z[..., 6:], z[..., :6]), dim=-1)


@positive("as many tokens as q, k and v have channels", length=24, fixed=True, twins=misses("softmax"))
class AllChannels(Layer):
    """One projection to 3 * 8 = T channels, chunked in three."""

    heads, key, value = 2, 4, 4

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv = nn.Linear(WIDTH, 24)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (y.reshape(x.shape[0], 24, 2, 4) for y in self.qkv(x).chunk(3, dim=-1))
        return q, k, v


@positive("as many heads as tokens", length=12, fixed=True, twins=misses("cummax"))
class ManyHeads(Layer):
    """[B, T, H, K] with T = H; the transposed form is as large as the plain one."""

    heads, key, value = 12, 3, 2

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        state = k[..., None] * v[..., None, :]
        state = state.cummax(2).values if self.miss == "cummax" else state.cumsum(2)
        return torch.einsum("bhtk,bhtkv->bthv", q, state)


@positive("tokens, keys and values of one size", decay="scalar", length=WIDTH, fixed=True, twins=misses("linear"))
class OneSize(Layer):
    """One head; T = K = V = D."""

    heads, key, value = 1, WIDTH, WIDTH

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "log_decay": torch.tensor([-0.25]).to(x)}

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return faded(q, k, v, torch.tensor([-0.25]).to(q), self.miss)


@positive("as many sequences as tokens, a loop", length=13, fixed=True, twins=misses("tanh"))
class Square(Layer):
    """B = T in a token loop, time first."""

    def example(self, length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        return super().example(length, length, seed)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return stepped(q, k, v, self.miss)


@positive("four chunks of four tokens for four heads", length=16, fixed=True, twins=misses("full"))
class Fours(Layer):
    """Chunks by reshape; every axis but the batch is of size four."""

    heads, key, value = 4, 4, 4

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b = q.shape[0]
        q, k, v = (y.view(b, 4, 4, 4, 4).permute(0, 3, 1, 2, 4) for y in (q, k, v))  # [b, h, n, c, *]
        inside = q @ k.mT
        if self.miss != "full":
            inside = inside.tril()
        states = (k.mT @ v).cumsum(2)
        before = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], 2)
        return (inside @ v + q @ before).permute(0, 2, 3, 1, 4).reshape(b, 16, 4, 4)


@positive("gates of a query and a key, as wide as the sequence is long", length=12, fixed=True, twins=misses("soft"))
class JoinedGates(Layer):
    """A gate of cat([q, k]), whose 2 K features are as many as the tokens."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.gate = nn.Linear(12, 1)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        return q, k * self.gate(torch.cat([q, k], -1)).sigmoid(), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return summed(q, k, v, self.miss)
