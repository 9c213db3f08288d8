"""Decoding in place: a cache that the model copies states into is updated where it is, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llcompile.passes import in_place as passes
from tests.models import tiny
from tests.models.serving import in_parts, serving

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_dynamo")]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that run, by the names of their operators."""
    seen: list[str] = []
    rewrite: Callable[..., None] = passes._rewrite

    def note(step: torch.fx.Node, copy: torch.fx.Node) -> None:
        seen.append(step.name)
        rewrite(step, copy)

    monkeypatch.setattr(passes, "_rewrite", note)
    return seen


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_a_cache_is_updated_in_place(name: str, steps: list[str]) -> None:
    """Steps are in place, and logits are those of a full pass."""
    torch._dynamo.reset()
    model, ids = serving(name), tiny.tokens()[:, :9]
    with torch.no_grad():
        want = tiny.logits(model(ids, use_cache=False))
        parts = list(in_parts(model, name, ids, [5, 1, 1, 1, 1]))
    assert torch.allclose(torch.cat(parts, 1), want, atol=1e-4)
    assert steps


def test_not_while_gradients_are_recorded(steps: list[str]) -> None:
    torch._dynamo.reset()
    model, ids = serving("mamba2"), tiny.tokens()[:, :7]
    for _ in in_parts(model, "mamba2", ids, [5, 1, 1]):
        pass
    assert not steps
