"""FLA's own torch code in the place of its kernels, for the proofs: what each naive function takes and leaves out.

Kept apart from the bindings on purpose: the gates inside a kernel are FLA's naive gate functions here, and everything
else is spelled as its kernels spell it, so that a proof compares two readings and not one with itself.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

Naive = Callable[..., Any]


def linear(naive: Naive, a: Mapping[str, Any]) -> Any:
    """Linear attention, with or without its denominator."""
    names = ("q", "k", "v", "scale", "output_final_state", "normalize")
    state = a["initial_state"]  # in float32, like everything that this naive form adds to it
    return naive(**{name: a[name] for name in names}, initial_state=None if state is None else state.float())


def simple_gla(naive: Naive, a: Mapping[str, Any]) -> Any:
    """Simple GLA with gates, constant decays or none; also called by FLA's retention and lightning attention."""
    g, g_gamma = a.get("g"), a.get("g_gamma")
    if g is None:
        g = torch.zeros(a["v"].shape[:-1])
        g = g if g_gamma is None else g + g_gamma
    return _run(naive, a, q=a["q"], k=a["k"], v=a["v"], g=g, scale=a.get("scale"))


def gla(naive: Naive, a: Mapping[str, Any]) -> Any:
    """GLA; the naive form has the scale built in."""
    gk = a["g"] if a.get("g") is not None else a.get("gk")
    gk = torch.zeros_like(a["k"]) if gk is None else gk
    return _run(naive, a, q=_prescaled(a), k=a["k"], v=a["v"], gk=gk)


def delta(naive: Naive, a: Mapping[str, Any]) -> Any:
    """The delta rule; the naive form is head first and has the scale built in."""
    q, k = _normalised(a)
    beta = torch.ones(a["v"].shape[:-1]) if a["beta"] is None else a["beta"]
    return _head_first(naive, a, q=_prescaled({**a, "q": q}), k=k, v=a["v"], beta=beta)


def gated(naive: Naive, a: Mapping[str, Any]) -> Any:
    """The gated delta rule; the naive form has no groups and takes gates as they are."""
    if a.get("gk") is not None:
        raise NotImplementedError("it has no decay per key channel")
    repeats = a["v"].shape[2] // a["q"].shape[2]
    q, k = (x.repeat_interleave(repeats, dim=2) for x in _normalised(a))
    return _run(naive, a, q=q, k=k, v=a["v"], beta=_beta(a), g=_scalar_gate(a), scale=a["scale"])


def kda(naive: Naive, a: Mapping[str, Any]) -> Any:
    """Kimi delta attention; also the gated delta rule with decays per key channel."""
    q, k = _normalised(a)
    g, gk = a.get("g"), a.get("gk")
    if g is not None and g.dim() == 4:
        gk = _channel_gate(a)
    elif gk is not None:
        gk = gk + _scalar_gate(a).unsqueeze(-1)
    else:
        raise NotImplementedError("it has no decay per head")
    return _run(naive, a, q=q, k=k, v=a["v"], g=gk, beta=_beta(a), scale=a["scale"])


def dplr(naive: Naive, a: Mapping[str, Any]) -> Any:
    """A diagonal plus a matrix of rank one (RWKV-7, too); the naive form is head first and has the scale built in."""
    q, gk = (a[names[0]] if names[0] in a else a[names[1]] for names in (("q", "r"), ("gk", "w")))
    alpha, beta = (a["a"], a["b"]) if "b" in a else (-a["kk"], a["kk"] * a["a"])
    operands = {"k": a["k"], "v": a["v"], "alpha": alpha.float(), "beta": beta, "gk": gk}  # it casts all others itself
    return _head_first(naive, a, q=_prescaled({**a, "q": q}), **operands)


def iplr(naive: Naive, a: Mapping[str, Any]) -> Any:
    """The identity plus a matrix of rank one."""
    return _head_first(naive, a, q=_prescaled(a), k=a["k"], v=a["v"], alpha=a["a"].float(), beta=a["b"])


