"""Which backend a trace is for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from llcompile.torch_internals.backends import (
    around_backend,
    backend_below,
    backend_mark,
    mark_backend,
    tracing_backend,
    unwrapped,
)
from tests.helpers.traces import Asking, asked_while_traced

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def plain(module: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
    return module.forward


def test_tracing_backend() -> None:
    ask, answers = asked_while_traced(tracing_backend)
    torch.compile(lambda x: x + ask(), backend=plain, options={"a": 1})(torch.ones(2))
    assert answers == [(plain, {"options": {"a": 1}})]
    assert tracing_backend() == (None, {})


class TestUnwrapped:
    def test_what_wraps_nothing(self) -> None:
        assert unwrapped(plain) == (plain, {})
        assert unwrapped(None) == (None, {})

    def test_partials(self) -> None:
        assert unwrapped(functools.partial(functools.partial(plain, a=1), b=2)) == (plain, {"a": 1, "b": 2})

    def test_what_torch_compile_makes_of_a_partial(self) -> None:
        ask, answers = asked_while_traced(tracing_backend)
        torch.compile(lambda x: x + ask(), backend=functools.partial(plain, a=1), options={"b": 2})(torch.ones(2))
        assert answers == [(plain, {"a": 1, "options": {"b": 2}})]

    def test_ddps_optimizer(self) -> None:
        distributed = pytest.importorskip("torch._dynamo.backends.distributed")
        optimizer = distributed.DDPOptimizer(1 << 20, backend_compile_fn=functools.partial(plain, a=1))
        assert unwrapped(optimizer.compile_fn) == (plain, {"a": 1})
        ask, answers = asked_while_traced(tracing_backend)
        torch._dynamo.optimize(optimizer.compile_fn)(lambda x: x + ask())(torch.ones(2))
        assert answers == [(plain, {"a": 1})]


def mark(_: Any) -> Any:
    before = backend_mark("of_a_test")
    mark_backend("of_a_test", "seen")
    return before


def test_a_mark_stays_with_one_torch_compile() -> None:
    asking = Asking(mark)
    one, other = (torch.compile(function, backend=asking, dynamic=False) for function in (torch.sin, torch.cos))
    for x in (torch.ones(2), torch.ones(3)):
        one(x)
    other(torch.ones(2))
    assert asking.answers == [None, "seen", None]
    mark_backend("of_a_test", "no trace is under way")
    assert backend_mark("of_a_test") is None


def test_around_backend() -> None:
    calls: list[str] = []

    def around(backend: Callable[..., Any], module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        calls.append(f"around {len(inputs)}")
        compiled = backend(module, inputs)
        return lambda *args: [out + 10 for out in compiled(*args)]

    def watch() -> Any:
        around_backend(around)
        around_backend(around)  # once is enough
        mark_backend("of_a_test", "seen")
        return tracing_backend(), backend_mark("of_a_test")

    def backend(module: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        calls.append("backend")
        return module.forward

    around_backend(around)  # no trace is under way
    ask, answers = asked_while_traced(watch)
    control = torch.compile(lambda x: x + 1, backend=backend)
    assert control(torch.ones(2)).tolist() == [2, 2]
    run = torch.compile(lambda x: x + ask(), backend=backend, options={"a": 1})
    assert run(torch.ones(2)).tolist() == [11, 11]
    assert calls == ["backend", "around 1", "backend"]
    assert answers == [((backend, {"options": {"a": 1}}), "seen")]


def test_backend_below() -> None:
    answers: list[Any] = []

    @torch.compiler.disable
    def look() -> None:
        answers.append(backend_below())

    def function(x: Tensor) -> Tensor:
        x = x + 1
        look()
        return x * 2

    function(torch.ones(2))
    torch.compile(function, backend=plain, options={"a": 1})(torch.ones(2))
    assert answers == [(None, {}), (plain, {"options": {"a": 1}})]
