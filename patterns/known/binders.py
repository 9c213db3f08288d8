"""Bindings shared by the tables: how the known functions spell the families, in plain torch calls.

Each function here runs on tensors (in the proof) and on `fx.Proxy` objects (in the rewrite), so it must not branch on
a tensor's shape or value; sizes come from `Arguments.sizes`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from llcompile.patterns.known.entry import Arguments, Tensor
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


def ssd(arguments: Arguments, value: str, state: str, dtype: torch.dtype | None = None) -> Mixer:
    """Mamba-2's scan.

    Args:
        arguments: the call's.
        value, state: names of its values and of its state.
        dtype: in which it computes its step sizes; dt's own by default.
    """
    dt = _time_step(arguments, arguments["dt"], arguments["dt_bias"], dtype)  # [B, T, H]
    return _ssd(arguments, value, dt, arguments["A"], initial_state=arguments[state])


def ssd_step(arguments: Arguments, value: str, dtype: torch.dtype | None = None) -> Mixer:
    """Its single step. dt, A and dt_bias have one value for each head, expanded over its channels for the kernel."""
    bias = arguments["dt_bias"]
    dt = _time_step(arguments, arguments["dt"][..., 0], None if bias is None else bias[..., 0], dtype)  # [B, H]
    return _ssd(arguments, value, dt, arguments["A"][..., 0, 0], initial_state=arguments["state"], step=True)


def ssd_step_tensors(value: str, skip: str) -> tuple[Tensor, ...]:
    """The tensors of the single step: its values have this name, and D these axes."""
    return (
        Tensor("state", "B H V K", "state"),
        Tensor(value, "B H V"),
        Tensor("dt", "B H *V", "step"),
        Tensor("A", "H *V *K", "negative"),
        Tensor("B", "B G K"),
        Tensor("C", "B G K"),
        Tensor("D", skip),
        Tensor("z", "B H V"),
        Tensor("dt_bias", "H *V", "step_bias"),
    )


def _ssd(arguments: Arguments, value: str, dt: Any, rate: Any, **more: Any) -> Mixer:
    dt = dt.float()
    return Mixer(
        decay="scalar",
        correction="none",
        query=arguments["C"].float(),
        key=arguments["B"].float(),
        value=arguments[value].float() * dt.unsqueeze(-1),
        log_decay=rate.float() * dt,
        **more,
    )


def _time_step(arguments: Arguments, dt: Any, bias: Any, dtype: torch.dtype | None) -> Any:
    """dt + bias, softplus, clamp."""
    dt = dt if dtype is None else dt.to(dtype)
    if bias is not None:
        dt = dt + bias.to(dtype or arguments.dtypes["dt"])
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
