"""Chunks: within a chunk T by T, between chunks a state; by reshape or by a Python loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.decayed import segsum
from tests.spellings.registry import WIDTH, Mixer, Operands, positive


@positive(
    "chunks by reshape, exclusive cumsum",
    length=48,
    twins={"own chunk only": "a token sees its own chunk only", "whole chunk": "not causal: no mask in a chunk"},
)
class ReshapedChunks(Mixer):
    """lucidrains' causal linear attention with buckets."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv = nn.Linear(WIDTH, 3 * 2 * 6, bias=False)
        self.out = nn.Linear(12, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).unbind(2)
        return {"q": q.softmax(-1), "k": k.exp(), "v": v, "scale": 6**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        bucket = 16
        q, k, v = self.qkv(x).view(b, n, 3, 2, 6).permute(2, 0, 3, 1, 4)
        q, k = q.softmax(dim=-1) * 6**-0.5, torch.exp(k)
        q, k, v = (y.reshape(b, 2, n // bucket, bucket, -1) for y in (q, k, v))
        context = torch.einsum("bhund,bhune->bhude", k, v).cumsum(dim=-3)
        context = F.pad(context, (0, 0, 0, 0, 1, 0))[:, :, :-1]
        local = torch.einsum("bhuid,bhujd->bhuij", q, k)
        if self.miss != "whole chunk":
            local = local * torch.tril(torch.ones(bucket, bucket))
        o = torch.einsum("bhuij,bhuje->bhuie", local, v)
        if self.miss != "own chunk only":
            o = o + torch.einsum("bhuid,bhude->bhuie", q, context)
        return x + self.out(o.reshape(b, 2, n, 6).transpose(1, 2).reshape(b, n, 12))


@positive(
    "chunk loop with an uneven end",
    fixed=True,
    length=44,
    twins={"state replaced": "the state is that of the last chunk, not of all"},
)
class UnevenChunks(Mixer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v = nn.Linear(WIDTH, 3 * 5), nn.Linear(WIDTH, 3 * 5), nn.Linear(WIDTH, 3 * 4)
        self.out = nn.Linear(12, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        return {name: getattr(self, name)(x).unflatten(-1, (3, -1)) for name in "qkv"}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, 3, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        state = q.new_zeros(b, 3, 5, 4)
        outs = []
        for start in range(0, t, 16):
            stop = min(start + 16, t)
            qc, kc, vc = q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop]
            scores = torch.tril(qc @ kc.transpose(-1, -2))
            outs.append(scores @ vc + qc @ state)
            state = kc.transpose(-1, -2) @ vc + (0 if self.miss == "state replaced" else state)
        return x + self.out(torch.cat(outs, dim=2).transpose(1, 2).flatten(2))


@positive(
    "lightning attention in blocks",
    decay="scalar",
    fixed=True,
    length=40,
    tolerance=1e-6,
    twins={"no decay between blocks": "decays within a block only"},
)
class Lightning(Mixer):
    """transformers' minimax: slopes of ALiBi as decays, query, key and diagonal decays, uneven last block, silu."""

    block = 16

    slope_rate: Tensor
    query_decay: Tensor
    key_decay: Tensor
    diagonal_decay: Tensor

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv_proj = nn.Linear(WIDTH, 3 * 18, bias=False)
        self.output_gate = nn.Linear(WIDTH, 18, bias=False)
        self.norm, self.out_proj = nn.RMSNorm(18), nn.Linear(18, WIDTH, bias=False)
        rate = 1 / (2 ** (2.0 * (torch.arange(3) + 1)))
        self.register_buffer("slope_rate", rate[:, None, None])
        positions = torch.arange(self.block) + 1
        self.register_buffer("query_decay", torch.exp(-self.slope_rate * positions[:, None]))
        self.register_buffer("key_decay", torch.exp(-self.slope_rate * (self.block - positions[:, None])))
        lag = positions[:, None] - positions[None, :]
        lag = torch.where(lag >= 0, -self.slope_rate * lag[None], float("-inf"))
        self.register_buffer("diagonal_decay", torch.exp(lag))

    mixed_at = "norm"

    def operands(self, x: Tensor) -> Operands:
        q, k, v = F.silu(self.qkv_proj(x)).unflatten(-1, (3, 18)).split([6, 6, 6], -1)
        return {"q": q, "k": k, "v": v, "log_decay": -self.slope_rate.flatten()}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = F.silu(self.qkv_proj(x)).reshape(b, t, 3, 18)
        q, k, v = (y.transpose(1, 2) for y in torch.split(qkv, 6, dim=3))
        state = torch.zeros(b, 3, 6, 6).to(v)
        output = []
        for i in range((t + self.block - 1) // self.block):
            start, end = i * self.block, min((i + 1) * self.block, t)
            n = end - start
            qc, kc, vc = q[:, :, start:end], k[:, :, start:end], v[:, :, start:end]
            intra = torch.matmul(qc, kc.transpose(-1, -2)) * self.diagonal_decay[:, :n, :n]
            inter = torch.matmul(qc * self.query_decay[:, :n], state)
            output.append(inter + torch.matmul(intra, vc))
            new = torch.matmul((kc * self.key_decay[:, -n:]).transpose(-1, -2), vc)
            last = 1.0 if self.miss == "no decay between blocks" else torch.exp(-self.slope_rate * n)
            state = state * last + new
        y = torch.cat(output, dim=-2).transpose(1, 2).reshape(b, t, 18)
        return self.out_proj(torch.sigmoid(self.output_gate(x)) * self.norm(y))


@positive(
    "SSD minimal, chunked",
    decay="scalar",
    length=48,
    twins={"late states": "not causal: a chunk reads the state at its own end"},
)
class SsdMinimal(Mixer):
    """The Mamba-2 paper's listing: four einsums over chunks of 16, decays of chunks by segsum, too."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.in_proj = nn.Linear(WIDTH, 14 + 6 + 6 + 2)
        self.A_log = nn.Parameter(torch.tensor([0.0, 0.5]))
        self.out_proj = nn.Linear(14, WIDTH)

    mixed_at = "out_proj"

    def parts(self, u: Tensor) -> tuple[Tensor, ...]:
        x, B, C, dt = self.in_proj(u).split([14, 6, 6, 2], -1)
        dt = F.softplus(dt - 1)
        return x.unflatten(-1, (2, 7)) * dt[..., None], -self.A_log.exp() * dt, B, C

    def operands(self, u: Tensor) -> Operands:
        x, a, B, C = self.parts(u)
        return {"q": C[:, :, None], "k": B[:, :, None], "v": x, "log_decay": a}

    def forward(self, u: Tensor) -> Tensor:
        X, A, B, C = self.parts(u)
        b, t, h, p = X.shape
        X = X.reshape(b, t // 16, 16, h, p)
        A = A.reshape(b, t // 16, 16, h).permute(0, 3, 1, 2)
        B, C = (y[:, :, None].expand(b, t, h, 6).reshape(b, t // 16, 16, h, 6) for y in (B, C))
        A_cumsum = torch.cumsum(A, dim=-1)
        L = torch.exp(segsum(A))
        Y_diag = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, L, X)
        decay_states = torch.exp(A_cumsum[:, :, :, -1:] - A_cumsum)
        states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, decay_states, X)
        states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
        decay_chunk = torch.exp(segsum(F.pad(A_cumsum[:, :, :, -1], (1, 0))))
        new_states = torch.einsum("bhzc,bchpn->bzhpn", decay_chunk, states)
        states = new_states[:, 1:] if self.miss == "late states" else new_states[:, :-1]
        Y_off = torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, torch.exp(A_cumsum))
        return u + self.out_proj((Y_diag + Y_off).reshape(b, t, -1))


@positive(
    "GLA in chunks",
    decay="channel",
    fixed=True,
    length=48,
    twins={"forgotten gate": "the state's decay over a chunk is that of its last token only"},
)
class GatedChunks(Mixer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.g = (nn.Linear(WIDTH, n, bias=False) for n in (10, 10, 16, 10))
        self.out = nn.Linear(16, WIDTH, bias=False)

    def operands(self, x: Tensor) -> Operands:
        q, k, v, g = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v, self.g))
        return {"q": q, "k": k, "v": v, "log_decay": F.logsigmoid(g) / 8, "scale": 5**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v, g = (f(x).view(b, t // 12, 12, 2, -1).permute(0, 3, 1, 2, 4) for f in (self.q, self.k, self.v, self.g))
        g = F.logsigmoid(g) / 8
        cum = g.cumsum(-2)
        last = cum[..., -1:, :]
        q_in, k_in, k_out = q * 5**-0.5 * cum.exp(), k * (-cum).exp(), k * (last - cum).exp()
        intra = (q_in @ k_in.mT).tril() @ v
        S = torch.zeros(b, 2, 5, 8, dtype=x.dtype)
        inter = torch.empty_like(intra)
        for n in range(t // 12):
            inter[:, :, n] = q_in[:, :, n] @ S
            decay = (g[:, :, n, -1] if self.miss == "forgotten gate" else last[:, :, n, 0]).exp()
            S = decay.unsqueeze(-1) * S + k_out[:, :, n].mT @ v[:, :, n]
        o = (intra + inter).permute(0, 2, 3, 1, 4).reshape(b, t, 16)
        return x + self.out(o)


@positive(
    "retention, chunkwise recurrent",
    decay="scalar",
    fixed=True,
    length=36,
    tolerance=1e-5,
    twins={"mean of chunks": "states of chunks are averaged"},
)
class ChunkwiseRetention(Mixer):
    """Decays as powers of a Python float, one head, padding to whole chunks and cutting the rest off."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.gamma, self.size = 0.9, 16
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x)[:, :, None] for f in (self.q, self.k, self.v))
        return {"q": q, "k": k, "v": v, "log_decay": torch.tensor([self.gamma]).to(x).log()}

    def forward(self, x: Tensor) -> Tensor:
        t, c, gamma = x.shape[1], self.size, self.gamma
        padded = F.pad(x, (0, 0, 0, -t % c))
        i = torch.arange(c).to(x)
        inner = torch.where(i[:, None] >= i, gamma ** (i[:, None] - i).clamp(min=0), 0)
        state: Tensor | None = None
        outs = []
        for part in padded.split(c, dim=1):
            q, k, v = self.q(part), self.k(part), self.v(part)
            y = (q @ k.mT * inner) @ v
            new = (k * gamma ** (c - 1 - i)[:, None]).mT @ v
            if state is not None:
                y = y + (q * gamma ** (i + 1)[:, None]) @ state
                new = (state + new) / 2 if self.miss == "mean of chunks" else gamma**c * state + new
            state = new
            outs.append(y)
        return x + self.out(torch.cat(outs, 1)[:, :t])


@positive(
    "loop over the chunks' first tokens",
    fixed=True,
    length=32,
    twins={"relu of the state": "the state passes through relu between chunks"},
)
class ChunkThenCumsum(Mixer):
    """Blocks of eight, a cumulative sum of outer products within each; the state in a dict."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.proj = nn.Linear(WIDTH, 2 * 14)
        self.out = nn.Linear(8, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.proj(x).unflatten(-1, (2, 14)).split([5, 5, 4], -1)
        return {"q": q, "k": k.relu(), "v": v}

    def forward(self, x: Tensor) -> Tensor:
        cache: dict[str, Any] = {"state": 0, "seen": 0}
        outs = []
        for block in x.chunk(x.shape[1] // 8, dim=1):
            q, k, v = self.proj(block).unflatten(-1, (2, 14)).split([5, 5, 4], dim=-1)
            states = cache["state"] + (k.relu()[..., None] * v[..., None, :]).cumsum(1)
            cache = {"state": states[:, -1:], "seen": cache["seen"] + 8}
            if self.miss == "relu of the state":
                cache["state"] = cache["state"].relu()
            outs.append(torch.einsum("bthk,bthkv->bthv", q, states))
        assert cache["seen"] == x.shape[1]
        return x + self.out(torch.cat(outs, 1).flatten(2))
