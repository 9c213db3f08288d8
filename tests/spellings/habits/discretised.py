"""Selective scans by zero-order hold, and scans whose B or C no token chooses (S4D with steps of its own)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.spellings.registry import WIDTH, Operands, negative, positive
from tests.spellings.selective import Selective

LENGTH = 12


class ZeroOrderHold(Selective):
    """Mamba-1's state with B-bar = (exp(dt A) - 1) / A * B: the input is held for a step."""

    def operands(self, x: Tensor) -> Operands:
        dt, b, c, a = self.parts(x)
        held = torch.expm1(dt[..., None] * a) / a * b[:, :, None]  # [B, T, D, N]
        return {
            "q": c[:, :, None].expand_as(held),
            "k": held,
            "v": x[..., None],
            "log_decay": dt[..., None] * a,
        }


@positive("zero-order hold, token by token", decay="channel", length=LENGTH, twins={"tanh": "a nonlinear recurrence"})
class HeldInLoop(ZeroOrderHold):
    """The textbook: A-bar and B-bar of all tokens, then a loop."""

    def scan(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor) -> Tensor:
        decay = torch.exp(dt[..., None] * a)
        added = (decay - 1) / a * b[:, :, None] * x[..., None]
        h, out = x.new_zeros(x.shape[0], WIDTH, self.n), []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + added[:, t]
            h = torch.tanh(h) if self.miss == "tanh" else h
            out.append((h * c[:, t, None]).sum(-1))
        return torch.stack(out, 1)


@positive("zero-order hold by cumulative sums", decay="channel", length=LENGTH)
class HeldBySums(ZeroOrderHold):
    """No loop."""

    def scan(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor) -> Tensor:
        steps = dt[..., None] * a
        total = steps.cumsum(1)
        added = torch.expm1(steps) / a * b[:, :, None] * x[..., None]
        return ((added * (-total).exp()).cumsum(1) * total.exp() * c[:, :, None]).sum(-1)


@positive("one C for all tokens", decay="channel", length=LENGTH, twins={"tanh": "a nonlinear recurrence"})
class OneC(Selective):
    """A learned readout of each channel, [D, N]; steps and B are the tokens'."""

    def __init__(self, miss: str = "", n: int = 4) -> None:
        super().__init__(miss, n)
        self.c = nn.Parameter(torch.randn(WIDTH, n))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dt, b, _, a = super().parts(x)
        return dt, b, self.c, a

    def operands(self, x: Tensor) -> Operands:
        dt, b, c, a = self.parts(x)
        return {
            "q": c.expand(*x.shape, -1),
            "k": b[:, :, None].expand(*x.shape, -1),
            "v": (dt * x)[..., None],
            "log_decay": dt[..., None] * a,
        }

    def scan(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor) -> Tensor:
        h, out = x.new_zeros(x.shape[0], WIDTH, self.n), []
        for t in range(x.shape[1]):
            h = torch.exp(dt[:, t, :, None] * a) * h + (dt[:, t] * x[:, t])[:, :, None] * b[:, t, None]
            h = torch.tanh(h) if self.miss == "tanh" else h
            out.append((h * c).sum(-1))
        return torch.stack(out, 1)


@positive("one B for all tokens", decay="channel", length=LENGTH, twins={"tanh": "a nonlinear recurrence"})
class OneB(Selective):
    """A learned input of each channel, [D, N]; steps and C are the tokens'."""

    def __init__(self, miss: str = "", n: int = 4) -> None:
        super().__init__(miss, n)
        self.b = nn.Parameter(torch.randn(WIDTH, n))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dt, _, c, a = super().parts(x)
        return dt, self.b, c, a

    def operands(self, x: Tensor) -> Operands:
        dt, b, c, a = self.parts(x)
        return {
            "q": c[:, :, None].expand(*x.shape, -1),
            "k": b.expand(*x.shape, -1),
            "v": (dt * x)[..., None],
            "log_decay": dt[..., None] * a,
        }

    def scan(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor) -> Tensor:
        h, out = x.new_zeros(x.shape[0], WIDTH, self.n), []
        for t in range(x.shape[1]):
            h = torch.exp(dt[:, t, :, None] * a) * h + (dt[:, t] * x[:, t])[:, :, None] * b
            h = torch.tanh(h) if self.miss == "tanh" else h
            out.append(torch.einsum("bdn,bn->bd", h, c[:, t]))
        return torch.stack(out, 1)


@negative("a decayed sum of gated keys, divided by", "it divides a sum of values without decay", length=LENGTH)
class GatedDivisor(nn.Module):
    """The form of a discretised state, but what a query reads of it is a divisor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.gate, self.rate = (nn.Linear(WIDTH, n) for n in (6, 6, 1, 6))
        self.v, self.out = nn.Linear(WIDTH, 7), nn.Linear(7, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, gate, decay = self.q(x).exp(), self.k(x).exp(), self.gate(x).sigmoid(), self.rate(x).sigmoid()
        state, read = torch.zeros_like(k[:, 0]), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + gate[:, t] * k[:, t]
            read.append((q[:, t] * state).sum(-1, keepdim=True))
        return x + self.out(self.v(x).cumsum(1) / torch.stack(read, 1))
