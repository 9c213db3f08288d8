"""Other mechanisms that mix time: softmax attention, recurrences, convolutions, routing."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.registry import WIDTH, negative


class Heads(nn.Module):
    """Projections to q, k, v [B, H, T, K]; a subclass mixes."""

    def __init__(self, heads: int = 2, size: int = 6) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv = nn.Linear(WIDTH, 3 * heads * size)
        self.out = nn.Linear(heads * size, WIDTH)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        return x + self.out(self.mix(q, k, v).transpose(1, 2).reshape(b, t, -1))


def causal(t: int) -> Tensor:
    return torch.ones(t, t, dtype=torch.bool).tril()


@negative("scaled_dot_product_attention", "softmax over the past")
class Sdpa(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@negative("softmax attention without mask", "softmax over all tokens")
class SdpaFull(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@negative("softmax attention by hand", "softmax over the past")
class SoftmaxAttention(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~causal(q.shape[2]), float("-inf"))
        return scores.softmax(-1) @ v


@negative("softmax by exp and sum", "scores pass through exp")
class ExpSum(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bhik,bhjk->bhij", q, k).exp().tril()
        return torch.einsum("bhij,bhje->bhie", weights / weights.sum(-1, keepdim=True), v)


@negative("softmax with ALiBi", "softmax over the past")
class Alibi(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        slopes = 2.0 ** -torch.arange(1, self.heads + 1).to(q)
        bias = -(i[:, None] - i[None, :]).abs() * slopes[:, None, None]
        scores = q @ k.mT * self.size**-0.5 + bias
        return torch.softmax(scores.masked_fill(~causal(q.shape[2]), -1e9), dim=-1) @ v


@negative("grouped softmax attention", "softmax over the past")
class Grouped(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (y[:, :1].expand(-1, self.heads, -1, -1) for y in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal(q.shape[2]))


@negative("softmax in a sliding window", "softmax, and a window")
class SlidingWindow(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = causal(q.shape[2]) & ~causal(q.shape[2]).tril(-8)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@negative("sigmoid attention", "scores pass through a sigmoid")
class SigmoidAttention(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.where(causal(q.shape[2]), torch.sigmoid(q @ k.mT - 2), 0.0) @ v


@negative("differential attention", "the difference of two softmaxes")
class Differential(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        mask = ~causal(q.shape[2])
        first = (q1 @ k1.mT).masked_fill(mask, float("-inf")).softmax(-1)
        second = (q2 @ k2.mT).masked_fill(mask, float("-inf")).softmax(-1)
        return (first - 0.4 * second) @ v


@negative("top-k attention", "each query keeps a few keys that it chooses")
class TopK(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(~causal(q.shape[2]), float("-inf"))
        best, where = scores.topk(4, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, where, best.softmax(-1).nan_to_num())
        return weights @ v


@negative("linear attention over all tokens", "not causal: no mask")
class FullLinear(Heads):
    """Katharopoulos' encoder form: never T by T."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = k.mT @ v
        return (q @ state) / (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)


@negative("efficient attention", "not causal: keys are normalised over all tokens")
class Efficient(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@negative("linear attention from the right", "anti-causal: sums run backwards")
class FromTheRight(Heads):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outer = torch.einsum("bhtk,bhtv->bhtkv", k, v)
        state = outer.flip(2).cumsum(2).flip(2)
        return torch.einsum("bhtk,bhtkv->bhtv", q, state)


@negative("Linformer", "time is projected to a few slots")
class Linformer(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(24, 5) / 5)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.einsum("bhtk,tn->bhnk", y, self.slots) for y in (k, v))
        return (q @ k.mT).softmax(-1) @ v


@negative("low-rank scores from positions", "the weight of a pair depends on positions only")
class Synthesizer(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(2, 24, 4)), nn.Parameter(torch.randn(2, 4, 24))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.left @ self.right).masked_fill(~causal(24), float("-inf")).softmax(-1) @ v


@negative("GRU", "gates depend on the state")
class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(WIDTH, 36), nn.Linear(12, 36)
        self.out = nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h, outs = x.new_zeros(x.shape[0], 12), []
        for x_t in self.x(x)[:, :12].unbind(1):
            (a, b, c), (d, e, f) = x_t.chunk(3, -1), self.h(h).chunk(3, -1)
            z = torch.sigmoid(a + d)
            h = z * h + (1 - z) * torch.tanh(c + torch.sigmoid(b + e) * f)
            outs.append(h)
        return self.out(torch.stack(outs, 1))


