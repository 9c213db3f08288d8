"""Known functions of mamba_ssm (read from 2.3.2): the selective scan, the SSD chunk scan, and the single step of both.

Transformers calls them through functions of its own, which its table knows; these entries are for models built on
mamba_ssm itself. Its `mamba_split_conv1d_scan_combined` (projection split, convolution, scan, norm and output
projection in one, the training path of its own Mamba2 block) is not in the table: what is wanted there is a mixer
inside a larger function. Build the block with use_mem_eff_path=False to have the chunk scan called by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from llcompile.patterns.families import SELECTIVE_SCAN
from llcompile.patterns.known import selective
from llcompile.patterns.known.binders import ssd, ssd_step, ssd_step_tensors
from llcompile.patterns.known.entry import Arguments, KnownFunction, Reference, Tensor
from llcompile.patterns.mixer import Mixer


def _scan(a: Arguments) -> Mixer:
    return ssd(a, "x", "initial_states", torch.float32)


def _step(a: Arguments) -> Mixer:
    if _has_heads(a):
        return ssd_step(a, "x", torch.float32)
    dt = selective.time_step(a, "dt", "dt_bias", "dt_softplus", torch.float32)
    return selective.selective_step(a, "x", dt, "state")


def _has_heads(a: Arguments) -> bool:
    """Whether a single step is Mamba-2's, and not that of Mamba-1's channels."""
    return a.ranks["x"] == 3


def _selective_scan(a: Arguments) -> Mixer:
    dt = selective.time_step(a, "delta", "delta_bias", "delta_softplus", torch.float32)
    return selective.selective_scan(a, "u", dt)


def _selective_scan_result(a: Arguments, output: Any, state: Any) -> Any:
    output = selective.by_channel(output, step=False)
    if a["D"] is not None:
        output = output + a["u"].float() * a["D"].float().unsqueeze(-1)
    if a["z"] is not None:
        output = output * F.silu(a["z"].float())
    output = output.to(a.dtypes["u"])
    return (output, state) if a["return_last_state"] else output


def _skip_and_gate(a: Arguments, output: Any) -> Any:
    skip = a["D"]
    if skip is not None:  # [H] or [H, V]
        skip = skip.float() if a.ranks["D"] == 2 else skip.float().unsqueeze(-1)
        output = output + skip * a["x"].float()
    if a["z"] is not None:
        output = output * F.silu(a["z"].float())
    return output.to(a.dtypes["x"])


def _scan_result(a: Arguments, output: Any, state: Any) -> Any:
    output = _skip_and_gate(a, output)
    return (output, state) if a["return_final_states"] else output


def _step_result(a: Arguments, output: Any, state: Any) -> Any:
    if _has_heads(a):
        return _skip_and_gate(a, output)
    output = selective.by_channel(output, step=True)
    if a["D"] is not None:
        output = output + a["x"].float() * a["D"].float()
    if a["z"] is not None:
        output = output * F.silu(a["z"].float())
    return output.to(a.dtypes["x"])


def _whole(reference: Callable[..., Any], a: Mapping[str, Any]) -> Any:
    """The chunked reference; in one chunk, because it takes whole chunks only."""
    if a["initial_states"] is not None or a["return_final_states"] or tuple(a["dt_limit"]) != (0.0, float("inf")):
        raise NotImplementedError("it has no states and no dt_limit")
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus")
    return reference(**{name: a[name] for name in names}, chunk_size=a["x"].shape[1])


def _in_float32(reference: Callable[..., Any], a: Mapping[str, Any]) -> Any:
    """The selective scan's reference, which casts some of its operands to float32 and not the others."""
    return reference(**{name: x.float() if isinstance(x, torch.Tensor) else x for name, x in a.items()})


