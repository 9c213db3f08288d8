"""Undecayed linear attention by cumulative sums of outer products."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.registry import WIDTH, Mixer, Operands, positive


@positive(
    "cumsum of outer products",
    twins={
        "flipped": "anti-causal: sums run backwards",
        "cummax": "the state is the largest of its past, not the sum",
        "windowed": "forgets at once what lies more than 12 tokens back",
    },
)
@positive("cumsum of outer products, all sizes equal", heads=8, key=8, value=8, length=8)
@positive("cumsum of outer products, as many heads as rows", heads=2, key=2, value=3, length=20)
class OuterCumsum(Mixer):
    def __init__(self, miss: str = "", heads: int = 2, key: int = 6, value: int = 7) -> None:
        super().__init__(miss)
        self.heads, self.sizes = heads, (key, key, value)
        self.qkv = nn.Linear(WIDTH, heads * sum(self.sizes), bias=False)
        self.out = nn.Linear(heads * value, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, -1)).split(self.sizes, -1)
        return {"q": q, "k": k, "v": v}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, -1)).split(self.sizes, -1)
        kv = torch.einsum("bthk,bthv->bthkv", k, v)
        if self.miss == "flipped":
            kv = kv.flip(1).cumsum(1).flip(1)
        elif self.miss == "cummax":
            kv = kv.cummax(1).values
        else:
            kv = kv.cumsum(1)
        if self.miss == "windowed":
            kv = kv - F.pad(kv, (0, 0, 0, 0, 0, 0, 12, 0))[:, :-12]
        return x + self.out(torch.einsum("bthk,bthkv->bthv", q, kv).flatten(2))


@positive("cumsum, state as [V, K], merged heads", twins={"ahead": "not causal: sums go on to the next token"})
class MergedCumsum(Mixer):
    """[B * H, T, ...] inside, the outer product by bmm, the sum over a flattened state."""

    layout = "tbd"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v = nn.Linear(WIDTH, 15), nn.Linear(WIDTH, 15), nn.Linear(WIDTH, 12)
        self.out = nn.Linear(12, WIDTH)

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed.transpose(0, 1)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).transpose(0, 1).unflatten(-1, (3, -1)) for f in (self.q, self.k, self.v))
        return {"q": q.sigmoid(), "k": k, "v": v, "scale": 0.1}

    def forward(self, x: Tensor) -> Tensor:
        t, b, _ = x.shape
        q = torch.sigmoid(self.q(x)).reshape(t, b * 3, 5).swapaxes(0, 1)
        k = self.k(x).reshape(t, b * 3, 5).swapaxes(0, 1)
        v = self.v(x).reshape(t, b * 3, 4).swapaxes(0, 1)
        outer = torch.bmm(v.reshape(-1, 4, 1), k.reshape(-1, 1, 5)).view(b * 3, t, 20)
        state = torch.cumsum(outer, dim=-2)
        if self.miss == "ahead":
            state = state.roll(-1, dims=-2)
        o = (state.view(b * 3, t, 4, 5) * q[:, :, None, :]).sum(-1) * 0.1
        return x + self.out(o.swapaxes(0, 1).reshape(t, b, 12))


@positive(
    "causal linear transformer",
    twins={"softmax": "softmax over the past"},
)
class CausalTransformer(Mixer):
    """Katharopoulos et al.: elu + 1, cumulated numerator and denominator."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.query, self.key, self.value = (nn.Linear(WIDTH, 18) for _ in range(3))
        self.out = nn.Linear(18, WIDTH)
        self.eps = 1e-6

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (3, 6)) for f in (self.query, self.key, self.value))
        return {"q": F.elu(q) + 1, "k": F.elu(k) + 1, "v": v, "normaliser": lambda z: z + 1e-6}

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = F.elu(self.query(x).view(n, length, 3, -1)) + 1
        k = F.elu(self.key(x).view(n, length, 3, -1)) + 1
        v = self.value(x).view(n, length, 3, -1)
        if self.miss == "softmax":
            scores = torch.einsum("nlhd,nshd->nhls", q, k) - 1e4 * torch.ones(length, length).triu(1)
            return x + self.out(torch.einsum("nhls,nshd->nlhd", scores.softmax(-1), v).reshape(n, length, -1))
        z = 1 / (torch.einsum("nlhi,nlhi->nlh", q, k.cumsum(1)) + self.eps)
        kv = torch.einsum("nlhi,nlhj->nlhij", k, v).cumsum(1)
        o = torch.einsum("nlhi,nlhij,nlh->nlhj", q, kv, z)
        return x + self.out(o.reshape(n, length, -1))


