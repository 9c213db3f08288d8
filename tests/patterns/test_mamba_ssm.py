"""The rows of mamba_ssm, proved against its own torch code.

Skipped where `mamba_ssm` cannot be imported. It installs with a CUDA compiler only; `LLCOMPILE_STUB_MAMBA=1` lets its
Python files be imported without the compiled extension (set PYTHONPATH to a folder that has them, einops and triton).
"""

from __future__ import annotations

import importlib
import os
import sys
import types

import pytest
import torch

from llcompile.patterns.known.arguments import CallRejection, read_call
from llcompile.patterns.known.capture import CapturedFunction
from llcompile.patterns.known.expansions import EXPANSIONS
from llcompile.patterns.known.proof import DoesNotRun
from llcompile.patterns.records import Certificate
from tests.patterns.proofs import SIZES, captured_function, operands, proof, row_of

if os.environ.get("LLCOMPILE_STUB_MAMBA"):
    sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
pytest.importorskip("mamba_ssm", reason="mamba_ssm is not installed (it needs a CUDA compiler)", exc_type=ImportError)

SCAN = ("mamba_chunk_scan_combined", "mamba_ssm.ops.triton.ssd_combined")
STEP = ("selective_state_update", "mamba_ssm.ops.triton.selective_state_update")
CHUNKED = "mamba_ssm.ops.triton.ssd_combined:ssd_chunk_scan_combined_ref"
SINGLE = "mamba_ssm.ops.triton.selective_state_update:selective_state_update_ref"
SELECTIVE = ("selective_scan_fn", "mamba_ssm.ops.selective_scan_interface")
WHOLE = "mamba_ssm.ops.selective_scan_interface:selective_scan_ref"
ROW = row_of("mamba_ssm", SCAN[0])
SELECTIVE_ROW = row_of("mamba_ssm", SELECTIVE[0])
CHANNELS = {"B": 2, "T": 70, "G": 2, "H": 6, "K": 7}


def captured(name: str, module: str) -> CapturedFunction:
    found = captured_function(row_of("mamba_ssm", name), getattr(importlib.import_module(module), name))
    assert found.problem is None
    return found


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("absent", [(), ("z",), ("D", "z"), ("dt_bias",)])
@pytest.mark.parametrize("dt_softplus", [True, False])
def test_scan_without_states(absent: tuple[str, ...], dt_softplus: bool, weighted: bool) -> None:
    arguments = {**operands(ROW, (*absent, "initial_states")), "chunk_size": 64, "dt_softplus": dt_softplus}
    result = proof(captured(*SCAN), arguments, weighted)
    assert isinstance(result, Certificate), result
    assert result.against == CHUNKED


@pytest.mark.parametrize("absent", [(), ("initial_states",), ("D", "z", "dt_bias")])
def test_scan_with_states(absent: tuple[str, ...]) -> None:
    arguments = {**operands(ROW, absent), "chunk_size": 64, "dt_softplus": True, "return_final_states": True}
    result = proof(captured(*SCAN), arguments)
    assert isinstance(result, Certificate), result
    assert result.against == SINGLE


def test_skip_per_channel() -> None:
    arguments = {**operands(ROW, ("initial_states",)), "chunk_size": 64, "dt_softplus": True}
    arguments["D"] = torch.zeros(SIZES["H"], SIZES["V"])
    assert isinstance(proof(captured(*SCAN), arguments), Certificate)


def test_time_step_limits_have_no_reference() -> None:
    arguments = {**operands(ROW), "chunk_size": 64, "dt_softplus": True, "dt_limit": (0.1, 1.0)}
    with pytest.raises(DoesNotRun, match="no dt_limit"):
        proof(captured(*SCAN), arguments)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("absent", [(), ("z",), ("D", "z"), ("delta_bias",)])
@pytest.mark.parametrize("softplus", [True, False])
def test_selective_scan(absent: tuple[str, ...], softplus: bool, weighted: bool) -> None:
    arguments = {**operands(SELECTIVE_ROW, absent, CHANNELS), "delta_softplus": softplus, "return_last_state": True}
    result = proof(captured(*SELECTIVE), arguments, weighted)
    assert isinstance(result, Certificate), result
    assert result.against == WHOLE


