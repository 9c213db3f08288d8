"""Token loops: one step of the recurrence after another, unrolled by the tracer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.registry import WIDTH, Mixer, Operands, positive


@positive("loop with appended outputs", fixed=True, length=16, twins={"tanh": "the state passes through tanh"})
@positive("loop over 128 tokens", fixed=True, length=128)
class AppendedOutputs(Mixer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v = (nn.Linear(WIDTH, 2 * n) for n in (5, 5, 6))
        self.out = nn.Linear(12, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        return {name: getattr(self, name)(x).unflatten(-1, (2, -1)) for name in "qkv"}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.q(x).view(b, t, 2, 5), self.k(x).view(b, t, 2, 5), self.v(x).view(b, t, 2, 6)
        state = torch.zeros(b, 2, 5, 6, dtype=x.dtype, device=x.device)
        outputs = []
        for i in range(t):
            state = state + k[:, i].unsqueeze(-1) * v[:, i].unsqueeze(-2)
            if self.miss == "tanh":
                state = torch.tanh(state)
            outputs.append((q[:, i].unsqueeze(-2) @ state).squeeze(-2))
        return x + self.out(torch.stack(outputs, dim=1).reshape(b, t, -1))


@positive(
    "loop with decay, outputs written in place",
    decay="scalar",
    fixed=True,
    length=16,
    twins={"read late": "the state is read that was there before the last two tokens"},
)
@positive("loop with decay, sizes equal", decay="scalar", fixed=True, length=9, heads=1, size=9)
class InPlaceOutputs(Mixer):
    """State as [V, K], outputs into a tensor made beforehand, decay not in log space."""

    def __init__(self, miss: str = "", heads: int = 3, size: int = 6) -> None:
        super().__init__(miss)
        self.h, self.d = heads, size
        self.qkv = nn.Linear(WIDTH, 3 * heads * size)
        self.gate = nn.Linear(WIDTH, heads)
        self.o_proj = nn.Linear(heads * size, WIDTH, bias=False)

    mixed_at = "o_proj"

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.h, self.d)).unbind(2)
        return {"q": q, "k": k, "v": v, "log_decay": F.logsigmoid(self.gate(x) + 2)}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.h, self.d).unbind(dim=2)
        a = torch.sigmoid(self.gate(x) + 2)
        s = x.new_zeros(b, self.h, self.d, self.d)
        o, late = torch.zeros_like(v), (s, s)
        for i in range(t):
            if self.miss == "read late":
                o[:, i] = torch.einsum("bhvk,bhk->bhv", late[0], q[:, i])
                late = (late[1], s)
            s = a[:, i, :, None, None] * s + torch.einsum("bhv,bhk->bhvk", v[:, i], k[:, i])
            if self.miss != "read late":
                o[:, i] = torch.einsum("bhvk,bhk->bhv", s, q[:, i])
        return x + self.o_proj(o.flatten(2))


@positive(
    "loop of GLA",
    decay="channel",
    fixed=True,
    length=16,
    tolerance=1e-5,
    twins={
        "decay of the value": "decays along the value's channels, by gates of the keys",
        "reset": "the state starts anew every five tokens",
    },
)
class GatedLoop(Mixer):
    """FLA's naive recurrent GLA: everything in float32, [B, H, T, K]; the result goes back to the type it came in."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.g = (nn.Linear(WIDTH, 14, bias=False) for _ in range(4))
        self.out = nn.Linear(14, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v, g = (f(x).unflatten(-1, (2, 7)) for f in (self.q, self.k, self.v, self.g))
        return {"q": q, "k": k, "v": v, "log_decay": F.logsigmoid(g) / 16, "scale": 7**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g = (f(x).view(*x.shape[:2], 2, 7).transpose(1, 2) for f in (self.q, self.k, self.v, self.g))
        dtype = v.dtype
        q, k, v, gk = (y.float() for y in (q, k, v, F.logsigmoid(g) / 16))
        b, h, t, d = q.shape
        scale = d**-0.5
        o = torch.zeros_like(v)
        hidden = q.new_zeros(b, h, d, d)
        for i in range(t):
            if self.miss == "reset" and i % 5 == 0:
                hidden = torch.zeros_like(hidden)
            q_i = q[:, :, i] * scale
            k_i, v_i = k[:, :, i], v[:, :, i]
            gate = gk[:, :, i].exp()
            kv_i = k_i[..., None] * v_i[..., None, :]
            hidden = hidden * (gate[..., None, :] if self.miss == "decay of the value" else gate[..., None]) + kv_i
            o[:, :, i] = (q_i[..., None] * hidden).sum(-2)
        return self.out(o.transpose(1, 2).flatten(2).to(dtype))


@positive(
    "delta loop",
    correction="delta",
    fixed=True,
    length=16,
    twins={"previous key": "erases at the key of the step before"},
)
class DeltaLoop(Mixer):
    """DeltaNet as in FLA's recurrent reference, keys of length one."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.b = (nn.Linear(WIDTH, n) for n in (12, 12, 14, 2))
        self.out = nn.Linear(14, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        return {"q": q, "k": F.normalize(k, dim=-1), "v": v, "beta": self.b(x).sigmoid(), "scale": 6**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        bs, t, _ = x.shape
        q = self.q(x).view(bs, t, 2, 6).transpose(1, 2) * (6**-0.5)
        k = F.normalize(self.k(x).view(bs, t, 2, 6), p=2, dim=-1).transpose(1, 2)
        v = self.v(x).view(bs, t, 2, 7).transpose(1, 2)
        beta = self.b(x).sigmoid().transpose(1, 2)
        state = torch.zeros(bs, 2, 6, 7).to(v)
        o = torch.zeros_like(v)
        for i in range(t):
            k_i = k[:, :, i]
            v_i = v[:, :, i].clone()
            k_old = k[:, :, max(i - 1, 0)] if self.miss == "previous key" else k_i
            v_i = v_i - (state.clone() * k_old[..., None]).sum(-2)
            v_i = v_i * beta[:, :, i, None]
            state = state.clone() + k_i.unsqueeze(-1) * v_i.unsqueeze(-2)
            o[:, :, i] = torch.einsum("bhd,bhdm->bhm", q[:, :, i], state)
        return x + self.out(o.transpose(1, 2).reshape(bs, t, 14))


@positive(
    "gated delta loop, [V, K] state",
    decay="scalar",
    correction="delta",
    fixed=True,
    length=16,
    twins={"error through tanh": "not linear in the value: the error passes through tanh"},
)
class GatedDeltaLoop(Mixer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.proj = nn.Linear(WIDTH, 2 * (5 + 5 + 8 + 1 + 1))
        self.A_log = nn.Parameter(torch.tensor([0.1, 0.7]).log())
        self.proj_out = nn.Linear(16, WIDTH)

    mixed_at = "proj_out"

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v, a, b = self.proj(x).unflatten(-1, (2, 20)).split([5, 5, 8, 1, 1], dim=-1)
        g = -self.A_log.exp() * F.softplus(a.squeeze(-1))
        return F.silu(q), F.normalize(k, dim=-1), v, g, 2 * b.squeeze(-1).sigmoid()

    def operands(self, x: Tensor) -> Operands:
        return dict(zip(("q", "k", "v", "log_decay", "beta"), self.parts(x), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g, beta = self.parts(x)
        S = x.new_zeros(x.size(0), 2, 8, 5)
        ys = []
        for q_t, k_t, v_t, g_t, b_t in zip(*(y.unbind(1) for y in (q, k, v, g, beta)), strict=True):
            S = g_t.exp()[..., None, None] * S
            error = v_t - torch.matmul(S, k_t[..., None])[..., 0]
            if self.miss == "error through tanh":
                error = error.tanh()
            S = S + (b_t[..., None] * error)[..., :, None] * k_t[..., None, :]
            ys.append(torch.matmul(S, q_t[..., None])[..., 0])
        return self.proj_out(torch.stack(ys, 1).flatten(-2)) + x


@positive(
    "KDA loop",
    decay="channel",
    correction="delta",
    fixed=True,
    length=16,
    twins={"bounded error": "the error is bounded by a tanh"},
)
class KimiLoop(Mixer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.f, self.b = (nn.Linear(WIDTH, n, bias=False) for n in (12, 12, 8, 12, 2))
        self.out = nn.Linear(8, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v, f = (p(x).unflatten(-1, (2, -1)) for p in (self.q, self.k, self.v, self.f))
        norm = {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1)}
        return {**norm, "v": v, "log_decay": -0.3 * F.softplus(f), "beta": self.b(x).sigmoid(), "scale": 6**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, f = (p(x).unflatten(-1, (2, -1)) for p in (self.q, self.k, self.v, self.f))
        q, k = F.normalize(q, dim=-1) * 6**-0.5, F.normalize(k, dim=-1)
        g, beta = -0.3 * F.softplus(f), torch.sigmoid(self.b(x))
        S = torch.zeros(x.shape[0], 2, 6, 4, dtype=x.dtype)
        o = torch.empty_like(v)
        for i in range(x.shape[1]):
            S = S * g[:, i, ..., None].exp()
            error = v[:, i] - (k[:, i, ..., None] * S).sum(-2)
            if self.miss == "bounded error":
                error = torch.tanh(error)
            S = S + torch.einsum("bhk,bhv->bhkv", beta[:, i, ..., None] * k[:, i], error)
            o[:, i] = torch.einsum("bhk,bhkv->bhv", q[:, i], S)
        return x + self.out(o.flatten(2))