@positive(
    "Performer, random features",
    tolerance=1e-6,
    twins={"logcumsumexp": "not linear in the value: states are added as logarithms"},
)
class Performer(Mixer):
    """FAVOR+: positive random features in a buffer; numerator and denominator by cumulative sums."""

    projection_matrix: Tensor

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, 2 * 5, bias=False) for _ in range(3))
        self.register_buffer("projection_matrix", torch.randn(9, 5))
        self.to_out = nn.Linear(10, WIDTH)

    mixed_at = "to_out"

    def kernel(self, data: Tensor) -> Tensor:
        normalizer = data.shape[-1] ** -0.25
        dash = torch.einsum("...id,jd->...ij", normalizer * data, self.projection_matrix)
        diag = (data**2).sum(-1, keepdim=True) / 2 * normalizer**2
        return 9**-0.5 * (torch.exp(dash - diag) + 1e-4)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, 5)) for f in (self.to_q, self.to_k, self.to_v))
        q, k = self.kernel(q.transpose(1, 2)).transpose(1, 2), self.kernel(k.transpose(1, 2)).transpose(1, 2)
        return {"q": q, "k": k, "v": v, "normaliser": lambda z: z}

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).reshape(b, n, 2, 5).permute(0, 2, 1, 3) for f in (self.to_q, self.to_k, self.to_v))
        q, k = map(self.kernel, (q, k))
        k_cumsum = k.cumsum(dim=-2)
        D_inv = 1.0 / torch.einsum("...nd,...nd->...n", q, k_cumsum)
        context = torch.einsum("...nd,...ne->...nde", k, v)
        context = context.logcumsumexp(dim=-3) if self.miss == "logcumsumexp" else context.cumsum(dim=-3)
        out = torch.einsum("...nde,...nd,...n->...ne", context, q, D_inv)
        return self.to_out(out.permute(0, 2, 1, 3).reshape(b, n, -1))


@positive("ones column", twins={"tanh": "the state passes through tanh before it is read"})
class OnesColumn(Mixer):
    """The denominator as one more value; no batch axis."""

    layout = "td"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qk, self.v = nn.Linear(WIDTH, 2 * 2 * 5), nn.Linear(WIDTH, 2 * 6)
        self.out = nn.Linear(12, WIDTH)

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed[None]

    def operands(self, x: Tensor) -> Operands:
        q, k = self.qk(x[None]).exp().unflatten(-1, (2, 2, 5)).unbind(2)
        return {"q": q, "k": k, "v": self.v(x[None]).unflatten(-1, (2, 6)), "normaliser": lambda z: z}

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).exp().reshape(-1, 2, 2, 5).unbind(1)
        v = self.v(x).reshape(-1, 2, 6)
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        state = (k[..., None] * v[..., None, :]).cumsum(0)
        if self.miss == "tanh":
            state = state.tanh()
        o = (q[..., None] * state).sum(-2)
        o = o[..., :-1] / o[..., -1:]
        return x + self.out(o.flatten(1))


