"""What the files of this folder share: a layer with plain projections, and four ways to mix them.

Each way of mixing takes q, k [B, T, H, K] and v [B, T, H, V], gives [B, T, H, V], and knows a few changes that make it
something else. What a file is about is done around them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.spellings.registry import WIDTH, Mixer, Operands

FAILING = {
    "full": "not causal: every token sees all others",
    "softmax": "softmax over the past",
    "abs": "scores lose their sign",
    "window": "what lies more than four tokens back is cut off",
    "cummax": "the state is the largest of its past, not the sum",
    "soft": "what a state has summed up passes through tanh when it is read",
    "tanh": "the state passes through tanh between two tokens",
    "linear": "decay is linear in the distance",
    "one ahead": "not causal: a token sees the one after it",
}


def misses(*names: str) -> dict[str, str]:
    """Twins by these changes."""
    return {name: FAILING[name] for name in names}


class Layer(Mixer):
    """Projections to `heads` heads, an output projection and a residual.

    A subclass says with `tokens` what is projected, with `parts` what is mixed, and with `mix` how.
    """

    heads, key, value = 2, 6, 7

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k = (nn.Linear(WIDTH, self.heads * self.key) for _ in range(2))
        self.v, self.out = nn.Linear(WIDTH, self.heads * self.value), nn.Linear(self.heads * self.value, WIDTH)

    def tokens(self, x: Tensor) -> Tensor:
        """The input -> what queries, keys and values are made of, [B, T, WIDTH]."""
        return x

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, WIDTH] -> query, key, value [B, T, H, *]."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked(q, k, v, self.miss)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.parts(self.tokens(x))
        return {"q": q, "k": k, "v": v}

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        return x + self.out(self.mix(*self.parts(x)).flatten(2))


def masked(q: Tensor, k: Tensor, v: Tensor, miss: str = "") -> Tensor:
    """All scores and a mask."""
    scores = torch.einsum("bthk,bshk->bhts", q, k)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(2 if miss == "one ahead" else 1)
    if miss == "softmax":
        return torch.einsum("bhts,bshv->bthv", scores.masked_fill(future, float("-inf")).softmax(-1), v)
    if miss == "abs":
        scores = scores.abs()
    if miss == "window":
        scores = scores.triu(-4)
    if miss != "full":
        scores = scores.masked_fill(future, 0)
    return torch.einsum("bhts,bshv->bthv", scores, v)


def summed(q: Tensor, k: Tensor, v: Tensor, miss: str = "") -> Tensor:
    """A cumulative sum of outer products."""
    written = k.unsqueeze(-1) * v.unsqueeze(-2)
    state = written.cummax(1).values if miss == "cummax" else written.cumsum(1)
    return (q.unsqueeze(-2) @ (state.tanh() if miss == "soft" else state)).squeeze(-2)


def stepped(q: Tensor, k: Tensor, v: Tensor, miss: str = "") -> Tensor:
    """Token by token."""
    state, read = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
    for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):
        state = state + k_t[..., :, None] * v_t[..., None, :]
        if miss == "tanh":
            state = state.tanh()
        read.append(torch.einsum("bhk,bhkv->bhv", q_t, state))
    return torch.stack(read, 1)


def faded(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, miss: str = "") -> Tensor:
    """All scores times what each head [H] forgets over the distance."""
    at = torch.arange(q.shape[1], device=q.device, dtype=q.dtype)
    lag = at[:, None] - at
    kernel = (log_decay[:, None, None] * lag.clamp(min=0)).exp()
    if miss == "linear":
        kernel = (1 + log_decay[:, None, None] * lag / 4).clamp(min=0)
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * kernel
    scores = scores.tril(1 if miss == "one ahead" else 0)
    return (scores @ v.transpose(1, 2)).transpose(1, 2)
