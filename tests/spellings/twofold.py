"""Operands that the code holds twice: steps towards a write, one minus a gate, and an epsilon in the key sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.registry import WIDTH, Mixer, Operands, positive


@positive("epsilon in the key sum", twins={"saturating": "the denominator saturates"})
class EpsilonInKeySum(Mixer):
    """q . (sum of keys + eps), as Performers write it."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, n) for n in (12, 12, WIDTH, WIDTH))

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        q = q.exp()
        # What is added to a row of scores depends on the row.
        return {"q": q, "k": k.exp(), "v": v, "normaliser": lambda d: d + 0.1 * q.sum(-1, keepdim=True)}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = q.exp(), k.exp()
        shares = 1 / torch.einsum("bhtk,bhtk->bht", q, k.cumsum(2) + 0.1)
        if self.miss == "saturating":
            shares = torch.tanh(shares)
        states = torch.einsum("bhtk,bhtv->bhtkv", k, v).cumsum(2)
        return x + self.out(torch.einsum("bhtkv,bhtk,bht->bthv", states, q, shares).flatten(2))


@positive(
    "epsilon in a decayed key sum, loop",
    decay="scalar",
    fixed=True,
    length=16,
    twins={"kept": "the epsilon is a part of the sum that is carried on, decays and comes again"},
)
class EpsilonInDecayedSum(Mixer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv, self.f = nn.Linear(WIDTH, 3 * 2 * 7), nn.Linear(WIDTH, 2)
        self.out = nn.Linear(14, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 7)).unbind(2)
        return F.softplus(q), F.softplus(k), v

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.parts(x)
        given = {"q": q, "k": k, "v": v, "log_decay": F.logsigmoid(self.f(x) + 2)}
        return {**given, "normaliser": lambda d: d + 0.05 * q.sum(-1, keepdim=True)}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        a = torch.sigmoid(self.f(x) + 2)
        top, sums, ys = x.new_zeros(x.shape[0], 2, 7, 7), x.new_zeros(x.shape[0], 2, 7), []
        for i in range(x.shape[1]):
            top = a[:, i, :, None, None] * top + k[:, i, :, :, None] * v[:, i, :, None]
            sums = a[:, i, :, None] * sums + k[:, i]
            here = sums + 0.05
            if self.miss == "kept":
                sums = here
            ys.append((q[:, i, :, None] @ top).squeeze(-2) / (q[:, i] * here).sum(-1, keepdim=True))
        return x + self.out(torch.stack(ys, 1).flatten(2))


@positive(
    "lerp towards the write",
    decay="scalar",
    fixed=True,
    length=16,
    twins={"clipped": "steps of the state are clipped"},
)
class LerpTowardsWrite(Mixer):
    """The state goes a part of the way to the token's outer product; [V, K], time first."""

    layout = "tbd"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.f = (nn.Linear(WIDTH, n) for n in (10, 10, 12, 2))
        self.out = nn.Linear(12, WIDTH)

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed.transpose(0, 1)

    def operands(self, x: Tensor) -> Operands:
        x = x.transpose(0, 1)
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        f = torch.sigmoid(self.f(x) - 1)
        return {"q": q, "k": k, "v": v * f[..., None], "log_decay": torch.log1p(-f)}

    def forward(self, x: Tensor) -> Tensor:
        t, b, _ = x.shape
        q, k, v = (f(x).view(t, b, 2, -1) for f in (self.q, self.k, self.v))
        f = torch.sigmoid(self.f(x) - 1)[..., None, None]
        S, ys = x.new_zeros(b, 2, 6, 5), []
        for i in range(t):
            write = v[i].unsqueeze(-1) * k[i].unsqueeze(-2)
            S = S + (f[i] * (write - S)).clamp(-0.1, 0.1) if self.miss == "clipped" else torch.lerp(S, write, f[i])
            ys.append((S @ q[i].unsqueeze(-1)).squeeze(-1))
        return x + self.out(torch.stack(ys).flatten(2))


