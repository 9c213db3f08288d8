"""Functions of transformers hand their arguments on to FLA's where that is installed; its names differ."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import types

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next import modeling_qwen3_next

import llcompile
from llcompile.commands.repro import reproducer
from llcompile.patterns.known.capture import plain_form
from tests.helpers import small
from tests.models.converted import compiled, weights_of

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

NAME = "torch_chunk_gated_delta_rule"
reference = plain_form(getattr(modeling_qwen3_next, NAME))


def fast(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """With FLA's names and order."""
    assert scale is None
    options = {"output_final_state": output_final_state, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
    return reference(q, k, v, g, beta, initial_state=initial_state, **options)  # type: ignore[no-any-return]


@functools.wraps(reference)
def handing_on(*args: Tensor, **kwargs: object) -> tuple[Tensor, Tensor | None]:
    """As transformers' use_kernel_func_from_hub_with_fallback makes it."""
    known = inspect.signature(fast).parameters
    return fast(*args, **{name: value for name, value in kwargs.items() if name in known})  # type: ignore[arg-type]


class FastMixer(small.DeltaMixer):
    """Calls it as transformers' models do."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g, beta = self.operands(x)
        o, _ = handing_on(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, cu_seqlens=None)
        return x + self.out(o.flatten(-2).to(x.dtype))


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in which functions of transformers are looked for."""
    module = types.ModuleType("transformers_modules.handing_on")
    setattr(module, NAME, handing_on)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def build(kind: type[small.DeltaMixer]) -> small.Model:
    torch.manual_seed(0)
    return small.Model([kind(), kind()])


def test_converts_and_acts() -> None:
    model, ids = build(FastMixer), small.ids()
    before = model(ids)
    report = llcompile.convert(model, ids)
    assert [c.origin for c in report.converted] == ["function"] * 2
    run = compiled(model)
    assert small.difference(run(ids), before) < 1e-5
    small.loss(run(ids), ids).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in weights_of(model).values())
    small.perturb(model)
    assert small.difference(run(ids), before) > 1e-3


def test_a_reproducer_calls_it_as_the_user_does() -> None:
    text = reproducer(build(FastMixer).layers[0], (torch.randn(2, 21, 16),), {}, "")
    assert re.search(rf"{NAME}\(\w+, \w+, \w+, g = \w+, beta = \w+,", text), text
