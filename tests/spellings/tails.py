"""Loops that hold the whole layer: projections of a token or a chunk before, and what becomes of its output after.

In some of them time is padded to whole chunks, and the rest of the layer comes before the cut.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.registry import WIDTH, Mixer, Operands, calls, positive


class InLoop(Mixer):
    """The mixer's output goes to `mixed_at` token by token [B, D], or chunk by chunk [B, C, D]."""

    def mixed(self, x: Tensor) -> Tensor:
        pieces = calls(self, self.mixed_at, x)
        made = torch.stack(pieces, 1) if pieces[0].dim() == 2 else torch.cat(pieces, 1)
        return self.heads_last(made)[:, : x.shape[1]].flatten(2)


@positive(
    "token loop with its projections",
    fixed=True,
    length=16,
    twins={"fed back": "what a token puts out is written with the next one"},
)
class TokenProjections(InLoop):
    """Queries, keys and values of one token, the output projection and the residual: all in the loop."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (4, 5)) for f in (self.q, self.k, self.v))
        return {"q": q, "k": k.sigmoid(), "v": v}

    def forward(self, x: Tensor) -> Tensor:
        S, ys = x.new_zeros(x.shape[0], 4, 5, 5), []
        for token in x.unbind(1):
            written = token + ys[-1] if self.miss == "fed back" and ys else token
            k, v = self.k(token).sigmoid().view(-1, 4, 5, 1), self.v(written).view(-1, 4, 1, 5)
            S = S + k * v
            y = (self.q(token).view(-1, 4, 1, 5) @ S).reshape(-1, WIDTH)
            ys.append(token + self.out(y))
        return torch.stack(ys, dim=1)


@positive(
    "retention step with norm and gate",
    decay="scalar",
    fixed=True,
    length=16,
    twins={"normed state": "the state that is carried on has been normalised"},
)
class RetentionStep(InLoop):
    """Learned decays; group norm, swish gate and projection of each output, which grow by cat."""

    mixed_at = "norm"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv, self.gate = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.keep = nn.Parameter(torch.tensor([1.0, 3.0]))
        self.norm, self.out = nn.GroupNorm(2, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 10)).unbind(2)
        return {"q": q, "k": k, "v": v, "log_decay": F.logsigmoid(self.keep)}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        keep, S, out = self.keep.sigmoid().view(2, 1, 1), torch.zeros(b, 2, 10, 10).to(x), x[:, :0]
        for i in range(t):
            q, k, v = self.qkv(x[:, i]).view(b, 3, 2, 10).unbind(1)
            S = keep * S + torch.einsum("bhk,bhv->bhkv", k, v)
            if self.miss == "normed state":
                S = F.layer_norm(S, (10,))
            y = self.norm(torch.einsum("bhk,bhkv->bhv", q, S).reshape(b, WIDTH))
            y = self.out(y * F.silu(self.gate(x[:, i])))
            out = torch.cat([out, y.unsqueeze(1)], dim=1)
        return x + out


@positive(
    "delta cell, rows written in place",
    decay="scalar",
    correction="delta",
    fixed=True,
    length=12,
    twins={"error of the output": "the correction is that of the normalised output"},
)
class DeltaCell(InLoop):
    """A cell with all weights in it, called for each token; what it returns is written into the output."""

    mixed_at = "norm"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.proj = nn.Linear(WIDTH, 2 * (6 + 6 + 8 + 2))
        self.norm, self.out = nn.RMSNorm(16), nn.Linear(16, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v, a, b = self.proj(x).unflatten(-1, (2, 22)).split([6, 6, 8, 1, 1], -1)
        given = {"log_decay": F.logsigmoid(a + 2)[..., 0], "beta": b.sigmoid()[..., 0]}
        return {"q": F.silu(q), "k": F.normalize(k, dim=-1), "v": v, **given}

    def cell(self, token: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, a, b = self.proj(token).unflatten(-1, (2, 22)).split([6, 6, 8, 1, 1], -1)
        q, k = F.silu(q).unsqueeze(-2), F.normalize(k, dim=-1).unsqueeze(-2)
        S = S * torch.sigmoid(a + 2).unsqueeze(-1)
        read = k @ S
        if self.miss == "error of the output":
            read = F.layer_norm(read, (8,))
        S = S + k.mT @ (b.sigmoid().unsqueeze(-1) * (v.unsqueeze(-2) - read))
        return self.out(self.norm((q @ S).flatten(1))), S

    def forward(self, x: Tensor) -> Tensor:
        S, y = x.new_zeros(x.shape[0], 2, 6, 8), torch.empty_like(x)
        for i in range(x.shape[1]):
            y[:, i], S = self.cell(x[:, i], S)
        return y


@positive(
    "loop with a denominator for each token",
    fixed=True,
    length=16,
    twins={"clipped": "the state is clipped"},
)
class TokenDenominators(InLoop):
    """Numerator and denominator as state; the quotient is projected at once."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v = (nn.Linear(WIDTH, n, bias=False) for n in (10, 10, 14))
        self.out = nn.Linear(14, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        return {"q": F.elu(q) + 1, "k": F.elu(k) + 1, "v": v, "normaliser": lambda d: d + 1e-3}

    def forward(self, x: Tensor) -> Tensor:
        top, bottom, ys = 0.0, 0.0, []
        for token in torch.unbind(x, 1):
            q, k = (F.elu(f(token)).unflatten(-1, (2, 5)) + 1 for f in (self.q, self.k))
            v = self.v(token).unflatten(-1, (2, 7))
            top, bottom = top + k[..., :, None] * v[..., None, :], bottom + k
            if self.miss == "clipped":
                top = top.clamp(-1, 1)
            y = torch.einsum("bhk,bhkv->bhv", q, top) / ((q * bottom).sum(-1, keepdim=True) + 1e-3)
            ys.append(self.out(y.flatten(1)).unsqueeze(1))
        return x + torch.cat(ys, 1)


@positive(
    "chunk loop with its projections",
    decay="scalar",
    fixed=True,
    length=32,
    twins={"own end": "not causal: a chunk reads the state at its own end"},
)
class ChunkProjections(InLoop):
    """Eight tokens at a time from their projections to the output's; decays that tokens decide."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qk, self.v, self.a = nn.Linear(WIDTH, 2 * 12), nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 2)
        self.out = nn.Linear(16, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k = self.qk(x).unflatten(-1, (2, 2, 6)).unbind(2)
        return {"q": q, "k": k, "v": self.v(x).unflatten(-1, (2, 8)), "log_decay": F.logsigmoid(self.a(x) + 1)}

    def forward(self, x: Tensor) -> Tensor:
        S, ys = x.new_zeros(x.shape[0], 2, 6, 8), []
        for part in x.split(8, dim=1):
            q, k = self.qk(part).unflatten(-1, (2, 2, 6)).permute(2, 0, 3, 1, 4)
            v = self.v(part).unflatten(-1, (2, 8)).transpose(1, 2)
            c = F.logsigmoid(self.a(part) + 1).cumsum(1).transpose(1, 2).unsqueeze(-1)
            after = c[:, :, -1:].exp() * S + (k * (c[:, :, -1:] - c).exp()).mT @ v
            read = after if self.miss == "own end" else S
            y = (q @ k.mT * (c - c.mT).tril().exp()).tril() @ v + (q * c.exp()) @ read
            S = after
            ys.append(part + self.out(y.transpose(1, 2).flatten(2)))
        return torch.cat(ys, dim=1)


@positive(
    "chunks of a delta layer",
    correction="delta",
    fixed=True,
    length=32,
    twins={"gated state": "the state is multiplied with a gate that depends on it"},
)
class DeltaLayerChunks(InLoop):
    """A triangular solve for each chunk, a norm and a gate behind it, written into slices of the output."""

    mixed_at = "norm"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv, self.bg = nn.Linear(WIDTH, 21), nn.Linear(WIDTH, 1 + 7)
        self.norm, self.out = nn.LayerNorm(7), nn.Linear(7, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.qkv(x)[:, :, None].chunk(3, -1)
        beta = self.bg(x)[..., :1].sigmoid()
        return {"q": q, "k": F.normalize(k, dim=-1), "v": v, "beta": beta, "scale": 7**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        y, S, eye = torch.zeros_like(x), x.new_zeros(x.shape[0], 7, 7), torch.eye(8).to(x)
        for at in range(0, x.shape[1], 8):
            part = x[:, at : at + 8]
            q, k, v = self.qkv(part).chunk(3, -1)
            beta, gate = self.bg(part).sigmoid().split([1, 7], -1)
            k = F.normalize(k, dim=-1)
            u = torch.linalg.solve_triangular(eye + (beta * k @ k.mT).tril(-1), beta * (v - k @ S), upper=False)
            o = (q @ S + (q @ k.mT).tril() @ u) * 7**-0.5
            S = S + k.mT @ u
            if self.miss == "gated state":
                S = S * S.sigmoid()
            y[:, at : at + 8] = self.out(self.norm(o) * gate)
        return x + y


@positive(
    "padded chunks, the layer ends before the cut",
    decay="scalar",
    length=21,
    twins={"softsign": "the state passes through softsign between chunks"},
)
class PaddedLayer(InLoop):
    """The input is padded to whole chunks; skip, gate and projection come before the padding is cut off."""

    mixed_at = "read"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.proj = nn.Linear(WIDTH, 2 * (6 + 6 + 8 + 8 + 1), bias=False)
        self.D, self.read, self.out = nn.Parameter(torch.rand(2, 1)), nn.Identity(), nn.Linear(16, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v, z, a = self.proj(x).unflatten(-1, (2, 29)).split([6, 6, 8, 8, 1], -1)
        return q, k, v, z, F.logsigmoid(a + 1)

    def operands(self, x: Tensor) -> Operands:
        q, k, v, _, a = self.parts(x)
        return {"q": q, "k": k, "v": v, "log_decay": a[..., 0]}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        n = (t + 7) // 8
        padded = F.pad(x, (0, 0, 0, n * 8 - t))
        parts = self.parts(padded)
        q, k, v, _, a = (y.reshape(b, n, 8, 2, -1).transpose(2, 3) for y in parts)
        c = a.cumsum(3)
        last = c[..., -1:, :]
        local = (q @ k.mT * (c - c.mT).tril().exp()).tril() @ v
        S, states = x.new_zeros(b, 2, 6, 8), []
        for i in range(n):
            states.append(S)
            S = last[:, i].exp() * S + (k * (last - c).exp())[:, i].mT @ v[:, i]
            S = F.softsign(S) if self.miss == "softsign" else S
        y = local + (q * c.exp()) @ torch.stack(states, 1)
        y = self.read(y.transpose(2, 3).reshape(b, n * 8, 2, 8)) + parts[2] * self.D
        return (padded + self.out((y * F.silu(parts[3])).flatten(2)))[:, :t]


@positive(
    "zeros at the end, a loop over chunks",
    fixed=True,
    length=29,
    twins={"saturating": "the state passes through tanh between chunks"},
)
class ZerosAtTheEnd(InLoop):
    """Padded by cat, projected chunk by chunk with a bias (padding is not zero any more), cut in the end."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def operands(self, x: Tensor) -> Operands:
        return {name: getattr(self, name)(x).unflatten(-1, (2, 10)) for name in "qkv"}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        more = torch.cat([x, x.new_zeros(b, -t % 8, WIDTH)], dim=1)
        S, ys = torch.zeros(b, 2, 10, 10).to(x), []
        for part in more.chunk(more.shape[1] // 8, dim=1):
            q, k, v = (f(part).view(b, 8, 2, 10).transpose(1, 2) for f in (self.q, self.k, self.v))
            ys.append(self.out((q @ S + torch.tril(q @ k.mT) @ v).transpose(1, 2).flatten(2)))
            S = S + k.mT @ v
            if self.miss == "saturating":
                S = torch.tanh(S)
        return x + torch.cat(ys, 1)[:, :t]
