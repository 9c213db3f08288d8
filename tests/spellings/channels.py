"""Decays of their own for each key channel: GLA, HGRN-2, RWKV-6."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.registry import WIDTH, Mixer, Operands, positive


@positive(
    "GLA, all pairs with their channels",
    decay="channel",
    twins={"decay of the query": "the decay depends on the query", "max": "the largest channel in place of the sum"},
)
@positive("GLA, all pairs with their channels, sizes equal", decay="channel", length=10, key=10, value=10)
class PairsAndChannels(Mixer):
    """[B, H, T, T, K] in memory, nothing factored."""

    def __init__(self, miss: str = "", key: int = 5, value: int = 7) -> None:
        super().__init__(miss)
        self.q, self.k, self.v = nn.Linear(WIDTH, 2 * key), nn.Linear(WIDTH, 2 * key), nn.Linear(WIDTH, 2 * value)
        self.gk = nn.Sequential(nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, 2 * key))
        self.out = nn.Linear(2 * value, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v, g = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v, self.gk))
        return {"q": q, "k": k, "v": v, "log_decay": F.logsigmoid(g) / 4, "scale": 5**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v, g = (f(x).view(b, t, 2, -1).transpose(1, 2) for f in (self.q, self.k, self.v, self.gk))
        g = F.logsigmoid(g) / 4
        c = g.cumsum(2)
        rel = c[:, :, :, None] - c[:, :, None]
        if self.miss == "decay of the query":
            i = torch.arange(t)
            rel = g[:, :, :, None] * (i[:, None] - i)[..., None]
        rel = rel.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1)[..., None], float("-inf"))
        terms = q[:, :, :, None] * k[:, :, None] * rel.exp()
        A = (terms.max(-1).values if self.miss == "max" else terms.sum(-1)) * 5**-0.5
        return x + self.out((A @ v).transpose(1, 2).reshape(b, t, -1))


@positive(
    "GLA, factored",
    decay="channel",
    also=(("none", "none"),),
    twins={"squared": "not linear in the query"},
)
class Factored(Mixer):
    """Queries grow and keys shrink by the cumulated gates: undecayed attention of scaled operands is the same."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.proj = nn.Linear(WIDTH, 3 * (5 + 5 + 5 + 6))
        self.out = nn.Linear(18, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, g, v = self.proj(x).unflatten(-1, (3, 21)).split([5, 5, 5, 6], -1)
        return {"q": q, "k": k, "v": v, "log_decay": -0.1 * torch.sigmoid(g)}

    def forward(self, x: Tensor) -> Tensor:
        q, k, g, v = self.proj(x).unflatten(-1, (3, 21)).transpose(1, 2).split([5, 5, 5, 6], -1)
        cum = (-0.1 * torch.sigmoid(g)).cumsum(-2)
        scores = (q * cum.exp()) @ (k * (-cum).exp()).transpose(-1, -2)
        scores = scores.tril() ** 2 if self.miss == "squared" else scores.tril()
        return x + self.out((scores @ v).transpose(1, 2).flatten(2))


@positive(
    "HGRN-2 loop",
    decay="channel",
    fixed=True,
    length=16,
    twins={"state in the gate": "the forget gate depends on the state"},
)
class Hgrn2(Mixer):
    """Keys are what the forget gates leave: k = 1 - f."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q_proj, self.f_proj, self.i_proj = (nn.Linear(WIDTH, n, bias=False) for n in (12, 12, 16))
        self.g_norm, self.o_proj = nn.RMSNorm(16), nn.Linear(16, WIDTH, bias=False)

    mixed_at = "g_norm"

    def operands(self, x: Tensor) -> Operands:
        q, f, i = (p(x).unflatten(-1, (2, -1)) for p in (self.q_proj, self.f_proj, self.i_proj))
        g = 0.3 + 0.7 * f.sigmoid()
        return {"q": F.silu(q), "k": 1 - g, "v": i, "log_decay": g.log()}

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = F.silu(self.q_proj(x)).reshape(b, n, 2, 6)
        f = 0.3 + (1 - 0.3) * torch.sigmoid(self.f_proj(x)).reshape(b, n, 2, 6)
        i = self.i_proj(x).reshape(b, n, 2, 8)
        memory = torch.zeros(b, 2, 6, 8).to(x)
        output = []
        for s in range(n):
            f_s = f[:, s]
            if self.miss == "state in the gate":
                f_s = f_s * torch.sigmoid(memory.sum(-1))
            memory = torch.einsum("bhk,bhkv->bhkv", f_s, memory) + torch.einsum("bhk,bhv->bhkv", 1 - f[:, s], i[:, s])
            output.append(torch.einsum("bhk,bhkv->bhv", q[:, s], memory).unsqueeze(1))
        return self.o_proj(self.g_norm(torch.cat(output, dim=1).reshape(b, n, 16)))


@positive(
    "RWKV-6 with its diagonal, loop",
    decay="channel",
    fixed=True,
    length=16,
    twins={"rectified": "what is read is rectified"},
)
class Rwkv6(Mixer):
    """Token shift, w = exp(-exp(.)), state [B, H, N, N]; the last token is read like the others."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.mix = nn.Parameter(torch.rand(4, WIDTH))
        self.receptance, self.key, self.value, self.decay = (nn.Linear(WIDTH, 12, bias=False) for _ in range(4))
        self.bonus = nn.Parameter(torch.rand(2, 6))
        self.ln_x, self.output = nn.GroupNorm(2, 12), nn.Linear(12, WIDTH, bias=False)

    mixed_at = "ln_x"

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed.unflatten(0, (2, -1))

    def parts(self, x: Tensor) -> list[Tensor]:
        shifted = F.pad(x, (0, 0, 1, -1))
        mixed = [x + (shifted - x) * m for m in self.mix]
        layers = (self.receptance, self.key, self.value, self.decay)
        return [f(y).unflatten(-1, (2, 6)) for f, y in zip(layers, mixed, strict=True)]

    def operands(self, x: Tensor) -> Operands:
        r, k, v, w = self.parts(x)
        return {"q": r, "k": k, "v": v, "log_decay": -torch.exp(w - 1)}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        r, k, v, w = self.parts(x)
        w = torch.exp(-torch.exp(w - 1))
        state = torch.zeros(b, 2, 6, 6, dtype=x.dtype, device=x.device)
        out = torch.empty(b, t, 2, 6, dtype=x.dtype)
        for i in range(t):
            rt, kt, vt = r[:, i].unsqueeze(2), k[:, i].unsqueeze(3), v[:, i].unsqueeze(2)
            at = kt @ vt
            if self.miss == "rectified":
                out[:, i] = (rt @ (self.bonus.unsqueeze(-1) * at + state).relu()).squeeze(2)
            state = at + w[:, i].unsqueeze(-1) * state
            if self.miss != "rectified":
                out[:, i] = (rt @ state).squeeze(2)
        out = self.ln_x(out.flatten(0, 1).flatten(1)).view(b, t, 12)
        return x + self.output(out)


@positive(
    "GLA by cumulative sums",
    decay="channel",
    twins={"cummax": "the state is the largest of its past, not the sum"},
)
class GatedCumsum(Mixer):
    """Each contribution is blown up by exp(-c), summed, and shrunk again by exp(c)."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.g = (nn.Linear(WIDTH, n) for n in (8, 8, 12, 8))
        self.out = nn.Linear(12, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v, g = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v, self.g))
        return {"q": q, "k": F.relu(k), "v": v, "log_decay": F.logsigmoid(g) / 8}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v, self.g))
        c = torch.cumsum(F.logsigmoid(g) / 8, dim=1).unsqueeze(-1)
        kv = F.relu(k).unsqueeze(-1) * v.unsqueeze(-2)
        scaled = kv * torch.exp(-c)
        state = torch.exp(c) * (scaled.cummax(1).values if self.miss == "cummax" else scaled.cumsum(1))
        return x + self.out((q.unsqueeze(-1) * state).sum(dim=3).flatten(2))


@positive(
    "decay for each channel, constant",
    decay="channel",
    twins={"linear": "decay is linear in the distance"},
)
class ConstantChannels(Mixer):
    """A learned decay for each channel and no gate: S4-like rates with keys and queries; no head axis."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 9)
        self.log_rate = nn.Parameter(torch.linspace(-3, 0, 6))
        self.out = nn.Linear(9, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x)[:, :, None] for f in (self.q, self.k, self.v))
        return {"q": q, "k": k, "v": v, "log_decay": -self.log_rate.exp().expand(*x.shape[:2], 1, 6)}

    def forward(self, x: Tensor) -> Tensor:
        lag = (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).to(x)
        rate = torch.exp(self.log_rate)
        kernel = torch.exp(-rate * lag.clamp(min=0)[..., None])
        if self.miss == "linear":
            kernel = (1 - rate * lag[..., None] / 8).clamp(min=0)
        kernel = kernel * (lag >= 0)[..., None]
        return x + self.out(torch.einsum("bik,bjk,ijk,bjv->biv", self.q(x), self.k(x), kernel, self.v(x)))
