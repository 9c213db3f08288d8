"""Constants that code holds beside its modules: in a global, a closure, or a list."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.spellings.habits.layer import Layer, misses
from tests.spellings.registry import Operands, positive

LENGTH = 13
KEEP = torch.tensor([0.5, 0.25])  # their powers are exact in float32
ANGLES = torch.outer(torch.arange(32.0), torch.tensor([1.0, 0.3, 0.1]))
COSINES, SINES = ANGLES.cos(), ANGLES.sin()
PAST = torch.ones(64, 64).tril()


def forgetting(keep: Tensor) -> Callable[[Tensor, Tensor, str], Tensor]:
    """How a state [B, H, K, V] goes on: `keep` [H] is in the closure."""

    def step(state: Tensor, written: Tensor, miss: str) -> Tensor:
        kept = keep.view(-1, 1, 1)
        if miss == "of the state":
            kept = kept / (1 + state.square().mean((-1, -2), keepdim=True))
        return kept * state + written

    return step


@positive(
    "decays in a closure",
    decay="scalar",
    fixed=True,
    length=LENGTH,
    twins={"of the state": "how much is forgotten hangs on the size of the state"},
)
class Closure(Layer):
    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.step = forgetting(KEEP.clone())

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "log_decay": KEEP.double().log()}

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, read = q.new_zeros(q.shape[0], self.heads, self.key, self.value), []
        for t in range(q.shape[1]):
            state = self.step(state, k[:, t, :, :, None] * v[:, t, :, None], self.miss)
            read.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        return torch.stack(read, 1)


@positive(
    "decays in a list",
    decay="scalar",
    length=LENGTH,
    twins={"of the input": "decays grow with the input's mean over all tokens"},
)
class InList(Layer):
    """Powers of a decay by the distance of two tokens."""

    def __init__(self, miss: str = "") -> None:
        super().__init__(miss)
        self.tables = [KEEP.clone(), torch.ones(3)]

    def operands(self, x: Tensor) -> Operands:
        return {**super().operands(x), "log_decay": KEEP.double().log()}

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[1], device=q.device)
        keep = self.tables[0][:, None, None]
        if self.miss == "of the input":
            keep = keep * v.mean().sigmoid()
        kernel = (keep ** (at[:, None] - at).clamp(min=0)).tril()
        scores = torch.einsum("bthk,bshk->bhts", q, k) * kernel
        return torch.einsum("bhts,bshv->bthv", scores, v)


@positive("a mask in a global", length=LENGTH, twins=misses("softmax"))
class GlobalMask(Layer):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bthk,bshk->bhts", q, k)
        past = PAST[: q.shape[1], : q.shape[1]]
        scores = scores.masked_fill(past == 0, -1e9).softmax(-1) if self.miss == "softmax" else scores * past
        return torch.einsum("bhts,bshv->bthv", scores, v)


def turned(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[..., 6] turned by three angles."""
    a, b = z.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


@positive("angles in a global, step by step", fixed=True, length=LENGTH, twins=misses("tanh"))
class GlobalAngles(Layer):
    """Token by token, with the row of that step."""

    def operands(self, x: Tensor) -> Operands:
        made = super().operands(x)
        cos, sin = (table[: x.shape[1], None] for table in (COSINES, SINES))
        return {**made, "q": turned(made["q"], cos, sin), "k": turned(made["k"], cos, sin)}

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, read = q.new_zeros(q.shape[0], self.heads, self.key, self.value), []
        for t in range(q.shape[1]):
            q_t, k_t = (turned(z[:, t], COSINES[t], SINES[t]) for z in (q, k))
            state = state + k_t[..., :, None] * v[:, t, :, None]
            if self.miss == "tanh":
                state = state.tanh()
            read.append(torch.einsum("bhk,bhkv->bhv", q_t, state))
        return torch.stack(read, 1)
