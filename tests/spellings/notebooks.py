"""Spellings that keep to no school: prefix slices, sums over lags, lists of pairs, in-place states."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import scan

from tests.spellings.registry import WIDTH, Mixer, Operands, positive


@positive("a slice of the past for each query", fixed=True, length=16, twins={"softmax": "softmax over the past"})
class PrefixSlices(Mixer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv = nn.Linear(WIDTH, 30)
        self.out = nn.Linear(10, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.qkv(x).unflatten(-1, (2, 15)).chunk(3, -1)
        return {"q": q, "k": k, "v": v, "scale": 5**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (2, 15)).transpose(1, 2).chunk(3, -1)
        rows = []
        for t in range(x.shape[1]):
            past = slice(0, t + 1)
            weights = q[:, :, t : t + 1] @ k[:, :, past].transpose(2, 3) / math.sqrt(5)
            if self.miss == "softmax":
                weights = weights.softmax(-1)
            rows.append(weights @ v[:, :, past])
        return x + self.out(torch.cat(rows, dim=2).transpose(1, 2).flatten(2))


@positive(
    "a sum over lags",
    decay="scalar",
    fixed=True,
    length=14,
    twins={"ten lags": "forgets at once what lies more than nine tokens back"},
)
class SumOverLags(Mixer):
    """For each distance the shifted keys and values, weighted by a power of the decay."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v = (nn.Linear(WIDTH, 12) for _ in range(3))
        self.decay = nn.Parameter(torch.tensor([0.5, 2.0]))
        self.out = nn.Linear(12, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, 6)) for f in (self.q, self.k, self.v))
        return {"q": q, "k": k, "v": v, "log_decay": F.logsigmoid(self.decay)}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 6)) for f in (self.q, self.k, self.v))
        gamma = torch.sigmoid(self.decay)[:, None]
        o = torch.zeros_like(v)
        lags = x.shape[1] if self.miss != "ten lags" else 10
        for lag in range(lags):
            shifted_k = F.pad(k, (0, 0, 0, 0, lag, 0))[:, : x.shape[1]]
            shifted_v = F.pad(v, (0, 0, 0, 0, lag, 0))[:, : x.shape[1]]
            o = o + gamma**lag * (q * shifted_k).sum(-1, keepdim=True) * shifted_v
        return x + self.out(o.flatten(2))


@positive("pairs by index", fixed=True, length=12, twins={"abs": "scores lose their sign"})
class PairsByIndex(Mixer):
    """All pairs of the lower triangle as a list; sums come back by index_add."""

    layout = "td"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 8)
        self.out = nn.Linear(8, WIDTH)

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed[None]

    def operands(self, x: Tensor) -> Operands:
        return {"q": self.q(x)[None, :, None], "k": self.k(x)[None, :, None], "v": self.v(x)[None, :, None]}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        to, source = torch.tril_indices(x.shape[0], x.shape[0])
        score = (q[to] * k[source]).sum(-1, keepdim=True)
        if self.miss == "abs":
            score = score.abs()
        return x + self.out(torch.zeros_like(v).index_add(0, to, score * v[source]))


