"""Truncated backpropagation through a model's own cache: segment by segment, with states that are detached between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from tests.helpers.small import difference
from tests.models import tiny

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.slow]


def detach(held: Any) -> None:
    """Every state of a cache as a tensor without a past."""
    for key, value in list(vars(held).items()) if hasattr(held, "__dict__") else ():
        if isinstance(value, Tensor):
            setattr(held, key, value.detach())
        elif isinstance(value, dict):
            value.update({k: x.detach() for k, x in value.items() if isinstance(x, Tensor)})
        elif isinstance(value, list):
            value[:] = [x.detach() if isinstance(x, Tensor) else x for x in value]
            for x in value:
                detach(x)


def trained(model: nn.Module, call: Callable[..., Any], ids: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses of each segment, and the sum of their gradients."""
    model.zero_grad()
    cache, losses = None, []
    for segment in ids.split(16, 1):
        out = call(segment, use_cache=True, **({} if cache is None else {"cache": cache}))
        loss = out.logits.square().mean()
        loss.backward()
        losses.append(loss.detach())
        cache = out.cache
        detach(cache)
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_as_the_model_does_it_unconverted() -> None:
    model, ids = tiny.build("mamba2").train(), tiny.tokens(2, 48)
    losses, gradients = trained(model, model, ids)
    llcompile.convert(model, ids[:, :16], use_cache=False)
    run = torch.compile(model, backend="loglinear", options={"inner": "eager"})
    own_losses, own_gradients = trained(model, run, ids)
    assert difference(torch.stack(own_losses), torch.stack(losses)) < 1e-6
    assert all(difference(own_gradients[name], g) < 1e-5 for name, g in gradients.items())
    new = {name: g for name, g in own_gradients.items() if name not in gradients}
    assert len(new) == 4
    assert all(g.abs().max() > 0 for g in new.values())
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if name in new:
            nn.init.normal_(p)
    moved, _ = trained(model, run, ids)
    assert difference(torch.stack(moved), torch.stack(losses)) > 1e-3
