"""What happens at the moment torch.compile is called, before anything is traced."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from torch._dynamo.backends import registry

from llcompile.torch_internals.compile_check import install
from tests.helpers.traces import Asking


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was called; torch.compile is as before afterwards."""
    wrapper = torch._TorchCompileWrapper
    monkeypatch.setattr(wrapper, "__init__", wrapper.__init__)
    return []


def checking(calls: list[Any]) -> tuple[Callable[[Any], None], Callable[[], None], Callable[[Any], None]]:
    def parse(options: Any) -> None:
        calls.append(options)
        if options and "typo" in options:
            raise ValueError("no such option")

    return parse, lambda: calls.append("prepare"), calls.append


def test_options_are_parsed_at_the_call(calls: list[Any]) -> None:
    ours, other = Asking(), Asking()
    install(ours, *checking(calls))
    assert calls == ["prepare"]
    run = torch.compile(torch.sin, backend=ours, options={"a": 1})
    assert calls == ["prepare", {"a": 1}, torch.sin, "prepare"]
    torch.compile(torch.cos, backend=ours)
    assert calls[4:] == [None, torch.cos, "prepare"]
    with pytest.raises(ValueError, match="no such option"):
        torch.compile(torch.sin, backend=ours, options={"typo": 1})
    del calls[:]
    torch.compile(torch.sin, backend=other, options={"typo": 1})
    run(torch.ones(2))
    assert calls == []
    assert ours.count == 1


def test_the_call_that_imports_us_is_checked(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend's name is looked up, and its module imported, from inside of the call."""
    module = types.ModuleType("of_a_test")

    def imported(name: str) -> Any:
        install(asking, *checking(calls))
        return asking

    asking = Asking()
    module.__getattr__ = imported  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "of_a_test", module)
    monkeypatch.setitem(
        registry._BACKENDS, "of_a_test", EntryPoint("of_a_test", "of_a_test:backend", "torch_dynamo_backends")
    )
    with pytest.raises(ValueError, match="no such option"):
        torch.compile(torch.sin, backend="of_a_test", options={"typo": 1})
    assert calls == [{"typo": 1}]
    del calls[:]
    torch.compile(torch.sin, backend="of_a_test")
    assert calls[:2] == [None, torch.sin]
