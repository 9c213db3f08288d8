"""Known functions of FLA (flash-linear-attention 0.6): one table of its mixers, one entry for each form.

Its kernels run on a GPU only, so the proofs use its own torch code (fla_references.py). What the entries know was read
from the source of fla-core 0.6.0: the scale is K^-1/2 unless given, operands are [B, T, H, ...], value head h uses
query/key head h // (HV // H), states are [B, H, K, V] in float32 unless `state_v_first` (before 0.6:
`transpose_state_layout`) turns them.

Not in the table: `fused_chunk_gla` and `fused_chunk_delta_rule`, which only raise, and `parallel_delta_rule`, which FLA
does not export, has no gradient for, and documents as [B, T, H, K] while it computes on [B, H, T, K].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from llcompile.patterns.families import Decay
from llcompile.patterns.known.binders import head_index, l2norm, output_and_state, query_scale
from llcompile.patterns.known.entry import Arguments, KnownFunction, Packing, Reference, Tensor
from llcompile.patterns.known.fla_references import delta, gated, gla, kda, linear, simple_gla
from llcompile.patterns.mixer import Mixer

_VALUE_FIRST = ("state_v_first", "transpose_state_layout")
# They choose between kernels, or between memory and time, and not what is computed.
_NUMERICS = ("chunk_size", "safe_gate", "disable_recompute", "use_graph", "max_num_seqs")
# FLA's layers pack when they get an attention mask.
_PACKING: dict[str, Packing] = {"cu_seqlens": "bounds", "cu_seqlens_cpu": "derived", "chunk_indices": "derived"}
_REFUSES = {
    "cp_context": "splits a sequence over several processes, which the operator does not support yet",
    "reverse": "mixes from the last token to the first, and levels are counted from the first",
    "head_first": "lays out its operands as [B, H, T, ...], which FLA has dropped",
    "output_attentions": "requests the matrix of scores, which the operator never forms",
    "return_intermediate_states": "requests the states between chunks, which have no levels",
    "gv": "lets the state decay along its value channels, which no family supports",
}


def common_operands(a: Arguments, query: str = "q", **more: Any) -> dict[str, Any]:
    """The operands that all of FLA's mixers have; `query` is what the function calls it."""
    return {
        "query": a[query].float(),
        "key": a["k"].float(),
        "value": a["v"].float(),
        "initial_state": a["initial_state"],
        "scale": query_scale(a),
        **more,
    }


def _linear_attn(a: Arguments) -> Mixer:
    operands = common_operands(a, decay="none", correction="none")
    if a["normalize"]:  # the denominator is one more value channel, of ones
        value = operands["value"]
        operands["value"] = torch.cat([value, torch.ones_like(value[..., :1])], -1)
    return Mixer(**operands)


def _linear_attn_result(a: Arguments, output: Any, state: Any) -> Any:
    if a["normalize"]:
        output = output[..., :-1] / (output[..., -1:] + 1e-10)
    return output_and_state(a, output, state, like="q")


def _linear_attn_requires(a: Arguments) -> str | None:
    if a["normalize"] and (a["output_final_state"] or a["initial_state"] is not None):
        return "passes a state of normalised attention, a pair (kv, z), which has no levels yet; use normalize=False"
    return None


def _retention(a: Arguments) -> Mixer:
    log_decay = (1 - 2.0 ** (-5.0 - head_index(a["v"]))).log()
    return Mixer(**common_operands(a, decay="scalar", correction="none", log_decay=log_decay))


def _lightning_attn(a: Arguments) -> Mixer:
    slope = -8 / a.sizes["H"] * (1 - a["layer_idx"] / a["num_layers"])
    return Mixer(**common_operands(a, decay="scalar", correction="none", log_decay=slope * head_index(a["v"])))


def _simple_gla(a: Arguments) -> Mixer:
    log_decay = None if a["g"] is None else a["g"].float()
    if a["g_gamma"] is not None:  # [H]
        log_decay = torch.zeros_like(a["v"][..., 0], dtype=torch.float32) + a["g_gamma"].float()
    decay = "none" if log_decay is None else "scalar"
    return Mixer(**common_operands(a, decay=decay, correction="none", log_decay=log_decay))


def _simple_gla_requires(a: Arguments) -> str | None:
    both = a["g"] is not None and a["g_gamma"] is not None
    return "passes both g and g_gamma, but FLA takes only one" if both else None


def _gla(a: Arguments) -> Mixer:
    given = a["gk"] if a["g"] is None else a["g"]
    log_decay = None if given is None else given.float()
    decay = "none" if log_decay is None else "channel"
    return Mixer(**common_operands(a, decay=decay, correction="none", log_decay=log_decay))


def _delta(a: Arguments, decay: Decay, log_decay: Any) -> Mixer:
    return Mixer(**delta_operands(a, decay, log_decay))


