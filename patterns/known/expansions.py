"""Expansions: library functions that hold a known function and more, written out so that the known one is called.

mamba_ssm's `mamba_inner_fn` fuses the convolution, the projections, the selective scan and the output projection of a
Mamba-1 block. Under our backend Dynamo traces the same in plain torch calls around `selective_scan_fn`, a known
function. Calls that the plain form does not cover run the library's function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Any]


@dataclass(frozen=True)
class Expansion:
    """One such function.

    Args:
        library, function: as in a known function's entry.
        expand: the library's function -> what is traced in its place.
    """

    library: str
    function: str
    expand: Callable[[Function], Function]


def _absent(function: Function) -> Function:
    """Transformers asks for the fused kernel first; where it gets None it calls its parts, the scan among them."""

    def expanded(*args: Any, **kwargs: Any) -> None:
        return None

    return expanded


def _mamba_inner(function: Function) -> Function:
    """What `mamba_inner_ref` of the same library computes, with torch's convolution."""
    scan = function.__globals__["selective_scan_fn"]  # type: ignore[attr-defined]

    def expanded(
        xz: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Tensor | None,
        x_proj_weight: Tensor,
        delta_proj_weight: Tensor,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        A: Tensor,
        B: Tensor | None = None,
        C: Tensor | None = None,
        D: Tensor | None = None,
        delta_bias: Tensor | None = None,
        B_proj_bias: Tensor | None = None,
        C_proj_bias: Tensor | None = None,
        delta_softplus: bool = True,
        **more: Any,
    ) -> Any:
        normed = any(more.get(name) is not None for name in ("b_rms_weight", "c_rms_weight", "dt_rms_weight"))
        if normed or B is not None or C is not None or A.is_complex():
            return function(
                xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias,
                A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus, **more,
            )  # fmt: skip
        x, z = xz.chunk(2, dim=1)
        width = conv1d_weight.shape[-1]
        x = F.conv1d(x, conv1d_weight, conv1d_bias, padding=width - 1, groups=x.shape[1])[..., : xz.shape[-1]]
        x = F.silu(x)
        rank, states = delta_proj_weight.shape[1], A.shape[-1]
        delta, key, query = F.linear(x.transpose(1, 2), x_proj_weight).split([rank, states, states], dim=-1)
        delta = F.linear(delta, delta_proj_weight).transpose(1, 2)
        key = key if B_proj_bias is None else key + B_proj_bias.to(key.dtype)
        query = query if C_proj_bias is None else query + C_proj_bias.to(query.dtype)
        key, query = key.transpose(1, 2), query.transpose(1, 2)
        y = scan(x, delta, A, key, query, D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)
        return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)

    return expanded


EXPANSIONS: tuple[Expansion, ...] = (
    Expansion("transformers", "mamba_inner_fn", _absent),
    Expansion("mamba_ssm", "mamba_inner_fn", _mamba_inner),
)
