"""Known functions of FLA beside the first six families: RWKV-6, RWKV-7, DPLR, IPLR, Comba, Gated DeltaNet-2.

What the entries know was read from the source of fla-core 0.4.2, 0.5.2 and 0.6.0. What is erased is read from the
state before its decay, except by Gated DeltaNet-2. FLA's `naive_recurrent_comba` reads it after the decay, unlike the
kernels and `naive_chunk_comba`: the proof uses the latter.
"""

from __future__ import annotations

from typing import Any

from llcompile.patterns.known.binders import l2norm, output_and_state, query_scale
from llcompile.patterns.known.entry import Arguments, KnownFunction, Reference, Tensor
from llcompile.patterns.known.fla import (
    KDA_GATES,
    channel_gate,
    channel_gate_requires,
    common_operands,
    delta_operands,
    like_query,
    like_value,
    row,
)
from llcompile.patterns.known.fla_references import comba, delta_product, dplr, gdn2, iplr, rwkv6
from llcompile.patterns.mixer import Mixer


def _dplr(a: Arguments, query: str, gate: str, erase_query: Any, erase_key: Any) -> Mixer:
    """S_t = (diag(exp g_t) - erase_key_t erase_query_t^T) S_{t-1} + k_t v_t^T."""
    return Mixer(
        **common_operands(a, query, decay="channel", correction="erase", log_decay=a[gate].float()),
        erase_query=erase_query,
        erase_key=erase_key,
    )


def _chunk_dplr(a: Arguments) -> Mixer:
    return _dplr(a, "q", "gk", a["a"].float(), -a["b"].float())


def _rwkv7(a: Arguments) -> Mixer:
    return _dplr(a, "r", "w", a["a"].float(), -a["b"].float())


def _mul_rwkv7(a: Arguments) -> Mixer:
    erased = a["kk"].float()
    return _dplr(a, "r", "w", erased, erased * a["a"].float())


def _iplr(a: Arguments) -> Mixer:
    erase = {"erase_query": a["a"].float(), "erase_key": -a["b"].float()}
    return Mixer(**common_operands(a, decay="none", correction="erase"), **erase)


def _comba(a: Arguments) -> Mixer:
    """S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T."""
    operands = common_operands(a, decay="scalar", correction="erase", log_decay=a["g"].float())
    erased = operands["key"] if a["p"] is None else a["p"].float()
    if a["use_qk_l2norm_in_kernel"]:
        operands["query"], operands["key"], erased = map(l2norm, (operands["query"], operands["key"], erased))
    if a["beta"] is None:
        return Mixer(**operands, erase_query=erased, erase_key=operands["key"])
    beta = a["beta"].float()
    operands["value"] = operands["value"] * beta.unsqueeze(-1)
    return Mixer(**operands, beta=beta, erase_query=erased, erase_key=operands["key"])


def _gdn2(a: Arguments) -> Mixer:
    """S_t = (I - k_t (b_t * k_t)^T) diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T."""
    gate = channel_gate(a)
    operands = common_operands(a, decay="channel", correction="erase", log_decay=gate)
    if a["use_qk_l2norm_in_kernel"]:
        operands["query"], operands["key"] = l2norm(operands["query"]), l2norm(operands["key"])
    key = operands["key"]
    operands["value"] = operands["value"] * a["w"].float()
    return Mixer(**operands, erase_query=gate.exp() * a["b"].float() * key, erase_key=key)


def _delta_product(a: Arguments) -> Mixer:
    g = None if a["g"] is None else a["g"].float()
    return Mixer(**delta_operands(a, "none" if g is None else "scalar", g))


def _delta_product_requires(a: Arguments) -> str | None:
    number = a["num_householder"]
    return None if number == 1 else f"applies {number} reflections to the state at each token; only one is supported"


def _rwkv6(a: Arguments) -> Mixer:
    """S_t = diag(exp w_t) S_{t-1} + k_t v_t^T, read as it was before; the own token comes in by its bonus alone."""
    operands = common_operands(a, "r", decay="channel", correction="none", log_decay=a["w"].float())
    return Mixer(**operands, early=True)


def _rwkv6_result(a: Arguments, output: Any, state: Any) -> Any:
    bonus = (a["r"].float() * a["u"].float() * a["k"].float()).sum(-1, keepdim=True)
    return _like_r(a, output + query_scale(a) * bonus * a["v"].float(), state)


def _like_r(a: Arguments, output: Any, state: Any) -> Any:
    return output_and_state(a, output, state, like="r")


