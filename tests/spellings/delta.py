"""The delta rule without a loop over tokens: solves, inverses, power series; and in chunks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.registry import WIDTH, Mixer, Operands, positive


@positive(
    "delta by a triangular solve",
    correction="delta",
    twins={"squared": "corrected twice: the solve is of the squared system", "upper": "not causal: solves upwards"},
)
@positive("delta by a triangular solve, sizes equal", correction="delta", length=12, heads=1, size=12)
class TriangularSolve(Mixer):
    """The UT transform on the whole sequence."""

    def __init__(self, miss: str = "", heads: int = 2, size: int = 6) -> None:
        super().__init__(miss)
        self.heads, self.size = heads, size
        self.qkv = nn.Linear(WIDTH, 3 * heads * size, bias=False)
        self.beta = nn.Linear(WIDTH, heads)
        self.out = nn.Linear(heads * size, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.size)).unbind(2)
        return q, F.normalize(k, dim=-1), v, self.beta(x).sigmoid()

    def operands(self, x: Tensor) -> Operands:
        return dict(zip(("q", "k", "v", "beta"), self.parts(x), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, beta = (y.transpose(1, 2) for y in self.parts(x))
        kb, vb = k * beta[..., None], v * beta[..., None]
        A = torch.tril(kb @ k.mT, diagonal=-1)
        if self.miss == "upper":
            A = A.mT
        if self.miss == "squared":
            A = A @ A + 2 * A
        system = A + torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        u = torch.linalg.solve_triangular(system, vb, upper=self.miss == "upper")
        o = torch.tril(q @ k.mT) @ u
        return x + self.out(o.transpose(1, 2).flatten(2))


@positive(
    "delta by an inverse",
    correction="delta",
    twins={"keys of queries": "errors are read with the query, not with the key"},
)
class Inverse(Mixer):
    """No batch of heads: one head, torch.linalg.inv, beta on the rows."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.b = (nn.Linear(WIDTH, n) for n in (7, 7, 9, 1))
        self.out = nn.Linear(9, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x)[:, :, None] for f in (self.q, self.k, self.v))
        return {"q": q, "k": F.normalize(F.silu(k), dim=-1), "v": v, "beta": self.b(x).sigmoid(), "scale": 0.4}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), F.normalize(F.silu(self.k(x)), dim=-1), self.v(x)
        beta = torch.sigmoid(self.b(x))
        t = x.shape[1]
        rows = q if self.miss == "keys of queries" else k
        strict = torch.ones(t, t).to(x).tril(-1)
        T = torch.linalg.inv(torch.eye(t).to(x) + beta * (rows @ k.transpose(1, 2)) * strict)
        w = 0.4 * (q @ k.transpose(1, 2)).masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), 0) @ T
        return x + self.out(w @ (beta * v))


