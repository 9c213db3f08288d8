"""States that are read before they are written to: RWKV-5 and 6 with their bonus, strictly causal attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.registry import WIDTH, Mixer, Operands, positive


@positive(
    "RWKV-6 loop",
    decay="channel",
    fixed=True,
    length=14,
    twins={"bonus of the last token": "the bonus goes to the token before", "rectified": "what is read is rectified"},
)
class RWKV6Loop(Mixer):
    """As in the scripts of RWKV-6: the state is [K, V], the bonus learned."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.r, self.k, self.v, self.w = (nn.Linear(WIDTH, 10, bias=False) for _ in range(4))
        self.time_faaaa = nn.Parameter(torch.randn(2, 5))
        self.out = nn.Linear(10, WIDTH, bias=False)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        r, k, v, w = (f(x).unflatten(-1, (2, 5)) for f in (self.r, self.k, self.v, self.w))
        return r, k, v, torch.exp(-torch.exp(w - 1))

    def operands(self, x: Tensor) -> Operands:
        r, k, v, w = self.parts(x)
        own = (r * self.time_faaaa * k).sum(-1)
        return {"q": r, "k": k, "v": v, "log_decay": w.log(), "early": True, "own": own}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        r, k, v, w = self.parts(x)
        state = torch.zeros(b, 2, 5, 5, dtype=x.dtype, device=x.device)
        outs, before = [], torch.zeros_like(state)
        for i in range(t):
            kv = k[:, i].unsqueeze(-1) @ v[:, i].unsqueeze(-2)
            bonus = self.time_faaaa[..., None] * (before if self.miss == "bonus of the last token" else kv)
            read = state + bonus
            if self.miss == "rectified":
                read = F.relu(read)
            outs.append((r[:, i].unsqueeze(-2) @ read).squeeze(-2))
            state = w[:, i].unsqueeze(-1) * state + kv
            before = kv
        return x + self.out(torch.stack(outs, 1).flatten(2))


@positive(
    "RWKV-5 loop",
    decay="channel",
    fixed=True,
    length=14,
    twins={"normalised state": "each state is divided by its norm"},
)
class RWKV5Loop(Mixer):
    """Decays and bonus are both learned, and time comes first."""

    layout = "tbd"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.rkv, self.out = nn.Linear(WIDTH, 3 * 8), nn.Linear(8, WIDTH)
        self.time_decay, self.time_first = nn.Parameter(torch.randn(2, 4) - 1), nn.Parameter(torch.rand(2, 4))

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed.transpose(0, 1)

    def operands(self, x: Tensor) -> Operands:
        r, k, v = self.rkv(x.transpose(0, 1)).unflatten(-1, (3, 2, 4)).unbind(2)
        own = (r * self.time_first * k).sum(-1)
        return {"q": r, "k": k, "v": v, "log_decay": -self.time_decay.exp().expand_as(k), "early": True, "own": own}

    def forward(self, x: Tensor) -> Tensor:
        r, k, v = self.rkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        w, u = torch.exp(-torch.exp(self.time_decay))[..., None], self.time_first[..., None]
        s, out = x.new_zeros(x.shape[1], 2, 4, 4), torch.empty_like(r)
        for t in range(x.shape[0]):
            a = torch.einsum("bhi,bhj->bhij", k[t], v[t])
            out[t] = torch.einsum("bhi,bhij->bhj", r[t], s + u * a)
            s = s * w + a
            if self.miss == "normalised state":
                s = s / (1 + s.norm(dim=(-1, -2), keepdim=True))
        return x + self.out(out.flatten(2))


