"""Loops over tokens that divide each token's output: mLSTM's recurrence, whose gates a carried maximum keeps small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.habits.layer import Layer
from tests.spellings.registry import WIDTH, Operands, negative, positive

LENGTH = 14
EPSILON = 0.02


class Recurrent(Layer):
    """mLSTM: a state, a sum of keys, and the largest logarithm of a gate so far, [B, H] each token."""

    mixed_at = "read"
    heads, key, value = 3, 4, 5

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.read, self.gates = nn.Identity(), nn.Linear(WIDTH, 2 * self.heads)

    def logs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the forget gate and the input gate, [B, T, H] each."""
        forget, write = self.gates(x).chunk(2, -1)
        return F.logsigmoid(forget + 1), write

    def tops(self, x: Tensor) -> Tensor:
        """What keeps the gates small, [B, T, H]."""
        (forget, write), made = self.logs(x), []
        if self.miss == "looks ahead":
            return (write - forget.cumsum(1)).amax(1, keepdim=True) + forget.cumsum(1)
        top = torch.zeros_like(write[:, 0])
        for t in range(x.shape[1]):
            top = torch.maximum(forget[:, t] + top, write[:, t])
            made.append(top)
        return torch.stack(made, 1)

    def size(self, x: Tensor, d: Tensor) -> Tensor:
        """What an output is divided by, from the sum of its scores without a stabiliser."""
        return torch.maximum(d.abs(), torch.ones_like(d)) + EPSILON * self.tops(x).exp().unsqueeze(-1)

    def operands(self, x: Tensor) -> Operands:
        given, (forget, write) = super().operands(x), self.logs(x)
        keys = given["k"] * write.exp().unsqueeze(-1)
        return {**given, "k": keys, "log_decay": forget, "normaliser": lambda d: self.size(x, d)}


@positive(
    "an mLSTM loop that divides in its loop",
    decay="scalar",
    length=LENGTH,
    fixed=True,
    twins={
        "other keys": "the divisor sums values' features, not the keys that the state holds",
        "of the state": "what is forgotten depends on the state",
        "next gate": "the divisor's bound is made of the gate of the token after",
    },
)
class Divided(Recurrent):
    """The stabiliser is carried, the epsilon is added to what it has scaled."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        forget, write = self.logs(x)
        state, total = k.new_zeros(len(x), self.heads, self.key, self.value), k.new_zeros(len(x), self.heads, self.key)
        top, read = k.new_zeros(len(x), self.heads), []
        for t in range(x.shape[1]):
            later = torch.maximum(forget[:, t] + top, write[:, t])
            kept, written = (forget[:, t] + top - later).exp()[..., None], (write[:, t] - later).exp()[..., None]
            if self.miss == "of the state":
                kept = kept * torch.sigmoid(state.mean((-1, -2)))[..., None]
            state = kept[..., None] * state + written[..., None] * (k[:, t, :, :, None] * v[:, t, :, None])
            total = kept * total + written * (v[:, t, :, :4] if self.miss == "other keys" else k[:, t])
            top = later
            held = state.detach() if self.miss == "detached" else state
            number = (q[:, t, :, None] @ held).squeeze(-2)
            seen = (q[:, t, :, None] @ total[..., None]).squeeze(-1)
            least = (-top).exp()[..., None]
            if self.miss == "next gate":
                least = least * write[:, (t + 1) % x.shape[1]].exp()[..., None]
            read.append(number / (torch.maximum(seen.abs(), least) + EPSILON))
        return x + self.out(self.read(torch.stack(read, 1)).flatten(2))


@negative("an mLSTM loop without a gradient in its state", "the state is detached, the divisor is not", length=LENGTH)
class DetachedState(Divided):
    """The control of the loop above that no number tells from it."""

    def __init__(self) -> None:
        super().__init__("detached")


@positive(
    "an mLSTM loop that sums its keys by hand",
    decay="scalar",
    length=LENGTH,
    fixed=True,
    twins={
        "looks ahead": "the stabiliser is the largest of all tokens, and bounds the divisor",
        "other queries": "the divisor is read with keys",
    },
)
class ByHand(Recurrent):
    """Products and sums in place of matrix products, the stabiliser before the loop, a gate and silu behind."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        (forget, write), tops = self.logs(x), self.tops(x)
        before, outs = torch.cat([torch.zeros_like(tops[:, :1]), tops[:, :-1]], 1), torch.zeros_like(v)
        state, total = 0.0, 0.0
        for t in range(x.shape[1]):
            kept, written = (forget[:, t] + before[:, t] - tops[:, t]).exp(), (write[:, t] - tops[:, t]).exp()
            fresh = k[:, t] * written[..., None]
            state = state * kept[..., None, None] + torch.einsum("bhv,bhk->bhvk", v[:, t], fresh)
            total = total * kept[..., None] + fresh
            asks = k[:, t] if self.miss == "other queries" else q[:, t]
            size = (total * asks).sum(-1, keepdim=True).abs()
            size = torch.maximum(size, (-tops[:, t]).exp()[..., None]) + EPSILON
            outs[:, t] = torch.einsum("bhvk,bhk->bhv", state, q[:, t]) / size
        return x + self.out(self.read(outs).flatten(2))


@positive(
    "a loop with a mean of gated values",
    decay="scalar",
    length=LENGTH,
    fixed=True,
    twins={"of the keys": "the divisor sums the size of the keys", "of the output": "it sums the outputs so far"},
)
class MeanOfValues(Recurrent):
    """The divisor is a sum of input gates that fades as the state does; its square root divides."""

    def operands(self, x: Tensor) -> Operands:
        given, (forget, write) = super().operands(x), self.logs(x)
        total, totals = torch.zeros_like(forget[:, 0]), []
        for t in range(x.shape[1]):
            total = forget[:, t].exp() * total + write[:, t].exp()
            totals.append(total)
        given.pop("normaliser")
        return {**given, "q": given["q"] / torch.stack(totals, 1).sqrt().unsqueeze(-1)}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        forget, write = (g.exp() for g in self.logs(x))
        state, total = k.new_zeros(len(x), self.heads, self.key, self.value), k.new_zeros(len(x), self.heads)
        read: list[Tensor] = []
        for t in range(x.shape[1]):
            state = (
                state * forget[:, t, :, None, None]
                + write[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None]
            )
            counted = k[:, t].square().sum(-1) if self.miss == "of the keys" else write[:, t]
            if self.miss == "of the output" and read:
                counted = read[-1].square().sum(-1)
            total = total * forget[:, t] + counted
            read.append((q[:, t, :, None] @ state).squeeze(-2) / total.sqrt()[..., None])
        return x + self.out(self.read(torch.stack(read, 1)).flatten(2))
