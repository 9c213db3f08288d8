"""Bindings shared by the tables: how the known functions spell the families, in plain torch calls.

Each function here runs on tensors (in the proof) and on `fx.Proxy` objects (in the rewrite), so it must not branch on
a tensor's shape or value; sizes come from `Arguments.sizes`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from llcompile.patterns.known.entry import Arguments
from llcompile.patterns.mixer import Mixer


def l2norm(x: Any) -> Any:
    """x / |x| over the last axis with the epsilon that FLA and transformers share."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def inverse_root_width(arguments: Arguments) -> float:
    """K^-1/2, the scale on the query that most functions apply by default."""
    return float(arguments.sizes["K"]) ** -0.5


def query_scale(arguments: Arguments) -> float:
    """The argument `scale`, or the default that most functions have for it."""
    scale = arguments["scale"]
    return inverse_root_width(arguments) if scale is None else float(scale)


def head_index(value: Any) -> Any:
    """0, 1, ... H - 1 for the heads of value [B, T, H, V], as float32 [B, T, H]: for decays that the head decides."""
    return torch.ones_like(value[..., 0], dtype=torch.float32).cumsum(-1) - 1


def time_step(arguments: Arguments, dt: Any, dtype: torch.dtype | None = None) -> Any:
    """Mamba's step size in `dtype` (dt's own by default): dt + bias, softplus, clamp. dt: [B, T, H] or [B, H]."""
    dt = dt if dtype is None else dt.to(dtype)
    if arguments["dt_bias"] is not None:
        dt = dt + arguments["dt_bias"].to(dtype or arguments.dtypes["dt"])
    if arguments["dt_softplus"]:
        dt = F.softplus(dt)
    low, high = arguments["dt_limit"] or (0.0, float("inf"))
    if (low, high) != (0.0, float("inf")):
        dt = torch.clamp(dt, min=low, max=high)
    return dt


def delta_rule(arguments: Arguments, q: Any, k: Any, v: Any, log_decay: Any, **shape: Any) -> Mixer:
    """Gated delta rule and Kimi delta attention: both differ only in the width of their decay."""
    q, k = q.float(), k.float()
    if arguments["use_qk_l2norm_in_kernel"]:
        q, k = l2norm(q), l2norm(k)
    return Mixer(
        correction="delta",
        query=q,
        key=k,
        value=v.float(),
        log_decay=log_decay,
        beta=arguments["beta"].float(),
        initial_state=arguments["initial_state"],
        scale=query_scale(arguments),
        **shape,
    )


def output_and_state(arguments: Arguments, output: Any, state: Any, like: str) -> tuple[Any, Any]:
    """The usual return value: the output in the dtype of argument `like`, and the state where it was asked for."""
    return output.to(arguments.dtypes[like]), state if arguments["output_final_state"] else None
