"""What the tests of generation share: converted models with random level weights, and loops over full passes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import llcompile
from tests.helpers import small
from tests.models import tiny
from tests.models.converted import lively

# Its sparse attention chooses among all tokens that a pass reads, so that a longer pass gives the earlier tokens
# something else, unconverted, too. Here it may choose them all.
SEES_ALL = {"glm5_next_text": {"index_topk": 80}}


@functools.cache
def serving(name: str) -> Any:
    """A tiny model, converted, with random level weights, compiled in place; the same for all tests of a process.

    Its tests compare its own outputs, so that the run at the end of `convert` has nothing to add.
    """
    model = lively(tiny.build(name, **SEES_ALL.get(name, {})))
    llcompile.convert(model, tiny.tokens(), verify=False)
    small.perturb(model)
    model.compile(backend="loglinear", options={"inner": "eager"})
    return model


def in_parts(model: Any, name: str, ids: Tensor, sizes: Sequence[int], **given: Any) -> Iterator[Tensor]:
    """The logits of ids, so many tokens at a time, through the model's own cache.

    With positions, as `generate()` passes them: Bamba does not count them itself.
    """
    key = "cache_params" if name == "mamba2" else "past_key_values"
    cache: dict[str, Any] = {}
    positions = torch.arange(ids.shape[1]).expand_as(ids).split(list(sizes), dim=1)
    for part, place in zip(ids.split(list(sizes), dim=1), positions, strict=True):
        where = {} if name == "mamba2" else {"position_ids": place}
        out = model(part, use_cache=True, **cache, **where, **given)
        cache = {key: out[key]}
        yield tiny.logits(out)


def greedy(model: Any, ids: Tensor, count: int, **given: Any) -> Tensor:
    """The reference: `count` tokens, each from one full forward pass without a cache."""
    for _ in range(count):
        logits = tiny.logits(model(ids, use_cache=False, **given))
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


def graphs() -> int:
    """How many graphs Dynamo has compiled in this process since it was reset."""
    return int(counters["stats"]["unique_graphs"])
