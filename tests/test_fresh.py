"""A compilation that fails leaves nothing; a conversion leaves other threads' compiled code alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from llcompile import backend
from llcompile.passes import pipeline
from llcompile.torch_internals import inner
from llcompile.weights import attachment

EAGER = {"inner": "eager"}


class Mixer(nn.Module):
    """Linear attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT).tril() @ v


def _fail(error: type[BaseException]) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error("simulated")

    return fail


STAGES = {
    "the inner compiler": lambda patch, error: patch.setitem(inner._INNER, "eager", _fail(error)),
    "the rewrite": lambda patch, error: patch.setattr(pipeline, "CHANGE", (_named(error),)),
    "the trace after attaching": lambda patch, error: patch.setattr(backend, "restart_trace", _fail(error)),
}


def _named(error: type[BaseException]) -> Callable[..., Any]:
    fail = _fail(error)
    fail.__name__ = "rewrite"
    return fail


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_a_failed_compilation_leaves_nothing(
    stage: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Mixer(), torch.randn(2, 12, 8)
    run = torch.compile(model, backend="loglinear", options=EAGER)
    with monkeypatch.context() as patch:
        STAGES[stage](patch, error)
        with pytest.raises((Exception, KeyboardInterrupt)):
            run(x)
    assert list(model.state_dict()) == ["qkv.weight", "qkv.bias"]
    assert not model._forward_hooks
    run(x)  # control: once nothing fails, they are attached and stay
    assert len(list(attachment.attached(model))) == 1


@pytest.mark.filterwarnings("ignore")
def test_level_weights_from_before_survive_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Mixer(), torch.randn(2, 12, 8)
    llcompile.convert(model, x)
    names = list(model.state_dict())
    STAGES["the inner compiler"](monkeypatch, KeyboardInterrupt)
    with pytest.raises((Exception, KeyboardInterrupt)):
        torch.compile(model, backend="loglinear", options=EAGER)(x)
    assert list(model.state_dict()) == names


# -- what a conversion forgets


def _counting() -> tuple[Callable[..., Any], list[int]]:
    made: list[int] = []

    def compile_it(module: Any, inputs: Any) -> Any:
        made.append(1)
        return module.forward

    return compile_it, made


class Other(nn.Module):
    """Nothing that is converted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_dynamo")
def test_only_what_runs_a_converted_module_is_compiled_again() -> None:
    """Through the module, and through a function that holds it in a dict; another class keeps its code."""
    count, made = _counting()
    model, other, x = Mixer(), Other(), torch.randn(2, 12, 8)

    def step(held: dict[str, nn.Module], x: Tensor) -> Tensor:
        return held["model"](x) * 2

    compiled = torch.compile(model, backend=count), torch.compile(step, backend=count)
    beside = torch.compile(other, backend=count)
    run = lambda: (compiled[0](x), compiled[1]({"model": model}, x), beside(x))  # noqa: E731
    run()
    run()
    assert len(made) == 3
    llcompile.convert(model, x)
    run()
    run()
    assert len(made) == 5


@pytest.mark.filterwarnings("ignore")
def test_threads_convert_side_by_side() -> None:
    """Four conversions at once, while a fifth thread serves a compiled model."""
    served, x, stop = torch.compile(Other(), backend="eager"), torch.randn(2, 12, 8), threading.Event()
    reports: list[llcompile.Report] = []

    def serve() -> None:
        while not stop.is_set():
            served(x)

    def convert() -> None:
        reports.append(llcompile.convert(Mixer(), x))

    server, threads = threading.Thread(target=serve), [threading.Thread(target=convert) for _ in range(4)]
    for thread in (server, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    server.join()
    assert [len(r.converted) for r in reports] == [1] * 4
    assert all(r.verified for r in reports)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_dynamo")
@torch._dynamo.config.patch(recompile_limit=4)
def test_many_models_of_one_class_one_after_the_other() -> None:
    """What earlier ones compiled does not count towards the limit of recompilations of the later ones."""
    x = torch.randn(2, 12, 8)
    for seed in range(torch._dynamo.config.recompile_limit + 3):
        torch.manual_seed(seed)
        model, count = Mixer(), _counting()
        llcompile.convert(model, x)
        torch.compile(model, backend=count[0])(x)
        assert len(count[1]) == 1


# -- exported models


class Stack(nn.Module):
    """Two mixers below the root."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mixer(), Mixer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) / 4
        return x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "names"), [(Mixer, [""]), (Stack, ["layers.0", "layers.1"])])
def test_an_exported_model_is_converted(make: Callable[[], nn.Module], names: list[str]) -> None:
    model, x = make(), torch.randn(2, 12, 8)
    exported: Any = torch.export.export(model, (x,)).module()
    report = llcompile.convert(exported, x)
    assert [c.module for c in report.converted] == names
    assert report.certificate is not None
    assert report.certificate.acts == tuple(names)
    run = torch.compile(exported, backend="loglinear", options=EAGER)
    assert torch.allclose(run(x), model(x), atol=1e-5)
