"""Generation through the models' own library: their caches, `generate()`, and what is stored between two calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.small import difference
from tests.models import tiny
from tests.models.converted import BREAKING
from tests.models.generating import CAUSAL, some
from tests.models.serving import graphs, greedy, in_parts, serving

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SIZES = ((1,) * 9, (13, 1, 1, 1, 1, 16, 5, 1, 31), (33, 30, 1, 1, 1, 1, 3))
GRAPHS = 6  # a prefill, a first step, steps of any length


@pytest.mark.usefixtures("warm_dynamo")
@pytest.mark.parametrize("name", some(tuple(tiny.CONFIGS), quick=("mamba2",)))
def test_prefill_and_decode_in_parts(name: str) -> None:
    """Token by token and in chunks of any size, across powers of two: the logits of one full forward pass."""
    model, ids = serving(name), tiny.tokens(2, 70)
    with torch.no_grad():
        whole = tiny.logits(model(ids, use_cache=False))
        for sizes in SIZES:
            length = sum(sizes)
            parts = torch.cat(list(in_parts(model, name, ids[:, :length], sizes)), dim=1)
            assert difference(parts, whole[:, :length]) < 1e-5, sizes


@pytest.mark.usefixtures("warm_dynamo")
@pytest.mark.parametrize("name", some(CAUSAL))
def test_greedy(name: str) -> None:
    """`generate()` writes what a loop over full forward passes writes, with a handful of graphs for all tokens."""
    model, ids = serving(name), tiny.tokens(2, 13)
    with torch.no_grad():
        expected = greedy(model, ids, 24)
        written, count = _generated(model, ids)
        assert torch.equal(written, expected)
        if name in BREAKING:
            plain = tiny.build(name)
            plain.compile(backend="eager")
            assert count <= _generated(plain, ids)[1]
        else:
            assert count <= GRAPHS


def _generated(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """24 tokens, and the number of graphs that they took."""
    torch._dynamo.reset()
    before = graphs()
    with torch._dynamo.config.patch(recompile_limit=64):
        return model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None), graphs() - before
