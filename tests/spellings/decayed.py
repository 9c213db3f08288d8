"""Decayed linear attention with its scores written out: one decay for all channels of a head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.registry import WIDTH, Mixer, Operands, positive


@positive(
    "RetNet, parallel form",
    decay="scalar",
    tolerance=1e-5,  # its decays are made in float32
    twins={
        "both directions": "not causal: decays with the distance to either side",
        "alibi": "decay is linear in the distance",
    },
)
class Retention(Mixer):
    """Constant decays 1 - 2^(-5-h), group norm, swish gate (syncdoth/RetNet)."""

    gamma: Tensor

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.heads = 3
        gamma = 1 - 2.0 ** (-2 - torch.arange(0, 3, dtype=torch.float))
        self.register_buffer("gamma", gamma)
        self.W_Q, self.W_K, self.W_V, self.W_G = (nn.Linear(WIDTH, n, bias=False) for n in (15, 15, 21, 21))
        self.group_norm = nn.GroupNorm(3, 21)
        self.W_O = nn.Linear(21, WIDTH, bias=False)

    mixed_at = "group_norm"

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed.unflatten(0, (2, -1))

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (3, -1)) for f in (self.W_Q, self.W_K, self.W_V))
        return {"q": q, "k": k, "v": v, "scale": 5**-0.5, "log_decay": self.gamma.log().to(x)}

    def decay_mask(self, t: int) -> Tensor:
        n = torch.arange(t, device=self.gamma.device).unsqueeze(1)
        m = torch.arange(t, device=self.gamma.device).unsqueeze(0)
        if self.miss == "both directions":
            return self.gamma[:, None, None] ** (n - m).abs().float()
        if self.miss == "alibi":
            return (1 - (1 - self.gamma[:, None, None]) * (n - m).float() / 8) * (n >= m)
        decay = (self.gamma[:, None, None] ** (n - m).float()) * (n >= m).float()
        decay[decay != decay] = 0
        return decay

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.W_Q(x).view(b, t, 3, -1).permute(0, 2, 1, 3)
        k = self.W_K(x).view(b, t, 3, -1).permute(0, 2, 1, 3) * 5**-0.5
        v = self.W_V(x).view(b, t, 3, -1).permute(0, 2, 1, 3)
        ret = (q @ k.permute(0, 1, 3, 2)) * self.decay_mask(t).to(x)[None]
        y = (ret @ v).permute(0, 2, 1, 3).reshape(b * t, 21)
        y = self.group_norm(y).reshape(b, t, 21)
        return self.W_O(F.silu(self.W_G(x)) * y)


def segsum(x: Tensor) -> Tensor:
    """The stable segment sum of the Mamba-2 paper's listing."""
    t = x.size(-1)
    x = x[..., None].expand(*x.shape, t)
    mask = torch.tril(torch.ones(t, t, device=x.device, dtype=torch.bool), diagonal=-1)
    x = x.masked_fill(~mask, 0)
    x = torch.cumsum(x, dim=-2)
    mask = torch.tril(torch.ones(t, t, device=x.device, dtype=torch.bool), diagonal=0)
    return x.masked_fill(~mask, -torch.inf)


