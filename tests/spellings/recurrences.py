"""More of what is no mixer of ours: other recurrences, other memories, other reads of a sum of outer products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.others import Heads, causal
from tests.spellings.registry import WIDTH, either, negative


@negative("minGRU", "each channel is a state of its own: no keys, no queries")
class MinGru(nn.Module):
    """Gates of the input only, by a cumulative sum in log space."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.h, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        k = self.z(x)
        log_keep, log_new = -F.softplus(k), -F.softplus(-k) + F.logsigmoid(self.h(x))
        a = log_keep.cumsum(1)
        return self.out(torch.exp(a + torch.logcumsumexp(log_new - a, dim=1)))


@negative("moving average", "each channel is a state of its own: no keys, no queries", length=16)
class MovingAverage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.out = nn.Parameter(torch.rand(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        alpha, y, ys = torch.sigmoid(self.alpha), torch.zeros_like(x[:, 0]), []
        for x_t in x.unbind(1):
            y = alpha * x_t + (1 - alpha) * y
            ys.append(y)
        return self.out(torch.stack(ys, 1))


@negative("diagonal state space", "a fixed state for each channel: no keys, no queries")
class S4d(nn.Module):
    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.rand(WIDTH, n))
        self.C, self.D = nn.Parameter(torch.randn(WIDTH, n)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        kernel = (self.C[..., None] * torch.exp(-self.rate[..., None] * torch.arange(t))).sum(1)
        y = torch.fft.irfft(torch.fft.rfft(x.mT, n=2 * t) * torch.fft.rfft(kernel, n=2 * t), n=2 * t)[..., :t]
        return F.gelu(y.mT + x * self.D)


@negative("RWKV-4", "each channel is a state of its own, normalised by its own keys", length=16)
class Rwkv4(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.w, self.u = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        r, k, v = self.r(x).sigmoid(), self.k(x), self.v(x)
        a = b = torch.zeros_like(x[:, 0])
        ys = []
        for t in range(x.shape[1]):
            now = torch.exp(self.u + k[:, t])
            ys.append((a + now * v[:, t]) / (b + now))
            a = torch.exp(-self.w) * a + k[:, t].exp() * v[:, t]
            b = torch.exp(-self.w) * b + k[:, t].exp()
        return x + r * torch.stack(ys, 1)


@negative("attention free transformer", "weights of positions and keys, for each channel")
class AttentionFree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(24, 24) / 3)

    def forward(self, x: Tensor) -> Tensor:
        w = (self.bias.exp() * causal(24))[None]
        k = self.k(x).exp()
        return x + self.q(x).sigmoid() * (w @ (k * self.v(x))) / (w @ k)


@negative("state divided by its size", "the state is divided by its norm before it is read")
class NormalisedState(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
        state = state / (1 + state.square().sum((-1, -2), keepdim=True).sqrt())
        return (q.unsqueeze(-2) @ state).squeeze(-2)


@negative("state read by a network", "the state passes through gelu before it is read")
class GeluState(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = F.gelu(torch.einsum("bhtk,bhtv->bhtkv", k, v).cumsum(2))
        return torch.einsum("bhtk,bhtkv->bhtv", q, state)


@negative("least squares by a running inverse", "reads through the inverse of the keys' covariance")
class Mesa(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kk = torch.einsum("bhti,bhtj->bhtij", k, k).cumsum(2) + torch.eye(self.size)
        kv = torch.einsum("bhti,bhtj->bhtij", k, v).cumsum(2)
        return torch.einsum("bhti,bhtij->bhtj", torch.linalg.solve(kk, q), kv)


@negative("online ridge in a loop", "each write is divided by a running covariance of the keys", length=12)
class RecursiveLeastSquares(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        P = torch.eye(self.size).expand(q.shape[0], self.heads, -1, -1)
        S, ys = torch.zeros_like(P), []
        for t in range(q.shape[2]):
            k_t, v_t, q_t = k[:, :, t], v[:, :, t], q[:, :, t]
            Pk = torch.einsum("bhij,bhj->bhi", P, k_t)
            gain = Pk / (1 + (k_t * Pk).sum(-1, keepdim=True))
            S = S + gain[..., None] * (v_t - torch.einsum("bhk,bhkv->bhv", k_t, S))[..., None, :]
            P = P - gain[..., None] * Pk[..., None, :]
            ys.append(torch.einsum("bhk,bhkv->bhv", q_t, S))
        return torch.stack(ys, 2)


@negative("Longhorn", "erases each channel by itself, not along the key", length=12)
class Longhorn(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        S, ys = q.new_zeros(q.shape[0], self.heads, self.size, self.size), []
        for t in range(q.shape[2]):
            k_t = k[:, :, t, :, None]
            step = torch.sigmoid(v[:, :, t, None, :])
            step = step / (1 + step * k_t.square().sum(-2, keepdim=True))
            S = (1 - step * k_t**2) * S + step * k_t * v[:, :, t, None, :]
            ys.append((q[:, :, t, :, None] * S).sum(-2))
        return torch.stack(ys, 2)


@either("gated slot attention", "two linear mixers with a softmax between them")
class SlotAttention(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slots = k.softmax(-1)
        keys = torch.einsum("bhtk,bhts->bhtks", k, slots).cumsum(2)
        read = torch.einsum("bhtk,bhtks->bhts", q, keys).softmax(-1)
        values = torch.einsum("bhts,bhtv->bhtsv", slots, v).cumsum(2)
        return torch.einsum("bhts,bhtsv->bhtv", read, values)


@negative("log-linear attention by hand", "weights by level: it is log-linear already")
class FenwickMask(Heads):
    levels: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Linear(WIDTH, 2 * 6)
        t = torch.arange(24)
        distance = (t[:, None] ^ t[None, :]).float()
        self.register_buffer("levels", torch.where(distance > 0, (distance + 0.5).log2().floor() + 1, 0).long())

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        w = F.softplus(self.level(x)).view(b, t, self.heads, 6).transpose(1, 2)
        weights = w.gather(-1, self.levels.clamp(max=5).expand(b, self.heads, t, t))
        o = (q @ k.mT * weights).tril() @ v
        return x + self.out(o.transpose(1, 2).reshape(b, t, -1))


@negative("largest value so far", "a maximum in place of a sum")
class RunningMax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(x).sigmoid() * self.v(x).cummax(1).values


@negative("softmax with a learned bias for distances", "softmax over the past")
class RelativeBias(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(2, 64))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        distance = i[:, None] - i
        logits = torch.einsum("bhid,bhjd->bhij", q, k) + self.bias[:, distance.clamp(min=0)]
        return torch.where(distance >= 0, logits, -torch.inf).softmax(-1) @ v


@negative("softmax plus one", "scores pass through exp")
class SoftmaxOne(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * self.size**-0.5).exp() * causal(q.shape[2])
        return scores @ v / (1 + scores.sum(-1, keepdim=True))


@negative("cosine attention", "scores are divided by the lengths of what they came from, then cubed")
class Cosine(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = F.cosine_similarity(q.unsqueeze(3), k.unsqueeze(2), dim=-1) ** 3
        return scores.tril() @ v


@negative("attention over pooled keys", "keys are pooled in blocks; the softmax is over blocks")
class Pooled(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (F.avg_pool1d(y.flatten(0, 1).mT, 4).mT.unflatten(0, y.shape[:2]) for y in (k, v))
        block = torch.arange(q.shape[2])[:, None] // 4 > torch.arange(k.shape[2])
        scores = (q @ k.mT).masked_fill(~block, -1e9)
        return scores.softmax(-1) @ v


@negative("nearest neighbours", "each query averages the values of its nearest keys")
class Nearest(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = torch.cdist(q, k).masked_fill(~causal(q.shape[2]), 1e9)
        near = distance.argsort(-1)[..., :3, None].expand(-1, -1, -1, -1, v.shape[-1])
        return v.unsqueeze(2).expand(-1, -1, q.shape[2], -1, -1).gather(3, near).mean(3)


@negative("gated long convolution", "a convolution as long as the input")
class Hyena(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, 3 * WIDTH)
        self.filter = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        a, b, v = self.proj(x).chunk(3, -1)
        t = torch.arange(x.shape[1])
        taps = self.filter((t / 24)[:, None].to(x)) * torch.exp(-0.2 * t)[:, None]
        lag = t[:, None] - t
        kernel = taps[lag.clamp(min=0)] * (lag >= 0)[..., None]
        return x + a * torch.einsum("tsd,bsd->btd", kernel, b * v)
