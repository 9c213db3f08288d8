"""The cost of a mixer as expressions: against the operations that torch counts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llcompile.kernels.aten import sequence
from llcompile.kernels.operands import Operands
from llcompile.look.cost import costs
from llcompile.patterns.families import FAMILIES

SIZES = {"B": 2, "H": 4, "G": 2, "K": 24, "V": 40, "L": 12, "E": 4}


def counted(decay: str, correction: str, length: int, weighted: bool) -> int:
    """Operations of all matrix products of one forward pass of the ATen lowering."""
    s = SIZES
    q, k = torch.randn(2, s["B"], length, s["G"], s["K"])
    v = torch.randn(s["B"], length, s["H"], s["V"])
    tail = {"none": None, "scalar": (), "channel": (s["K"],)}[decay]
    log_decay = None if tail is None else -torch.rand(s["B"], length, s["H"], *tail)
    beta = torch.rand(s["B"], length, s["H"]) if correction == "delta" else None
    erase = {"erase_query": q, "erase_key": 0.1 * q} if correction == "erase" else {}
    weights = torch.rand(s["B"], length, s["H"], s["L"]) if weighted else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sequence.forward(Operands(q, k, v, weights, log_decay, beta=beta, **erase), 1.0, False)
    return counter.get_total_flops()


@pytest.mark.parametrize(("family", "weighted"), list(itertools.product(FAMILIES, (False, True))), ids=str)
def test_operations_are_those_that_torch_counts(family: tuple[str, str], weighted: bool) -> None:
    decay, correction = family
    for length in (512, 2048):
        estimate = costs(*family)[weighted].at({**SIZES, "T": length, "C": 64})["operations"]
        # Exact but for the ends of the delta rule's tree.
        assert estimate == pytest.approx(counted(decay, correction, length, weighted), rel=0.02)


@pytest.mark.parametrize("family", [*FAMILIES, ("rate", "none")], ids=str)
def test_a_log_linear_mixer_grows_with_the_logarithm(family: tuple[str, str]) -> None:
    linear, loglinear = costs(*family)
    at = {n: loglinear.at({**SIZES, "C": 64, "T": n}) for n in (2**12, 2**13, 2**14)}
    per_token = {n: row["operations"] / n for n, row in at.items()}
    steps = per_token[2**13] - per_token[2**12], per_token[2**14] - per_token[2**13]
    assert steps[0] == pytest.approx(steps[1])
    assert steps[0] > 0
    assert at[2**14]["state"] == 15 * linear.at({**SIZES, "C": 64, "T": 2**14})["state"]
    assert at[2**12]["bytes"] > linear.at({**SIZES, "C": 64, "T": 2**12})["bytes"]