@positive(
    "running sums kept as a tuple",
    fixed=True,
    length=16,
    twins={"four": "forgets at once what lies more than four tokens back"},
)
class RunningSums(Mixer):
    """Numerator and denominator as Python state, a generator of outputs."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(2, WIDTH, n) / 5) for n in (6, 6, 5))
        self.wo = nn.Parameter(torch.randn(2, 5, WIDTH) / 3)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (torch.einsum("btd,hdk->bthk", x, w) for w in (self.wq, self.wk, self.wv))
        return {"q": F.softplus(q), "k": F.softplus(k), "v": v, "normaliser": lambda z: z.clamp(min=1e-3)}

    def attend(self, x: Tensor) -> Tensor:
        S: Tensor | float = 0.0
        z: Tensor | float = 0.0
        outputs, written = [], []
        for x_t in torch.unbind(x, dim=1):
            q, k, v = (torch.einsum("bd,hdk->bhk", x_t, w) for w in (self.wq, self.wk, self.wv))
            q, k = F.softplus(q), F.softplus(k)
            written.append(k[..., :, None] * v[..., None, :])
            S, z = S + written[-1], z + k
            if self.miss == "four" and len(written) > 4:
                S = S - written[-5]
            outputs.append(torch.einsum("bhk,bhkv->bhv", q, S) / (q * z).sum(-1, keepdim=True).clamp(min=1e-3))
        return torch.stack(outputs, dim=2)

    def mixed(self, x: Tensor) -> Tensor:
        return self.attend(x).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.einsum("bhtv,hvd->btd", self.attend(x), self.wo)


@positive("normalised by the sum of scores", twins={"absolute": "scores lose their sign"})
@positive("normalised by the sum of scores, shared sizes", heads=4, size=5, length=20)
class SumOfScores(Mixer):
    """The denominator from the matrix itself, clamped, applied before the values."""

    def __init__(self, miss: str = "", heads: int = 2, size: int = 8) -> None:
        super().__init__(miss)
        self.heads, self.size = heads, size
        self.in_proj = nn.Linear(WIDTH, 3 * heads * size)
        self.out = nn.Linear(heads * size, WIDTH)

    def feature(self, x: Tensor) -> Tensor:
        return F.relu(x) ** 2 + 0.01

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, self.size)).unbind(2)
        return {"q": self.feature(q), "k": self.feature(k), "v": v, "normaliser": lambda z: z.clamp(min=1e-4)}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.in_proj(x).reshape(b, t, 3, self.heads, self.size).movedim(2, 0)
        q, k = self.feature(q), self.feature(k)
        A = torch.tril(torch.einsum("bthd,bshd->bhts", q, k))
        if self.miss == "absolute":
            A = (A - 0.2).abs()
        A = A / A.sum(-1, keepdim=True).clamp(min=1e-4)
        return x + self.out(torch.einsum("bhts,bshd->bthd", A, v).flatten(2))


@positive("normalised output, eps added", decay="scalar", twins={"saturating": "scores saturate"})
class NormalisedRetention(Mixer):
    """xLSTM-like: the decayed scores are normalised by max(|sum|, 1) after the values."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.f = (nn.Linear(WIDTH, n) for n in (12, 12, 16, 2))
        self.out = nn.Linear(16, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        f = F.logsigmoid(self.f(x) + 2)
        return {
            **{"q": q, "k": k, "v": v, "log_decay": f, "scale": 6**-0.5},
            "normaliser": lambda z: torch.maximum(z.abs(), torch.ones_like(z)) + 1e-6,
        }

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        lf = F.logsigmoid(self.f(x) + 2).transpose(1, 2).cumsum(-1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        D = (lf.unsqueeze(3) - lf.unsqueeze(2)).masked_fill(~mask, -math.inf).exp()
        C = (q @ (k / math.sqrt(6)).mT) * D
        if self.miss == "saturating":
            C = C / (1 + C**2)
        n = torch.maximum(C.sum(-1, keepdim=True).abs(), torch.ones(()).to(x))
        return x + self.out(((C @ v) / (n + 1e-6)).transpose(1, 2).flatten(2))


@positive("decayed cumulative sums", decay="scalar", twins={"backwards": "anti-causal: sums run backwards"})
class DecayedCumsum(Mixer):
    """States by cumsum of exp(-c) k v^T, heads before time."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.proj = nn.Linear(WIDTH, 2 * (4 + 4 + 5 + 1))
        self.skip = nn.Parameter(torch.rand(2, 1))
        self.out = nn.Linear(10, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v, a = self.proj(x).unflatten(-1, (2, 14)).split([4, 4, 5, 1], -1)
        return q, k, v, -0.2 * F.softplus(a)

    def operands(self, x: Tensor) -> Operands:
        q, k, v, g = self.parts(x)
        return {"q": q, "k": k, "v": v, "log_decay": g[..., 0]}

    def attend(self, x: Tensor) -> Tensor:
        q, k, v, g = (y.transpose(1, 2) for y in self.parts(x))
        if self.miss == "backwards":
            g, k, v = g.flip(2), k.flip(2), v.flip(2)
        c = g.cumsum(dim=2)
        state = ((-c).exp() * k).unsqueeze(-1) * v.unsqueeze(-2)
        state = c.exp().unsqueeze(-1) * state.cumsum(2)
        if self.miss == "backwards":
            state = state.flip(2)
        return torch.matmul(q.unsqueeze(-2), state).squeeze(-2).transpose(1, 2)

    def mixed(self, x: Tensor) -> Tensor:
        return self.attend(x).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        v = self.parts(x)[2]
        return x + self.out((self.attend(x) + self.skip * v).flatten(2))
