"""What a loop makes anew at each step or chunk without the input: positions, angles, rows of learned tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.habits.layer import Layer, misses
from tests.spellings.registry import WIDTH, Operands, either, positive

LENGTH, CHUNK = 12, 4
THETAS = (1.0, 0.3, 0.1)


def turned(z: Tensor, angles: Tensor) -> Tensor:
    """[..., 6] turned by three angles [..., 3]."""
    a, b = z.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Turned(Layer):
    """Queries and keys are turned by the position times `thetas`."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.register_buffer("thetas", torch.tensor(THETAS))

    def operands(self, x: Tensor) -> Operands:
        made = super().operands(x)
        angles = torch.arange(x.shape[1])[:, None, None] * self.thetas
        return {**made, "q": turned(made["q"], angles), "k": turned(made["k"], angles)}


@positive(
    "angles made chunk by chunk",
    fixed=True,
    length=LENGTH,
    twins={**misses("tanh"), "of the input": "angles grow with the input's mean over all tokens"},
)
class ChunkAngles(Turned):
    """RetNet's chunks with the positions of each, made where they are needed."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, read = q.new_zeros(q.shape[0], self.heads, self.key, self.value), []
        past = torch.ones(CHUNK, CHUNK, device=q.device).tril()
        thetas = self.thetas * v.mean() if self.miss == "of the input" else self.thetas
        for start in range(0, q.shape[1], CHUNK):
            stop = start + CHUNK
            at = torch.arange(start, stop, device=q.device, dtype=q.dtype)
            q_c, k_c = (turned(z[:, start:stop], at[:, None, None] * thetas) for z in (q, k))
            v_c = v[:, start:stop]
            scores = torch.einsum("bthk,bshk->bhts", q_c, k_c) * past
            read.append(torch.einsum("bhts,bshv->bthv", scores, v_c) + torch.einsum("bthk,bhkv->bthv", q_c, state))
            state = state + torch.einsum("bshk,bshv->bhkv", k_c, v_c)
            if self.miss == "tanh":
                state = state.tanh()
        return torch.cat(read, 1)


@positive("angles of a tensor of the step", fixed=True, length=LENGTH, twins=misses("tanh"))
class TensorAngles(Turned):
    """Token by token, with `torch.tensor(t)`."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, read = q.new_zeros(q.shape[0], self.heads, self.key, self.value), []
        for t in range(q.shape[1]):
            angles = torch.tensor(float(t), device=q.device) * self.thetas
            state = state + turned(k[:, t], angles)[..., :, None] * v[:, t, :, None]
            if self.miss == "tanh":
                state = state.tanh()
            read.append(torch.einsum("bhk,bhkv->bhv", turned(q[:, t], angles), state))
        return torch.stack(read, 1)


@positive("learned frequencies times the step", fixed=True, length=LENGTH, twins=misses("tanh"))
class LearnedAngles(Turned):
    """Token by token, with `t * theta`; the frequencies are trained."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        del self.thetas
        self.thetas = nn.Parameter(torch.tensor(THETAS))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, read = q.new_zeros(q.shape[0], self.heads, self.key, self.value), []
        for t in range(q.shape[1]):
            angles = (t + 0) * self.thetas
            state = state + turned(k[:, t], angles)[..., :, None] * v[:, t, :, None]
            if self.miss == "tanh":
                state = state.tanh()
            read.append(torch.einsum("bhk,bhkv->bhv", turned(q[:, t], angles), state))
        return torch.stack(read, 1)


@positive(
    "a rate for each step and channel",
    decay="channel",
    fixed=True,
    length=LENGTH,
    twins={"of the state": "how much is forgotten hangs on the size of the state"},
)
class StepChannelRates(Layer):
    """Learned rates [T, H, K], made decays inside of the loop."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.rates = nn.Parameter(torch.randn(LENGTH + 3, self.heads, self.key))

    def operands(self, x: Tensor) -> Operands:
        log_decay = -F.softplus(self.rates[: x.shape[1]])
        return {**super().operands(x), "log_decay": log_decay.expand(x.shape[0], -1, -1, -1)}

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, read = q.new_zeros(q.shape[0], self.heads, self.key, self.value), []
        for t in range(q.shape[1]):
            kept = torch.exp(-F.softplus(self.rates[t]))[None, :, :, None]
            if self.miss == "of the state":
                kept = kept / (1 + state.square().mean((-1, -2), keepdim=True))
            state = kept * state + k[:, t, :, :, None] * v[:, t, :, None]
            read.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        return torch.stack(read, 1)


class ReadElsewhere(nn.Module):
    """Decays [T + 1, H] that are read in another order than that of the tokens; the numbers are a mixer's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.keep = nn.Linear(WIDTH, 36), nn.Parameter(torch.randn(LENGTH + 1, 2))

    def row(self, t: int) -> int:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).unbind(2)
        keep, state, read = self.keep.sigmoid(), q.new_zeros(q.shape[0], 2, 6, 6), []
        for t in range(x.shape[1]):
            state = keep[self.row(t)].view(1, -1, 1, 1) * state + k[:, t, :, :, None] * v[:, t, :, None]
            read.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        return torch.stack(read, 1).flatten(2)


@either("a rate for each step, read backwards", "a decay for each token, from a table turned round", length=LENGTH)
class ReadBackwards(ReadElsewhere):
    def row(self, t: int) -> int:
        return LENGTH - 1 - t


@either("the rate of the next step", "a decay for each token, from a table without its first row", length=LENGTH)
class ReadAhead(ReadElsewhere):
    def row(self, t: int) -> int:
        return t + 1