def _token_by_token(reference: Callable[..., Any], a: Mapping[str, Any]) -> Any:
    """The single step's reference, once for each token, for calls with states."""
    if tuple(a["dt_limit"]) != (0.0, float("inf")):
        raise NotImplementedError("it has no dt_limit")
    x, z, state = a["x"], a["z"], a["initial_states"]
    batch, length, heads, width = x.shape
    depth = a["B"].shape[-1]
    state = x.new_zeros(batch, heads, width, depth) if state is None else state.clone()

    def wide(value: torch.Tensor) -> torch.Tensor:
        return value.unsqueeze(-1).expand(*value.shape, width)

    fixed = {
        "A": wide(a["A"]).unsqueeze(-1).expand(heads, width, depth),
        "D": a["D"] if a["D"] is None or a["D"].dim() == 2 else wide(a["D"]),
        "dt_bias": None if a["dt_bias"] is None else wide(a["dt_bias"]),
        "dt_softplus": a["dt_softplus"],
    }
    dt, key, query = wide(a["dt"]), a["B"], a["C"]
    outputs = [
        reference(state, x[:, t], dt[:, t], B=key[:, t], C=query[:, t], z=None if z is None else z[:, t], **fixed)
        for t in range(length)
    ]
    output = torch.stack(outputs, 1)
    return (output, state) if a["return_final_states"] else output


_SCAN_TENSORS = (
    Tensor("x", "B T H V"),
    # Positive also without softplus: a negative step would let the state grow.
    Tensor("dt", "B T H", "step"),
    Tensor("A", "H", "negative"),
    Tensor("B", "B T G K"),
    Tensor("C", "B T G K"),
    Tensor("D", "H|H V"),
    Tensor("z", "B T H V"),
    Tensor("dt_bias", "H", "step_bias"),
    Tensor("initial_states", "B H V K", "state"),
)
# Of Mamba-2's heads, or of Mamba-1's channels.
_STEP_TENSORS = tuple(
    replace(tensor, axes=f"{tensor.axes}|{axes}")
    for tensor, axes in zip(
        ssd_step_tensors("x", skip="H V"),
        ("B H K", "B H", "B H", "H K", "B K", "B K", "H", "B H", "H"),
        strict=True,
    )
)
_STEP_REFERENCE = "mamba_ssm.ops.triton.selective_state_update:selective_state_update_ref"

ENTRIES: tuple[KnownFunction, ...] = (
    KnownFunction(
        library="mamba_ssm",
        function="selective_scan_fn",
        family=SELECTIVE_SCAN,
        tensors=selective.scan_tensors("u", "delta"),
        constants=("delta_softplus", "return_last_state"),
        requires=selective.is_complex,
        softplus="delta_softplus",
        bind=_selective_scan,
        result=_selective_scan_result,
        returns_state="return_last_state",
        final_state="B H K",
        opaque=True,
        references=(Reference("mamba_ssm.ops.selective_scan_interface:selective_scan_ref", _in_float32),),
    ),
    KnownFunction(
        library="mamba_ssm",
        function="mamba_chunk_scan_combined",
        family="Mamba-2 (SSD)",
        tensors=_SCAN_TENSORS,
        constants=("chunk_size", "dt_softplus", "dt_limit", "return_final_states"),
        packing={"seq_idx": "indices", "cu_seqlens": "bounds"},
        refuses={
            "return_varlen_states": "requests the states of packed sequences",
        },
        bind=_scan,
        result=_scan_result,
        returns_state="return_final_states",
        opaque=True,
        references=(
            Reference("mamba_ssm.ops.triton.ssd_combined:ssd_chunk_scan_combined_ref", _whole),
            Reference(_STEP_REFERENCE, _token_by_token),
        ),
    ),
    KnownFunction(
        library="mamba_ssm",
        function="selective_state_update",
        family="Mamba (single step)",
        tensors=_STEP_TENSORS,
        constants=("dt_softplus",),
        refuses={"state_batch_indices": "keeps its states in the rows of a larger table"},
        bind=_step,
        result=_step_result,
        writes_state="state",
        opaque=True,
        references=(
            Reference(
                _STEP_REFERENCE,
                lambda reference, a: reference(**{n: v for n, v in a.items() if n != "state_batch_indices"}),
            ),
        ),
    ),
)