@negative("LSTM", "gates depend on the state", length=12)
class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(WIDTH + 10, 40)
        self.out = nn.Linear(10, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 10)
        ys = []
        for t in range(x.shape[1]):
            i, f, g, o = self.cell(torch.cat([x[:, t], h], -1)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            ys.append(h)
        return x + self.out(torch.stack(ys, 1))


@negative("plain RNN", "the state passes through tanh and a matrix", length=16)
class PlainRnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.h = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros_like(x[:, 0]), torch.empty_like(x)
        for t in range(x.shape[1]):
            h = torch.tanh(self.i(x[:, t]) + self.h(h))
            out[:, t] = h
        return out


@negative("linear RNN with a matrix", "the transition mixes all channels of the state", length=16)
class MatrixRnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h, outs = torch.zeros_like(x[:, 0]), []
        for x_t in x.unbind(1):
            h = self.a(h) + self.b(x_t)
            outs.append(self.c(h))
        return torch.stack(outs, dim=1)


@negative("RG-LRU", "each channel is a state of its own: no keys, no queries", length=16)
class RgLru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r, self.i = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.param = nn.Parameter(torch.randn(WIDTH))
        self.y, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        log_a = -8.0 * self.r(x).sigmoid() * F.softplus(self.param) / 8
        a = log_a.exp()
        u = (1 - (2 * log_a).exp()).sqrt() * (self.i(x).sigmoid() * x)
        h, hs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = a[:, t] * h + u[:, t]
            hs.append(h)
        return self.out(torch.stack(hs, 1) * F.gelu(self.y(x)))


@negative("short convolution", "a convolution")
class ShortConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.conv(x.mT)[..., : x.shape[1]].mT)


@negative("FFT convolution", "a convolution as long as the input")
class FftConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(WIDTH, 24) / 5)
        self.gates = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.gates(x).chunk(2, -1)
        n = 2 * x.shape[1]
        y = torch.fft.irfft(torch.fft.rfft((a * x).mT, n=n) * torch.fft.rfft(self.filter, n=n), n=n)
        return b * y[..., : x.shape[1]].mT


@negative("Toeplitz convolution", "weights depend on the distance only")
class Toeplitz(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.randn(24) / 5)
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        i = torch.arange(x.shape[1])
        d = i[:, None] - i[None, :]
        return x + torch.where(d >= 0, self.taps[d.clamp(min=0)], 0.0) @ self.value(x)


@negative("mean of the past", "no queries, no keys")
class PrefixMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1).to(x)[None, :, None]
        return self.proj(x) + torch.cumsum(x, 1) / count


@negative("bag of words by a masked matrix", "no queries, no keys")
class BagOfWords(nn.Module):
    """The first step of Karpathy's lecture."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        wei = torch.tril(torch.ones(x.shape[1], x.shape[1]))
        wei = wei / wei.sum(1, keepdim=True)
        return wei.to(x) @ self.value(x)


@negative("positions by cumulative sum", "sums count tokens; they carry no value")
class CountedPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mask = x[..., 0] > -1
        return x + self.embed((mask.long().cumsum(1) - 1).clamp(min=0))


@negative("experts with capacities", "sums count tokens per expert")
class Experts(nn.Module):
    """Switch routing: a token's place in its expert's queue by a cumulative sum over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.w = nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 5)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        chosen = F.one_hot(gates.argmax(-1), 4).to(x)
        place = (chosen.cumsum(1) - 1) * chosen
        kept = chosen * (place < 8)
        dispatch = kept[..., None] * F.one_hot(place.long().clamp(max=7), 8).to(x)
        inputs = torch.einsum("btd,btec->becd", x, dispatch)
        outputs = torch.einsum("becd,edf->becf", inputs, self.w).relu()
        return x + torch.einsum("becd,btec,bte->btd", outputs, dispatch, gates)


@negative("MLP", "nothing mixes time")
class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@negative("MLP-mixer", "time is mixed by a weight")
class MlpMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.feature = nn.Linear(24, 24), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.time(x.mT)).mT
        return x + F.gelu(self.feature(x))


@negative("spatial gating unit", "time is mixed by a weight")
class CausalGmlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(12, WIDTH)
        self.weight, self.bias = nn.Parameter(torch.randn(24, 24) / 5), nn.Parameter(torch.ones(24))

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.up(x).chunk(2, -1)
        v = torch.einsum("ij,bjd->bid", self.weight.tril(), v) + self.bias[:, None]
        return x + self.down(u * v)
