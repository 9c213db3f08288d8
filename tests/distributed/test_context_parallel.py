"""A sequence that is spread over processes: all results are those of one process that has it whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llcompile import ops
from llcompile.distributed import context_parallel, loglinear_attention
from llcompile.errors import DistributedError
from llcompile.kernels import choice
from tests.helpers.processes import together
from tests.kernels.kernel_cases import Operands, operands

Correction = bool | Literal["erase"]
FAMILIES: list[tuple[str | None, Correction]] = [
    (decay, correction) for correction in (False, True, "erase") for decay in (None, "head", "token", "channel", "rate")
]
WITH_TIME = ("q", "k", "v", "level_weights", "log_decay", "beta", "erase_query", "erase_key")
# Even at powers of two; uneven; a process without tokens, and one with a single one.
CUTS = ((16, 16), (5, 32), (0, 21), (20, 1))
CUTS_OF_FOUR = ((16, 16, 16, 16), (3, 17, 0, 29), (1, 1, 40, 7))


def results(x: Operands, shard: slice | None = None, **options: Any) -> dict[str, Tensor]:
    """Output, final state and gradients; of a shard, those of this process."""
    leaves = {n: _leaf(n, t, shard) for n, t in x.items() if t is not None}
    if shard is not None and dist.get_rank():
        leaves.pop("initial_state", None)
    given: dict[str, Any] = {**dict.fromkeys(x), **leaves}
    function = ops.loglinear_attention if shard is None else loglinear_attention
    o, state = function(**given, scale=0.7, return_final_state=True, **options)
    assert state is not None
    upstream = _like(x["v"]) if shard is None else _like(x["v"])[:, shard]
    # On all processes together the gradient of the state is what one process has.
    share = torch.randn(state.shape, dtype=state.dtype, generator=torch.Generator().manual_seed(9))
    share = share if shard is None else share / dist.get_world_size()
    found = torch.autograd.grad([o, state], list(leaves.values()), [upstream.to(o.dtype), share], allow_unused=True)
    grads = {n: d for n, d in zip(leaves, found, strict=True) if d is not None}
    return {"o": o.detach(), "state": state.detach(), **{f"d {n}": d for n, d in grads.items()}}


def _leaf(name: str, x: Tensor, shard: slice | None) -> Tensor:
    cut = shard is not None and name in WITH_TIME and x.dim() > 1
    return (x[:, shard] if cut else x).detach().clone().requires_grad_()


def _like(v: Tensor | None) -> Tensor:
    assert v is not None
    return torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


def check(rank: int, x: Operands, lengths: Sequence[int], tolerance: float) -> None:
    """This process's results are its part of those of one process."""
    start = sum(lengths[:rank])
    shard = slice(start, start + lengths[rank])
    whole, ours = results(x), results(x, shard)
    for name, actual in ours.items():
        parameter = name.removeprefix("d ")
        expected = whole[name]
        if name == "o" or (parameter in WITH_TIME and expected.dim() > 1):
            expected = expected[:, shard]
        if parameter in ("decay_rate", "log_decay") and expected.dim() < 3:  # shared by all tokens
            actual = actual.clone()
            dist.all_reduce(actual)
        if name == "d initial_state":  # a level without tokens has no gradient that means anything
            there = (x["initial_state"] != 0).flatten(-2).any(-1)[..., None, None]  # type: ignore[union-attr]
            actual, expected = actual * there, expected * there
        error = float((actual - expected).abs().max() / whole[name].abs().max()) if expected.numel() else 0.0
        assert error <= tolerance, f"{name} with shards of {lengths}: {error:.1e}"


def families(rank: int, cuts: Sequence[Sequence[int]], dtype: torch.dtype, tolerance: float, levels: int | None) -> None:
    for lengths in cuts:
        for decay, correction in FAMILIES:
            x = operands(sum(lengths), decay, correction, levels=levels, batch=1, dtype=dtype)
            with choice.use("aten"):
                check(rank, x, lengths, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11)])
def test_all_families(dtype: torch.dtype, tolerance: float) -> None:
    """Two processes; output, final state and every gradient."""
    together(families, CUTS, dtype, tolerance, 8)
