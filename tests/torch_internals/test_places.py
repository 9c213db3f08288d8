"""The module and the line of the user's code that a node was traced in."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from llcompile.torch_internals.places import is_forward_of, module_of, place_of, user_frames, user_line
from tests.helpers.traces import Layers, Scale, ask_of_graphs, node_of

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def products(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if getattr(node.target, "__name__", "") == "mul"]


class TestModuleOf:
    def test_modules_below_the_frame(self) -> None:
        model = Layers()
        (found,) = ask_of_graphs(
            lambda module: [module_of(node.meta) for node in products(module)], lambda x: model(x), torch.ones(3)
        )
        assert [name for _, name in found] == ["layers.0", "layers.1"]
        assert [key.split("@")[0] for key, _ in found] == [str(id(layer)) for layer in model.layers]

    def test_the_module_of_the_frame_itself(self) -> None:
        model = Scale()
        (found,) = ask_of_graphs(lambda module: module_of(products(module)[0].meta), model, torch.ones(3))
        assert found == (str(id(model)), "")

    def test_an_exported_model(self) -> None:
        """Its nodes have the names of the export."""
        model = torch.export.export(Layers(), (torch.ones(3),)).module()
        (found,) = ask_of_graphs(lambda module: module_of(node_of(module, "mul").meta), model, torch.ones(3))
        assert found == (str(id(model.get_submodule("layers.0"))), "layers.0")

    def test_no_module(self) -> None:
        (found,) = ask_of_graphs(lambda module: module_of(node_of(module, "add").meta), lambda x: x + 1, torch.ones(3))
        assert found == ("", "")
        assert module_of({}) == ("", "")


class TestPlaceOf:
    def test_as_module_of(self) -> None:
        model = Layers()
        (found,) = ask_of_graphs(
            lambda module: [(place_of(n), module_of(n.meta)) for n in products(module)], model, torch.ones(3)
        )
        assert [place for place, _ in found] == [place for _, place in found]

    def test_a_function_that_calls_forward_itself(self) -> None:
        """No module is called: whose parameter is read says whose the code is."""
        model = Layers()

        def function(net: nn.Module, x: Tensor) -> Tensor:
            return net.layers[1].forward(x + 1)

        (found,) = ask_of_graphs(lambda module: place_of(products(module)[0]), function, model, torch.ones(3))
        assert found == (str(id(model.layers[1])), "")

    def test_a_module_that_calls_forward_itself(self) -> None:
        """What is not called is in no module's stack; its code and its parameters say that it is at work."""

        class Around(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.weight = Scale(), nn.Parameter(torch.ones(3))

            def forward(self, x: Tensor) -> Tensor:
                return self.inner.forward(x) * self.weight

        model = Around()
        (found,) = ask_of_graphs(lambda module: [place_of(n)[0] for n in products(module)], model, torch.ones(3))
        assert found == [str(id(model.inner)), str(id(model))]


def test_is_forward_of() -> None:
    def question(module: fx.GraphModule) -> Any:
        (frame, *_) = user_frames(products(module)[0].meta)
        return [is_forward_of(m, frame) for m in (Scale(), Layers(), nn.Identity())]

    (found,) = ask_of_graphs(question, Scale(), torch.ones(3))
    assert found == [True, False, False]


def add(x: Tensor) -> Tensor:
    return x + 1


def vmapped(x: Tensor) -> Tensor:
    return torch.vmap(add)(x)


def test_frames_and_lines() -> None:
    """PyTorch's own frames are none of the user's."""

    def question(module: fx.GraphModule) -> Any:
        meta = node_of(module, "add").meta
        return user_frames(meta), user_line(meta), meta["stack_trace"]

    ((frames, line, whole),) = ask_of_graphs(question, vmapped, torch.ones(3))
    first = {f: f.__code__.co_firstlineno for f in (add, vmapped)}
    assert frames == [
        {"file": __file__, "line": str(first[vmapped] + 1), "function": "vmapped"},
        {"file": __file__, "line": str(first[add] + 1), "function": "add"},
    ]
    assert line == f"{__file__}:{first[add] + 1} in add"
    assert "torch" in whole.replace(__file__, "")


def test_no_frames() -> None:
    assert user_frames({}) == []
    assert user_line({}) == ""


def test_a_notation_of_arrays_is_not_the_users_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Code that einops runs stands on the line that calls it; another library's layer has lines of its own."""
    trace = []
    for name in ("einops", "layers"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__file__=str(folder / "__init__.py")))
        trace.append(f'File "{folder / "core.py"}", line 7, in multiply')
    own = f'File "{__file__}", line 3, in forward'
    assert user_line({"stack_trace": "\n".join([own, trace[0]])}) == f"{__file__}:3 in forward"
    assert user_line({"stack_trace": "\n".join([own, trace[1]])}).endswith("core.py:7 in multiply")