def delta_operands(a: Arguments, decay: Decay, log_decay: Any) -> dict[str, Any]:
    """The operands of a delta rule."""
    operands = common_operands(a, decay=decay, correction="delta", log_decay=log_decay)
    if a["use_qk_l2norm_in_kernel"]:
        operands["query"], operands["key"] = l2norm(operands["query"]), l2norm(operands["key"])
    beta = a["beta"]
    beta = torch.ones_like(a["v"][..., 0], dtype=torch.float32) if beta is None else beta.float()
    if a["use_beta_sigmoid_in_kernel"]:
        beta = torch.sigmoid(beta) * (2.0 if a["allow_neg_eigval"] else 1.0)
    return {**operands, "beta": beta}


def _delta_rule(a: Arguments) -> Mixer:
    return _delta(a, "none", None)


def _gated_delta_rule(a: Arguments) -> Mixer:
    g, gk = a["g"], a["gk"]
    if g is not None:
        g = g.float()
        if a["use_gate_in_kernel"]:
            g = g if a["dt_bias"] is None else g + a["dt_bias"].float()
            g = -a["A_log"].float().exp() * F.softplus(g)
    if gk is None:
        return _delta(a, "none" if g is None else "scalar", g)
    gk = gk.float()
    return _delta(a, "channel", gk if g is None else gk + g.unsqueeze(-1))


def _gated_delta_rule_requires(a: Arguments) -> str | None:
    if a["use_gate_in_kernel"] and (a["A_log"] is None or a["g"] is None):
        return "sets use_gate_in_kernel without g and A_log"
    if a["beta"] is None and a.sizes["H"] != a.sizes["G"]:
        return "passes no beta; FLA then makes one for the query heads, but there are more value heads"
    return None


def channel_gate(a: Arguments) -> Any:
    """The log decay per key channel [B, T, H, K] of Kimi Delta Attention, from its gate where the kernel has that."""
    g = a["g"].float()
    if a["use_gate_in_kernel"]:
        heads, width = a.sizes["H"], a.sizes["K"]
        if a["dt_bias"] is not None:
            g = g + a["dt_bias"].float().reshape(heads, width)
        rate = 1.0 if a["A_log"] is None else a["A_log"].float().exp().reshape(heads, 1)
        bound = a["lower_bound"]
        g = -rate * F.softplus(g) if bound is None else bound * torch.sigmoid(rate * g)
    return g


def _kda(a: Arguments) -> Mixer:
    return _delta(a, "channel", channel_gate(a))


def channel_gate_requires(a: Arguments) -> str | None:
    """Why a gate inside the kernel is not covered."""
    if a["use_gate_in_kernel"] and a["A_log"] is None and a["lower_bound"] is None:
        return "sets use_gate_in_kernel without A_log or lower_bound"
    return None


def like_query(a: Arguments, output: Any, state: Any) -> Any:
    """The usual return value, in the dtype of q."""
    return output_and_state(a, output, state, like="q")


def like_value(a: Arguments, output: Any, state: Any) -> Any:
    """The usual return value, in the dtype of v."""
    return output_and_state(a, output, state, like="v")


_STATE = Tensor("initial_state", "B H K V", "state")
_QKV = (Tensor("q", "B T H K"), Tensor("k", "B T H K"), Tensor("v", "B T H V"))
_POSITIVE_QKV = (Tensor("q", "B T H K", "positive"), Tensor("k", "B T H K", "positive"), _QKV[2])
_KEYS = (_QKV[0], Tensor("k", "B T H K", "key"), _QKV[2], Tensor("beta", "B T H", "unit"))
_GROUPED = (Tensor("q", "B T G K"), Tensor("k", "B T G K", "key"), _QKV[2], Tensor("beta", "B T H", "unit"))
_G = Tensor("g", "B T H", "log_decay")
_G_CHANNEL = Tensor("g", "B T H K", "log_decay")
_GK = Tensor("gk", "B T H K", "log_decay")
_GATES = (Tensor("A_log", "H|1 1 H 1"), Tensor("dt_bias", "H"))
KDA_GATES = (Tensor("A_log", "H|1 1 H 1"), Tensor("dt_bias", "H.K|H K"))
_DELTA_CONSTANTS = ("use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval")
_GATED_CONSTANTS = (*_DELTA_CONSTANTS, "use_gate_in_kernel")

_NAIVE_LINEAR = Reference("fla.ops.linear_attn.naive:naive_recurrent_linear_attn", linear)
_NAIVE_SIMPLE_GLA = "fla.ops.simple_gla.naive:naive_recurrent_simple_gla"
_NAIVE_GLA = Reference("fla.ops.gla.naive:naive_recurrent_gla", gla)
_NAIVE_DELTA = Reference("fla.ops.delta_rule.naive:delta_rule_recurrence", delta)
_NAIVE_GATED = Reference("fla.ops.gated_delta_rule.naive:naive_recurrent_gated_delta_rule", gated)
_NAIVE_KDA = Reference("fla.ops.kda.naive:naive_recurrent_kda", kda)


