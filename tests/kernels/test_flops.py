"""What `torch.utils.flop_counter` counts for the operators: the products of the ATen form."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import llcompile
from llcompile.kernels.aten import sequence, token
from llcompile.kernels.operands import DIFFERENTIABLE, Operands, Token
from llcompile.kernels.state import empty_state
from llcompile.ops import loglinear_attention, loglinear_attention_step, loglinear_attention_step_
from tests.helpers import small
from tests.kernels.kernel_cases import NAMES, operands

CASES = [(None, False, 9), ("token", True, 9), ("channel", False, None), ("rate", False, 9), ("token", "erase", 9)]


def counted(run):  # type: ignore[no-untyped-def]
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(("decay", "delta", "levels"), CASES)
def test_a_call_counts_as_its_products(decay: str | None, delta: bool, levels: int | None) -> None:
    x = operands(150, decay, delta, levels=levels, dtype=torch.float32)
    own = Operands(**{name: x[name] for name in NAMES})
    forward = counted(lambda: sequence.forward(own, 1.0, False))
    assert counted(lambda: loglinear_attention(**x)) == forward > 0

    leaves = {n: None if t is None else t.clone().requires_grad_() for n, t in x.items()}
    backward = counted(lambda: sequence.backward(own, 1.0, torch.ones_like(own.v), None))
    both = counted(lambda: loglinear_attention(**leaves)[0].sum().backward())
    assert len(own[:DIFFERENTIABLE]) == len(leaves)
    assert both == forward + backward > 2 * forward


def test_a_step_counts_as_its_products() -> None:
    x = operands(1, "token", True, levels=6, dtype=torch.float32)
    one = {n: t[:, 0] for n, t in x.items() if t is not None}
    state = empty_state(2, 4, 5, 3, levels=6)
    expected = counted(lambda: token.step(Token(**one, state=state)))
    assert counted(lambda: loglinear_attention_step(**one, state=state)) == expected > 0
    assert counted(lambda: loglinear_attention_step_(**one, state=state)) == expected


def test_an_exported_model_counts_its_mixers() -> None:
    """Dynamo runs nothing compiled under a dispatch mode, so that a compiled model counts as it is when run eagerly."""
    model, ids = small.model(), small.ids(length=100)
    llcompile.convert(model, ids, verify=False)
    program = torch.export.export(model, (ids,))
    own = {op: f for op, f in llcompile.decompositions().items() if "llcompile" in str(op)}
    written = program.run_decompositions(own).module()
    products = counted(lambda: written(ids))  # less those of which nobody reads the result
    assert products <= counted(lambda: program.module()(ids)) <= 1.02 * products
