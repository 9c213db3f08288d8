"""Mamba-1's selective scan: a state for each channel, its decays a token's step times a rate per channel and state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.registry import WIDTH, Mixer, Operands, positive

_TWINS = {"tanh": "a nonlinear recurrence", "of the query": "the step of the decay is that of the token that reads"}


class Selective(Mixer):
    """What the spellings share; `out` reads the channels [B, T, WIDTH]."""

    def __init__(self, miss: str = "", n: int = 4) -> None:
        super().__init__(miss)
        self.n = n
        self.x_proj, self.dt, self.out = nn.Linear(WIDTH, 2 * n + 3), nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.A_log = nn.Parameter(torch.arange(1, n + 1).float().repeat(WIDTH, 1).log())

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The step [B, T, D], B and C [B, T, N], A [D, N]."""
        dt, b, c = self.x_proj(x).split([3, self.n, self.n], -1)
        return F.softplus(self.dt(dt) - 2), b, c, -torch.exp(self.A_log)

    def operands(self, x: Tensor) -> Operands:
        dt, b, c, a = self.parts(x)
        return {"q": c[:, :, None], "k": b[:, :, None], "v": (dt * x)[..., None], "log_decay": dt[..., None] * a}

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed[..., None]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.scan(x, *self.parts(x)))

    def scan(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor) -> Tensor:
        raise NotImplementedError


@positive("selective scan, token by token", decay="channel", length=12, twins=_TWINS)
class TokenByToken(Selective):
    """Everything of a token inside of the loop."""

    def scan(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor) -> Tensor:
        h, out = x.new_zeros(x.shape[0], WIDTH, self.n), []
        for t in range(x.shape[1]):
            h = torch.exp(dt[:, t, :, None] * a) * h + (dt[:, t] * x[:, t])[:, :, None] * b[:, t, None]
            h = torch.tanh(h) if self.miss == "tanh" else h
            read = h * dt[:, t, :, None].mul(a).exp() if self.miss == "of the query" else h
            out.append((read @ c[:, t, :, None])[..., 0])
        return torch.stack(out, 1)


@positive("selective scan, discretised at once by einsum", decay="channel", length=12)
class Discretised(Selective):
    """The minimal implementations: decays and inputs of all tokens first, then a loop over the states."""

    def scan(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor) -> Tensor:
        decay = torch.exp(torch.einsum("btd,dn->btdn", dt, a))
        added = torch.einsum("btd,btn,btd->btdn", dt, b, x)
        h, out = x.new_zeros(x.shape[0], WIDTH, self.n), []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + added[:, t]
            out.append(torch.einsum("bdn,bn->bd", h, c[:, t]))
        return torch.stack(out, 1)


@positive("selective scan, channels first", decay="channel", length=12)
class ChannelsFirst(Selective):
    """The layout of mamba_ssm: [B, D, T], and all states stacked before they are read."""

    def scan(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor) -> Tensor:
        x, dt, b, c = (z.transpose(1, 2) for z in (x, dt, b, c))
        decay = torch.exp(a[None, :, None, :] * dt[..., None])
        added = dt[..., None] * b.transpose(1, 2)[:, None] * x[..., None]
        h, states = torch.zeros_like(added[:, :, 0]), []
        for t in range(x.shape[2]):
            h = decay[:, :, t] * h + added[:, :, t]
            states.append(h)
        return (torch.stack(states, 1) @ c.transpose(1, 2).unsqueeze(-1)).squeeze(3)


@positive("selective scan by cumulative sums", decay="channel")
class ByCumulativeSums(Selective):
    """No loop: decays added up as logarithms, and undone before the sum."""

    def scan(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor) -> Tensor:
        total = torch.einsum("btd,dn->btdn", dt, a).cumsum(1)
        added = torch.einsum("btd,btn,btd->btdn", dt, b, x)
        h = total.exp() * (added * (-total).exp()).cumsum(1)
        return torch.einsum("btdn,btn->btd", h, c)


@positive("selective scan by doubling, a positive rate", decay="channel", length=13)
class ByDoubling(Selective):
    """A scan whose step doubles; the rate is held positive, and the sign stands in the exponent."""

    def scan(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor) -> Tensor:
        decay, h = torch.exp(-dt[..., None] * torch.exp(self.A_log)), (dt * x)[..., None] * b[:, :, None]
        by = 1
        while by < x.shape[1]:
            h = torch.cat([h[:, :by], h[:, by:] + decay[:, by:] * h[:, :-by]], 1)
            decay = torch.cat([decay[:, :by], decay[:, by:] * decay[:, :-by]], 1)
            by *= 2
        return (h @ c[..., None])[..., 0]
