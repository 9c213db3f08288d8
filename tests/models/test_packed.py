"""Packed sequences: each is computed as if it were alone, forward and backward, and its levels start anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

import llcompile
from llcompile.errors import LLCompileError
from tests.helpers import small
from tests.helpers.small import difference
from tests.models import tiny
from tests.models.converted import compiled, lively
from tests.models.generating import some

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LENGTHS = (9, 1, 20, 6)
BOUNDS = torch.tensor([0, 9, 10, 30, 36])
INDICES = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None]


class Delta(small.DeltaMixer):
    """Takes the bounds [N + 1] of N sequences."""

    def forward(self, x: Tensor, where: Tensor | None = None) -> Tensor:
        o, _ = torch_chunk_gated_delta_rule(*self.operands(x), use_qk_l2norm_in_kernel=True, cu_seqlens=where)
        return x + self.out(o.flatten(-2).to(x.dtype))


class Scan(small.DeltaMixer):
    """Takes the sequence [B, T] that each token belongs to."""

    def forward(self, x: Tensor, where: Tensor | None = None) -> Tensor:
        q, k, v, _, beta = self.operands(x)
        rate = -torch.ones(self.heads)
        o = mamba2_chunk_scan(v, F.softplus(beta), rate, k, q, chunk_size=16, seq_idx=where)
        return x + self.out(o.flatten(-2).to(x.dtype))


CASES = {"cu_seqlens": (Delta, BOUNDS, 1), "seq_idx": (Scan, INDICES, 1), "seq_idx, two rows": (Scan, INDICES, 2)}
ROUTED = [pytest.param(case, "routed", marks=[] if case == "seq_idx, two rows" else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("case", "weights"), [*((case, "linear") for case in CASES), *ROUTED])
def test_forward_and_backward(case: str, weights: str) -> None:
    kind, where, rows = CASES[case]
    mixer = kind()
    x = torch.randn(rows, sum(LENGTHS), 16, requires_grad=True)
    where = where.expand(rows, -1) if where.dim() == 2 else where
    report = llcompile.convert(mixer, x, where, options={"level_weights": weights, "levels": 6}, verify=False)
    assert [c.level_weights for c in report.converted] == [weights]
    small.perturb(mixer)
    packed = compiled(mixer, "aot_eager")(x, where)
    one = compiled(mixer, "aot_eager", dynamic=True)
    alone = torch.cat([one(part, None) for part in x.split(LENGTHS, dim=1)], dim=1)
    assert difference(packed, alone) < 1e-5
    direction = torch.randn_like(packed)
    inputs = [x, *mixer.parameters()]
    for ours, expected in zip(
        torch.autograd.grad(packed, inputs, direction), torch.autograd.grad(alone, inputs, direction), strict=True
    ):
        assert difference(ours, expected) < 1e-5


def test_nothing_leaks() -> None:
    """What is written in one sequence reaches no other, in either direction."""
    mixer, x = Delta(), torch.randn(1, sum(LENGTHS), 16, requires_grad=True)
    llcompile.convert(mixer, x, BOUNDS, verify=False)
    small.perturb(mixer)
    out = compiled(mixer, "aot_eager")(x, BOUNDS)
    (reached,) = torch.autograd.grad(out[:, 10:30].sum(), x)
    assert reached[:, 10:30].abs().amax(-1).gt(0).all()
    assert not reached[:, :10].any()
    assert not reached[:, 30:].any()


@pytest.mark.parametrize("name", some(("qwen3_next", "kimi_linear", "granitemoehybrid"), quick=()))
def test_whole_models(name: str) -> None:
    """What transformers calls the packing reaches the operator. (The torch form of its convolution looks across the
    bounds, and so does its softmax attention: here the first sees one token, and the second adds nothing.)"""
    model = lively(tiny.build(name))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".layers.1." in parameter_name and "o_proj" in parameter_name:
                parameter.zero_()
        for module in model.modules():
            if isinstance(module, torch.nn.Conv1d):
                module.weight[..., :-1] = 0
    ids = tiny.tokens(1, sum(LENGTHS))
    llcompile.convert(model, ids, verify=False)
    small.perturb(model)
    run = compiled(model)
    with torch.no_grad():
        packed = tiny.logits(run(ids, use_cache=False, cu_seq_lens_q=BOUNDS.to(torch.int32)))
        alone = torch.cat([tiny.logits(run(part, use_cache=False)) for part in ids.split(LENGTHS, dim=1)], dim=1)
    assert difference(packed, alone) < 1e-5


WRONG: dict[str, tuple[Any, str]] = {
    "start": ([2, 9, 36], r"starts at 2, not at 0.*\[2, 9, 36\]"),
    "end": ([0, 9, 30], r"ends at 30, not at T=36.*\[0, 9, 30\]"),
    "order": ([0, 20, 9, 36], r"decreases from 20 to 9 \(entries 1 and 2\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_bounds_are_errors(case: str) -> None:
    bounds, message = WRONG[case]
    mixer, x = Delta(), torch.randn(1, 36, 16)
    llcompile.convert(mixer, x, BOUNDS, verify=False)
    with pytest.raises(LLCompileError, match=message):
        compiled(mixer)(x, torch.tensor(bounds))


def test_a_sequence_that_comes_back_is_an_error() -> None:
    mixer, x = Scan(), torch.randn(1, 5, 16)
    where = torch.tensor([[0, 0, 1, 0, 0]])
    llcompile.convert(mixer, x, where.sort().values, verify=False)
    with pytest.raises(LLCompileError, match=r"comes back to sequence 0 in row 0 after another one"):
        compiled(mixer)(x, where)
