"""Padding: a sequence gives the same logits alone and padded on either side; rows decode from their own places."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

import llcompile
from llcompile.errors import LLCompileError
from tests.helpers import small
from tests.helpers.small import difference
from tests.models import tiny
from tests.models.converted import compiled, lively
from tests.models.generating import CAUSAL, some
from tests.models.padding import padded
from tests.models.serving import greedy, serving

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.usefixtures("warm_dynamo")
@pytest.mark.parametrize("name", some(tuple(tiny.CONFIGS), quick=("mamba2",)))
def test_padded_rows(name: str) -> None:
    model = serving(name)
    with torch.no_grad():
        alone = [tiny.logits(model(row, use_cache=False))[0] for row in padded("left")[2]]
        for side in ("left", "right"):
            ids, mask, _ = padded(side)
            logits = tiny.logits(model(ids, attention_mask=mask, use_cache=False))
            for row, expected in enumerate(alone):
                assert difference(logits[row][mask[row] == 1], expected) < 1e-5, (side, row)


@pytest.mark.parametrize("name", some(("mamba2", "qwen3_next", "kimi_linear", "bamba"), quick=("mamba2",)))
def test_at_conversion_padding_is_what_it_was(name: str) -> None:
    """With level weights of 1, left-padded rows get the logits that the library gives them."""
    model = lively(tiny.build(name))
    ids, mask, _ = padded("left")
    with torch.no_grad():
        before = tiny.logits(model(ids, attention_mask=mask))
        llcompile.convert(model, ids, attention_mask=mask, verify=False)
        after = tiny.logits(compiled(model)(ids, attention_mask=mask))
    assert difference(after[mask == 1], before[mask == 1]) < 1e-5


@pytest.mark.usefixtures("warm_dynamo")
@pytest.mark.parametrize("name", some(CAUSAL, quick=("mamba2",)))
def test_generate_from_left_padded_rows(name: str) -> None:
    """Each row goes on at its own position: what it writes is what it writes alone, in full forward passes."""
    model = serving(name)
    ids, mask, rows = padded("left")
    with torch.no_grad():
        expected = [greedy(model, row, 12)[0, row.shape[1] :] for row in rows]
        written = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(written[:, ids.shape[1] :], torch.stack(expected))


@pytest.mark.usefixtures("warm_dynamo")
def test_generate_from_right_padded_rows(caplog: pytest.LogCaptureFixture) -> None:
    """Transformers warns; rows without padding are right; without a cache the mask gets a hole, which is an error."""
    model = serving("mamba2")
    ids, mask, rows = padded("right")
    given = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with torch.no_grad():
            written = model.generate(ids, **given)
            assert torch.equal(written[:1], greedy(model, rows[0], 4))
    finally:
        logger.removeHandler(caplog.handler)
    assert "right-padding was detected" in caplog.text
    with torch.no_grad(), pytest.raises(LLCompileError, match="hole in row 1"):
        model.generate(ids, use_cache=False, **given)


@pytest.mark.usefixtures("warm_dynamo")
def test_a_hole_in_a_mask_is_an_error() -> None:
    model, ids = serving("mamba2"), tiny.tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 3:5] = 0
    with torch.no_grad(), pytest.raises(LLCompileError, match=r"hole in row 1: it is \[1, 1, 1, 0, 0, 1"):
        model(ids, attention_mask=mask)


def test_a_gate_is_no_mask() -> None:
    """Features that are multiplied by something the model computes, or by a mask that spares an operand."""

    class Gated(small.DeltaMixer):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            assert mask is not None
            return x + super().forward(x * mask[:, :, None])

    class Half(small.DeltaMixer):
        def operands(self, x: Tensor) -> tuple[Tensor, ...]:
            mask = self.mask
            q, k, v, g, beta = super().operands(x)
            return q, k, v * mask[:, :, None, None], g, beta

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            self.mask = mask
            return super().forward(x)

    class Unbiased(Gated):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(16, 3 * self.heads * self.size, bias=False)

    x, mask = torch.randn(2, 9, 16), (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    cases = ((Unbiased(), mask, ""), (Unbiased(), mask.float(), ""), (Gated(), mask, "bias"), (Half(), mask, "cover"))
    for mixer, given, note in cases:
        before = mixer(x, mask=given)
        report = llcompile.convert(mixer, x, mask=given, verify=False)
        assert len(report.converted[0].notes) == bool(note)
        assert note in "".join(report.converted[0].notes)
        assert difference(compiled(mixer)(x, mask=given), before) < 1e-5
        small.perturb(mixer)
        torch._dynamo.reset()
        alone = compiled(mixer)(x[1:, 4:], mask=given[1:, 4:])
        row = compiled(mixer)(x, mask=given)[1:, 4:]
        followed = given is mask and isinstance(mixer, Unbiased)
        assert (difference(row, alone) < 1e-5) == followed


def test_the_look_shows_the_kernels_of_padded_rows() -> None:
    """Kernels read padded rows as packed sequences; those are shown, and not others."""
    model = tiny.build("mamba2")
    look = llcompile.inspect(model, torch.zeros(2, 9, dtype=torch.long), attention_mask=torch.ones(2, 9).long())
    (kernels,) = look.kernels
    assert kernels.description.packed
    assert "packed=True" in kernels.source
