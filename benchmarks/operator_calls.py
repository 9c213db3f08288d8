"""What ``llcompile bench operator --device cpu`` measures, as functions without arguments on operands they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Operands = dict[str, Tensor]
Result = tuple[Tensor, ...]
Run = Callable[[], Result]


def operands(job: dict[str, Any], weights: bool, backward: bool) -> Operands:
    """The same for ours and for peers: q, k, v `[1, T, H, K]`, the family's own, a gradient, a step's states.

    Keys have unit length, as every delta-rule model's have. Decays stay in float32, as in models.
    """
    from llcompile.kernels.levels import level_count

    torch.manual_seed(0)
    shape = (1, 1 if job["step"] else job["length"], job["heads"])
    levels = level_count(job["length"] + job["step"])
    unit = torch.nn.functional.normalize
    x = {name: unit(torch.randn(*shape, job["dim"]), dim=-1) for name in ("q", "k")}
    x["v"] = torch.randn(*shape, job["dim"])
    if job["correction"] == "delta":
        x["beta"] = torch.rand(shape)
    if weights:
        x["level_weights"] = torch.rand(*shape, levels)
    if backward:
        x["grad"] = torch.randn_like(x["v"])
    x = {name: tensor.to(getattr(torch, job["dtype"])) for name, tensor in x.items()}
    if job["decay"] != "none":
        channels = (job["dim"],) if job["decay"] == "channel" else ()
        x["log_decay"] = -0.1 * torch.rand(*shape, *channels) - 1e-4
    x = {name: tensor.to(job["device"]).requires_grad_(backward and name != "grad") for name, tensor in x.items()}
    return {**x, **_states(job, levels)} if job["step"] else x


def _states(job: dict[str, Any], levels: int) -> Operands:
    """A linear state and level states after `length` tokens."""
    from llcompile.kernels.state import pack_state

    states = torch.randn(1, job["heads"], levels, job["dim"], job["dim"], device=job["device"])
    position = torch.full((1,), job["length"], device=job["device"])
    return {"state": states.sum(2), "level_state": pack_state(states, position)}


def call(job: dict[str, Any], x: Operands) -> Run:
    """One run of a job; its results are all that it returns: the output, and gradients or a state."""
    forward = _ours(job, x) if job["runs"] == "llcompile" else peer(job["runs"], x)
    forward = torch.compile(forward, dynamic=False) if job["compiled"] else forward
    if job["step"]:
        return _step(job, x)
    if not job["backward"]:
        return torch.no_grad()(lambda: (forward(),))
    skipped = {"grad"} if job["weights"] else {"grad", "level_weights"}
    leaves = [t for name, t in x.items() if name not in skipped]

    def both() -> Result:
        o = forward()
        return o, *torch.autograd.grad(o, leaves, x["grad"].to(o.dtype))

    return both


def _ours(job: dict[str, Any], x: Operands) -> Callable[[], Tensor]:
    from llcompile.ops import loglinear_attention

    w = x["level_weights"] if job["weights"] else None
    return lambda: loglinear_attention(x["q"], x["k"], x["v"], w, x.get("log_decay"), x.get("beta"))[0]


def _step(job: dict[str, Any], x: Operands) -> Run:
    from llcompile.ops import loglinear_attention_step

    token = {name: tensor[:, 0] for name, tensor in x.items() if not name.endswith("state")}
    q, k, v, g, beta = (token.get(name) for name in ("q", "k", "v", "log_decay", "beta"))
    w, state = (token["level_weights"], x["level_state"]) if job["weights"] else (None, x["state"])
    assert q is not None
    assert k is not None
    assert v is not None
    return torch.no_grad()(lambda: loglinear_attention_step(q, k, v, w, state, g, beta))


def peer(name: str, x: Operands) -> Callable[[], Tensor]:
    """transformers' own code by its name, on the same operands; delta rules scale by K^-1/2."""
    return {
        "mamba2_chunk_scan": _mamba2,
        "torch_chunk_gated_delta_rule": _gated_delta,
        "chunk_kimi_delta_attention": _kimi_delta,
    }[name](x)


def _mamba2(x: Operands) -> Callable[[], Tensor]:
    """The Mamba-2 scan, its decay being ``A * dt``: A = -1 and dt = -log_decay give ours (with values times dt)."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    scan = getattr(mamba2_chunk_scan, "__wrapped__", mamba2_chunk_scan)
    rate = -torch.ones(x["v"].shape[2], device=x["v"].device)

    def run() -> Tensor:
        o: Tensor = scan(x["v"], -x["log_decay"], rate, x["k"], x["q"], 64)
        return o

    return run


def _gated_delta(x: Operands) -> Callable[[], Tensor]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    rule = getattr(torch_chunk_gated_delta_rule, "__wrapped__", torch_chunk_gated_delta_rule)
    return lambda: rule(x["q"], x["k"], x["v"], x["log_decay"], x["beta"])[0]


def _kimi_delta(x: Operands) -> Callable[[], Tensor]:
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

    rule = getattr(chunk_kimi_delta_attention, "__wrapped__", chunk_kimi_delta_attention)
    return lambda: rule(x["q"], x["k"], x["v"], x["log_decay"], x["beta"])[0]