@positive(
    "SSD by segsum",
    decay="scalar",
    twins={
        "softmax": "decays are normalised over the past",
        "squared sum": "decay is not a product of one factor a step",
    },
)
class SegsumSsd(Mixer):
    """A whole Mamba-2 block: short convolution, dt by softplus, B and C in groups, D skip, gated norm."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.inner, self.n, self.groups, self.heads = 28, 6, 2, 4
        self.channels = self.inner + 2 * self.groups * self.n
        self.in_proj = nn.Linear(WIDTH, self.inner + self.channels + self.heads, bias=False)
        self.conv1d = nn.Conv1d(self.channels, self.channels, 4, groups=self.channels, padding=3)
        self.dt_bias = nn.Parameter(torch.linspace(-2, -0.5, self.heads))
        self.A_log = nn.Parameter(torch.arange(1, self.heads + 1).float().log())
        self.D = nn.Parameter(torch.rand(self.heads))
        self.norm = nn.RMSNorm(self.inner)
        self.out_proj = nn.Linear(self.inner, WIDTH, bias=False)

    def parts(self, u: Tensor) -> tuple[Tensor, ...]:
        z, xbc, dt = self.in_proj(u).split([self.inner, self.channels, self.heads], dim=-1)
        xbc = F.silu(self.conv1d(xbc.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
        x, b, c = xbc.split([self.inner, self.groups * self.n, self.groups * self.n], dim=-1)
        dt = F.softplus(dt + self.dt_bias)
        x = x.unflatten(-1, (self.heads, -1))
        return z, x, b.unflatten(-1, (self.groups, -1)), c.unflatten(-1, (self.groups, -1)), dt

    def operands(self, u: Tensor) -> Operands:
        _, x, b, c, dt = self.parts(u)
        return {"q": c, "k": b, "v": x * dt[..., None], "log_decay": -self.A_log.exp() * dt}

    def mixed(self, u: Tensor) -> Tensor:
        return self.ssd(*self.parts(u)[1:]).flatten(2)

    def ssd(self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor) -> Tensor:
        b, c = (y.repeat_interleave(self.heads // self.groups, dim=2) for y in (b, c))
        a = -torch.exp(self.A_log) * dt
        sums = segsum(a.transpose(1, 2))
        if self.miss == "softmax":
            decays = sums.softmax(-1)
        elif self.miss == "squared sum":
            decays = torch.exp(-(sums**2))
        else:
            decays = torch.exp(sums)
        return torch.einsum("bthn,bshn,bhts,bshp->bthp", c, b, decays, x * dt[..., None])

    def forward(self, u: Tensor) -> Tensor:
        z, x, b, c, dt = self.parts(u)
        y = self.ssd(x, b, c, dt) + x * self.D[:, None]
        return u + self.out_proj(self.norm(y.flatten(2) * F.silu(z)))


@positive(
    "ratio of cumulative products",
    decay="scalar",
    twins={"harmonic": "decay is 1 / (1 + distance), no product of one factor a step"},
)
class CumprodRatio(Mixer):
    """Decays not in log space: sigmoid gates, cumprod, a division, tril."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qk = nn.Linear(WIDTH, 2 * 2 * 6)
        self.v = nn.Linear(WIDTH, 2 * 9)
        self.f = nn.Linear(WIDTH, 2)
        self.out = nn.Linear(18, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k = self.qk(x).unflatten(-1, (2, 12)).chunk(2, -1)
        return {"q": q, "k": k, "v": self.v(x).unflatten(-1, (2, 9)), "log_decay": (self.f(x) + 1).sigmoid().log()}

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).unflatten(-1, (2, 12)).chunk(2, dim=-1)
        v = self.v(x).unflatten(-1, (2, 9))
        forget = torch.sigmoid(self.f(x) + 1).cumprod(dim=1).permute(0, 2, 1)
        D = forget[:, :, :, None] / forget[:, :, None, :]
        if self.miss == "harmonic":
            D = 1 / (1 + (forget.log()[:, :, None, :] - forget.log()[:, :, :, None]).relu())
        att = torch.tril(torch.einsum("bihd,bjhd->bhij", q, k) * D)
        return x + self.out(torch.einsum("bhij,bjhd->bihd", att, v).reshape(*x.shape[:2], -1))


@positive(
    "learned decay for each head",
    decay="scalar",
    twins={
        "decay of the query": "the decay depends on the query",
        "polynomial": "decay is polynomial in the distance",
    },
)
class LearnedDecay(Mixer):
    layout = "tbd"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.proj = nn.Linear(WIDTH, 3 * 2 * 7)
        self.rate = nn.Parameter(torch.tensor([-2.0, -0.5]))
        self.out = nn.Linear(14, WIDTH)

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed.transpose(0, 1)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.proj(x.transpose(0, 1)).unflatten(-1, (2, 3, 7)).unbind(3)
        return {"q": q, "k": k, "v": v, "log_decay": -F.softplus(self.rate)}

    def forward(self, x: Tensor) -> Tensor:
        t, b, _ = x.shape
        q, k, v = self.proj(x).view(t, b, 2, 3, 7).unbind(-2)
        distance = torch.arange(t)[:, None] - torch.arange(t)
        rate = F.softplus(self.rate)[:, None, None]
        if self.miss == "decay of the query":
            rate = rate * (1 + q.mean(-1).permute(1, 2, 0)[..., None].tanh())
        bias = torch.where(distance >= 0, -rate * distance.clamp(min=0), float("-inf"))
        weights = 1 / (1 - bias) ** 2 if self.miss == "polynomial" else bias.exp()
        o = torch.einsum("tbhd,sbhd,bhts,sbhe->tbhe", q, k, weights.expand(b, 2, t, t), v)
        return x + self.out(o.flatten(-2))


