"""torch's own loops: while_loop and scan stay one operation in a Dynamo graph, associative_scan becomes a tree."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import associative_scan, scan, while_loop

from tests.spellings.registry import WIDTH, Mixer, Operands, positive


@positive("scan", decay="scalar", length=16, twins={"tanh": "the state passes through tanh"})
class Scan(Mixer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.g = (nn.Linear(WIDTH, n) for n in (10, 10, 14, 2))
        self.out = nn.Linear(14, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        return {"q": q, "k": k, "v": v, "log_decay": F.logsigmoid(self.g(x) + 1)}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, 2, -1) for f in (self.q, self.k, self.v))
        decay = torch.sigmoid(self.g(x) + 1)

        def step(state: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            q_t, k_t, v_t, a_t = inputs
            state = a_t[..., None, None] * state + k_t[..., :, None] * v_t[..., None, :]
            if self.miss == "tanh":
                state = state.tanh()
            return state, torch.einsum("bhk,bhkv->bhv", q_t, state)

        _, o = scan(step, torch.zeros(b, 2, 5, 7).to(x), (q, k, v, decay), dim=1)
        return x + self.out(o.flatten(2))


@positive("scan of DeltaNet", correction="delta", length=16, twins={"relu": "the error passes through relu"})
class DeltaScan(Mixer):
    """Time first, heads merged into the batch, state as [V, K]."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.qkvb = nn.Linear(WIDTH, 2 * (4 + 4 + 6 + 1))
        self.out = nn.Linear(12, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v, b = self.qkvb(x).unflatten(-1, (2, 15)).split([4, 4, 6, 1], -1)
        return {"q": q, "k": F.normalize(k, dim=-1), "v": v, "beta": b[..., 0].sigmoid()}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        rows = self.qkvb(x).reshape(b, t, 2, 15).permute(1, 0, 2, 3).reshape(t, b * 2, 15)
        q, k, v, beta = rows.split([4, 4, 6, 1], dim=-1)

        def step(S: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            q, k, v, beta = inputs
            error = beta * (v - torch.bmm(S, k.unsqueeze(2)).squeeze(2))
            if self.miss == "relu":
                error = error.relu()
            S = S + error.unsqueeze(2) * k.unsqueeze(1)
            return S, torch.bmm(S, q.unsqueeze(2)).squeeze(2)

        _, o = scan(step, x.new_zeros(b * 2, 6, 4), (q, F.normalize(k, dim=-1), v, beta.sigmoid()))
        return x + self.out(o.view(t, b, 12).transpose(0, 1))


@positive("associative scan", decay="scalar", length=16, twins={"maximum": "states are joined by a maximum"})
class AssociativeScan(Mixer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v, self.g = (nn.Linear(WIDTH, n) for n in (10, 10, 12, 2))
        self.out = nn.Linear(12, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        return {"q": q, "k": k, "v": v, "log_decay": -0.3 * self.g(x).exp()}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        kv = k[..., :, None] * v[..., None, :]
        decay = torch.exp(-0.3 * self.g(x).exp())[..., None, None].expand_as(kv)

        def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            carried = left[1] * right[0]
            joined = torch.maximum(carried, right[1]) if self.miss == "maximum" else carried + right[1]
            return left[0] * right[0], joined

        _, states = associative_scan(combine, (decay, kv), dim=1, combine_mode="generic")
        return x + self.out((q.unsqueeze(-2) @ states).squeeze(-2).flatten(2))


@positive("associative scan of GLA", decay="channel", length=16, twins={"mean": "the joined decay is a mean"})
class GatedAssociativeScan(Mixer):
    layout = "tbd"

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.proj = nn.Linear(WIDTH, 3 * (4 + 4 + 4 + 5))
        self.out = nn.Linear(15, WIDTH)

    def heads_last(self, mixed: Tensor) -> Tensor:
        return mixed.transpose(0, 1)

    def operands(self, x: Tensor) -> Operands:
        q, k, f, v = self.proj(x.transpose(0, 1)).unflatten(-1, (3, 17)).split([4, 4, 4, 5], -1)
        return {"q": q, "k": k, "v": v, "log_decay": F.logsigmoid(f + 2)}

    def forward(self, x: Tensor) -> Tensor:
        q, k, f, v = self.proj(x).unflatten(-1, (3, 17)).split([4, 4, 4, 5], -1)
        kv = torch.einsum("tbhk,tbhv->tbhkv", k, v)
        a = torch.sigmoid(f + 2).unsqueeze(-1) * torch.ones_like(kv)

        def join(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            decay = (x[0] + y[0]) / 2 if self.miss == "mean" else x[0] * y[0]
            return decay, y[0] * x[1] + y[1]

        states = associative_scan(join, (a, kv), dim=0, combine_mode="generic")[1]
        return x + self.out(torch.einsum("tbhk,tbhkv->tbhv", q, states).flatten(2))


@positive(
    "while loop",
    length=16,
    differentiable=False,
    twins={"shrinking": "each step divides the state by its own size"},
)
class WhileLoop(Mixer):
    """A counter, the state and the outputs go round; the token is picked by index_select."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.q, self.k, self.v = nn.Linear(WIDTH, 10), nn.Linear(WIDTH, 10), nn.Linear(WIDTH, 12)
        self.out = nn.Linear(12, WIDTH)

    def operands(self, x: Tensor) -> Operands:
        return {name: getattr(self, name)(x).unflatten(-1, (2, -1)) for name in "qkv"}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))

        def more(i: Tensor, state: Tensor, out: Tensor) -> Tensor:
            return i < t

        def step(i: Tensor, state: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            here = i.reshape(1)
            q_i, k_i, v_i = (y.index_select(1, here).squeeze(1) for y in (q, k, v))
            if self.miss == "shrinking":
                state = state / (1 + state.square().mean((-1, -2), keepdim=True))
            state = state + k_i.unsqueeze(-1) * v_i.unsqueeze(-2)
            o = torch.einsum("bhk,bhkv->bhv", q_i, state)
            return i + 1, state, out.index_copy(1, here, o.unsqueeze(1))

        start = torch.zeros((), dtype=torch.int64), x.new_zeros(b, 2, 5, 6), torch.zeros_like(v)
        _, _, out = while_loop(more, step, start)
        return x + self.out(out.flatten(2))
