"""States that are erased along a key of their own: RWKV-7, Comba, Gated DeltaNet-2, DPLR, IPLR."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import scan

from tests.spellings.registry import WIDTH, Mixer, Operands, positive


@positive(
    "RWKV-7 loop",
    decay="channel",
    correction="erase",
    fixed=True,
    length=14,
    twins={"bounded": "what is read is bounded by a tanh", "of the value": "erases along the value"},
)
class RWKV7Loop(Mixer):
    """The state is [V, K], matrices all the way, as in the small scripts that show RWKV-7."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.receptance, self.key, self.value = (nn.Linear(WIDTH, 12, bias=False) for _ in range(3))
        self.w0, self.w1, self.a1 = nn.Parameter(torch.zeros(12)), nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12)
        self.k_k, self.k_a = nn.Parameter(torch.rand(12) + 0.5), nn.Parameter(torch.rand(12))
        self.out = nn.Linear(12, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        r, k, v, a = self.receptance(x), self.key(x), self.value(x), self.a1(x).sigmoid()
        w = torch.exp(-0.606531 * torch.sigmoid(self.w0 + torch.tanh(self.w1(x))))
        kk = F.normalize((k * self.k_k).unflatten(-1, (2, 6)), dim=-1, p=2.0)
        k = k * (1 + (a - 1) * self.k_a)
        return *(y.unflatten(-1, (2, 6)) for y in (r, w, k, v, a)), kk

    def operands(self, x: Tensor) -> Operands:
        r, w, k, v, a, kk = self.parts(x)
        return {"q": r, "k": k, "v": v, "log_decay": w.log(), "erase_query": kk, "erase_key": kk * a}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        r, w, k, v, a, kk = self.parts(x)
        state = torch.zeros(b, 2, 6, 6, dtype=x.dtype, device=x.device)
        out = torch.zeros(b, t, 2, 6, dtype=x.dtype, device=x.device)
        for i in range(t):
            vk = v[:, i].view(b, 2, 6, 1) @ k[:, i].view(b, 2, 1, 6)
            ab = (-kk[:, i]).view(b, 2, 6, 1) @ (kk[:, i] * a[:, i]).view(b, 2, 1, 6)
            if self.miss == "bounded":
                erased = torch.tanh(state @ (-kk[:, i]).view(b, 2, 6, 1)) @ (kk[:, i] * a[:, i]).view(b, 2, 1, 6)
            else:
                erased = ab @ state if self.miss == "of the value" else state @ ab
            state = state * w[:, i].view(b, 2, 1, 6) + erased + vk
            out[:, i] = (state @ r[:, i].view(b, 2, 6, 1)).squeeze(-1)
        return x + self.out(out.flatten(2))


@positive(
    "RWKV-7 with einsum",
    decay="channel",
    correction="erase",
    fixed=True,
    length=12,
    twins={"another read": "a second direction is taken away"},
)
class RWKV7Einsum(Mixer):
    """The state is [K, V]; decays are their logarithm's logarithm, and all is one projection."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.all, self.out = nn.Linear(WIDTH, 2 * (5 * 4 + 5)), nn.Linear(10, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        r, k, kk, a, w, v = self.all(x).unflatten(-1, (2, 25)).split([4, 4, 4, 4, 4, 5], -1)
        return r, k, kk / kk.norm(dim=-1, keepdim=True), a.sigmoid(), w - 2, v

    def operands(self, x: Tensor) -> Operands:
        r, k, kk, a, w, v = self.parts(x)
        return {"q": r, "k": k, "v": v, "log_decay": -w.exp(), "erase_query": kk, "erase_key": kk * a}

    def forward(self, x: Tensor) -> Tensor:
        r, k, kk, a, w, v = self.parts(x)
        S, ys = x.new_zeros(x.shape[0], 2, 4, 5), []
        for t in range(x.shape[1]):
            seen = torch.einsum("bhk,bhkv->bhv", kk[:, t], S)
            new = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            erased = torch.einsum("bhk,bhv->bhkv", kk[:, t] * a[:, t], seen)
            if self.miss == "another read":
                erased = erased + torch.einsum("bhk,bhl,bhlv->bhkv", r[:, t], k[:, t], S) / 4
            S = torch.exp(-torch.exp(w[:, t]))[..., None] * S - erased + new
            ys.append(torch.einsum("bhk,bhkv->bhv", r[:, t], S))
        return x + self.out(torch.stack(ys, 1).flatten(2))


@positive(
    "DPLR as matrices",
    decay="channel",
    correction="erase",
    fixed=True,
    length=12,
    twins={"dense": "the transition is a matrix of full rank"},
)
class DPLRMatrices(Mixer):
    """diag(a) + b c^T as a matrix; time first, one head."""

    layout = "tbd"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.inputs, self.readout = nn.Linear(WIDTH, 5 * 5 + 6), nn.Linear(6, WIDTH)

    mixed_at = "readout"

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed.transpose(0, 1)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, a, b, c, v = self.inputs(x).split([5, 5, 5, 5, 5, 6], -1)
        return q, k, torch.sigmoid(a + 2), F.normalize(b, dim=-1) / 2, F.normalize(c, dim=-1) / 2, v

    def operands(self, x: Tensor) -> Operands:
        q, k, a, b, c, v = self.parts(x.transpose(0, 1)[:, :, None])
        return {"q": q, "k": k, "v": v, "log_decay": a.log(), "erase_query": -c, "erase_key": b, "scale": 0.5}

    def forward(self, x: Tensor) -> Tensor:
        q, k, a, b, c, v = self.parts(x)
        S, ys = x.new_zeros(x.shape[1], 5, 6), []
        for t in range(x.shape[0]):
            A = torch.diag_embed(a[t]) + b[t].unsqueeze(-1) @ c[t].unsqueeze(-2)
            if self.miss == "dense":
                A = torch.diag_embed(a[t]) + (b[t].unsqueeze(-1) * c[t].unsqueeze(-2)).sigmoid()
            S = A @ S + k[t].unsqueeze(-1) @ v[t].unsqueeze(-2)
            ys.append(0.5 * (q[t].unsqueeze(-2) @ S).squeeze(-2))
        return x + self.readout(torch.stack(ys))


@positive(
    "IPLR loop",
    correction="erase",
    fixed=True,
    length=16,
    twins={"of the query": "is written along what is read with, and reads nothing else"},
)
class IPLRLoop(Mixer):
    """FLA's recurrence without a decay, head first."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.a, self.b = (nn.Linear(WIDTH, 10) for _ in range(4))
        self.v, self.out = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, a, b, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.a, self.b, self.v))
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        return {"q": q, "k": k, "v": v, "erase_query": a, "erase_key": -b / 2, "scale": 5**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        q, k, a, b, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.a, self.b, self.v))
        q, a, b = q * 5**-0.5, F.normalize(a, dim=-1), F.normalize(b, dim=-1) / 2
        o, S = torch.zeros_like(v), torch.zeros(x.shape[0], 2, 5, 3).to(v)
        for i in range(x.shape[1]):
            seen = (S.clone() * a[:, :, i, :, None]).sum(-2, keepdim=True)
            if self.miss == "of the query":
                seen = seen.square()
            S = S + k[:, :, i, :, None] * v[:, :, i, None, :] + seen * b[:, :, i, :, None]
            o[:, :, i] = torch.einsum("bhd,bhdm->bhm", q[:, :, i], S)
        return x + self.out(o.transpose(1, 2).flatten(2))