@positive(
    "forget gates, differences of cumulative sums",
    decay="scalar",
    twins={"softmax": "softmax of scores with the decays added (Forgetting Transformer)"},
)
class ForgetGates(Mixer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.wq, self.wk, self.wv = (nn.Linear(WIDTH, 2 * 8, bias=False) for _ in range(3))
        self.wf = nn.Linear(WIDTH, 2)
        self.wo = nn.Linear(16, WIDTH, bias=False)

    mixed_at = "wo"

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, 8)) for f in (self.wq, self.wk, self.wv))
        return {"q": q, "k": k, "v": v, "log_decay": F.logsigmoid(self.wf(x)), "scale": 8**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 8)).movedim(2, 1) for f in (self.wq, self.wk, self.wv))
        log_fgate = F.logsigmoid(self.wf(x).float() if x.dtype == torch.float32 else self.wf(x)).mT
        c = log_fgate.cumsum(-1)
        decay_bias = c[..., :, None] - c[..., None, :]
        mask = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device), 1)
        decay_bias = decay_bias.masked_fill(mask, float("-inf"))
        scores = torch.matmul(q, k.mT) * 8**-0.5
        probs = (scores + decay_bias).softmax(-1) if self.miss == "softmax" else scores * decay_bias.exp()
        return self.wo(torch.matmul(probs, v).movedim(1, 2).flatten(2))