@positive("one einsum of four", twins={"full": "not causal: the mask is all ones"})
class OneEinsum(Mixer):
    """Queries in groups of a key head keep their own axis; the mask is an operand like the others."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v = nn.Linear(WIDTH, 2 * 3 * 5), nn.Linear(WIDTH, 2 * 5), nn.Linear(WIDTH, 2 * 4)
        self.out = nn.Linear(2 * 3 * 4, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.q(x).unflatten(-1, (6, 5)), self.k(x).unflatten(-1, (2, 5)), self.v(x).unflatten(-1, (2, 4))
        return {"q": q, "k": k.repeat_interleave(3, 2), "v": v.repeat_interleave(3, 2)}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x).unflatten(-1, (2, 3, 5)), self.k(x).unflatten(-1, (2, 5)), self.v(x).unflatten(-1, (2, 4))
        mask = torch.tril(torch.ones(x.shape[1], x.shape[1], device=x.device))
        if self.miss == "full":
            mask = torch.ones_like(mask)
        o = torch.einsum("btgrk,bsgk,ts,bsgv->btgrv", q, k, mask, v)
        return x + self.out(o.reshape(*x.shape[:2], -1))


@positive("Hedgehog", twins={"second softmax": "softmax over the past"})
class Hedgehog(Mixer):
    """Learned features softmax([W x, -W x]) for each head, normalised with an epsilon, in_proj_weight and F.linear."""

    mixed_at = "out_proj"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.in_proj_weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / 5)
        self.in_proj_bias = nn.Parameter(torch.randn(3 * WIDTH) / 5)
        self.feature = nn.Parameter(torch.randn(2, 2, 10, 4) / 3)
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def map(self, x: Tensor, which: int) -> Tensor:
        x = torch.einsum("bthd,hdf->bthf", x, self.feature[which])
        return torch.cat([x, -x], dim=-1).softmax(dim=-1)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, 2, 10)).unbind(2)
        return {"q": self.map(q, 0), "k": self.map(k, 1), "v": v, "normaliser": lambda z: z + 1e-5}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, 2, 10)).unbind(dim=2)
        q, k = self.map(q, 0), self.map(k, 1)
        A = torch.einsum("bmhd,bnhd->bhmn", q, k)
        causal = torch.ones(A.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        if self.miss == "second softmax":
            A = A.masked_fill(causal, float("-inf")).softmax(-1)
        else:
            A = A.masked_fill(causal, 0)
            A = A / (A.sum(dim=-1, keepdim=True) + 1e-5)
        y = torch.einsum("bhmn,bnhd->bmhd", A, v)
        return self.out_proj(y.reshape(*x.shape))


@positive(
    "in-place state",
    decay="scalar",
    fixed=True,
    length=16,
    twins={"clamped": "the state is clamped between two tokens"},
)
class InPlaceState(Mixer):
    """mul_, addcmul_ and outputs filled into a slice; one head, decays as exp2."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.inner = nn.Linear(WIDTH, 5 + 5 + 8 + 1)
        self.out = nn.Linear(8, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v, a = self.inner(x)[:, :, None].split([5, 5, 8, 1], -1)
        return {"q": q, "k": k, "v": v, "log_decay": -a[..., 0].sigmoid() * math.log(2.0)}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, a = self.inner(x).split([5, 5, 8, 1], dim=-1)
        keep = torch.exp2(-a.sigmoid())
        state = x.new_zeros(x.size(0), 8, 5)
        y = x.new_zeros(x.size(0), x.size(1), 8)
        for t in range(x.size(1)):
            state = state.mul(keep[:, t, :, None])
            state = torch.addcmul(state, v[:, t, :, None], k[:, t, None, :])
            if self.miss == "clamped":
                state.clamp_(-0.5, 0.5)
            y[:, t, :] = torch.matmul(state, q[:, t].unsqueeze(-1)).squeeze(-1)
        return x + self.out(y)


@positive(
    "Mamba-2, token by token",
    decay="scalar",
    fixed=True,
    length=16,
    twins={"decay of each channel": "each value channel has a step size of its own"},
)
class MambaSteps(Mixer):
    """State [B, H, P, N], dA and dBx, D skip, gate; B and C shared by all heads."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.in_proj = nn.Linear(WIDTH, 2 * 12 + 5 + 5 + 3, bias=False)
        self.channel_dt = nn.Linear(WIDTH, 12)
        self.dt_bias, self.D = nn.Parameter(torch.linspace(-2, 0, 3)), nn.Parameter(torch.rand(3))
        self.A_log = nn.Parameter(torch.linspace(0, 1, 3))
        self.out_proj = nn.Linear(12, WIDTH, bias=False)

    def parts(self, u: Tensor) -> tuple[Tensor, ...]:
        z, x, B, C, dt = torch.split(self.in_proj(u), [12, 12, 5, 5, 3], dim=-1)
        return z, F.silu(x).unflatten(-1, (3, 4)), F.silu(B), F.silu(C), F.softplus(dt + self.dt_bias)

    def operands(self, u: Tensor) -> Operands:
        _, x, B, C, dt = self.parts(u)
        v = x * dt[..., None]
        return {"q": C[:, :, None], "k": B[:, :, None], "v": v, "log_decay": -self.A_log.exp() * dt}

    def mixed(self, u: Tensor) -> Tensor:
        return self.ssm(u, *self.parts(u)[1:]).flatten(2)

    def ssm(self, u: Tensor, x: Tensor, B: Tensor, C: Tensor, dt: Tensor) -> Tensor:
        A = -torch.exp(self.A_log)
        h, ys = torch.zeros(u.shape[0], 3, 4, 5).to(u), []
        steps = F.softplus(self.channel_dt(u)).unflatten(-1, (3, 4))
        for t in range(u.shape[1]):
            dA = torch.exp(dt[:, t] * A)[:, :, None, None]
            if self.miss == "decay of each channel":
                dA = torch.exp(steps[:, t] * A[:, None])[..., None]
            dBx = torch.einsum("bh,bn,bhp->bhpn", dt[:, t], B[:, t], x[:, t])
            h = h * dA + dBx
            ys.append(torch.einsum("bhpn,bn->bhp", h, C[:, t]))
        return torch.stack(ys, dim=1)

    def forward(self, u: Tensor) -> Tensor:
        z, x, B, C, dt = self.parts(u)
        y = self.ssm(u, x, B, C, dt) + self.D[None, None, :, None] * x
        return self.out_proj(y.flatten(2) * F.silu(z)) + u


@positive(
    "recurrent retention",
    decay="scalar",
    fixed=True,
    length=16,
    tolerance=1e-6,
    twins={"shrinking": "each step divides the state by its own size"},
)
class RecurrentRetention(Mixer):
    """A Python list of decays, [B, H, 1, K] rows, keys transposed before they are written."""

    layout = "tbd"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.gammas = [0.7, 0.9, 0.97]
        self.q, self.k, self.v, self.g = (nn.Linear(WIDTH, 12, bias=False) for _ in range(4))
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(12, WIDTH, bias=False)

    mixed_at = "norm"

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed.transpose(0, 1)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x.transpose(0, 1)).unflatten(-1, (3, 4)) for f in (self.q, self.k, self.v))
        return {"q": q, "k": k, "v": v, "log_decay": torch.tensor(self.gammas).to(x).log()}

    def forward(self, x: Tensor) -> Tensor:
        t, b, _ = x.shape
        gamma = torch.tensor(self.gammas, dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
        past: Tensor | None = None
        outs = []
        for n in range(t):
            q, k, v = (f(x[n]).reshape(b, 3, 1, 4) for f in (self.q, self.k, self.v))
            write = k.transpose(-1, -2) @ v
            past = write if past is None else gamma * past + write
            if self.miss == "shrinking":
                past = past / (1 + (past**2).mean((-1, -2), keepdim=True))
            outs.append((q @ past).squeeze(2))
        y = self.norm(torch.stack(outs))
        return x + self.out(y.flatten(2) * F.silu(self.g(x)))


@positive("scan of GLA", decay="channel", length=14, twins={"gate of the state": "gates depend on the state"})
class GatedScan(Mixer):
    """Gates shared by all heads, the state transposed."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.g = (nn.Linear(WIDTH, n) for n in (10, 10, 8, 5))
        self.out = nn.Linear(8, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        return {"q": q, "k": k, "v": v, "log_decay": (F.logsigmoid(self.g(x)) / 4)[:, :, None].expand_as(k)}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).movedim(1, 0) for f in (self.q, self.k, self.v))
        gate = torch.exp(F.logsigmoid(self.g(x)) / 4).movedim(1, 0)

        def step(S: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            q, k, v, gate = now
            if self.miss == "gate of the state":
                gate = gate * torch.sigmoid(S.sum((1, 2)))
            S = S * gate[:, None, None, :] + v.unsqueeze(-1) * k.unsqueeze(-2)
            return S, (S @ q.unsqueeze(-1)).squeeze(-1)

        _, ys = scan(step, x.new_zeros(x.shape[0], 2, 4, 5), (q, k, v, gate), dim=0)
        return x + self.out(ys.movedim(0, 1).flatten(-2))


@positive(
    "GLA, stable chunks",
    decay="channel",
    length=32,
    twins={"mean of decays": "the decay over a chunk is the mean of its steps"},
)
class StableChunks(Mixer):
    """Chunks of eight by unflatten: all pairs with channels inside, a decayed cumulative sum of states between."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.proj = nn.Linear(WIDTH, 2 * (4 + 4 + 6 + 4))
        self.out = nn.Linear(12, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v, g = self.proj(x).unflatten(-1, (2, 18)).split([4, 4, 6, 4], -1)
        return {"q": q, "k": k, "v": v, "log_decay": -0.3 * g.sigmoid(), "scale": 0.5}

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x).unflatten(-1, (2, 18)).unflatten(1, (-1, 8))  # [b, n, c, h, .]
        q, k, v, g = y.split([4, 4, 6, 4], -1)
        c = (-0.3 * g.sigmoid()).cumsum(2)
        mask = torch.arange(8)[:, None] >= torch.arange(8)
        pair = (c[:, :, :, None] - c[:, :, None]).masked_fill(~mask[..., None, None], -1e9).exp()
        scores = torch.einsum("bnihk,bnjhk,bnijhk->bnhij", q, k, pair)
        inside = torch.einsum("bnhij,bnjhv->bnihv", scores, v)
        whole = c[:, :, -1]
        states = torch.einsum("bnchk,bnchv->bnhkv", k * (whole[:, :, None] - c).exp(), v)
        if self.miss == "mean of decays":
            whole = whole / 8
        total = whole.cumsum(1)[..., None]
        carried = ((states * (-total).exp()).cumsum(1) * total.exp())[:, :-1]
        carried = torch.cat([torch.zeros_like(carried[:, :1]), carried], 1)
        between = torch.einsum("bnchk,bnhkv->bnchv", q * c.exp(), carried)
        return x + self.out(0.5 * (inside + between).flatten(1, 2).flatten(2))


@positive("shared queries and keys", twins={"squared": "not linear in the query"})
class SharedQueryKey(Mixer):
    """q = k, softplus features, mask as a float buffer with batch and head axes, scale on the values."""

    keep: Tensor

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.register_buffer("keep", torch.ones(1, 1, 80, 80).tril())
        self.qk, self.v = nn.Linear(WIDTH, 14), nn.Linear(WIDTH, 10)
        self.out = nn.Linear(10, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        k = F.softplus(self.qk(x)).unflatten(-1, (2, 7))
        return {"q": k, "k": k, "v": self.v(x).unflatten(-1, (2, 5)) / 7}

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        k = F.softplus(self.qk(x)).reshape(-1, t, 2, 7).permute(0, 2, 1, 3)
        v = self.v(x).reshape(-1, t, 2, 5).permute(0, 2, 1, 3) / 7
        gram = k.matmul(k.permute(0, 1, 3, 2)).mul(self.keep[..., :t, :t])
        if self.miss == "squared":
            gram = gram.square()
        return self.out(gram.matmul(v).permute(0, 2, 1, 3).flatten(-2)).add(x)


@positive("five axes, groups of heads", decay="scalar", twins={"window": "forgets at once after eleven tokens"})
class FiveAxes(Mixer):
    """[B, G, R, T, .] all through; decays a gate for each head; scores scaled by a learned temperature."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.kv, self.f = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 2 * (6 + 5)), nn.Linear(WIDTH, 4)
        self.temperature = nn.Parameter(torch.tensor([0.5, 0.8]).view(2, 1, 1, 1))
        self.out = nn.Linear(20, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q = self.q(x).unflatten(-1, (2, 2, 6)) * self.temperature[:, :, 0]
        k, v = self.kv(x).unflatten(-1, (2, 11)).split([6, 5], -1)
        return {"q": q.flatten(2, 3), "k": k.repeat_interleave(2, 2), "v": v.repeat_interleave(2, 2)} | {
            "log_decay": F.logsigmoid(self.f(x) + 1)
        }

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 2, 2, 6).permute(0, 2, 3, 1, 4)
        k, v = self.kv(x).view(b, t, 2, 1, 11).permute(0, 2, 3, 1, 4).split([6, 5], dim=-1)
        c = torch.cumsum(F.logsigmoid(self.f(x) + 1), dim=1).view(b, t, 2, 2).permute(0, 2, 3, 1)
        lower = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        if self.miss == "window":
            lower = lower.triu(-11)
        D = torch.where(lower, (c[..., :, None] - c[..., None, :]).clamp(max=0).exp(), torch.zeros(()).to(x))
        scores = torch.matmul(q, k.transpose(-2, -1)) * self.temperature * D
        return x + self.out(torch.matmul(scores, v).permute(0, 3, 1, 2, 4).reshape(b, t, 20))


@positive("padding mask", twins={"argmax": "scores other than the largest are halved: not linear in the query"})
class PaddingMask(Mixer):
    """A second input says which tokens are real; keys and values of the others are zeroed."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.query, self.key, self.value = (nn.Linear(WIDTH, 16) for _ in range(3))
        self.out = nn.Linear(16, WIDTH)

    def example(self, length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        real = torch.arange(length)[None] < torch.tensor([length, *[2 * length // 3] * (batch - 1)])[:, None]
        return *super().example(length, batch, seed), real.float()

    def operands(self, x: Tensor, real: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, 8)) for f in (self.query, self.key, self.value))
        return {"q": q, "k": k.sigmoid() * real[..., None, None], "v": v * real[..., None, None], "scale": 8**-0.5}

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, 2, 8).transpose(1, 2) for f in (self.query, self.key, self.value))
        k, v = k.sigmoid() * real[:, None, :, None], v * real[:, None, :, None]
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(8)
        scores = scores * torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        if self.miss == "argmax":
            scores = torch.where(scores == scores.amax(-1, keepdim=True), scores, scores / 2)
        return x + self.out(torch.matmul(scores, v).transpose(1, 2).reshape(b, t, 16))
