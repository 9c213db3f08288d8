"""A small model of a user's own that calls a library's gated delta rule: it compiles in a fraction of a second."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

VOCABULARY = 32


class DeltaMixer(nn.Module):
    """Gated delta rule with projections, residual included."""

    def __init__(self, width: int = 16, heads: int = 2, size: int = 8) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv = nn.Linear(width, 3 * heads * size)
        self.gates = nn.Linear(width, 2 * heads)
        self.out = nn.Linear(heads * size, width)

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.size)).unbind(2)
        beta, decay = self.gates(x).chunk(2, -1)
        return q, k, v, -0.2 * F.softplus(decay), beta.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        o, _ = torch_chunk_gated_delta_rule(*self.operands(x), use_qk_l2norm_in_kernel=True)
        return x + self.out(o.flatten(-2).to(x.dtype))


class TwoMixers(DeltaMixer):
    """Two known functions in one module, of two families."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g, beta = self.operands(x)
        first, _ = torch_chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)
        rate = -torch.ones(self.heads, dtype=torch.float32)
        second = mamba2_chunk_scan(v, F.softplus(beta), rate, k, q, chunk_size=16)
        return x + self.out((first + second).flatten(-2).to(x.dtype))


class Model(nn.Module):
    """Embedding, layers, head."""

    def __init__(self, layers: Iterable[nn.Module] | None = None, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(layers or [DeltaMixer(width), DeltaMixer(width)])
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Attention(nn.Module):
    """Nothing linear-time in it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True)


def model(seed: int = 0, **sizes: Any) -> Model:
    """A new model, the same for the same seed."""
    torch.manual_seed(seed)
    return Model([DeltaMixer(**sizes), DeltaMixer(**sizes)], width=sizes.get("width", 16))


def ids(batch: int = 2, length: int = 21, seed: int = 1) -> Tensor:
    """Random tokens [B, T]."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def perturb(converted: nn.Module, scale: float = 0.5, seed: int = 2) -> None:
    """Gives all level weights of a converted model random values, so that they are no longer 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in converted.named_parameters():
            if "loglinear" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Next-token cross-entropy."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten() % logits.shape[-1])


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the scale of what was expected."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())