@positive(
    "RWKV-6 over all pairs",
    decay="channel",
    twins={"bonus of all": "each pair has the bonus, and the decays of a sum"},
)
class RWKV6Pairs(Mixer):
    """A sum of decays between two tokens, without those of both; the diagonal has a bonus that hangs on the token."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.r, self.k, self.v, self.w, self.u = (nn.Linear(WIDTH, n) for n in (8, 8, 6, 8, 8))
        self.out = nn.Linear(6, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        r, k, v, w, u = (f(x).unflatten(-1, (2, -1)) for f in (self.r, self.k, self.v, self.w, self.u))
        return r, k, v, F.logsigmoid(w) / 2, u.sigmoid()

    def operands(self, x: Tensor) -> Operands:
        r, k, v, w, u = self.parts(x)
        return {"q": r, "k": k, "v": v, "log_decay": w, "early": True, "own": 0.5 * (r * u * k).sum(-1), "scale": 0.5}

    def forward(self, x: Tensor) -> Tensor:
        r, k, v, w, u = (y.transpose(1, 2) for y in self.parts(x))
        total, t = w.cumsum(2), x.shape[1]
        between = (total - w)[..., :, None, :] - total[..., None, :, :]
        strict = torch.ones(t, t, dtype=torch.bool, device=x.device).tril(-1)
        decay = torch.exp(between.masked_fill(~strict[..., None], -math.inf))
        if self.miss == "bonus of all":
            decay = (decay + u[..., None, :, :]).tanh() * strict[..., None]
        scores = torch.einsum("bhik,bhjk,bhijk->bhij", r, k, decay) + torch.diag_embed((r * u * k).sum(-1))
        return x + self.out((0.5 * scores @ v).transpose(1, 2).flatten(2))


@positive(
    "strict retention",
    decay="scalar",
    twins={"strict window": "a token sees the five before it only"},
)
class StrictRetention(Mixer):
    """A mask without its diagonal; decays count from a token to the other."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv, self.fade, self.out = nn.Linear(WIDTH, 3 * 12), nn.Linear(WIDTH, 2), nn.Linear(12, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).unbind(2)
        g = F.logsigmoid(self.fade(x)) / 2
        return {"q": q * g.exp()[..., None], "k": k, "v": v, "log_decay": g, "early": True, "scale": 6**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        q, k, v = self.qkv(x).view(-1, t, 3, 2, 6).unbind(2)
        total = (F.logsigmoid(self.fade(x)) / 2).cumsum(1)
        decay = total[:, :, None] - total[:, None, :]
        hidden = torch.ones(t, t, dtype=torch.bool).triu(0)
        if self.miss == "strict window":
            hidden = hidden | torch.ones(t, t, dtype=torch.bool).tril(-6)
        decay = decay.masked_fill(hidden[..., None], -math.inf).exp()
        scores = torch.einsum("bihd,bjhd->bijh", q, k) / math.sqrt(6)
        return x + self.out(torch.einsum("bijh,bjhd->bihd", scores * decay, v).flatten(2))


@positive(
    "sums without the last",
    twins={"squared sums": "the sums are squared before they are read"},
)
class SumsWithoutTheLast(Mixer):
    """Linear attention: cumulative sums of outer products, less the own one."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v = (nn.Linear(WIDTH, n) for n in (8, 8, 10))
        self.out = nn.Linear(10, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        return {"q": F.elu(q) + 1, "k": F.elu(k) + 1, "v": v, "early": True, "scale": 0.25}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        kv = (F.elu(k) + 1)[..., None] * v[..., None, :]
        sums = kv.cumsum(1) - kv
        if self.miss == "squared sums":
            sums = sums.square()
        return x + self.out(torch.einsum("bthk,bthkv->bthv", F.elu(q) + 1, sums).flatten(2) / 4)


@positive(
    "sums moved by one",
    twins={"moved by three": "the three last tokens are not seen"},
)
class MovedSums(Mixer):
    """The sum of the tokens before, by padding and cutting off."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv, self.out = nn.Linear(WIDTH, 21, bias=False), nn.Linear(7, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.qkv(x)[:, :, None].chunk(3, -1)
        return {"q": q.softmax(-1), "k": k.exp(), "v": v, "early": True}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        sums = torch.cumsum(k.exp().unsqueeze(-1) * v.unsqueeze(-2), dim=1)
        by = 3 if self.miss == "moved by three" else 1
        sums = F.pad(sums, (0, 0, 0, 0, by, 0))[:, : x.shape[1]]
        return x + self.out((q.softmax(-1).unsqueeze(-2) @ sums).squeeze(-2))


@positive(
    "delta rule that answers first",
    correction="delta",
    fixed=True,
    length=14,
    twins={"clipped": "the error is clipped"},
)
class AnswersFirst(Mixer):
    """Fast weights: the answer is read before they learn from the token."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.b = (nn.Linear(WIDTH, n) for n in (6, 6, 8, 1))
        self.out = nn.Linear(8, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x)[:, :, None] for f in (self.q, self.k, self.v))
        return {"q": q, "k": F.normalize(k, dim=-1), "v": v, "beta": self.b(x).sigmoid(), "early": True}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, b = self.q(x), F.normalize(self.k(x), dim=-1), self.v(x), self.b(x).sigmoid()
        W, answers = x.new_zeros(x.shape[0], 8, 6), []
        for t in range(x.shape[1]):
            answers.append(torch.einsum("bvk,bk->bv", W, q[:, t]))
            error = v[:, t] - torch.einsum("bvk,bk->bv", W, k[:, t])
            if self.miss == "clipped":
                error = error.clamp(-0.3, 0.3)
            W = W + torch.einsum("bv,bk->bvk", b[:, t] * error, k[:, t])
        return x + self.out(torch.stack(answers, dim=1))


@positive(
    "gated loop that reads first",
    decay="scalar",
    fixed=True,
    length=16,
    twins={"gate of what was read": "the gate hangs on what was read"},
)
class ReadsFirst(Mixer):
    """A gate per head that acts after the state was read, and a learned weight for the own token."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv, self.g = nn.Linear(WIDTH, 2 * 13), nn.Linear(WIDTH, 2)
        self.out = nn.Linear(10, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.qkv(x).unflatten(-1, (2, 13)).split([4, 4, 5], -1)
        own = 0.7 * (q * k).sum(-1)
        return {"q": q, "k": k, "v": v, "log_decay": F.logsigmoid(self.g(x)), "early": True, "own": own}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (2, 13)).split([4, 4, 5], -1)
        g, S, ys = self.g(x).sigmoid(), x.new_zeros(x.shape[0], 2, 4, 5), []
        for t in range(x.shape[1]):
            kv = k[:, t, :, :, None] * v[:, t, :, None, :]
            y = (q[:, t, :, None, :] @ (S + 0.7 * kv)).squeeze(-2)
            gate = g[:, t]
            if self.miss == "gate of what was read":
                gate = gate * torch.sigmoid(y.mean(-1))
            S = gate[..., None, None] * S + kv
            ys.append(y)
        return x + self.out(torch.stack(ys, 1).flatten(2))