@positive(
    "mLSTM gates without a stabiliser",
    decay="scalar",
    twins={"sigmoid scores": "scores pass through a sigmoid"},
)
class MatrixLstm(Mixer):
    """Forget gates in the decay, exponential input gates on the keys, inside one T by T matrix; no denominator."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv, self.gates = nn.Linear(WIDTH, 3 * 12), nn.Linear(WIDTH, 4)
        self.norm, self.down = nn.LayerNorm(12), nn.Linear(12, WIDTH)

    mixed_at = "norm"

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).unbind(2)
        i, f = self.gates(x).chunk(2, -1)
        return {"q": q, "k": k * i.exp()[..., None], "v": v, "log_decay": F.logsigmoid(f + 1), "scale": 6**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        queries, keys, values = self.qkv(x).view(b, s, 3, 2, 6).permute(2, 0, 3, 1, 4)
        igate, fgate = self.gates(x).transpose(1, 2).unsqueeze(-1).chunk(2, dim=1)
        log_fgates = F.logsigmoid(fgate + 1)
        ltr = torch.tril(torch.ones((s, s), dtype=torch.bool, device=x.device))
        cumsum = torch.cat([torch.zeros_like(log_fgates[:, :, :1]), torch.cumsum(log_fgates, dim=-2)], dim=-2)
        repeated = cumsum.repeat(1, 1, 1, s + 1)
        matrix = repeated - repeated.transpose(-2, -1)
        log_fg = torch.where(ltr, matrix[:, :, 1:, 1:], -float("inf"))
        log_d = log_fg + igate.transpose(-2, -1)
        keys_scaled = keys / 6**0.5
        qk = queries @ keys_scaled.transpose(-2, -1)
        if self.miss == "sigmoid scores":
            qk = qk.sigmoid()
        h = (qk * torch.exp(log_d)) @ values
        return x + self.down(self.norm(h.transpose(1, 2).reshape(b, s, 12)))


@positive("decay scores as a buffer", decay="scalar", fixed=True, tolerance=1e-5, twins={"ramp": "decay is a ramp"})
class DecayBuffer(Mixer):
    """A mask of lightning slopes for one length, made in the constructor."""

    slopes: Tensor
    mask: Tensor

    def __init__(self, miss: str = "", length: int = 24) -> None:
        super().__init__(miss)
        self.q, self.k, self.v = (nn.Linear(WIDTH, 4 * 5) for _ in range(3))
        slopes = torch.tensor([2 ** (-2 * (h + 1)) for h in range(4)])
        self.register_buffer("slopes", slopes)
        i = torch.arange(length)
        index = i[:, None] - i
        s = slopes[:, None, None] * index
        bare = (1 - s / 8).clamp(min=0) if miss == "ramp" else torch.exp(-s)
        self.register_buffer("mask", torch.where(index >= 0, bare, 0.0), persistent=False)
        self.out = nn.Linear(20, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (4, 5)) for f in (self.q, self.k, self.v))
        return {"q": F.silu(q), "k": F.silu(k), "v": F.silu(v), "log_decay": -self.slopes}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.silu(f(x)).unflatten(-1, (4, 5)).transpose(1, 2) for f in (self.q, self.k, self.v))
        energy = torch.einsum("bhnd,bhmd->bhnm", q, k) * self.mask
        return x + self.out(torch.einsum("bhnm,bhme->bhne", energy, v).transpose(1, 2).flatten(2))


@positive(
    "cumulative sum by a matrix of ones, one head",
    decay="scalar",
    twins={"window": "forgets at once what lies more than 15 tokens back"},
)
class OnesMatrixCumsum(Mixer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.w = nn.Parameter(torch.randn(WIDTH, 5 + 5 + 9 + 1) / 5)
        self.out = nn.Linear(9, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v, g = (x @ self.w)[:, :, None].split([5, 5, 9, 1], -1)
        return {"q": q, "k": k, "v": v, "log_decay": -0.1 * g[..., 0] ** 2}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g = torch.tensor_split(torch.matmul(x, self.w), (5, 10, 19), dim=-1)
        ones = torch.ones(x.shape[1], x.shape[1]).to(x).tril()
        total = ones @ (-0.1 * g.square())
        log_d = total - total.transpose(1, 2)
        d = torch.exp(log_d * ones) * ones
        if self.miss == "window":
            d = d.triu(-15)
        return x + self.out((q @ k.transpose(1, 2) * d) @ v)


@positive(
    "positions from cumsum of ones, rotated queries", decay="scalar", tolerance=1e-5, twins={"sum": "adds decays"}
)
class RotatedRetention(Mixer):
    """RetNet with its rotation: queries and keys turn with the position before they meet."""

    angle: Tensor
    decay: Tensor

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v = (nn.Linear(WIDTH, 2 * 8, bias=False) for _ in range(3))
        self.register_buffer("angle", 1.0 / (100 ** torch.linspace(0, 1, 4)).repeat_interleave(2))
        self.register_buffer("decay", torch.log(1 - 2 ** (-3 - torch.arange(2, dtype=torch.float))))
        self.out = nn.Linear(16, WIDTH)

    def rotate(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[1]).to(x)
        sin, cos = (f(index[:, None] * self.angle)[:, None] for f in (torch.sin, torch.cos))
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos + turned * sin

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, 8)) for f in (self.q, self.k, self.v))
        return {"q": self.rotate(q), "k": self.rotate(k), "v": v, "log_decay": self.decay, "scale": 8**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 8)) for f in (self.q, self.k, self.v))
        qr, kr = self.rotate(q).transpose(1, 2), self.rotate(k * 8**-0.5).transpose(1, 2)
        index = torch.ones(x.shape[1]).cumsum(0).to(x)
        mask = torch.tril(torch.ones(x.shape[1], x.shape[1]).to(x))
        mask = torch.masked_fill(index[:, None] - index[None, :], ~mask.bool(), float("inf"))
        mask = torch.nan_to_num(torch.exp(mask * self.decay[:, None, None]))
        scores = qr @ kr.transpose(-1, -2)
        scores = torch.tril(scores + mask) if self.miss == "sum" else scores * mask
        return x + self.out((scores @ v.transpose(1, 2)).transpose(1, 2).reshape(*x.shape[:2], 16))


@positive(
    "operands given from outside",
    decay="scalar",
    twins={"key norm": "scores are divided by the query's and the key's distance"},
)
class FromOutside(Mixer):
    """No projections at all: a function of q, k, v and gates, wrapped in a module."""

    def operands(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Operands:
        return {"q": q.transpose(1, 2), "k": k.transpose(1, 2), "v": v.transpose(1, 2), "log_decay": g.transpose(1, 2)}

    def example(self, length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(batch, 3, length, n, generator=generator) for n in (5, 5, 7))
        return q, k, v, -0.5 * torch.rand(batch, 3, length, generator=generator)

    def mixed(self, *inputs: Tensor) -> Tensor:
        return self(*inputs).transpose(1, 2).flatten(2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        cum = torch.cumsum(g, dim=-1)
        rel = cum.unsqueeze(-1) - cum.unsqueeze(-2)
        causal = torch.ones_like(rel, dtype=torch.bool).tril()
        gate = torch.where(causal, torch.where(causal, rel, 0).exp(), 0)
        sim = torch.matmul(q, k.transpose(-1, -2))
        if self.miss == "key norm":
            sim = sim / (1 + torch.cdist(q, k))
        return torch.matmul(sim * gate, v)