_Q, _K, _V = Tensor("q", "B T H K"), Tensor("k", "B T H K"), Tensor("v", "B T H V")
_A, _B = Tensor("a", "B T H K", "key"), Tensor("b", "B T H K", "key")
_COMBA = (
    Tensor("q", "B T G K"),
    Tensor("k", "B T G K", "key"),
    _V,
    Tensor("p", "B T G K", "key"),
    Tensor("g", "B T H", "log_decay"),
    Tensor("beta", "B T H", "unit"),
)
_GDN2 = (
    _Q,
    Tensor("k", "B T H K", "key"),
    _V,
    Tensor("g", "B T H K", "log_decay"),
    Tensor("b", "B T H K", "unit"),
    Tensor("w", "B T H V", "unit"),
    *KDA_GATES,
)
_PRODUCT = (
    _Q,
    Tensor("k", "B T H K", "key"),
    _V,
    Tensor("g", "B T H", "log_decay"),
    Tensor("beta", "B T H", "unit"),
)
# A promise about the decays, for the sake of kernels.
_BOUND: dict[str, Any] = {"constants": ("lower_bound",), "optional": ("lower_bound",)}
_NAIVE_DPLR = Reference("fla.ops.generalized_delta_rule.dplr.naive:dplr_recurrence", dplr)
_NAIVE_IPLR = Reference("fla.ops.generalized_delta_rule.iplr.naive:iplr_recurrence", iplr)
_NAIVE_COMBA = Reference("fla.ops.comba.naive:naive_chunk_comba", comba)
_NAIVE_GDN2 = Reference("fla.ops.gdn2.naive:naive_recurrent_gdn2", gdn2)
_NAIVE_RWKV6 = Reference("fla.ops.rwkv6.recurrent_naive:naive_recurrent_rwkv6", rwkv6)
_NAIVE_PRODUCT = Reference("fla.ops.gated_delta_product.naive:naive_recurrent_gated_delta_product", delta_product)
_GDN2_CONSTANTS = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "lower_bound")

ENTRIES: tuple[KnownFunction, ...] = (
    *(
        row(
            f"{form}_rwkv7",
            "RWKV-7",
            (Tensor("r", "B T H K"), Tensor("w", "B T H K", "log_decay"), _K, _V, _A, _B),
            _rwkv7,
            _NAIVE_DPLR,
            scale=scale,
            result=result,
            **_BOUND,
        )
        for form, scale, result in (("chunk", 1.0, _like_r), ("fused_recurrent", None, like_value))
    ),
    row(
        "fused_mul_recurrent_rwkv7",
        "RWKV-7",
        (
            Tensor("r", "B T H K"),
            Tensor("w", "B T H K", "log_decay"),
            _K,
            _V,
            Tensor("kk", "B T H K", "key"),
            Tensor("a", "B T H K", "unit"),
        ),
        _mul_rwkv7,
        _NAIVE_DPLR,
        scale=1.0,
        result=like_value,
    ),
    *(
        row(
            f"{form}_dplr_delta_rule",
            "DPLR delta rule",
            (_Q, _K, _V, _A, _B, Tensor("gk", "B T H K", "log_decay")),
            _chunk_dplr,
            _NAIVE_DPLR,
            result=result,
            **_BOUND,
        )
        for form, result in (("chunk", like_query), ("fused_recurrent", like_value))
    ),
    *(
        row(f"{form}_iplr_delta_rule", "IPLR delta rule", (_Q, _K, _V, _A, _B), _iplr, _NAIVE_IPLR, result=result)
        for form, result in (("chunk", like_query), ("fused_recurrent", like_value))
    ),
    *(
        row(f"{form}_comba", "Comba", _COMBA, _comba, _NAIVE_COMBA, constants=("use_qk_l2norm_in_kernel",))
        for form in ("chunk", "fused_recurrent")
    ),
    *(
        row(
            f"{form}_gdn2",
            "Gated DeltaNet-2",
            _GDN2,
            _gdn2,
            _NAIVE_GDN2,
            constants=_GDN2_CONSTANTS,
            optional=("A_log", "dt_bias"),
            requires=channel_gate_requires,
            result=result,
        )
        for form, result in (("chunk", like_query), ("fused_recurrent", like_value))
    ),
    *(
        row(
            f"{form}_rwkv6",
            "RWKV-6",
            (Tensor("r", "B T H K"), _K, _V, Tensor("w", "B T H K", "log_decay"), Tensor("u", "H K")),
            _rwkv6,
            _NAIVE_RWKV6,
            result=_rwkv6_result,
        )
        for form in ("chunk", "fused_recurrent")
    ),
    row(
        "chunk_gated_delta_product",
        "Gated DeltaProduct",
        _PRODUCT,
        _delta_product,
        _NAIVE_PRODUCT,
        constants=("use_qk_l2norm_in_kernel", "num_householder"),
        requires=_delta_product_requires,
    ),
)