def row(
    function: str,
    family: str,
    tensors: tuple[Tensor, ...],
    bind: Callable[[Arguments], Mixer],
    *references: Reference,
    constants: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    requires: Callable[[Arguments], str | None] | None = None,
    result: Callable[[Arguments, Any, Any], Any] = like_query,
    scale: float | None = None,
) -> KnownFunction:
    """The entry of one of FLA's functions, with what all of them have in common."""
    # The parallel forms know no states.
    stateful = not function.startswith("parallel_")
    lacking = (*_NUMERICS, *_VALUE_FIRST, *(c for c in _GATED_CONSTANTS if c != "use_qk_l2norm_in_kernel"), *optional)
    return KnownFunction(
        library="fla",
        function=function,
        family=family,
        tensors=(*tensors, _STATE) if stateful else tensors,
        constants=("scale", *constants, *(("output_final_state",) if stateful else ()), *_NUMERICS, *_VALUE_FIRST),
        packing=_PACKING,
        optional=lacking,
        refuses={name: why for name, why in _REFUSES.items() if name not in {t.name for t in tensors}},
        defaults={"scale": scale, "head_first": False, "reverse": False, **dict.fromkeys(_VALUE_FIRST, False)},
        requires=requires,
        returns_state="output_final_state" if stateful else None,
        value_first=_VALUE_FIRST,
        opaque=True,
        bind=bind,
        result=result,
        references=references,
    )


def _over_simple_gla(form: str) -> Reference:
    """The function's own code, with FLA's torch form of simple GLA in the place of the kernel that it calls."""
    return Reference(_NAIVE_SIMPLE_GLA, simple_gla, callee=f"{form}_simple_gla")


ENTRIES: tuple[KnownFunction, ...] = (
    *(
        row(
            f"{form}_linear_attn",
            "linear attention",
            _POSITIVE_QKV,
            _linear_attn,
            _NAIVE_LINEAR,
            constants=("normalize",),
            requires=_linear_attn_requires,
            result=_linear_attn_result,
        )
        for form in ("chunk", "fused_chunk", "fused_recurrent")
    ),
    *(
        row(f"{form}_retention", "RetNet", _QKV, _retention, _over_simple_gla(form))
        for form in ("chunk", "fused_chunk", "fused_recurrent", "parallel")
    ),
    *(
        row(
            f"{form}_lightning_attn",
            "lightning attention",
            _QKV,
            _lightning_attn,
            _over_simple_gla(form),
            constants=("layer_idx", "num_layers"),
        )
        for form in ("chunk", "fused_recurrent")
    ),
    *(
        row(
            f"{form}_simple_gla",
            "Simple GLA",
            (*_QKV, _G, Tensor("g_gamma", "H", "log_decay")),
            _simple_gla,
            Reference(_NAIVE_SIMPLE_GLA, simple_gla),
            optional=("g_gamma",),
            requires=_simple_gla_requires,
        )
        for form in ("chunk", "fused_chunk", "fused_recurrent", "parallel")
    ),
    row("chunk_gla", "GLA", (*_QKV, _G_CHANNEL), _gla, _NAIVE_GLA, result=like_value),
    row("fused_recurrent_gla", "GLA", (*_QKV, _GK), _gla, _NAIVE_GLA),
    *(
        row(
            f"{form}_delta_rule",
            "DeltaNet",
            _KEYS,
            _delta_rule,
            _NAIVE_DELTA,
            constants=("use_qk_l2norm_in_kernel",),
        )
        for form in ("chunk", "fused_recurrent")
    ),
    *(
        row(
            f"{form}_gated_delta_rule",
            "Gated DeltaNet",
            (*_GROUPED, _G, *own, *_GATES),
            _gated_delta_rule,
            _NAIVE_GATED,
            _NAIVE_KDA,
            constants=_GATED_CONSTANTS,
            optional=("A_log", "dt_bias", "gk"),
            requires=_gated_delta_rule_requires,
            result=result,
        )
        for form, own, result in (("chunk", (), like_query), ("fused_recurrent", (_GK,), like_value))
    ),
    *(
        row(
            f"{form}_kda",
            "Kimi Delta Attention",
            (*_GROUPED, _G_CHANNEL, *KDA_GATES),
            _kda,
            _NAIVE_KDA,
            constants=(*_GATED_CONSTANTS, "lower_bound"),
            optional=("A_log", "dt_bias", "lower_bound"),
            requires=channel_gate_requires,
            result=result,
        )
        for form, result in (("chunk", like_query), ("fused_recurrent", like_value))
    ),
)
