"""Sums with more in them than the mixer: a skip on the diagonal, a first state, products with zeros, decays twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.habits.layer import Layer, misses
from tests.spellings.registry import WIDTH, Operands, positive

LENGTH = 14


class Plus(Layer):
    """A mixer to which `more` is added in the same expression."""

    def more(self, x: Tensor) -> Tensor:
        """What is not the mixer's in the output, [B, T, H, V]."""
        raise NotImplementedError

    def mixed(self, x: Tensor) -> Tensor:
        return super().mixed(x) - self.more(x).flatten(2)


@positive("a skip on the diagonal of the scores", length=LENGTH, twins=misses("full"))
class Diagonal(Plus):
    """D goes into the scores of a token with itself, as in state space duality written by hand."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.D = nn.Parameter(torch.tensor([0.5, -1.5]))

    def more(self, x: Tensor) -> Tensor:
        return self.parts(x)[2] * self.D[:, None]

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bthk,bshk->bhts", q, k)
        if self.miss != "full":
            scores = scores.tril()
        scores = scores + self.D[:, None, None] * torch.eye(q.shape[1], device=q.device, dtype=q.dtype)
        return torch.einsum("bhts,bshv->bthv", scores, v)


@positive("a learned state at the start", decay="scalar", length=LENGTH, fixed=True, twins=misses("tanh"))
class LearnedStart(Plus):
    """The loop starts with a parameter [H, K, V] instead of zeros."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.start = nn.Parameter(torch.randn(2, 6, 7))
        self.gate = nn.Linear(WIDTH, 2)

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "log_decay": F.logsigmoid(self.gate(x))}

    def more(self, x: Tensor) -> Tensor:
        left = F.logsigmoid(self.gate(x)).cumsum(1).exp().unsqueeze(-1)
        return torch.einsum("bthk,hkv->bthv", self.parts(x)[0] * left, self.start)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        keep, state, read = self.gate(x).sigmoid(), self.start.expand(x.shape[0], -1, -1, -1), []
        for t in range(x.shape[1]):
            state = keep[:, t, :, None, None] * state + k[:, t, :, :, None] @ v[:, t, :, None]
            if self.miss == "tanh":
                state = state.tanh()
            read.append((q[:, t, :, None] @ state).squeeze(2))
        return x + self.out(torch.stack(read, 1).flatten(2))


@positive("features filled up with zeros", length=LENGTH, twins=misses("softmax"))
class FilledUp(Layer):
    """Keys and queries are padded to eight features, as some kernels ask for it; one mask more than needed."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.pad(q, (0, 2)), F.pad(k, (0, 2))
        scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).tril()
        if self.miss == "softmax":
            scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -1e9).softmax(-1)
        return (scores * torch.ones_like(scores).tril() @ v.transpose(1, 2)).transpose(1, 2)


@positive("a cache of zeros in front of the keys", length=LENGTH, twins=misses("abs"))
class EmptyCache(Layer):
    """Four empty keys and values, as from a fresh cache, stand before the tokens; the mask is shifted by them."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        empty = k.new_zeros(k.shape[0], 4, 2, 1)
        k, v = torch.cat([empty.expand(-1, -1, -1, 6), k], 1), torch.cat([empty.expand(-1, -1, -1, 7), v], 1)
        scores = torch.einsum("bthk,bshk->bhts", q, k).tril(4)
        if self.miss == "abs":
            scores = scores.abs()
        return torch.einsum("bhts,bshv->bthv", scores, v)


@positive(
    "one decay, written for the state and for the divisor",
    decay="scalar",
    length=12,
    fixed=True,
    twins=misses("tanh"),
)
class DecayTwice(Layer):
    """exp(-a) for the divisor and exp(-a)[..., None] for the state, computed apart."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.a = nn.Linear(WIDTH, 2)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        return q.sigmoid(), k.sigmoid(), v

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "log_decay": -F.softplus(self.a(x)), "normaliser": lambda d: d}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        rate = F.softplus(self.a(x))
        state, total, read = 0.0, 0.0, []
        for t in range(x.shape[1]):
            a = rate[:, t].unsqueeze(-1)
            total = total * torch.exp(-a) + k[:, t]
            state = state * torch.exp(-a)[..., None] + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            if self.miss == "tanh":
                state = state.tanh()
            below = (q[:, t] * total).sum(-1, keepdim=True)
            read.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) / below)
        return x + self.out(torch.stack(read, 1).flatten(2))


@positive("a skip in the loop", correction="delta", length=12, fixed=True, twins=misses("tanh"))
class SkipInLoop(Plus):
    """Each step of a delta rule adds its own value times D to what it reads."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.D, self.beta = nn.Parameter(torch.rand(7)), nn.Linear(WIDTH, 2)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        return q, F.normalize(k, dim=-1), v

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "beta": self.beta(x).sigmoid()}

    def more(self, x: Tensor) -> Tensor:
        return self.parts(x)[2] * self.D

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        beta, state, read = self.beta(x).sigmoid().unsqueeze(-1), x.new_zeros(x.shape[0], 2, 6, 7), []
        for t in range(x.shape[1]):
            error = beta[:, t] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
            state = state + k[:, t].unsqueeze(-1) * error.unsqueeze(-2)
            if self.miss == "tanh":
                state = state.tanh()
            read.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) + self.D * v[:, t])
        return x + self.out(torch.stack(read, 1).flatten(2))