def comba(naive: Naive, a: Mapping[str, Any]) -> Any:
    """Comba in chunks; the naive form has no groups."""
    repeats = a["v"].shape[2] // a["q"].shape[2]
    p = a["k"] if a["p"] is None else a["p"]
    q, k = _normalised(a)
    p = p / torch.sqrt(p.square().sum(-1, keepdim=True) + 1e-6) if a["use_qk_l2norm_in_kernel"] else p
    q, k, p = (x.repeat_interleave(repeats, dim=2) for x in (q, k, p))
    return _run(naive, a, q=q, k=k, v=a["v"], p=p, g=a["g"], beta=_beta(a), scale=a["scale"])


def gdn2(naive: Naive, a: Mapping[str, Any]) -> Any:
    """Gated DeltaNet-2; the naive form takes gates as they are."""
    q, k = _normalised(a)
    return _run(naive, a, q=q, k=k, v=a["v"], g=_channel_gate(a), b=a["b"], w=a["w"], scale=a["scale"])


def delta_product(naive: Naive, a: Mapping[str, Any]) -> Any:
    """Gated DeltaProduct, of one reflection for a token."""
    q, k = _normalised(a)
    scale = a["q"].shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
    more = {"scale": scale, "cu_seqlens": None, "num_householder": a["num_householder"]}
    return _run(naive, a, q=q, k=k, v=a["v"], g=a["g"], beta=a["beta"], **more)


def rwkv6(naive: Naive, a: Mapping[str, Any]) -> Any:
    """RWKV-6, whose bonus has no tokens; the naive form is head first."""
    with_bonus = functools.partial(naive, u=a["u"], scale=a["scale"])
    return _head_first(with_bonus, a, q=a["r"], k=a["k"], v=a["v"], w=a["w"])


def _head_first(naive: Naive, a: Mapping[str, Any], **operands: torch.Tensor) -> Any:
    turned = {name: x.transpose(1, 2) for name, x in operands.items()}
    output, state = _run(naive, a, **turned)
    return output.transpose(1, 2), state


def _run(naive: Naive, a: Mapping[str, Any], **operands: Any) -> Any:
    """The naive form on its operands and on the state, which it keeps as [B, H, K, V]."""
    turned = bool(a.get("state_v_first") or a.get("transpose_state_layout"))
    state = a.get("initial_state")
    state = state.transpose(-1, -2) if state is not None and turned else state
    output, final = naive(**operands, initial_state=state, output_final_state=bool(a.get("output_final_state")))
    return output, final.transpose(-1, -2) if final is not None and turned else final


def _prescaled(a: Mapping[str, Any]) -> torch.Tensor:
    scale = a["scale"]
    return a["q"] if scale is None else a["q"] * (scale * a["q"].shape[-1] ** 0.5)


def _normalised(a: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    if not a.get("use_qk_l2norm_in_kernel"):
        return a["q"], a["k"]
    q, k = (x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (a["q"], a["k"]))
    return q, k


def _beta(a: Mapping[str, Any]) -> torch.Tensor:
    beta = torch.ones(a["v"].shape[:-1]) if a["beta"] is None else a["beta"]
    if a.get("use_beta_sigmoid_in_kernel"):
        beta = 1 / (1 + torch.exp(-beta))
        beta = 2 * beta if a.get("allow_neg_eigval") else beta
    return beta


def _scalar_gate(a: Mapping[str, Any]) -> torch.Tensor:
    if a.get("g") is None:
        return torch.zeros(a["v"].shape[:-1])
    if not a.get("use_gate_in_kernel"):
        return a["g"]
    gate = importlib.import_module("fla.ops.gated_delta_rule.gate")
    return gate.naive_gdn_gate(a["g"], a["A_log"], a.get("dt_bias"))


def _channel_gate(a: Mapping[str, Any]) -> torch.Tensor:
    if not a.get("use_gate_in_kernel"):
        return a["g"]
    gate = importlib.import_module("fla.ops.kda.gate")
    bound, given = a.get("lower_bound"), (a["g"], a.get("A_log"), a.get("dt_bias"))
    return gate.naive_kda_gate(*given) if bound is None else gate.naive_kda_lowerbound_gate(*given, lower_bound=bound)
