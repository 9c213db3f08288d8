"""The delta rule in loops and chunks of other schools: fast weights, test-time training, Kimi's chunks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import scan

from tests.spellings.registry import WIDTH, Mixer, Operands, positive


@positive(
    "test-time training",
    correction="delta",
    fixed=True,
    length=14,
    twins={
        "momentum": "gradients have momentum: a second state",
        "minibatch": "gradients are taken at the weights of four tokens before",
    },
)
class TestTimeTraining(Mixer):
    """TTT-Linear with the gradient written out: W goes down the slope of |k W - v|^2 / 2, one token at a time."""

    __test__ = False

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.theta_q, self.theta_k, self.theta_v = (nn.Linear(WIDTH, 2 * 6, bias=False) for _ in range(3))
        self.lr = nn.Linear(WIDTH, 2)
        self.post, self.out = nn.LayerNorm(12), nn.Linear(12, WIDTH)

    mixed_at = "post"

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, 6)) for f in (self.theta_q, self.theta_k, self.theta_v))
        return {"q": q, "k": F.normalize(k, dim=-1), "v": v, "beta": 0.7 * self.lr(x).sigmoid()}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        xq, xk, xv = (f(x).view(b, t, 2, 6).permute(1, 0, 2, 3) for f in (self.theta_q, self.theta_k, self.theta_v))
        xk = F.normalize(xk, dim=-1)
        eta = 0.7 * torch.sigmoid(self.lr(x)).permute(1, 0, 2)
        W = torch.zeros(b, 2, 6, 6, device=x.device, dtype=x.dtype)
        old, velocity, zs = W, torch.zeros_like(W), []
        for step in range(t):
            k, v = xk[step].unsqueeze(2), xv[step].unsqueeze(2)
            if step % 4 == 0 or self.miss != "minibatch":
                old = W
            grad = k.transpose(2, 3) @ (k @ old - v)
            if self.miss == "momentum":
                grad = velocity = 0.5 * velocity + grad
            W = W - eta[step][..., None, None] * grad
            zs.append(xq[step].unsqueeze(2) @ W)
        return self.out(self.post(torch.cat(zs, 2).transpose(1, 2).reshape(b, t, 12)))


@positive(
    "fast weights, full step",
    correction="delta",
    fixed=True,
    length=12,
    twins={"attention": "reads with a softmax over the state's rows"},
)
class FastWeights(Mixer):
    """Schmidhuber's write with beta = 1, features that sum to one, no projection of the output."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.slow = nn.Linear(WIDTH, 5 + 5 + WIDTH, bias=False)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = self.slow(x)[:, :, None].split([5, 5, WIDTH], -1)
        q, k = ((F.elu(y) + 1) / (F.elu(y) + 1).sum(-1, keepdim=True) for y in (q, k))
        return {"q": q, "k": k, "v": v, "beta": torch.ones_like(k[..., 0])}

    def mixed(self, x: Tensor) -> Tensor:
        return self(x) - x

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.slow(x).split([5, 5, WIDTH], -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        q, k = q / q.sum(-1, keepdim=True), k / k.sum(-1, keepdim=True)
        W = x.new_zeros(x.shape[0], WIDTH, 5)
        y = torch.empty_like(v)
        for t in range(x.shape[1]):
            old = torch.bmm(W, k[:, t, :, None])
            W = torch.baddbmm(W, v[:, t, :, None] - old, k[:, t, None, :])
            read = W.softmax(1) if self.miss == "attention" else W
            y[:, t] = torch.bmm(read, q[:, t, :, None])[..., 0]
        return x + y


@positive(
    "gated delta, fewer key heads",
    decay="scalar",
    correction="delta",
    fixed=True,
    length=14,
    twins={"shared state": "two heads write to one state"},
)
class GroupedGatedDelta(Mixer):
    """Qwen's recurrent form: two key heads for four value heads, short convolution, gated norm, (k * S).sum."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.in_proj_qkvz = nn.Linear(WIDTH, 2 * 10 + 4 * 12, bias=False)
        self.in_proj_ba = nn.Linear(WIDTH, 8, bias=False)
        self.conv = nn.Conv1d(44, 44, 4, groups=44, padding=3, bias=False)
        self.dt_bias, self.A_log = nn.Parameter(torch.ones(4)), nn.Parameter(torch.linspace(-2, -1, 4))
        self.norm, self.out_proj = nn.RMSNorm(6), nn.Linear(24, WIDTH, bias=False)

    mixed_at = "norm"

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        mixed, z = self.in_proj_qkvz(x).split([44, 24], -1)
        mixed = F.silu(self.conv(mixed.transpose(1, 2))[:, :, : x.shape[1]]).transpose(1, 2)
        q, k, v = mixed.split([10, 10, 24], dim=-1)
        b, a = self.in_proj_ba(x).chunk(2, -1)
        g = -self.A_log.float().to(x).exp() * F.softplus(a + self.dt_bias)
        q, k = (F.normalize(y.unflatten(-1, (2, 5)), dim=-1) for y in (q, k))
        return q, k, v.unflatten(-1, (4, 6)), g, b.sigmoid(), z

    def operands(self, x: Tensor) -> Operands:
        q, k, v, g, beta, _ = self.parts(x)
        return {"q": q, "k": k, "v": v, "log_decay": g, "beta": beta, "scale": 5**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g, beta, z = self.parts(x)
        q, k = q.repeat_interleave(2, dim=2), k.repeat_interleave(2, dim=2)
        q, k, v, beta, g = (y.transpose(1, 2).contiguous() for y in (q, k, v, beta, g))
        q = q * 5**-0.5
        b, h, t, _ = k.shape
        core = torch.zeros(b, h, t, 6, dtype=x.dtype, device=x.device)
        state = torch.zeros(b, h, 5, 6, dtype=x.dtype, device=x.device)
        for i in range(t):
            q_t, k_t, v_t = q[:, :, i], k[:, :, i], v[:, :, i]
            g_t, beta_t = g[:, :, i].exp().unsqueeze(-1).unsqueeze(-1), beta[:, :, i].unsqueeze(-1)
            state = state * g_t
            if self.miss == "shared state":
                state = state.view(b, 2, 2, 5, 6).mean(2, keepdim=True).expand(-1, -1, 2, -1, -1).reshape_as(state)
            memory = (state * k_t.unsqueeze(-1)).sum(dim=-2)
            delta = (v_t - memory) * beta_t
            state = state + k_t.unsqueeze(-1) * delta.unsqueeze(-2)
            core[:, :, i] = (state * q_t.unsqueeze(-1)).sum(dim=-2)
        y = self.norm(core.transpose(1, 2)) * F.silu(z).unflatten(-1, (4, 6))
        return x + self.out_proj(y.flatten(2))


@positive(
    "gated delta by an inverse, learned decays",
    decay="scalar",
    correction="delta",
    twins={
        "full": "not causal: no mask on the scores",
    },
)
class LearnedDecayDelta(Mixer):
    """A constant decay a head, powers of it by distance, one inverse; heads first in memory."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.wq, self.wk = nn.Parameter(torch.randn(3, WIDTH, 5) / 5), nn.Parameter(torch.randn(3, WIDTH, 5) / 5)
        self.wv, self.wb = nn.Parameter(torch.randn(3, WIDTH, 4) / 5), nn.Parameter(torch.randn(3, WIDTH) / 5)
        self.alpha = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.out = nn.Linear(12, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (torch.einsum("btd,hdk->bthk", x, w) for w in (self.wq, self.wk, self.wv))
        beta = torch.sigmoid(torch.einsum("btd,hd->bth", x, self.wb))
        return {"q": q, "k": F.normalize(k, dim=-1), "v": v, "beta": beta, "log_decay": F.logsigmoid(self.alpha)}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,hdk->hbtk", x, w) for w in (self.wq, self.wk, self.wv))
        k = F.normalize(k, dim=-1)
        beta = torch.sigmoid(torch.einsum("btd,hd->hbt", x, self.wb))[..., None]
        t = x.shape[1]
        lag = torch.arange(t)[:, None] - torch.arange(t)[None]
        decay = (torch.sigmoid(self.alpha)[:, None, None] ** lag.clamp(min=0) * (lag >= 0))[:, None]
        M = torch.eye(t).to(x) + beta * (k @ k.mT) * decay * (lag > 0)
        scores = q @ k.mT
        if self.miss != "full":
            scores = scores * decay
        o = scores @ (torch.inverse(M) @ (beta * v))
        return x + self.out(o.permute(1, 2, 0, 3).reshape(*x.shape[:2], 12))


@positive("scan of gated delta", decay="scalar", correction="delta", length=14, twins={"sign": "errors are signs"})
class GatedDeltaScan(Mixer):
    layout = "td"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.a, self.b = (nn.Linear(WIDTH, n) for n in (10, 10, 12, 2, 2))
        self.out = nn.Linear(12, WIDTH)

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed[None]

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        return q, F.normalize(k, dim=-1), v, F.logsigmoid(self.a(x) + 2), 2 * self.b(x).sigmoid()

    def operands(self, x: Tensor) -> Operands:
        return dict(zip(("q", "k", "v", "log_decay", "beta"), self.parts(x[None]), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        def cell(S: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            q, k, v, a, b = now
            S = S * torch.exp(a)[:, None, None]
            error = v - torch.einsum("hkv,hk->hv", S, k)
            if self.miss == "sign":
                error = torch.sign(error)
            S = S + torch.einsum("hk,hv,h->hkv", k, error, b)
            return S, torch.einsum("hkv,hk->hv", S, q)

        _, o = scan(cell, torch.zeros(2, 5, 6).to(x), self.parts(x))
        return x + self.out(o.flatten(1))


@positive(
    "gated delta, chunk loop with an uneven end",
    decay="scalar",
    correction="delta",
    fixed=True,
    length=28,
    twins={"undecayed state": "the state does not decay from chunk to chunk"},
)
class GatedDeltaChunkLoop(Mixer):
    """One head, chunks of twelve, decays from differences, torch.linalg.solve."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.proj = nn.Linear(WIDTH, 6 + 6 + 8 + 2)
        self.out = nn.Linear(8, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v, a, b = self.proj(x).split([6, 6, 8, 1, 1], -1)
        return q, F.normalize(k, dim=-1), v, -0.2 * F.softplus(a), b.sigmoid()

    def operands(self, x: Tensor) -> Operands:
        q, k, v, g, beta = self.parts(x[:, :, None])
        return {"q": q, "k": k, "v": v, "log_decay": g[..., 0], "beta": beta[..., 0]}

    def forward(self, x: Tensor) -> Tensor:
        S = torch.zeros(x.shape[0], 6, 8, dtype=x.dtype)
        outs = []
        for part in torch.split(x, 12, dim=1):
            q, k, v, g, beta = self.parts(part)
            c = g.cumsum(1)
            D = torch.exp((c - c.mT).tril()).tril()
            A = torch.eye(part.shape[1]).to(x) + (beta * (k @ k.mT) * D).tril(-1)
            u = torch.linalg.solve(A, beta * (v - (k * c.exp()) @ S))
            outs.append((q * c.exp()) @ S + ((q @ k.mT) * D) @ u)
            last = c[:, -1:]
            S = (k * (last - c).exp()).mT @ u + (S if self.miss == "undecayed state" else last.exp() * S)
        return x + self.out(torch.cat(outs, dim=1))


@positive(
    "KDA in chunks",
    decay="channel",
    correction="delta",
    fixed=True,
    length=32,
    tolerance=1e-8,
    twins={"decay by head in chunks": "the state decays by the head's mean over a chunk"},
)
class KimiChunks(Mixer):
    """FLA's naive_chunk_kda: columns of the gram matrix one by one, rows of the inverse in place."""

    size = 8

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.f, self.b = (nn.Linear(WIDTH, n, bias=False) for n in (10, 10, 12, 10, 2))
        self.out = nn.Linear(12, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v, f = (p(x).unflatten(-1, (2, -1)) for p in (self.q, self.k, self.v, self.f))
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, -0.2 * F.softplus(f), self.b(x).sigmoid()

    def operands(self, x: Tensor) -> Operands:
        return {
            **dict(zip(("q", "k", "v", "log_decay", "beta"), self.parts(x), strict=True)),
            "scale": 5**-0.5,
        }

    def forward(self, x: Tensor) -> Tensor:
        c, (b, t, _) = self.size, x.shape
        q, k, v, g, beta = (y.unflatten(1, (t // c, c)).transpose(2, 3).transpose(1, 2) for y in self.parts(x))
        q = q * 5**-0.5
        g = g.cumsum(-2)  # [b, h, n, c, k]
        A = torch.zeros(b, 2, t // c, c, c, dtype=x.dtype)
        for i in range(c):
            k_i, g_i = k[..., i, :], g[..., i : i + 1, :]
            A[..., i] = torch.einsum("...cd,...d->...c", k * (g - g_i).exp(), k_i)
        A = A * beta[..., None]
        A = -A.masked_fill(torch.triu(torch.ones(c, c, dtype=torch.bool)), 0)
        for i in range(1, c):
            A[..., i, :i] = A[..., i, :i].clone() + (A[..., i, :, None].clone() * A[..., :, :i].clone()).sum(-2)
        A = (A + torch.eye(c).to(x)) * beta[..., None, :]
        w, u = A @ (g.exp() * k), A @ v
        S = torch.zeros(b, 2, 5, 6).to(x)
        o = torch.zeros_like(v)
        mask = torch.triu(torch.ones(c, c, dtype=torch.bool), diagonal=1)
        for n in range(t // c):
            q_n, k_n, g_n = q[:, :, n], k[:, :, n], g[:, :, n]
            scores = torch.zeros(b, 2, c, c, dtype=x.dtype)
            for j in range(c):
                scores[..., j] = torch.einsum(
                    "...cd,...d->...c", q_n * (g_n - g_n[..., j : j + 1, :]).exp(), k_n[..., j, :]
                )
            v_n = u[:, :, n] - w[:, :, n] @ S
            o[:, :, n] = (q_n * g_n.exp()) @ S + scores.masked_fill(mask, 0) @ v_n
            whole = g_n[..., -1, :, None]
            if self.miss == "decay by head in chunks":
                whole = whole.mean(-2, keepdim=True)
            S = S * whole.exp() + (k_n * (g_n[..., -1:, :] - g_n).exp()).mT @ v_n
        return x + self.out(o.flatten(2, 3).transpose(1, 2).flatten(2))


@positive(
    "KDA, transition written out",
    decay="channel",
    correction="delta",
    fixed=True,
    length=12,
    twins={"low rank of two": "the transition takes two directions away"},
)
class KimiTransition(Mixer):
    """(I - b k k^T) Diag(a) as a matrix, time first, one head."""

    layout = "tbd"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.inputs = nn.Linear(WIDTH, 4 * 5 + 7 + 1)
        self.readout = nn.Linear(7, WIDTH)

    mixed_at = "readout"

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed.transpose(0, 1)

    def operands(self, x: Tensor) -> Operands:
        q, k, a, _, v, b = self.inputs(x.transpose(0, 1))[:, :, None].split([5, 5, 5, 5, 7, 1], -1)
        k, b = F.normalize(k, dim=-1), b[..., 0].sigmoid()
        return {"q": q, "k": k, "v": v, "log_decay": (a + 1).sigmoid().log(), "beta": b}

    def forward(self, x: Tensor) -> Tensor:
        q, k, a, r, v, b = self.inputs(x).split([5, 5, 5, 5, 7, 1], -1)
        k, a, b, eye = F.normalize(k, dim=-1), torch.sigmoid(a + 1), torch.sigmoid(b), torch.eye(5).to(x)
        S, ys = x.new_zeros(x.shape[1], 5, 7), []
        for t in range(x.shape[0]):
            erase = eye - b[t, :, :, None] * k[t, :, :, None] * k[t, :, None, :]
            if self.miss == "low rank of two":
                erase = erase - 0.1 * r[t, :, :, None] * k[t, :, None, :]
            A = erase @ torch.diag_embed(a[t])
            S = A @ S + b[t, :, :, None] * (k[t, :, :, None] * v[t, :, None, :])
            ys.append(torch.einsum("bk,bkv->bv", q[t], S))
        return x + self.readout(torch.stack(ys))


@positive(
    "scan of KDA",
    decay="channel",
    correction="delta",
    length=12,
    twins={"two keys": "erases at another key as well"},
)
class KimiScan(Mixer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.a, self.b = (nn.Linear(WIDTH, n) for n in (8, 8, 10, 8, 2))
        self.erased = nn.Linear(WIDTH, 8)
        self.out = nn.Linear(10, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v, a = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v, self.a))
        k = F.normalize(k, dim=-1)
        return {"q": q, "k": k, "v": v, "log_decay": F.logsigmoid(a) / 4, "beta": self.b(x).sigmoid()}

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.q, self.k, self.v, self.a, self.erased)
        q, k, v, a, e = (f(x).unflatten(-1, (2, -1)).transpose(0, 1) for f in layers)
        k = F.normalize(k, dim=-1)
        e = F.normalize(e, dim=-1)
        beta = self.b(x).sigmoid().transpose(0, 1)

        def cell(S: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            q, k, v, a, e, beta = now
            S = S * (F.logsigmoid(a) / 4).exp()[..., None]
            erased = (beta[..., None] * k)[..., None] * (v - (k[..., None] * S).sum(-2))[..., None, :]
            if self.miss == "two keys":
                erased = erased - 0.5 * e[..., None] * (e[..., None] * S).sum(-2)[..., None, :]
            S = S + erased
            return S, (q[..., None] * S).sum(-2)

        _, o = scan(cell, torch.zeros(x.shape[0], 2, 4, 5).to(x), (q, k, v, a, e, beta))
        return x + self.out(o.transpose(0, 1).flatten(2))
