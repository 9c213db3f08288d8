"""A library that traced code imports itself: its functions are known from the first compiled call on."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llcompile
from llcompile.backend import last_report
from tests.helpers import small
from tests.models.converted import compiled

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# A function of its own, so that no other test has met it; like transformers' own, it is wrapped.
SOURCE = """
import functools, types
from transformers.models.qwen3_next import modeling_qwen3_next
from llcompile.patterns.known.capture import plain_form

_plain = plain_form(modeling_qwen3_next.torch_chunk_gated_delta_rule)

@functools.wraps(_plain)
def torch_chunk_gated_delta_rule(*args, **kwargs):
    return _plain(*args, **kwargs)
"""


class ImportingMixer(small.DeltaMixer):
    """Imports the function where it calls it."""

    def forward(self, x: Tensor) -> Tensor:
        from transformers_modules.on_the_way import torch_chunk_gated_delta_rule

        q, k, v, g, beta = self.operands(x)
        o, _ = torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
        return x + self.out(o.flatten(-2).to(x.dtype))


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A module of the library that has not been imported."""
    package = types.ModuleType("transformers_modules")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, f"{package.__name__}.on_the_way", None)  # so that undoing removes it
    del sys.modules[f"{package.__name__}.on_the_way"]
    (tmp_path / "on_the_way.py").write_text(SOURCE)


def test_known_from_the_first_call_on() -> None:
    torch.manual_seed(0)
    model, ids = small.Model([ImportingMixer()]), small.ids()
    run = compiled(model)
    before = run(ids)
    assert [c.origin for c in last_report().converted] == ["function"]
    assert small.difference(before, model(ids)) < 1e-5
    small.perturb(model)
    assert small.difference(run(ids), before) > 1e-3


def test_a_conversion_and_the_first_call_meet_the_same() -> None:
    torch.manual_seed(0)
    model, ids = small.Model([ImportingMixer()]), small.ids()
    report = llcompile.convert(model, ids)
    assert [c.origin for c in report.converted] == ["function"]
    names = set(model.state_dict())
    compiled(model)(ids)
    assert set(model.state_dict()) == names
