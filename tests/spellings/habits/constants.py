"""Loops in which each token has constants of its own: rows of a table, angles, divisors, masks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.habits.layer import Layer, misses
from tests.spellings.registry import Operands, positive

LENGTH = 14


class Stepwise(Layer):
    """A token loop; `now` makes what is written and read at step t of the projections of that token."""

    def now(self, t: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def operands(self, x: Tensor) -> Operands:
        made = [self.now(t, *(y[:, t] for y in self.parts(x))) for t in range(x.shape[1])]
        q, k, v = (torch.stack(rows, 1) for rows in zip(*made, strict=True))
        return {"q": q, "k": k, "v": v}

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, read = k.new_zeros(k.shape[0], self.heads, self.key, self.value), []
        for t in range(q.shape[1]):
            q_t, k_t, v_t = self.now(t, q[:, t], k[:, t], v[:, t])
            state = state + torch.einsum("bhk,bhv->bhkv", k_t, v_t)
            if self.miss == "tanh":
                state = torch.tanh(state)
            read.append((q_t.unsqueeze(-2) @ state).squeeze(-2))
        return torch.stack(read, dim=1)


@positive("a row of a table for each step", fixed=True, length=LENGTH, twins=misses("tanh"))
class RowOfTable(Stepwise):
    """Keys get the row of their step; values a number of it."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.rows, self.numbers = nn.Parameter(torch.randn(32, self.key)), nn.Embedding(32, 1)

    def now(self, t: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k + self.rows[t], v * self.numbers.weight[t]


@positive("the mean of the past, step by step", fixed=True, length=LENGTH, twins=misses("tanh"))
class MeanOfPast(Stepwise):
    def now(self, t: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q / (t + 1), F.elu(k) + 1, v


@positive("angles of the step", fixed=True, length=LENGTH, twins=misses("tanh"))
class Angles(Stepwise):
    """Queries and keys are turned by t, with the numbers of Python's math."""

    def turn(self, z: Tensor, t: int) -> Tensor:
        a, b = z.chunk(2, dim=-1)
        cos = z.new_tensor([math.cos(t / 2**i) for i in range(3)])
        sin = z.new_tensor([math.sin(t / 2**i) for i in range(3)])
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def now(self, t: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.turn(q, t), self.turn(k, t), v


@positive("weights of the steps", fixed=True, length=LENGTH, twins=misses("tanh"))
class StepWeights(Stepwise):
    """A list of floats, made once."""

    weights = tuple(math.exp(-i / LENGTH) + (i % 3) / 4 for i in range(LENGTH))

    def now(self, t: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k * self.weights[t], v


@positive(
    "a mask of ones, step by step",
    fixed=True,
    length=LENGTH,
    twins={"kept": "a token whose state grows too large leaves the state as it is"},
)
class OnesMask(Layer):
    """The mask lets a token write or not; here everyone writes, as where nobody gave a mask."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, t = q.shape[:2]
        mask = torch.ones(b, t, dtype=torch.bool, device=q.device)
        state, read = q.new_zeros(b, self.heads, self.key, self.value), torch.zeros_like(v)
        for i in range(t):
            new = state + k[:, i, :, :, None] * v[:, i, :, None, :]
            keep = mask[:, i].view(b, 1, 1, 1)
            if self.miss == "kept":
                keep = keep & (new.abs() < 1)
            state = torch.where(keep, new, state)
            read[:, i] = torch.einsum("bhk,bhkv->bhv", q[:, i], state)
        return read


@positive(
    "a rate for each step",
    decay="scalar",
    fixed=True,
    length=LENGTH,
    twins={"of the state": "how much is forgotten hangs on the size of the state"},
)
class StepRates(Layer):
    """Learned decays [T, H]: at step t all sequences forget alike."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.keep = nn.Parameter(torch.randn(LENGTH, self.heads) + 1)

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "log_decay": F.logsigmoid(self.keep).expand(x.shape[0], -1, -1)}

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep, state, read = self.keep.sigmoid(), q.new_zeros(q.shape[0], self.heads, self.key, self.value), []
        for t in range(LENGTH):
            factor = keep[t].view(1, -1, 1, 1)
            if self.miss == "of the state":
                factor = factor / (1 + state.square().mean((-1, -2), keepdim=True))
            state = factor * state + k[:, t, :, :, None] * v[:, t, :, None]
            read.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        return torch.stack(read, 1)
