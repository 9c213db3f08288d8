"""Known functions of transformers >= 5: Mamba-1, Mamba-2, the gated delta rule and Kimi delta attention.

Each whole and by step.
Every model of a kind carries the same code under the same name (modular transformers copies it), so that one entry
serves all of them.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from llcompile.patterns.families import SELECTIVE_SCAN
from llcompile.patterns.known import selective
from llcompile.patterns.known.binders import delta_rule, output_and_state, ssd, ssd_step, ssd_step_tensors
from llcompile.patterns.known.entry import Arguments, KnownFunction, Packing, Tensor
from llcompile.patterns.mixer import Mixer


def _mamba2(a: Arguments) -> Mixer:
    return ssd(a, "hidden_states", "initial_states")


def _mamba2_step(a: Arguments) -> Mixer:
    return ssd_step(a, "hidden_states")


def _mamba2_result(a: Arguments, output: Any, state: Any) -> Any:
    if a["D"] is not None:
        output = output + a["D"].unsqueeze(-1) * a["hidden_states"].float()
    return (output, state) if a["return_final_states"] else output


def _mamba2_step_result(a: Arguments, output: Any, state: Any) -> Any:
    if a["D"] is not None:
        output = output + a["hidden_states"].float() * a["D"].float()
    if a["z"] is not None:
        output = output * F.silu(a["z"].float())
    return output.to(a.dtypes["hidden_states"])


def _mamba(a: Arguments) -> Mixer:
    return selective.selective_scan(a, "hidden_states", selective.time_step(a, "dt", "delta_bias", "delta_softplus"))


def _mamba_step(a: Arguments) -> Mixer:
    return selective.selective_step(a, "hidden_states", selective.time_step(a, "dt", "dt_bias", "dt_softplus"), "state")


def _mamba_result(a: Arguments, output: Any, state: Any) -> Any:
    output = selective.by_channel(output, step=False).to(a.dtypes["hidden_states"])
    if a["D"] is not None:
        output = output + a["hidden_states"] * a["D"].unsqueeze(-1)
    if a["z"] is not None:
        output = output * F.silu(a["z"])
    return (output, state) if a["return_last_state"] else output


def _mamba_step_result(a: Arguments, output: Any, state: Any) -> Any:
    output = selective.by_channel(output, step=True).to(a.dtypes["C"])
    if a["D"] is not None:
        output = output + a["hidden_states"] * a["D"]
    if a["z"] is not None:
        output = output * F.silu(a["z"])
    return output.to(a.dtypes["hidden_states"])


def _gated_delta(a: Arguments) -> Mixer:
    return delta_rule(a, a["query"], a["key"], a["value"], a["g"].float(), decay="scalar")


def _kimi(a: Arguments) -> Mixer:
    return delta_rule(a, a["query"], a["key"], a["value"], a["g"].float(), decay="channel")


def _delta_result(a: Arguments, output: Any, state: Any) -> Any:
    return output_and_state(a, output, state, like="query")


# Step sizes are positive also where no softplus makes them so: a negative one would be a decay above 1.
_MAMBA2_TENSORS = (
    Tensor("hidden_states", "B T H V"),
    Tensor("dt", "B T H", "step"),
    Tensor("A", "H", "negative"),
    Tensor("B", "B T G K"),
    Tensor("C", "B T G K"),
    Tensor("D", "H"),
    Tensor("dt_bias", "H", "step_bias"),
    Tensor("initial_states", "B H V K", "state"),
)
_MAMBA_STEP_TENSORS = (
    Tensor("state", "B H K", "state"),
    Tensor("hidden_states", "B H"),
    Tensor("dt", "B H", "step"),
    Tensor("A", "H K", "negative"),
    Tensor("B", "B K"),
    Tensor("C", "B K"),
    Tensor("D", "H"),
    Tensor("z", "B H"),
    Tensor("dt_bias", "H", "step_bias"),
)
_DELTA_TENSORS = (
    Tensor("query", "B T G K"),
    Tensor("key", "B T G K", "key"),
    Tensor("value", "B T H V"),
    Tensor("g", "B T H", "log_decay"),
    Tensor("beta", "B T H", "unit"),
    Tensor("initial_state", "B H K V", "state"),
)
_KIMI_TENSORS = (*(t for t in _DELTA_TENSORS if t.name != "g"), Tensor("g", "B T H K", "log_decay"))
_DELTA_CONSTANTS = ("output_final_state", "use_qk_l2norm_in_kernel")
# Transformers hands them on to the kernels that it may have installed; its torch code takes no notice of them.
_PACKING: dict[str, Packing] = {"cu_seqlens": "bounds", "cu_seq_lens_q": "bounds", "seq_idx": "indices"}


def _delta_row(function: str, family: str, kimi: bool) -> KnownFunction:
    return KnownFunction(
        library="transformers",
        function=function,
        family=family,
        tensors=_KIMI_TENSORS if kimi else _DELTA_TENSORS,
        constants=_DELTA_CONSTANTS,
        packing=_PACKING,
        returns_state="output_final_state",
        bind=_kimi if kimi else _gated_delta,
        result=_delta_result,
    )


ENTRIES: tuple[KnownFunction, ...] = (
    KnownFunction(
        library="transformers",
        function="mamba2_chunk_scan",
        family="Mamba-2 (SSD)",
        tensors=_MAMBA2_TENSORS,
        constants=("chunk_size", "dt_softplus", "dt_limit", "return_final_states"),
        packing=_PACKING,
        refuses={"z": "gates its output inside the kernel, which the torch form does not do"},
        bind=_mamba2,
        returns_state="return_final_states",
        result=_mamba2_result,
    ),
    KnownFunction(
        library="transformers",
        function="mamba2_selective_state_update",
        family="Mamba-2 (SSD)",
        tensors=ssd_step_tensors("hidden_states", skip="H *V"),
        constants=("dt_softplus",),
        bind=_mamba2_step,
        result=_mamba2_step_result,
        writes_state="state",
    ),
    KnownFunction(
        library="transformers",
        function="mamba_selective_scan",
        family=SELECTIVE_SCAN,
        tensors=selective.scan_tensors("hidden_states", "dt"),
        constants=("delta_softplus", "return_last_state", "use_mambapy", "use_associative_scan"),
        requires=selective.is_complex,
        softplus="delta_softplus",
        bind=_mamba,
        result=_mamba_result,
        returns_state="return_last_state",
        final_state="B H K",
    ),
    KnownFunction(
        library="transformers",
        function="mamba_selective_state_update",
        family=SELECTIVE_SCAN,
        tensors=_MAMBA_STEP_TENSORS,
        constants=("dt_softplus",),
        bind=_mamba_step,
        result=_mamba_step_result,
        writes_state="state",
    ),
    _delta_row("torch_chunk_gated_delta_rule", "Gated DeltaNet", kimi=False),
    _delta_row("torch_recurrent_gated_delta_rule", "Gated DeltaNet", kimi=False),
    _delta_row("chunk_kimi_delta_attention", "Kimi Delta Attention", kimi=True),
    _delta_row("recurrent_kimi_delta_attention", "Kimi Delta Attention", kimi=True),
)
