"""FLA's functions for the families that it has kernels of, and ours of the same meaning."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llcompile.ops import loglinear_attention

SCALE = 0.5


class Twin(NamedTuple):
    """A function of FLA by module and name, and what it takes: decays per channel, a delta rule, level weights."""

    module: str
    name: str
    family: str
    weighted: bool = False

    def leaves(
        self, tokens: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, levels: int
    ) -> dict[str, Tensor]:
        """Operands that need gradients, by the names of `theirs` and `ours`: keys of unit length, fp32 decays."""
        make = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(1, tokens, *shape, generator=make)

        groups = 1 if self.weighted else heads  # FLA's log-linear form alone takes groups
        k = torch.nn.functional.normalize(normal(groups, key_dim), dim=-1)
        x = {"q": normal(groups, key_dim).to(dtype), "k": k.to(dtype), "v": normal(heads, value_dim).to(dtype)}
        channel = (key_dim,) if self.family.startswith("channel") else ()
        x["g"] = -0.3 * torch.rand(1, tokens, heads, *channel, generator=make)
        if self.family.endswith("delta"):
            x["beta"] = torch.rand(1, tokens, heads, generator=make)
        if self.weighted:
            x["level_scales"] = normal(heads, levels).to(dtype)
        return {name: t.requires_grad_() for name, t in x.items()}

    def theirs(self) -> Callable[..., Tensor]:
        """FLA's function of `leaves`, which imports FLA."""
        function = getattr(importlib.import_module(self.module), self.name)
        return lambda **x: function(**x, scale=SCALE)[0]

    def ours(self) -> Callable[..., Tensor]:
        """The operator on the same operands."""

        def run(g: Tensor, level_scales: Tensor | None = None, **x: Tensor) -> Tensor:
            return loglinear_attention(**x, level_weights=level_scales, log_decay=g, scale=SCALE)[0]  # type: ignore[arg-type]

        return run


TWINS = {
    "simple_gla": Twin("fla.ops.simple_gla", "chunk_simple_gla", "scalar/none"),
    "log-linear": Twin("fla.ops.log_linear_attn", "chunk_log_linear_attn", "scalar/none", weighted=True),
    "gated delta": Twin("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", "scalar/delta"),
    "KDA": Twin("fla.ops.kda", "chunk_kda", "channel/delta"),
}
