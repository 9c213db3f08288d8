"""Loops over chunks: how a chunk is taken, and how its output is put back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.habits.layer import Layer
from tests.spellings.registry import WIDTH, Operands, positive

OWN_END = {"own end": "not causal: a chunk reads the state at its own end"}
SQUASHED = {"squashed": "the state passes through tanh between chunks"}


def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A chunk's tokens among themselves; all [B, H, C, *]."""
    return torch.tril(q @ k.mT) @ v


@positive("chunks by a view, stacked", length=24, fixed=True, twins=OWN_END)
class Viewed(Layer):
    """view(b, n, c, ...)[:, i]; stack and flatten."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b = q.shape[0]
        q, k, v = (y.view(b, 3, 8, 2, -1).transpose(2, 3) for y in (q, k, v))
        state, done = q.new_zeros(b, 2, 6, 7), []
        for i in range(3):
            after = state + k[:, i].mT @ v[:, i]
            read = after if self.miss == "own end" else state
            done.append(inside(q[:, i], k[:, i], v[:, i]) + q[:, i] @ read)
            state = after
        return torch.stack(done, dim=1).transpose(2, 3).flatten(1, 2)


@positive("chunks by narrow, written into a buffer", length=20, fixed=True, twins=SQUASHED)
class Narrowed(Layer):
    """narrow for each chunk; rows of an empty buffer are written; two chunks."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        state, y = torch.zeros(q.shape[0], 2, 6, 7).to(q), torch.empty_like(v)
        for start in (0, 10):
            a, b, c = (z.narrow(2, start, 10) for z in (q, k, v))
            y[:, :, start : start + 10] = a @ state + inside(a, b, c)
            state = state + b.transpose(2, 3) @ c
            if self.miss == "squashed":
                state = torch.tanh(state)
        return y.transpose(1, 2)


@positive("one chunk only", length=16, fixed=True, twins={"masked twice": "a token does not see more than four back"})
class OneChunk(Layer):
    """A loop over chunks of 16, called with 16 tokens; the first state is zero."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, done = q.new_zeros(q.shape[0], 2, 6, 7), []
        for a, b, c in zip(*(y.split(16, dim=1) for y in (q, k, v)), strict=True):
            scores = torch.einsum("bthk,bshk->bhts", a, b).tril()
            if self.miss == "masked twice":
                scores = scores.triu(-4)
            done.append(torch.einsum("bhts,bshv->bthv", scores, c) + torch.einsum("bthk,bhkv->bthv", a, state))
            state = state + torch.einsum("bthk,bthv->bhkv", b, c)
        return torch.cat(done, 1)


@positive(
    "retention in chunks by unbind",
    decay="scalar",
    length=24,
    fixed=True,
    twins={"a step less": "a chunk's state fades by one step less than its tokens are far away"},
)
class UnbindChunks(Layer):
    """unflatten, unbind, cat; powers of a learned rate."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.rate = nn.Parameter(torch.tensor([0.1, 0.4]))

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "log_decay": -self.rate}

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rate, i = self.rate[:, None, None], torch.arange(1, 9)[:, None].to(q)
        inner = ((i - i.T).clamp(min=0) * -rate).exp().tril()
        whole = 7 if self.miss == "a step less" else 8
        state, done = 0.0, []
        chunks = (y.unflatten(1, (3, 8)).transpose(2, 3).unbind(1) for y in (q, k, v))
        for a, b, c in zip(*chunks, strict=True):
            read = (a * torch.exp(-rate * i)) @ state if done else 0.0
            done.append((a @ b.mT * inner) @ c + read)
            state = torch.exp(-rate * whole) * state + (b * torch.exp(-rate * (8 - i))).mT @ c
        return torch.cat(done, 2).transpose(1, 2)


@positive("gates of channels in chunks by index", decay="channel", length=18, fixed=True, twins=SQUASHED)
class IndexedChunks(Layer):
    """Chunks taken by a range of indices, outputs appended to one tensor; each key channel has a gate."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.g = nn.Linear(WIDTH, 12)

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "log_decay": F.logsigmoid(self.g(x)).unflatten(-1, (2, 6)) / 4}

    def forward(self, x: Tensor) -> Tensor:
        log_decay = F.logsigmoid(self.g(x)).unflatten(-1, (2, 6)) / 4
        q, k, v, g = (y.transpose(1, 2) for y in (*self.parts(x), log_decay))
        state, y = q.new_zeros(x.shape[0], 2, 6, 7), v[:, :, :0]
        for n in range(3):
            at = torch.arange(6 * n, 6 * n + 6, device=x.device)
            a, b, c, total = q[:, :, at], k[:, :, at], v[:, :, at], g[:, :, at].cumsum(2)
            a, faded, last = a * total.exp(), b * (-total).exp(), total[:, :, -1:]
            y = torch.cat([y, inside(a, faded, c) + a @ state], dim=2)
            state = state * last.mT.exp() + (b * (last - total).exp()).mT @ c
            if self.miss == "squashed":
                state = state.tanh()
        return x + self.out(y.transpose(1, 2).flatten(2))


@positive("chunks along the batch", length=24, twins={"own chunk only": "a token sees its own chunk only"})
class AlongBatch(Layer):
    """Chunks are moved to the batch for the part inside, states summed by a lower triangle of ones."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, t, h, _ = q.shape
        n = t // 6
        q, k, v = (y.reshape(b * n, 6, h, -1).transpose(1, 2) for y in (q, k, v))
        states = (k.mT @ v).unflatten(0, (b, n))
        before = torch.ones(n, n, device=q.device, dtype=q.dtype).tril(-1)
        states = torch.einsum("nm,bmhkv->bnhkv", before, states).flatten(0, 1)
        y = inside(q, k, v)
        if self.miss != "own chunk only":
            y = y + q @ states
        return y.transpose(1, 2).reshape(b, t, h, -1)


@positive(
    "delta rule in three chunks, row by row",
    correction="delta",
    length=12,
    fixed=True,
    twins={"no correction between": "what a chunk writes is corrected by its own tokens only"},
)
class DeltaRows(Layer):
    """The triangular inverse is built row by row; chunks of four by slices."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.beta = nn.Linear(WIDTH, 2)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        return q, F.normalize(k, dim=-1), v

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "beta": self.beta(x).sigmoid()}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, beta = (y.transpose(1, 2) for y in (*self.parts(x), self.beta(x).sigmoid().unsqueeze(-1)))
        state, done = torch.zeros(x.shape[0], 2, 6, 7).to(x), []
        for at in range(0, 12, 4):
            a, b, c, s = (y[:, :, at : at + 4] for y in (q, k, v, beta))
            pull = (s * b @ b.mT).tril(-1)
            wanted = s * (c if self.miss == "no correction between" else c - b @ state)
            rows = [wanted[:, :, :1]]
            for i in range(1, 4):
                rows.append(wanted[:, :, i : i + 1] - pull[:, :, i : i + 1, :i] @ torch.cat(rows, 2))
            new = torch.cat(rows, 2)
            done.append(a @ state + inside(a, b, new))
            state = state + b.mT @ new
        return x + self.out(torch.cat(done, 2).transpose(1, 2).flatten(2))
