"""Undecayed linear attention with its scores written out, T by T."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.registry import WIDTH, Mixer, Operands, positive


@positive("tril of scores", twins={"triu": "not causal: the future is kept", "squared": "not linear in the query"})
@positive("tril of scores, all sizes equal", size=24, heads=1, length=24)
class TrilOfScores(Mixer):
    def __init__(self, miss: str = "", heads: int = 2, size: int = 8) -> None:
        super().__init__(miss)
        self.heads = heads
        self.to_q = nn.Linear(WIDTH, heads * size, bias=False)
        self.to_k = nn.Linear(WIDTH, heads * size, bias=False)
        self.to_v = nn.Linear(WIDTH, heads * size, bias=False)
        self.out = nn.Linear(heads * size, WIDTH)

    def split(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        return x.view(b, t, self.heads, d // self.heads).transpose(1, 2)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (self.split(f(x)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        return {"q": q, "k": k, "v": v, "scale": 1 / math.sqrt(q.shape[-1])}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(self.split, (self.to_q(x), self.to_k(x), self.to_v(x)))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if self.miss == "squared":
            scores = scores**2
        scores = torch.triu(scores) if self.miss == "triu" else torch.tril(scores)
        o = (scores @ v).transpose(1, 2).contiguous().view(x.shape[0], x.shape[1], -1)
        return x + self.out(o)


@positive("masked_fill with zero", twins={"gap": "a token sees neither itself nor the one before"})
class MaskedFill(Mixer):
    """nanoGPT's attention with the softmax taken out."""

    bias: Tensor

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.n_head, self.block = 2, 64
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    mixed_at = "c_proj"

    def heads_first(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(c, dim=2)
        k = k.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        q = q.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        v = v.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        return q, k, v

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.heads_first(x)
        return {"q": q.mT.permute(0, 3, 1, 2), "k": k.transpose(1, 2), "v": v.transpose(1, 2), "scale": 10**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.heads_first(x)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, 0.0)
        if self.miss == "gap":
            att = att.tril(-2)
        y = att @ v
        y = y.transpose(1, 2).contiguous().view(b, t, c)
        return self.c_proj(y)


@positive(
    "where over an arange mask",
    twins={"window": "forgets at once what lies more than 20 tokens back", "relu": "not linear in the query"},
)
class WhereArange(Mixer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q = nn.Linear(WIDTH, 3 * 5)
        self.kv = nn.Linear(WIDTH, 3 * (5 + 7))
        self.out = nn.Linear(21, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def operands(self, x: Tensor) -> Operands:
        x = self.norm(x)
        q = self.q(x).unflatten(-1, (3, 5))
        k, v = self.kv(x).unflatten(-1, (3, 12)).split([5, 7], -1)
        return {"q": q, "k": F.elu(k) + 1, "v": v}

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q = self.q(h).unflatten(-1, (3, 5))
        k, v = self.kv(h).unflatten(-1, (3, 12)).split([5, 7], -1)
        k = F.elu(k) + 1
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
        if self.miss == "relu":
            scores = scores.relu()
        pos = torch.arange(x.shape[1], device=x.device)
        seen = pos[:, None] >= pos[None, :]
        if self.miss == "window":
            seen = seen & (pos[:, None] - pos[None, :] <= 20)
        scores = torch.where(seen, scores, torch.zeros_like(scores))
        o = torch.einsum("bhij,bjhe->bihe", scores, v)
        return x + self.out(o.flatten(-2))


@positive(
    "one minus mask times scores",
    twins={"bias": "scores have a bias for each distance", "bidirectional": "not causal: no mask"},
)
class MultipliedMask(Mixer):
    """An upper triangle of ones that is taken away by multiplication; one head, no head axis."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv = nn.Linear(WIDTH, 6 + 6 + 9)
        self.slopes = nn.Parameter(0.3 * torch.randn(64))
        self.out = nn.Linear(9, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.qkv(x)[:, :, None].split([6, 6, 9], -1)
        return {"q": torch.relu(q), "k": torch.relu(k), "v": v, "scale": 0.5}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.split(self.qkv(x), [6, 6, 9], dim=-1)
        t = x.size(1)
        future = torch.ones(t, t, device=x.device, dtype=x.dtype).triu(1)
        score = torch.bmm(torch.relu(q), torch.relu(k).permute(0, 2, 1))
        if self.miss == "bias":
            i = torch.arange(t)
            score = score + self.slopes[(i[:, None] - i[None, :]).clamp(min=0)]
        if self.miss != "bidirectional":
            score = score * (1 - future)
        return torch.add(x, self.out(0.5 * torch.bmm(score, v)))


@positive("keys first, time last", twins={"tanh": "scores pass through tanh"})
class TimeLast(Mixer):
    """Convolution people's layout: [B, C, T] all through, scores as [keys, queries]."""

    mixed_at = "out"
    layout = "bdt"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkv = nn.Conv1d(WIDTH, 3 * 12, 1)
        self.out = nn.Conv1d(12, WIDTH, 1)

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed.transpose(1, 2)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (y.unflatten(1, (2, 6)).permute(0, 3, 1, 2) for y in self.qkv(x).chunk(3, 1))
        return {"q": q.softmax(-1), "k": k.exp(), "v": v}

    def forward(self, x: Tensor) -> Tensor:
        b, _, t = x.shape
        q, k, v = self.qkv(x).reshape(b, 3, 2, 6, t).unbind(1)
        q, k = q.softmax(dim=2), k.exp()
        s = torch.matmul(k.mT, q)  # [b, h, key, query]
        if self.miss == "tanh":
            s = s.tanh()
        s = s.triu()
        return self.out(torch.matmul(v, s).reshape(b, 12, t)) + x


@positive("heads merged into the batch", twins={"exp": "scores pass through exp"})
class HeadsInBatch(Mixer):
    """fairseq style: [T, B, C] input, [B * H, T, K] inside, scale on q."""

    layout = "tbd"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.h, self.d = 4, 5
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed.transpose(0, 1)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).transpose(0, 1).unflatten(-1, (4, 5)) for f in (self.q_proj, self.k_proj, self.v_proj))
        return {"q": q, "k": k, "v": v, "scale": 5**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        t, b, c = x.size()
        q = self.q_proj(x) * self.d**-0.5
        q = q.contiguous().view(t, b * self.h, self.d).transpose(0, 1)
        k = self.k_proj(x).contiguous().view(-1, b * self.h, self.d).transpose(0, 1)
        v = self.v_proj(x).contiguous().view(-1, b * self.h, self.d).transpose(0, 1)
        w = torch.bmm(q, k.transpose(1, 2))
        if self.miss == "exp":
            w = w.exp()
        w = w * torch.tril(torch.ones_like(w[0])).unsqueeze(0)
        a = torch.bmm(w, v)
        a = a.transpose(0, 1).contiguous().view(t, b, c)
        return self.out(a)


@positive("keys and values shared by all heads", twins={"distance": "scores are distances: not linear in the query"})
class MultiQuery(Mixer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.wq = nn.Parameter(torch.randn(WIDTH, 3, 5) / 5)
        self.wk = nn.Parameter(torch.randn(WIDTH, 5) / 5)
        self.wv = nn.Parameter(torch.randn(WIDTH, 7) / 5)
        self.out = nn.Linear(21, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        v = (x @ self.wv)[:, :, None].expand(-1, -1, 3, -1)
        return {"q": torch.einsum("btd,dhk->bthk", x, self.wq), "k": (x @ self.wk)[:, :, None], "v": v}

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("btd,dhk->bhtk", x, self.wq)
        k = torch.einsum("btd,dk->btk", x, self.wk)
        v = torch.einsum("btd,de->bte", x, self.wv)
        logits = torch.einsum("bhtk,bsk->bhts", q, k)
        if self.miss == "distance":
            logits = -torch.cdist(q, k[:, None].expand_as(q), p=1.0)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        logits = logits.masked_fill(~mask, 0)
        o = torch.einsum("bhts,bse->bthe", logits, v)
        return x + self.out(o.reshape(*x.shape[:2], -1))


@positive("grouped keys", twins={"topk": "each query keeps its four largest scores only"})
class GroupedKeys(Mixer):
    """Llama's repeat_kv; two key heads for four query heads."""

    mixed_at = "o_proj"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q_proj = nn.Linear(WIDTH, 4 * 6, bias=False)
        self.k_proj = nn.Linear(WIDTH, 2 * 6, bias=False)
        self.v_proj = nn.Linear(WIDTH, 2 * 6, bias=False)
        self.o_proj = nn.Linear(4 * 6, WIDTH, bias=False)

    @staticmethod
    def repeat_kv(x: Tensor, n: int) -> Tensor:
        b, h, t, d = x.shape
        return x[:, :, None, :, :].expand(b, h, n, t, d).reshape(b, h * n, t, d)

    def operands(self, x: Tensor) -> Operands:
        q = self.q_proj(x).unflatten(-1, (4, 6))
        k, v = (f(x).unflatten(-1, (2, 6)).repeat_interleave(2, 2) for f in (self.k_proj, self.v_proj))
        return {"q": q, "k": k, "v": v, "scale": 0.25}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, 4, 6).transpose(1, 2)
        k = self.repeat_kv(self.k_proj(x).view(b, t, 2, 6).transpose(1, 2), 2)
        v = self.repeat_kv(self.v_proj(x).view(b, t, 2, 6).transpose(1, 2), 2)
        weights = torch.matmul(q, k.transpose(2, 3)) * 0.25
        causal = torch.full((t, t), True, device=x.device).triu(diagonal=1)
        weights = torch.where(causal, 0.0, weights)
        if self.miss == "topk":
            weights = torch.where(weights >= weights.topk(4, -1).values[..., -1:], weights, 0.0)
        y = torch.matmul(weights, v).transpose(1, 2).flatten(2)
        return self.o_proj(y)


@positive("no batch axis", twins={"one ahead": "not causal: each token sees the next one"})
class NoBatch(Mixer):
    layout = "td"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v = nn.Linear(WIDTH, 9), nn.Linear(WIDTH, 9), nn.Linear(WIDTH, 11)
        self.out = nn.Linear(11, WIDTH)

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed[None]

    def operands(self, x: Tensor) -> Operands:
        return {"q": self.q(x)[None, :, None], "k": self.k(x)[None, :, None], "v": self.v(x)[None, :, None]}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return x + self.out(torch.tril(q @ k.T, diagonal=1 if self.miss == "one ahead" else 0) @ v)


@positive("broadcast and sum", twins={"other value": "the value of a pair depends on both tokens"})
class BroadcastAndSum(Mixer):
    """No matrix product anywhere, as a first draft in a notebook."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.proj = nn.Linear(WIDTH, 4 + 4 + 6)
        self.out = nn.Linear(6, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.proj(x)[:, :, None].split((4, 4, 6), -1)
        return {"q": q, "k": k, "v": v}

    def forward(self, x: Tensor) -> Tensor:
        p = self.proj(x)
        q, k, v = p[..., :4], p[..., 4:8], p[..., 8:]
        t = x.shape[1]
        score = (q.unsqueeze(2) * k.unsqueeze(1)).sum(dim=-1)
        score = score * (torch.arange(t)[:, None] >= torch.arange(t)[None, :]).to(x.dtype)
        value = v.unsqueeze(1)
        if self.miss == "other value":
            value = torch.maximum(value, v.unsqueeze(2))
        mixed = (score.unsqueeze(-1) * value).sum(dim=2)
        return x + self.out(mixed)