@positive(
    "gated delta, solve with decays",
    decay="scalar",
    correction="delta",
    twins={"undecayed correction": "the correction ignores the decays"},
)
class GatedSolve(Mixer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qk, self.v, self.ab = nn.Linear(WIDTH, 2 * 10), nn.Linear(WIDTH, 2 * 8), nn.Linear(WIDTH, 4)
        self.norm, self.out = nn.RMSNorm(8), nn.Linear(16, WIDTH)
        self.g = nn.Linear(WIDTH, 16)

    mixed_at = "norm"

    def operands(self, x: Tensor) -> Operands:
        q, k = F.normalize(self.qk(x).unflatten(-1, (2, 2, 5)), dim=-1).unbind(2)
        a, b = self.ab(x).chunk(2, -1)
        v = self.v(x).unflatten(-1, (2, 8))
        return {"q": q, "k": k, "v": v, "log_decay": -0.5 * F.softplus(a), "beta": b.sigmoid(), "scale": 5**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k = F.normalize(self.qk(x).view(b, t, 2, 2, 5), dim=-1).unbind(2)
        a, beta = self.ab(x).chunk(2, dim=-1)
        g = (-0.5 * F.softplus(a)).cumsum(1).transpose(1, 2)
        keep = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        D = (g[..., :, None] - g[..., None, :]).masked_fill(~keep, float("-inf")).exp()
        beta = beta.sigmoid().transpose(1, 2)[..., None]
        kk = torch.einsum("bihd,bjhd->bhij", k, k)
        L = (beta * kk * (1 if self.miss == "undecayed correction" else D)).tril(-1)
        values = self.v(x).view(b, t, 2, 8).transpose(1, 2) * beta
        u = torch.linalg.solve(torch.eye(t).to(x) + L, values)
        attn = torch.einsum("bihd,bjhd->bhij", q, k) * 5**-0.5 * D
        o = self.norm((attn @ u).transpose(1, 2))
        return x + self.out(o.flatten(2) * F.silu(self.g(x)))


@positive(
    "delta, power series by doubling",
    correction="delta",
    fixed=True,
    tolerance=1e-8,
    twins={"cut off": "the series ends after two terms"},
)
class PowerSeries(Mixer):
    """(I + A)^-1 = (I - A)(I + A^2)(I + A^4)...: A is nilpotent."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.b = (nn.Linear(WIDTH, n) for n in (12, 12, 12, 2))
        self.out = nn.Linear(12, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, 6)) for f in (self.q, self.k, self.v))
        return {"q": q, "k": k / k.norm(dim=-1, keepdim=True), "v": v, "beta": 2 * self.b(x).sigmoid()}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).reshape(b, t, 2, 6).transpose(1, 2).reshape(b * 2, t, 6) for f in (self.q, self.k, self.v))
        k = k / k.norm(dim=-1, keepdim=True)
        beta = 2 * torch.sigmoid(self.b(x)).transpose(1, 2).reshape(b * 2, t, 1)
        A = torch.tril(torch.bmm(beta * k, k.transpose(1, 2)), -1)
        eye = torch.eye(t, device=x.device, dtype=x.dtype)
        inverse, power = eye - A, A
        for _ in range(1 if self.miss == "cut off" else (t - 1).bit_length() - 1):
            power = torch.bmm(power, power)
            inverse = torch.bmm(inverse, eye + power)
        o = torch.bmm(torch.tril(torch.bmm(q, k.transpose(1, 2))), torch.bmm(inverse, beta * v))
        return x + self.out(o.view(b, 2, t, 6).transpose(1, 2).reshape(b, t, 12))


@positive(
    "delta by forward substitution",
    correction="delta",
    fixed=True,
    length=16,
    twins={"last error only": "errors are corrected by the last error only"},
)
class ForwardSubstitution(Mixer):
    """Errors u_i one after the other, as a list; then one masked product."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.proj = nn.Linear(WIDTH, 6 + 6 + 8 + 1)
        self.out = nn.Linear(8, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v, b = self.proj(x)[:, :, None].split([6, 6, 8, 1], -1)
        return {"q": q, "k": F.normalize(k, dim=-1), "v": v, "beta": b[..., 0].sigmoid()}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, b = self.proj(x).split([6, 6, 8, 1], -1)
        k, b = F.normalize(k, dim=-1), b.sigmoid()
        gram = k @ k.mT
        us: list[Tensor] = []
        for i in range(x.shape[1]):
            seen = torch.zeros_like(v[:, 0])
            for j in range(i - 1 if self.miss == "last error only" and i else 0, i):
                seen = seen + gram[:, i, j, None] * us[j]
            us.append(b[:, i] * (v[:, i] - seen))
        return x + self.out((q @ k.mT).tril() @ torch.stack(us, 1))


@positive(
    "gated delta in chunks",
    decay="scalar",
    correction="delta",
    fixed=True,
    length=48,
    twins={"uncorrected chunks": "the state of the chunks before is not subtracted from the values"},
)
class ChunkedGatedDelta(Mixer):
    """transformers' torch_chunk_gated_delta_rule, written into a layer: rows of the inverse in place, chunks of 16."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.in_proj = nn.Linear(WIDTH, 2 * (6 + 6 + 8), bias=False)
        self.ba = nn.Linear(WIDTH, 4)
        self.A_log = nn.Parameter(torch.tensor([-1.0, 0.0]))
        self.out_proj = nn.Linear(16, WIDTH, bias=False)

    mixed_at = "out_proj"

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.in_proj(x).unflatten(-1, (2, 20)).split([6, 6, 8], -1)
        b, a = self.ba(x).chunk(2, -1)
        q, k = (y * torch.rsqrt((y * y).sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        return q, k, v, -self.A_log.exp() * F.softplus(a), b.sigmoid()

    def operands(self, x: Tensor) -> Operands:
        return {**dict(zip(("q", "k", "v", "log_decay", "beta"), self.parts(x), strict=True)), "scale": 6**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        size = 16
        query, key, value, g, beta = (y.transpose(1, 2).contiguous() for y in self.parts(x))
        batch, heads, length, key_dim = key.shape
        query = query * key_dim**-0.5
        v_beta, k_beta = value * beta.unsqueeze(-1), key * beta.unsqueeze(-1)
        query, key, k_beta, v_beta = (
            y.reshape(batch, heads, -1, size, y.shape[-1]) for y in (query, key, k_beta, v_beta)
        )
        g = g.reshape(batch, heads, -1, size).cumsum(dim=-1)
        mask = torch.triu(torch.ones(size, size, dtype=torch.bool, device=x.device), diagonal=0)
        decay_mask = ((g.unsqueeze(-1) - g.unsqueeze(-2)).tril().exp()).tril()
        attn = -((k_beta @ key.transpose(-1, -2)) * decay_mask).masked_fill(mask, 0)
        for i in range(1, size):
            row, sub = attn[..., i, :i].clone(), attn[..., :i, :i].clone()
            attn[..., i, :i] = row + (row.unsqueeze(-1) * sub).sum(-2)
        attn = attn + torch.eye(size, dtype=attn.dtype, device=attn.device)
        value = attn @ v_beta
        k_cumdecay = attn @ (k_beta * g.exp().unsqueeze(-1))
        state = torch.zeros(batch, heads, key_dim, value.shape[-1]).to(value)
        out = torch.zeros_like(value)
        mask = torch.triu(torch.ones(size, size, dtype=torch.bool, device=x.device), diagonal=1)
        for i in range(length // size):
            q_i, k_i, v_i = query[:, :, i], key[:, :, i], value[:, :, i]
            scores = (q_i @ k_i.transpose(-1, -2) * decay_mask[:, :, i]).masked_fill_(mask, 0)
            v_new = v_i if self.miss == "uncorrected chunks" else v_i - k_cumdecay[:, :, i] @ state
            out[:, :, i] = (q_i * g[:, :, i, :, None].exp()) @ state + scores @ v_new
            rest = (g[:, :, i, -1, None] - g[:, :, i]).exp()[..., None]
            state = state * g[:, :, i, -1, None, None].exp() + (k_i * rest).transpose(-1, -2) @ v_new
        out = out.reshape(batch, heads, -1, out.shape[-1])[:, :, :length]
        return x + self.out_proj(out.transpose(1, 2).flatten(2))


@positive(
    "delta in chunks, uneven end",
    correction="delta",
    fixed=True,
    length=40,
    twins={"state without correction": "the state takes the uncorrected values"},
)
class ChunkedDelta(Mixer):
    """WY form by triangular solves in a loop over chunks, [T, B, D] input."""

    layout = "tbd"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.b = (nn.Linear(WIDTH, n) for n in (9, 9, 12, 3))
        self.out = nn.Linear(12, WIDTH)

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed.transpose(0, 1)

    def operands(self, x: Tensor) -> Operands:
        x = x.transpose(0, 1)
        q, k, v = (f(x).unflatten(-1, (3, -1)) for f in (self.q, self.k, self.v))
        return {"q": q, "k": F.normalize(k, dim=-1), "v": v, "beta": self.b(x).sigmoid()}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (3, -1)).permute(1, 2, 0, 3) for f in (self.q, self.k, self.v))
        k = F.normalize(k, p=2.0, dim=-1)
        beta = self.b(x).sigmoid().permute(1, 2, 0).unsqueeze(-1)
        S, outs = None, []
        for qc, kc, vc, bc in zip(*(y.split(16, dim=2) for y in (q, k, v, beta)), strict=True):
            n = qc.shape[2]
            lower = torch.eye(n).to(x) + ((bc * kc) @ kc.mT).tril(-1)
            u = torch.linalg.solve_triangular(lower, bc * vc, upper=False)
            if S is not None:
                w = torch.linalg.solve_triangular(lower, bc * kc, upper=False)
                u = u - w @ S
            outs.append((qc @ kc.mT).tril() @ u + (0 if S is None else qc @ S))
            written = bc * vc if self.miss == "state without correction" else u
            S = kc.mT @ written + (0 if S is None else S)
        return x + self.out(torch.cat(outs, 2).permute(2, 0, 1, 3).flatten(2))


@positive(
    "KDA by a solve over all pairs",
    decay="channel",
    correction="delta",
    twins={"mixed decay": "reads decay by head, corrections by channel"},
)
class KimiSolve(Mixer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.g, self.b = (nn.Linear(WIDTH, n) for n in (10, 10, 8, 10, 2))
        self.out = nn.Linear(8, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v, g = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v, self.g))
        norm = {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1), "v": v}
        return {**norm, "log_decay": F.logsigmoid(g) / 4, "beta": self.b(x).sigmoid()}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v, self.g))
        q, k, c = F.normalize(q, dim=-1), F.normalize(k, dim=-1), (F.logsigmoid(g) / 4).cumsum(2)
        lower = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        rel = torch.where(lower[..., None], c.unsqueeze(3) - c.unsqueeze(2), -torch.inf).exp()
        beta = self.b(x).sigmoid().transpose(1, 2).unsqueeze(-1)
        system = torch.einsum("bhik,bhjk,bhijk->bhij", k, k, rel).tril(-1) * beta
        u = torch.linalg.solve_triangular(system, beta * v, upper=False, unitriangular=True)
        if self.miss == "mixed decay":
            rel = rel.mean(-1, keepdim=True).expand_as(rel)
        return x + self.out((torch.einsum("bhik,bhjk,bhijk->bhij", q, k, rel) @ u).transpose(1, 2).flatten(2))


@positive(
    "delta with matrices of transition",
    correction="delta",
    fixed=True,
    length=16,
    twins={"whole state": "each step keeps half of the rest: another transition"},
)
class TransitionMatrices(Mixer):
    """S_t = (I - beta k k^T) S_{t-1} + ..., the matrix written out."""

    layout = "td"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.b = (nn.Linear(WIDTH, n) for n in (5, 5, 7, 1))
        self.out = nn.Linear(7, WIDTH)

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed[None]

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x)[None, :, None] for f in (self.q, self.k, self.v))
        return {"q": q, "k": F.normalize(k, dim=-1), "v": v, "beta": self.b(x)[None].sigmoid()}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, b = self.q(x), F.normalize(self.k(x), dim=-1), self.v(x), self.b(x).sigmoid()
        eye, S, ys = torch.eye(5).to(x), torch.zeros(5, 7).to(x), []
        for t in range(x.shape[0]):
            M = eye - b[t] * torch.outer(k[t], k[t])
            if self.miss == "whole state":
                M = M @ (eye - 0.5 * torch.outer(q[t], q[t]) / q[t].square().sum())
            S = M @ S + b[t] * torch.outer(k[t], v[t])
            ys.append(q[t] @ S)
        return x + self.out(torch.stack(ys))
