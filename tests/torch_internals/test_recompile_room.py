"""The limit of recompilations counts for each module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from llcompile.torch_internals.recompile_room import make_room
from tests.helpers.traces import Asking, Scale


@pytest.fixture
def config() -> Iterator[object]:
    """Dynamo's, with limits of 3 that other tests do not see."""
    with torch._dynamo.config.patch(recompile_limit=3, accumulated_recompile_limit=3):
        yield torch._dynamo.config


def limits(config: object) -> tuple[int, int]:
    return config.recompile_limit, config.accumulated_recompile_limit  # type: ignore[attr-defined]


def test_no_module(config: object) -> None:
    make_room(None)
    assert limits(config) == (3, 3)


def test_a_multiple_for_each_module(config: object) -> None:
    modules = [nn.Identity() for _ in range(3)]
    found = []
    for module in modules:
        make_room(module)
        found.append(limits(config))
        make_room(module)  # is known
        assert limits(config) == found[-1]
    (first, _), (second, _), (third, _) = found
    assert first % 3 == 0
    assert first > 3
    assert first < second < third
    assert third - second == second - first
    assert all(recompile == accumulated for recompile, accumulated in found)


def test_limits_are_only_raised(config: object) -> None:
    config.recompile_limit = 3  # type: ignore[attr-defined]
    config.accumulated_recompile_limit = 1 << 20  # type: ignore[attr-defined]
    make_room(nn.Identity())
    assert limits(config)[0] > 3
    assert limits(config)[1] == 1 << 20


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("room", [False, True])
def test_dynamo_goes_on_to_compile(config: object, room: bool) -> None:
    """One function for many kinds of calls: from the limit on, Dynamo would run it eagerly."""
    module = Scale()
    backend = Asking(lambda _: make_room(module) if room else None)
    run = torch.compile(module, backend=backend)
    for dims in range(6):
        run(torch.ones(*[1] * dims, 3))
    assert backend.count == (6 if room else 3)