def test_selective_scan_with_groups() -> None:
    arguments = {**operands(SELECTIVE_ROW, (), CHANNELS), "delta_softplus": True}
    arguments |= {name: torch.zeros(2, 2, 7, 70) for name in "BC"}
    result = proof(captured(*SELECTIVE), arguments)
    assert isinstance(result, Certificate), result


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"B": torch.zeros(6, 7)}, "expected 3 or 4 axes"),
        ({"A": torch.zeros(6, 7, dtype=torch.complex64)}, "has a complex A"),
    ],
)
def test_selective_scan_declines(changed: dict[str, torch.Tensor], reason: str) -> None:
    found = captured(*SELECTIVE)
    with pytest.raises(CallRejection, match=reason):
        read_call(found.entry, found.plain, {**operands(SELECTIVE_ROW, (), CHANNELS), **changed})


@pytest.mark.parametrize("biases", [False, True])
def test_the_fused_block_written_out(biases: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the library's own reference of it, whose convolution is a CUDA kernel."""
    module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")

    def convolved(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
        taps = torch.nn.functional.pad(x, (weight.shape[1] - 1, 0)).unfold(2, weight.shape[1], 1)
        out = (taps * weight[:, None]).sum(-1)
        return torch.nn.functional.silu(out if bias is None else out + bias[:, None])

    monkeypatch.setattr(module, "causal_conv1d_fn", convolved)
    monkeypatch.setattr(module, "selective_scan_fn", module.selective_scan_ref)
    generator = torch.Generator().manual_seed(0)
    normal = lambda *sizes: torch.randn(sizes, generator=generator)  # noqa: E731
    arguments = [normal(2, 12, 9), normal(6, 1, 4), normal(6), normal(3 + 10, 6), normal(6, 3), normal(8, 6), None]
    more = {"A": -normal(6, 5).exp(), "D": normal(6), "delta_bias": normal(6)}
    if biases:
        more |= {"B_proj_bias": normal(5), "C_proj_bias": normal(5)}
    (expansion,) = [e for e in EXPANSIONS if e.library == "mamba_ssm"]
    expanded = expansion.expand(module.mamba_inner_fn)
    expected = module.mamba_inner_ref(*arguments, **more)  # in float32
    assert float((expanded(*arguments, **more) - expected).abs().max() / expected.abs().max()) < 2e-6


@pytest.mark.parametrize("levels", [None, 8])
@pytest.mark.parametrize("absent", [(), ("z",), ("D", "z")])
def test_selective_step(absent: tuple[str, ...], levels: int | None) -> None:
    found = captured(*STEP)
    shapes = [tensor.layouts()[1] for tensor in found.entry.tensors]
    arguments: dict[str, object] = {
        tensor.name: torch.zeros([CHANNELS[axis] for axis in axes])
        for tensor, axes in zip(found.entry.tensors, shapes, strict=True)
        if tensor.name not in absent
    }
    if levels is not None:
        arguments["state"] = torch.zeros(2, 6, 1 + levels, 7, 1)
    result = proof(found, {**arguments, "dt_softplus": True}, weighted=levels is not None)
    assert isinstance(result, Certificate), result
    assert result.against == SINGLE


@pytest.mark.parametrize("levels", [None, 8])
@pytest.mark.parametrize("absent", [(), ("z",), ("D", "z")])
def test_step(absent: tuple[str, ...], levels: int | None) -> None:
    arguments = {**operands(row_of("mamba_ssm", STEP[0]), absent), "dt_softplus": True}
    if levels is not None:
        arguments["state"] = torch.zeros(SIZES["B"], SIZES["H"], 1 + levels, SIZES["K"], SIZES["V"])
    result = proof(captured(*STEP), arguments, weighted=levels is not None)
    assert isinstance(result, Certificate), result
    assert result.against == SINGLE


def test_states_of_sequences_packed_by_index_are_declined() -> None:
    found = captured(*SCAN)
    given = {**operands(ROW, ("initial_states",)), "chunk_size": 64, "seq_idx": torch.zeros(2, 70, dtype=torch.int32)}
    assert isinstance(proof(found, given), Certificate)
    with pytest.raises(CallRejection, match="combines seq_idx with states"):
        read_call(ROW, found.plain, {**given, "return_final_states": True})


def test_a_selective_scan_with_a_decay_per_channel_is_declined() -> None:
    found = captured(*STEP)
    arguments = operands(found.entry)
    arguments["A"] = torch.randn(SIZES["H"], SIZES["V"], SIZES["K"])
    with pytest.raises(CallRejection, match="varies along V"):
        read_call(found.entry, found.plain, arguments)