@positive(
    "Comba loop",
    decay="scalar",
    correction="erase",
    fixed=True,
    length=14,
    twins={"of itself": "what is read is of the token's own state as well"},
)
class CombaLoop(Mixer):
    """What is read is read before the decay, along the key times a strength that a head has learned."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv, self.gates = nn.Linear(WIDTH, 2 * (4 + 4 + 5)), nn.Linear(WIDTH, 4)
        self.strength, self.out = nn.Parameter(torch.tensor([0.3, -0.5])), nn.Linear(10, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.qkv(x).unflatten(-1, (2, 13)).split([4, 4, 5], -1)
        beta, g = self.gates(x).chunk(2, -1)
        k = F.normalize(k, dim=-1)
        return q, k, k * self.strength.sigmoid()[:, None], v, beta.sigmoid(), -F.softplus(g) / 2

    def operands(self, x: Tensor) -> Operands:
        q, k, p, v, beta, g = self.parts(x)
        return {
            "q": q,
            "k": k,
            "v": beta[..., None] * v,
            "log_decay": g,
            "erase_query": p,
            "erase_key": beta[..., None] * k,
        }

    def forward(self, x: Tensor) -> Tensor:
        q, k, p, v, beta, g = self.parts(x)
        h, ys = x.new_zeros(x.shape[0], 2, 4, 5), []
        for t in range(x.shape[1]):
            read = (h * p[:, t, :, :, None]).sum(-2)
            if self.miss == "of itself":
                read = read * torch.sigmoid(read.sum(-1, keepdim=True))
            u = (v[:, t] - read) * beta[:, t, :, None]
            h = h * g[:, t, :, None, None].exp() + k[:, t, :, :, None] * u[..., None, :]
            ys.append((q[:, t, :, :, None] * h).sum(-2))
        return x + self.out(torch.stack(ys, 1).flatten(2))


@positive(
    "two keys by a solve",
    correction="erase",
    twins={"upper": "not causal: solves upwards", "squared": "corrected twice: the solve is of the squared system"},
)
class TwoKeysSolve(Mixer):
    """The UT transform on the whole sequence: errors are read with another key than they are written with."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkp, self.v, self.beta = nn.Linear(WIDTH, 3 * 10), nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 2)
        self.out = nn.Linear(12, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, p = self.qkp(x).unflatten(-1, (3, 2, 5)).unbind(2)
        v, beta = self.v(x).unflatten(-1, (2, 6)), self.beta(x).sigmoid()
        return q, F.normalize(k, dim=-1), F.normalize(p, dim=-1), v, beta

    def operands(self, x: Tensor) -> Operands:
        q, k, p, v, beta = self.parts(x)
        return {"q": q, "k": k, "v": v * beta[..., None], "erase_query": p, "erase_key": k * beta[..., None]}

    def forward(self, x: Tensor) -> Tensor:
        q, k, p, v = (y.transpose(1, 2) for y in self.parts(x)[:4])
        beta = self.parts(x)[4].transpose(1, 2)[..., None]
        A = torch.tril((beta * p) @ k.mT, diagonal=-1)
        if self.miss == "upper":
            A = A.mT
        if self.miss == "squared":
            A = A @ A + 2 * A
        system = A + torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        u = torch.linalg.solve_triangular(system, beta * v, upper=self.miss == "upper")
        o = torch.tril(q @ k.mT) @ u
        return x + self.out(o.transpose(1, 2).flatten(2))


@positive(
    "Gated DeltaNet-2 loop",
    decay="channel",
    correction="erase",
    fixed=True,
    length=12,
    twins={"gate of the state": "what is erased is gated by the state"},
)
class GatedDeltaNet2Loop(Mixer):
    """A gate per channel for what is erased, another for what is written; what is read is read after the decay."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.g, self.b, self.w = (nn.Linear(WIDTH, n) for n in (8, 8, 10, 8, 8, 10))
        self.out = nn.Linear(10, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        layers = (self.q, self.k, self.v, self.g, self.b, self.w)
        q, k, v, g, b, w = (f(x).unflatten(-1, (2, -1)) for f in layers)
        return q, F.normalize(k, dim=-1), v, F.logsigmoid(g) / 4, b.sigmoid(), w.sigmoid()

    def operands(self, x: Tensor) -> Operands:
        q, k, v, g, b, w = self.parts(x)
        return {
            "q": q,
            "k": k,
            "v": w * v,
            "log_decay": g,
            "erase_query": g.exp() * b * k,
            "erase_key": k,
            "scale": 0.5,
        }

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g, b, w = (y.transpose(1, 2) for y in self.parts(x))
        S, ys = torch.zeros(x.shape[0], 2, 4, 5, device=x.device, dtype=x.dtype), []
        for t in range(x.shape[1]):
            S = S * g[:, :, t].exp().unsqueeze(-1)
            erase = ((b[:, :, t] * k[:, :, t]).unsqueeze(-1) * S).sum(-2)
            if self.miss == "gate of the state":
                erase = erase * S.mean((-1, -2), keepdim=True)[..., 0].sigmoid()
            S = S + k[:, :, t].unsqueeze(-1) * (w[:, :, t] * v[:, :, t] - erase).unsqueeze(-2)
            ys.append(0.5 * (q[:, :, t].unsqueeze(-1) * S).sum(-2))
        return x + self.out(torch.stack(ys, 1).flatten(2))


@positive(
    "scan with two keys",
    decay="channel",
    correction="erase",
    length=12,
    twins={"maximum": "no channel of the state falls below nothing"},
)
class TwoKeysScan(Mixer):
    """KDA that erases at another key than it writes to."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.a, self.b = (nn.Linear(WIDTH, n) for n in (8, 8, 10, 8, 2))
        self.erased, self.out = nn.Linear(WIDTH, 8), nn.Linear(10, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        layers = (self.q, self.k, self.v, self.a, self.erased)
        q, k, v, a, e = (f(x).unflatten(-1, (2, -1)) for f in layers)
        a, beta = F.logsigmoid(a) / 4, self.b(x).sigmoid()[..., None]
        k, e = F.normalize(k, dim=-1), F.normalize(e, dim=-1)
        return {"q": q, "k": k, "v": beta * v, "log_decay": a, "erase_query": e * a.exp(), "erase_key": beta * k}

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.q, self.k, self.v, self.a, self.erased)
        q, k, v, a, e = (f(x).unflatten(-1, (2, -1)).transpose(0, 1) for f in layers)
        k, e = F.normalize(k, dim=-1), F.normalize(e, dim=-1)
        beta = self.b(x).sigmoid().transpose(0, 1)

        def cell(S: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            q, k, v, a, e, beta = now
            S = S * (F.logsigmoid(a) / 4).exp()[..., None]
            S = S + (beta[..., None] * k)[..., None] * (v - (e[..., None] * S).sum(-2))[..., None, :]
            if self.miss == "maximum":
                S = S.relu()
            return S, (q[..., None] * S).sum(-2)

        _, o = scan(cell, torch.zeros(x.shape[0], 2, 4, 5).to(x), (q, k, v, a, e, beta))
        return x + self.out(o.transpose(0, 1).flatten(2))
