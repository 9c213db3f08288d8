"""The rows of transformers, each proved against the function itself, whole and by step, with and without states."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from llcompile.patterns.known.arguments import CallRejection, read_call
from llcompile.patterns.known.capture import CapturedFunction
from llcompile.patterns.records import Certificate
from tests.patterns.proofs import SIZES, captured_function, operands, proof, row_of

pytest.importorskip("transformers")

MAMBA2 = "transformers.models.mamba2.modeling_mamba2"
MAMBA = "transformers.models.mamba.modeling_mamba"
QWEN3_NEXT = "transformers.models.qwen3_next.modeling_qwen3_next"
KIMI = "transformers.models.kimi_linear.modeling_kimi_linear"
DELTA = {
    "torch_chunk_gated_delta_rule": QWEN3_NEXT,
    "torch_recurrent_gated_delta_rule": QWEN3_NEXT,
    "chunk_kimi_delta_attention": KIMI,
    "recurrent_kimi_delta_attention": KIMI,
}

CHANNELS = {"B": 2, "T": 70, "G": 1, "H": 6, "K": 7}  # of Mamba-1


def captured(name: str, module: str) -> CapturedFunction:
    found = captured_function(row_of("transformers", name), getattr(importlib.import_module(module), name))
    assert found.problem is None
    return found


def level_state() -> torch.Tensor:
    return torch.zeros(SIZES["B"], SIZES["H"], 1 + 8, SIZES["K"], SIZES["V"])


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(
    ("state", "weighted"), [("none", True), ("none", False), ("linear", True), ("linear", False), ("levels", True)]
)
@pytest.mark.parametrize("name", DELTA)
def test_delta_rules(name: str, state: str, normalised: bool, weighted: bool) -> None:
    found = captured(name, DELTA[name])
    # Kimi's functions know no groups: each head has a query and a key of its own.
    sizes = {**SIZES, "G": SIZES["H"]} if "kimi" in name else SIZES
    arguments: dict[str, Any] = operands(found.entry, sizes=sizes)
    if state == "none":
        arguments["initial_state"] = None
    if state == "levels":
        arguments["initial_state"] = level_state()
    arguments.update(use_qk_l2norm_in_kernel=normalised, output_final_state=True)
    result = proof(found, arguments, weighted)
    assert isinstance(result, Certificate), result
    assert result.against == ""


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("absent", [("initial_states",), (), ("D", "dt_bias")])
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (1.5, 2.5)])
def test_mamba2_scan(absent: tuple[str, ...], limit: tuple[float, float], weighted: bool) -> None:
    found = captured("mamba2_chunk_scan", MAMBA2)
    arguments = operands(found.entry, absent)
    arguments.update(chunk_size=64, dt_softplus=True, dt_limit=limit, return_final_states=True)
    result = proof(found, arguments, weighted)
    assert isinstance(result, Certificate), result
    assert result.against == ""


@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("absent", [(), ("z",), ("D", "z")])
def test_mamba2_step(absent: tuple[str, ...], levels: bool) -> None:
    found = captured("mamba2_selective_state_update", MAMBA2)
    arguments = {**operands(found.entry, absent), "dt_softplus": True}
    if levels:
        arguments["state"] = level_state()
    result = proof(found, arguments, weighted=levels)
    assert isinstance(result, Certificate), result
    assert result.against == ""


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("absent", [(), ("z",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("softplus", [True, False])
def test_mamba_scan(absent: tuple[str, ...], softplus: bool, weighted: bool) -> None:
    found = captured("mamba_selective_scan", MAMBA)
    arguments = operands(found.entry, absent, CHANNELS)
    result = proof(found, {**arguments, "delta_softplus": softplus, "return_last_state": True}, weighted)
    assert isinstance(result, Certificate), result
    assert result.against == ""


@pytest.mark.parametrize("state", ["linear", "levels", "no weights"])
@pytest.mark.parametrize("absent", [(), ("z",), ("D", "z", "dt_bias")])
def test_mamba_step(absent: tuple[str, ...], state: str) -> None:
    found = captured("mamba_selective_state_update", MAMBA)
    arguments = {**operands(found.entry, absent, CHANNELS), "dt_softplus": True}
    if state == "levels":
        arguments["state"] = torch.zeros(2, 6, 1 + 8, 7, 1)
    result = proof(found, arguments, weighted=state != "no weights")
    assert isinstance(result, Certificate), result


@pytest.mark.parametrize("sizes", [dict.fromkeys(SIZES, 1), {"B": 4, "T": 64, "G": 1, "H": 1, "K": 8, "V": 32}])
def test_one_head(sizes: dict[str, int]) -> None:
    """The gradient of one head's decay is a sum over all tokens, and smaller than what float32 makes of its terms."""
    found = captured("mamba2_chunk_scan", MAMBA2)
    arguments = operands(found.entry, sizes=sizes)
    result = proof(found, {**arguments, "chunk_size": 256, "dt_softplus": True, "return_final_states": True})
    assert isinstance(result, Certificate), result


@pytest.mark.parametrize(
    ("name", "module", "refused"),
    [
        ("mamba2_chunk_scan", MAMBA2, "z"),
    ],
)
def test_refused_arguments_have_a_reason(name: str, module: str, refused: str) -> None:
    found = captured(name, module)
    with pytest.raises(CallRejection, match=f"argument {refused} of {name} {found.entry.refuses[refused]}"):
        read_call(found.entry, found.plain, {**operands(found.entry), refused: torch.zeros(1)})
