"""Sums by shifts that double, and decays by powers of a number that was learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.registry import WIDTH, Mixer, Operands, positive


@positive(
    "powers of a learned decay in chunks",
    decay="scalar",
    fixed=True,
    length=30,
    twins={"a step short": "across chunks a step of decay is missing"},
)
class LearnedPowers(Mixer):
    """RetNet's chunks of eight, the last one shorter; the base of the powers is a parameter."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.base = nn.Parameter(torch.tensor([0.8, 0.95]))

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, 10)) for f in (self.q, self.k, self.v))
        return {"q": q, "k": k, "v": v, "log_decay": self.base.log()}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, 2, 10).transpose(1, 2) for f in (self.q, self.k, self.v))
        base, S, ys = self.base.view(2, 1, 1), x.new_zeros(b, 2, 10, 10), []
        for start in range(0, t, 8):
            qc, kc, vc = (y[:, :, start : start + 8] for y in (q, k, v))
            n = qc.shape[2]
            i = torch.arange(n, device=x.device)
            lag = i[:, None] - i
            local = qc @ kc.mT * (base ** lag.clamp(min=0) * (lag >= 0))
            here = i if self.miss == "a step short" else i + 1
            ys.append(local @ vc + (qc * base ** here[:, None]) @ S)
            S = base**n * S + (kc * base ** (n - 1 - i)[:, None]).mT @ vc
        return x + self.out(torch.cat(ys, 2).transpose(1, 2).flatten(2))


@positive(
    "powers of a sigmoid, chunks of the input",
    decay="scalar",
    fixed=True,
    length=24,
    twins={"power of the state": "the state is squared between chunks"},
)
class SigmoidPowers(Mixer):
    """One head; projections in the loop; query and key decays as rows of powers."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.logit = nn.Parameter(torch.tensor(2.0))

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unsqueeze(2) for f in (self.q, self.k, self.v))
        return {"q": q, "k": k, "v": v, "log_decay": F.logsigmoid(self.logit)[None]}

    def forward(self, x: Tensor) -> Tensor:
        keep, p = torch.sigmoid(self.logit), torch.arange(1, 7).to(x)
        rise, fall = torch.pow(keep, p)[:, None], torch.pow(keep, 6 - p)[:, None]
        inner = torch.tril(torch.pow(keep, (p[:, None] - p).clamp_min(0)))
        S, ys = torch.zeros(x.shape[0], WIDTH, WIDTH).to(x), []
        for part in torch.chunk(x, x.shape[1] // 6, dim=1):
            q, k, v = self.q(part), self.k(part), self.v(part)
            ys.append((q @ k.mT * inner) @ v + (q * rise) @ S)
            S = keep**6 * S + (k * fall).mT @ v
            if self.miss == "power of the state":
                S = S * S.abs()
        return x + self.out(torch.cat(ys, 1))


def shifted(x: Tensor, by: int, fill: float) -> Tensor:
    """Dimension 1 moved on by some places."""
    return F.pad(x[:, :-by], (0,) * (2 * x.dim() - 4) + (by, 0), value=fill)


@positive(
    "doubling shifts",
    decay="scalar",
    fixed=True,
    length=21,
    twins={"one short": "its reach ends: a doubling is left out"},
)
class DoublingShifts(Mixer):
    """Hillis and Steele: each round adds what stands twice as far back, with the decays in between."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv, self.a = nn.Linear(WIDTH, 3 * 2 * 5), nn.Linear(WIDTH, 2)
        self.out = nn.Linear(10, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 5)).unbind(2)
        return {"q": q, "k": k, "v": v, "log_decay": F.logsigmoid(self.a(x) + 2)}

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 5)).unbind(2)
        a, S = torch.sigmoid(self.a(x) + 2)[..., None, None], k.unsqueeze(-1) * v.unsqueeze(-2)
        for n in range((t - 1).bit_length() - (self.miss == "one short")):
            S, a = S + a * shifted(S, 2**n, 0.0), a * shifted(a, 2**n, 1.0)
        return x + self.out((q.unsqueeze(-2) @ S).flatten(2))


@positive(
    "doubling shifts by cat",
    decay="channel",
    fixed=True,
    length=16,
    twins={"larger": "states are joined by a maximum"},
)
class DoublingByCat(Mixer):
    """Time first and heads in the batch; decays in log space, the rows that have no past kept as they are."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.proj, self.out = nn.Linear(WIDTH, 2 * (4 + 4 + 4 + 6)), nn.Linear(12, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, g, v = self.proj(x).unflatten(-1, (2, 18)).split([4, 4, 4, 6], -1)
        return {"q": q, "k": k, "v": v, "log_decay": -0.3 * F.softplus(g)}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        rows = self.proj(x).view(b, t, 2, 18).permute(1, 0, 2, 3).reshape(t, b * 2, 18)
        q, k, g, v = rows.split([4, 4, 4, 6], dim=-1)
        g, S = -0.3 * F.softplus(g).unsqueeze(-1), k[..., :, None] * v[..., None, :]
        step = 1
        while step < t:
            past = g[step:].exp() * S[:-step]
            new = torch.maximum(S[step:], past) if self.miss == "larger" else S[step:] + past
            S = torch.cat([S[:step], new])
            g = torch.cat([g[:step], g[step:] + g[:-step]])
            step *= 2
        y = torch.einsum("tnk,tnkv->tnv", q, S)
        return x + self.out(y.view(t, b, 12).transpose(0, 1))
