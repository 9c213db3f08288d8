"""Feature maps made of operations that are seldom met: transforms, gathers, complex numbers, batch norms.

A row for each: what is done to a query or key [B, T, H, 8], and how it is mixed then.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.habits.layer import Layer, masked, misses, summed
from tests.spellings.registry import positive

Map = Callable[["Featured", Tensor], Tensor]


class Featured(Layer):
    """Queries and keys of eight go through `feature`; both through the same."""

    key, value = 8, 5
    turns: Tensor

    def __init__(self, feature: Map, mixed_by: Callable[..., Tensor], miss: str = "") -> None:
        super().__init__(miss)
        self.feature, self.mixed_by = feature, mixed_by
        self.norm, self.batch_norm = nn.LayerNorm(8), nn.BatchNorm1d(16).eval()
        self.features = nn.Parameter(torch.randn(8, 8) / 3)
        self.order = nn.Buffer(torch.randperm(8))
        self.turns = nn.Buffer(torch.polar(torch.ones(32, 4), torch.outer(torch.arange(32.0), 0.5 ** torch.arange(4))))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        return self.feature(self, q), self.feature(self, k), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.mixed_by(q, k, v, self.miss)


def turned(m: Featured, z: Tensor) -> Tensor:
    pairs = torch.view_as_complex(z.unflatten(-1, (4, 2)).contiguous())
    return torch.view_as_real(pairs * m.turns[: z.shape[1], None].to(pairs.dtype)).flatten(-2)


def in_batch(m: Featured, z: Tensor) -> Tensor:
    return m.batch_norm(z.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(z).relu()


def squares(m: Featured, z: Tensor) -> Tensor:
    z = z[..., :4]
    return torch.cat([torch.ones_like(z[..., :1]), z, (z[..., None] * z[..., None, :]).flatten(-2) / 2**0.5], -1)


def both_signs(m: Featured, z: Tensor) -> Tensor:
    z = z @ m.features
    return torch.cat([z.exp(), (-z).exp()], dim=-1)


def shifted_logs(m: Featured, z: Tensor) -> Tensor:
    return torch.exp(z - torch.logsumexp(z, dim=-1, keepdim=True) / 2)


def gathered(m: Featured, z: Tensor) -> Tensor:
    return torch.take_along_dim(z, m.order.expand_as(z), dim=-1) - z


def waves(m: Featured, z: Tensor) -> Tensor:
    z = F.linear(z, m.features)
    return torch.cat([z.cos(), z.sin()], -1) / math.sqrt(8)


def leaves(m: Featured, z: Tensor) -> Tensor:
    """Eight numbers in windows of four, which overlap by two."""
    return z.unfold(-1, 4, 2).mean(-1)


FEATURES: dict[str, tuple[Map, Callable[..., Tensor], str]] = {
    "complex rotations": (turned, masked, "softmax"),
    "batch norm over heads and features": (in_batch, masked, "full"),
    "gated halves": (lambda m, z: F.glu(z, dim=-1), summed, "cummax"),
    "amplitudes of a Fourier transform": (lambda m, z: torch.fft.rfft(z).abs(), masked, "window"),
    "means of windows": (leaves, summed, "soft"),
    "a reordered copy": (gathered, masked, "abs"),
    "a blend with a learned map": (lambda m, z: torch.lerp(z, F.silu(z @ m.features), 0.5), masked, "one ahead"),
    "a product added in one operation": (lambda m, z: torch.addcmul(z, z.flip(-1), z.roll(1, -1)), summed, "cummax"),
    "exponentials over a root of their sum": (shifted_logs, masked, "softmax"),
    "one, itself and its squares": (squares, masked, "full"),
    "exponentials of both signs": (both_signs, summed, "soft"),
    "cosines and sines of a learned map": (waves, masked, "window"),
    "normed exponentials": (lambda m, z: m.norm(z).exp(), masked, "softmax"),
    "numbers in order of size": (lambda m, z: z.sort(dim=-1).values, masked, "abs"),
    "running sums over features": (lambda m, z: z.softmax(-1).cumsum(-1), summed, "cummax"),
    "the larger of two": (lambda m, z: torch.stack([z, z @ m.features], -1).amax(-1), masked, "full"),
    "the four largest": (lambda m, z: z.masked_fill(z < z.topk(4, -1).values[..., -1:], 0), masked, "one ahead"),
    "features by outer sums": (lambda m, z: (z[..., :4, None] + z[..., None, 4:]).relu().flatten(-2), masked, "window"),
}

for _name, (_feature, _mixed_by, _miss) in FEATURES.items():
    _twins = misses(_miss)
    positive(f"features: {_name}", length=16, twins=_twins, feature=_feature, mixed_by=_mixed_by)(Featured)