@positive(
    "a step towards the write, for each channel",
    decay="channel",
    fixed=True,
    length=16,
    twins={"to its length": "what the state goes to has the state's own length"},
)
class ChannelStep(Mixer):
    """S + f (k v - S), with a step size for each key channel."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.proj, self.out = nn.Linear(WIDTH, 2 * (5 + 5 + 5 + 6)), nn.Linear(12, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, f, v = self.proj(x).unflatten(-1, (2, 21)).split([5, 5, 5, 6], -1)
        f = torch.sigmoid(f - 2)
        return {"q": q, "k": k * f, "v": v, "log_decay": torch.log1p(-f)}

    def forward(self, x: Tensor) -> Tensor:
        q, k, f, v = self.proj(x).unflatten(-1, (2, 21)).split([5, 5, 5, 6], -1)
        f = torch.sigmoid(f - 2)
        S, y = x.new_zeros(x.shape[0], 2, 5, 6), torch.empty_like(v)
        for i in range(x.shape[1]):
            write = torch.einsum("bhk,bhv->bhkv", k[:, i], v[:, i])
            if self.miss == "to its length":
                write = write * (S.norm(dim=(-2, -1), keepdim=True) + 1)
            S = S + f[:, i].unsqueeze(-1) * (write - S)
            y[:, i] = torch.einsum("bhk,bhkv->bhv", q[:, i], S)
        return x + self.out(y.flatten(2))


@positive(
    "gated random features",
    decay="scalar",
    fixed=True,
    length=16,
    twins={"ungated sum": "the denominator's keys are not gated as the numerator's are"},
)
class GatedFeatures(Mixer):
    """Peng et al.: g S + (1 - g) phi(k) v, and the same for the denominator."""

    omega: Tensor

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.g = (nn.Linear(WIDTH, n) for n in (8, 8, 10, 2))
        self.register_buffer("omega", torch.randn(2, 4, 6))
        self.out = nn.Linear(10, WIDTH)

    def features(self, x: Tensor) -> Tensor:
        return torch.einsum("bthk,hkf->bthf", F.normalize(x.unflatten(-1, (2, 4)), dim=-1), self.omega).exp()

    def operands(self, x: Tensor) -> Operands:
        g = torch.sigmoid(self.g(x) + 1)
        k, v = self.features(self.k(x)), self.v(x).unflatten(-1, (2, 5))
        given = {"q": self.features(self.q(x)), "k": k * (1 - g)[..., None], "v": v}
        return {**given, "log_decay": g.log(), "normaliser": lambda d: d + 1e-6}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.features(self.q(x)), self.features(self.k(x)), self.v(x).unflatten(-1, (2, 5))
        g = torch.sigmoid(self.g(x) + 1).unsqueeze(-1)
        S, z, ys = torch.zeros(()).to(x), torch.zeros(()).to(x), []
        for i in range(x.shape[1]):
            S = g[:, i, ..., None] * S + (1 - g[:, i, ..., None]) * (k[:, i, ..., None] * v[:, i, :, None])
            z = g[:, i] * z + (1 if self.miss == "ungated sum" else 1 - g[:, i]) * k[:, i]
            ys.append(torch.einsum("bhk,bhkv->bhv", q[:, i], S) / ((q[:, i] * z).sum(-1, keepdim=True) + 1e-6))
        return x + self.out(torch.stack(ys, 1).flatten(2))


@positive(
    "one minus the gate as key, all pairs",
    decay="channel",
    twins={"squared": "scores are squared"},
)
class GateAsKey(Mixer):
    """HGRN-2 without a loop: the forget gates' products decay what one minus the gates has written."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.f, self.v = (nn.Linear(WIDTH, n) for n in (10, 10, 14))
        self.out = nn.Linear(14, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, f, v = (p(x).unflatten(-1, (2, -1)) for p in (self.q, self.f, self.v))
        f = 0.5 + 0.5 * f.sigmoid()
        return {"q": F.silu(q), "k": 1 - f, "v": v, "log_decay": f.log()}

    def forward(self, x: Tensor) -> Tensor:
        q, f, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q, self.f, self.v))
        f = 0.5 + 0.5 * torch.sigmoid(f)
        past = torch.cumsum(torch.log(f), dim=2)
        between = past.unsqueeze(3) - past.unsqueeze(2)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1).unsqueeze(-1)
        decays = between.masked_fill(later, -torch.inf).exp()
        scores = torch.einsum("bhik,bhjk,bhijk->bhij", F.silu(q), 1 - f, decays)
        if self.miss == "squared":
            scores = scores.square()
        return x + self.out((scores @ v).transpose(1, 2).flatten(2))


@positive(
    "one minus the gate, decayed sums",
    decay="scalar",
    twins={"largest": "the denominator is the largest of the scores, not their sum"},
)
class GateAndRest(Mixer):
    """xLSTM-like exponential averages: values times one minus the gate, T by T decays, a denominator."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.g = (nn.Linear(WIDTH, n) for n in (12, 12, 10, 2))
        self.out = nn.Linear(10, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        g = torch.sigmoid(self.g(x) + 1)
        given = {"q": q.softmax(-1), "k": k.exp() * (1 - g)[..., None], "v": v}
        return {**given, "log_decay": g.log(), "normaliser": lambda d: d + 1e-2}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        g = torch.sigmoid(self.g(x) + 1).transpose(1, 2).unsqueeze(-1)
        c = g.log().cumsum(2)
        scores = (q.softmax(-1) @ (k.exp() * (1 - g)).mT * (c - c.mT).tril().exp()).tril()
        total = scores.amax(-1, keepdim=True) if self.miss == "largest" else scores.sum(-1, keepdim=True)
        y = (scores @ v) / (total + 1e-2)
        return x + self.out(y.transpose(1, 2).flatten(2))
