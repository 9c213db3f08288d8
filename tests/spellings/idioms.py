"""Idioms of torch that the other files leave out: additive masks, vmap, tensordot, in-place scores, affine scans."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import associative_scan

from tests.spellings.registry import WIDTH, Mixer, Operands, positive


@positive("additive infinite mask", decay="scalar", twins={"logits": "softmax over the past"})
class AdditiveMask(Mixer):
    """A triangle of -inf is added to the decays' logarithms before exp, as softmax people do."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.pre = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, 3 * 5) for _ in range(3))
        self.forget = nn.Linear(WIDTH, 3)
        self.out = nn.Linear(15, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        x = self.pre(x)
        q, k, v = (f(x).unflatten(-1, (3, 5)) for f in (self.query, self.key, self.value))
        return {"q": q, "k": k, "v": v, "log_decay": -F.softplus(self.forget(x) - 1), "scale": 5**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        h = self.pre(x)
        t = h.shape[-2]
        q, k, v = (f(h).unflatten(-1, (3, 5)).transpose(-3, -2) for f in (self.query, self.key, self.value))
        past = torch.cumsum(-F.softplus(self.forget(h) - 1), dim=-2).transpose(-1, -2)
        mask = torch.triu(torch.full((t, t), float("-inf"), device=x.device), diagonal=1)
        bias = past[..., None] - past[..., None, :] + mask
        scores = q @ k.transpose(-1, -2) * 5**-0.5
        weights = torch.softmax(scores + bias, -1) if self.miss == "logits" else scores * torch.exp(bias)
        return x + self.out((weights @ v).transpose(-3, -2).flatten(-2))


@positive(
    "padded chunks by reshape",
    decay="scalar",
    length=21,
    twins={"unmoved": "states go to the next chunk only, without what came before"},
)
class PaddedChunks(Mixer):
    """Any length: padded with zeros to whole chunks of eight, a loop over chunk states, cut off at the end."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.proj, self.dt = nn.Linear(WIDTH, 2 * (4 + 4 + 6)), nn.Linear(WIDTH, 2)
        self.out = nn.Linear(12, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.proj(x).unflatten(-1, (2, 14)).split([4, 4, 6], -1)
        return {"q": q, "k": k, "v": v, "log_decay": -F.softplus(self.dt(x) - 2)}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        pad = (8 - t % 8) % 8
        y, a = self.proj(x), -F.softplus(self.dt(x) - 2)
        y, a = F.pad(y, (0, 0, 0, pad)), F.pad(a, (0, 0, 0, pad))
        n = (t + pad) // 8
        q, k, v = y.reshape(b, n, 8, 2, 14).permute(0, 3, 1, 2, 4).split([4, 4, 6], dim=-1)
        c = a.reshape(b, n, 8, 2).permute(0, 3, 1, 2).cumsum(-1)
        lower = torch.ones(8, 8, dtype=torch.bool).tril()
        D = (c[..., :, None] - c[..., None, :]).masked_fill(~lower, float("-inf")).exp()
        o = (q @ k.mT * D) @ v
        state, before = torch.zeros(b, 2, 4, 6).to(x), []
        for i in range(n):
            before.append(state)
            new = (k[:, :, i] * (c[:, :, i, -1:] - c[:, :, i]).exp()[..., None]).mT @ v[:, :, i]
            state = new if self.miss == "unmoved" else state * c[:, :, i, -1].exp()[..., None, None] + new
        o = o + (q * c.exp()[..., None]) @ torch.stack(before, 2)
        return x + self.out(o.permute(0, 2, 3, 1, 4).reshape(b, n * 8, 12)[:, :t])


@positive("vmap over batch and heads", twins={"relu": "not linear in the query"})
class Vmapped(Mixer):
    """One head's function of [T, K] matrices, mapped twice."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * 12), nn.Linear(12, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).unbind(2)
        return {"q": q, "k": k, "v": v}

    def head(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.tril(q @ k.T)
        return (scores.relu() if self.miss == "relu" else scores) @ v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).unbind(2)
        o = torch.vmap(torch.vmap(self.head, in_dims=1, out_dims=1))(q, k, v)
        return x + self.out(o.flatten(2))


@positive("inner and tensordot", twins={"lt": "looks forward: a token sees itself and what follows"})
class InnerTensordot(Mixer):
    layout = "td"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(n, WIDTH) / 4) for n in (6, 6, 7)])
        self.out = nn.Linear(7, WIDTH)

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed[None]

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (torch.inner(x, w)[None, :, None] for w in self.weights)
        return {"q": torch.cos(q), "k": torch.cos(k), "v": v}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.inner(x, w) for w in self.weights)
        i = torch.arange(x.shape[0], device=x.device)
        compare = torch.le if self.miss == "lt" else torch.ge
        seen = compare(i.unsqueeze(1), i.unsqueeze(0))
        kernel = torch.inner(torch.cos(q), torch.cos(k)).where(seen, torch.tensor(0.0).to(x))
        return torch.add(self.out(torch.tensordot(kernel, v, dims=1)), x)


@positive("scores in place", twins={"abs": "scores lose their sign"})
class InPlaceScores(Mixer):
    """masked_fill_, div_ and clamp_ on the scores; triu_ on the mask."""

    layout = "tbd"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v = (nn.Linear(WIDTH, 12, bias=False) for _ in range(3))
        self.out = nn.Linear(12, WIDTH)

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed.transpose(0, 1)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).transpose(0, 1).unflatten(-1, (3, 4)) for f in (self.q, self.k, self.v))
        return {"q": q.exp(), "k": k.exp(), "v": v, "normaliser": lambda z: z.clamp(min=1e-2)}

    def forward(self, x: Tensor) -> Tensor:
        t, b, _ = x.shape
        q, k, v = (f(x).view(t, b * 3, 4).transpose(0, 1) for f in (self.q, self.k, self.v))
        scores = torch.baddbmm(torch.zeros(()).to(x), q.exp(), k.exp().transpose(1, 2))
        if self.miss == "abs":
            scores.sub_(4).abs_()
        scores.masked_fill_(torch.ones(t, t).triu_(1).bool(), 0)
        total = scores.sum(2, keepdim=True).clamp_(min=1e-2)
        o = scores.bmm(v).div_(total)
        return x + self.out(o.transpose(0, 1).reshape(t, b, 12))


@positive(
    "associative scan of affine maps",
    correction="delta",
    length=12,
    tolerance=1e-8,
    also=(("none", "erase"),),
    twins={"swapped": "maps are composed in the wrong order"},
)
class AffineScan(Mixer):
    """Each token is a map S -> M S + X; a constant learned beta for each head."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 10)
        self.beta = nn.Parameter(torch.tensor([-0.5, 1.0]))
        self.out = nn.Linear(10, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        beta = torch.sigmoid(self.beta).expand(*x.shape[:2], 2)
        return {"q": q, "k": F.normalize(k, dim=-1), "v": v, "beta": beta}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        k = F.normalize(k, dim=-1)
        beta = torch.sigmoid(self.beta)[:, None, None]
        M = torch.eye(4).to(x) - beta * k[..., :, None] * k[..., None, :]
        X = beta * k[..., :, None] * v[..., None, :]

        def compose(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            both = first[0] @ second[0] if self.miss == "swapped" else second[0] @ first[0]
            return both, second[0] @ first[1] + second[1]

        _, S = associative_scan(compose, (M, X), dim=1, combine_mode="generic")
        return x + self.out((q[..., None, :] @ S).flatten(2))
