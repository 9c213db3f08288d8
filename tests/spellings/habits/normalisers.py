"""What divides the output: sums of scores that are clamped, detached or stabilised, sums of decays, positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.habits.layer import Layer, misses
from tests.spellings.registry import WIDTH, Operands, positive

LENGTH = 16


class Divided(Layer):
    """Scores [B, H, T, T] with a fading kernel; `divide` is given them after the mask."""

    mixed_at = "read"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.read = nn.Identity()
        self.rate = nn.Parameter(torch.tensor([0.1, 0.4]))

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "log_decay": -self.rate}

    def scores(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The scores and their kernel."""
        at = torch.arange(q.shape[1], device=q.device)
        lag = (at[:, None] - at).to(q)
        kernel = torch.exp(-self.rate[:, None, None] * lag.clamp(min=0)).tril()
        if self.miss == "linear":
            kernel = (1 - self.rate[:, None, None] * lag / 4).clamp(min=0).tril()
        return torch.einsum("bthk,bshk->bhts", q, k) * kernel, kernel

    def divide(self, scores: Tensor, kernel: Tensor, v: Tensor) -> Tensor:
        """-> [B, T, H, V]"""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        return x + self.out(self.read(self.divide(*self.scores(q, k), v)).flatten(2))


def at(scores: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhts,bshv->bthv", scores, v)


@positive("divided by the clamped size of its sum", decay="scalar", length=LENGTH, twins=misses("linear"))
class ClampedSum(Divided):
    """RetNet's scores over max(|sum|, 1)."""

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "normaliser": lambda d: d.abs().clamp(min=1)}

    def divide(self, scores: Tensor, kernel: Tensor, v: Tensor) -> Tensor:
        return at(scores / scores.sum(-1, keepdim=True).abs().clamp(min=1.0), v)


@positive("divided by a sum without a gradient", decay="scalar", length=LENGTH, twins=misses("linear"))
class DetachedSum(Divided):
    """The same, but the divisor is detached, and it divides the output."""

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "normaliser": lambda d: d.abs().clamp(min=1)}

    def divide(self, scores: Tensor, kernel: Tensor, v: Tensor) -> Tensor:
        size = scores.detach().sum(-1).abs().clamp(min=1.0)
        return at(scores, v) / size.transpose(1, 2).unsqueeze(-1)


@positive("divided by the root of the sum of decays", decay="scalar", length=LENGTH, twins=misses("linear"))
class RootOfDecays(Divided):
    """RetNet divides its kernel by sqrt of its rows' sums: what is left is a number for each position."""

    def operands(self, x: Tensor) -> Operands:
        given = super().operands(x)
        at = torch.arange(x.shape[1], device=x.device).to(x)[:, None]
        rows = ((at - at.T).clamp(min=0) * -self.rate[:, None, None]).exp().tril().sum(-1)
        return {**given, "q": given["q"] / rows.T.sqrt().unsqueeze(-1)}

    def divide(self, scores: Tensor, kernel: Tensor, v: Tensor) -> Tensor:
        return at(scores / kernel.sum(-1, keepdim=True).sqrt(), v)


@positive("means over the past", decay="scalar", length=LENGTH, twins=misses("linear"))
class OverPositions(Divided):
    """Each row is divided by its number, counted from one."""

    def operands(self, x: Tensor) -> Operands:
        given = super().operands(x)
        return {**given, "q": given["q"] / torch.arange(1, x.shape[1] + 1).to(x)[:, None, None]}

    def divide(self, scores: Tensor, kernel: Tensor, v: Tensor) -> Tensor:
        seen = torch.ones_like(scores[0, 0]).tril().sum(-1, keepdim=True)
        return at(scores / seen, v)


class Gated(Layer):
    """Forget and input gates for each head, in logarithms."""

    mixed_at = "read"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.read, self.gates = nn.Identity(), nn.Linear(WIDTH, 4)

    def logs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the forget gate and the input gate, [B, T, H] each."""
        forget, write = self.gates(x).chunk(2, -1)
        return F.logsigmoid(forget + 1), write

    def operands(self, x: Tensor) -> Operands:
        given, (forget, write) = super().operands(x), self.logs(x)
        return {**given, "k": given["k"] * write.exp().unsqueeze(-1), "log_decay": forget}

    def pairs(self, x: Tensor) -> Tensor:
        """log of what is left at t of what s wrote, [B, H, T, S]; -inf where s > t."""
        forget, write = (y.transpose(1, 2) for y in self.logs(x))
        total = forget.cumsum(-1)
        log = total[..., :, None] - total[..., None, :] + write[..., None, :]
        return log.masked_fill(torch.ones_like(log[0, 0]).triu(1).bool(), float("-inf"))


@positive(
    "an mLSTM with its stabiliser",
    decay="scalar",
    length=LENGTH,
    twins={"exponentiated": "scores stand in the exponent, too: softmax-like attention"},
)
class Stabilised(Gated):
    """Rows are scaled by their largest gate; the divisor is max(|sum|, exp(-largest)) plus an epsilon of the scaled."""

    def operands(self, x: Tensor) -> Operands:
        top = self.pairs(x).amax(-1).transpose(1, 2).unsqueeze(-1)
        given = super().operands(x)

        def size(d: Tensor) -> Tensor:
            return torch.maximum((d * (-top).exp()).abs(), (-top).exp()) * top.exp() + 1e-6 * top.exp()

        return {**given, "q": given["q"] / 6**0.5, "normaliser": size}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        log, scores = self.pairs(x), torch.einsum("bthk,bshk->bhts", q / 6**0.5, k)
        if self.miss == "exponentiated":
            log, scores = log + scores, torch.ones_like(scores)
        top = log.amax(dim=-1, keepdim=True)
        weights = scores * torch.exp(log - top)
        size = torch.maximum(weights.sum(-1, keepdim=True).abs(), torch.exp(-top))
        return x + self.out(self.read(at(weights / (size + 1e-6), v)).flatten(2))


@positive(
    "a loop with a sum of gates",
    decay="scalar",
    length=12,
    fixed=True,
    twins={"of the state": "what is forgotten hangs on the state"},
)
class SumOfGates(Gated):
    """State and divisor fade alike; the divisor sums input gates, not keys, and the decay is written twice."""

    def operands(self, x: Tensor) -> Operands:
        given, (forget, write) = super().operands(x), self.logs(x)
        total, totals = torch.zeros_like(forget[:, 0]), []
        for t in range(x.shape[1]):
            total = forget[:, t].exp() * total + write[:, t].exp()
            totals.append(total)
        return {**given, "q": given["q"] / torch.stack(totals, 1).unsqueeze(-1)}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        forget, write = self.logs(x)
        state, total, read = torch.zeros_like(k[:, 0, ..., None] * v[:, 0, :, None]), 0.0, []
        for t in range(x.shape[1]):
            kept = forget[:, t].exp()[..., None, None]
            if self.miss == "of the state":
                kept = kept * torch.sigmoid(state)
            state = kept * state + (write[:, t].exp()[..., None] * k[:, t])[..., None] * v[:, t, :, None]
            total = torch.exp(forget[:, t]) * total + torch.exp(write[:, t])
            read.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) / total.unsqueeze(-1))
        return x + self.out(self.read(torch.stack(read, 1)).flatten(2))
