"""What becomes of calls of known functions, on a small library made here: wrong ones are declined, never rewritten."""

from __future__ import annotations

import itertools
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from llcompile.patterns.known import capture
from llcompile.patterns.known.binders import output_and_state, query_scale
from llcompile.patterns.known.entry import KnownFunction, Reference
from llcompile.patterns.known.entry import Tensor as Operand
from llcompile.patterns.mixer import Mixer

HEADS, WIDTH = 2, 4
_names = itertools.count()


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("bhts,bshv->bthv", scores.tril(), v), None


def not_causal(q: Tensor, k: Tensor, v: Tensor, scale: Any = None, initial_state: Any = None) -> tuple[Tensor, None]:
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshv->bthv", scores, v), None


def stops_gradients(
    q: Tensor, k: Tensor, v: Tensor, scale: Any = None, initial_state: Any = None
) -> tuple[Tensor, None]:
    return linear_attention(q, k.detach(), v)[0], None


def rounds(q: Tensor, k: Tensor, v: Tensor, scale: Any = None, initial_state: Any = None) -> tuple[Tensor, None]:
    """In float32 inside, with a gradient of the key that is a hundredth too large."""
    k = k + 0.01 * (k - k.detach())
    return linear_attention(q.float(), k.float(), v.float(), scale)[0].to(q.dtype), None


def no_keys(q: Tensor, k: Tensor, v: Tensor, scale: Any = None, initial_state: Any = None) -> tuple[Tensor, None]:
    return q.sum(-1, keepdim=True) * v.cumsum(1), None


def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: Any = None) -> Any:
    """Like a Triton kernel on a CPU."""
    raise RuntimeError("no driver")


def gpu_only(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: Any = None) -> Any:
    return kernel(q=q, k=k, v=v, scale=q.shape[-1] ** -0.5 if scale is None else scale, initial_state=initial_state)


@torch.compiler.disable
def launches(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: Any = None, **kwargs: Any
) -> Any:
    """Runs, but not on fake tensors, as a kernel does; and breaks every graph, as FLA's functions do."""
    q.numpy(force=True)
    return linear_attention(q, k, v, scale, initial_state)


def bind(a: Any) -> Mixer:
    return Mixer("none", "none", a["q"], a["k"], a["v"], initial_state=a["initial_state"], scale=query_scale(a))


def entry_for(library: str, function: str, **more: Any) -> KnownFunction:
    operands = (Operand("q", "B T H K"), Operand("k", "B T H K"), Operand("v", "B T H V"))
    given: dict[str, Any] = {
        "library": library,
        "function": function,
        "family": "linear attention",
        "tensors": (*operands, Operand("initial_state", "B H K V", "state")),
        "constants": ("scale",),
        "bind": bind,
        "result": lambda a, output, state: output_and_state(a, output, state, like="q"),
        **more,
    }
    return KnownFunction(**given)


Make = Callable[..., nn.Module]


class Attention(nn.Module):
    def __init__(self, function: Callable[..., Any], **arguments: Any) -> None:
        super().__init__()
        self.project = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.function = function
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, WIDTH)).unbind(2)
        return self.function(q, k, v, **self.arguments)[0].flatten(2)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Make:
    """Puts a copy of a function into a library of its own, with a row that claims to know it."""

    def build(function: Any, arguments: dict[str, Any] | None = None, **entry: Any) -> nn.Module:
        library = f"fake_library_{next(_names)}"
        module = types.ModuleType(library)
        monkeypatch.setitem(sys.modules, library, module)
        vars(module).update(__builtins__=__builtins__, torch=torch, kernel=kernel, linear_attention=linear_attention)
        plain = capture.plain_form(function)
        copy = types.FunctionType(plain.__code__, vars(module), plain.__name__, plain.__defaults__)
        copy.__module__ = library
        if plain is not function:
            copy = torch.compiler.disable(copy)
        setattr(module, plain.__name__, copy)
        entries = (*capture.entries(), entry_for(library, plain.__name__, **entry))
        monkeypatch.setattr(capture, "entries", lambda: entries)
        return Attention(copy, **(arguments or {}))

    return build


def x(length: int = 9) -> Tensor:
    return torch.randn(2, length, HEADS * WIDTH)


def compiled_output(model: nn.Module, given: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(model, backend="loglinear", options={"inner": "aot_eager"})(given)


def check_declined(model: nn.Module, reason: str) -> None:
    """Declined for this reason; the model is what it was and computes what it did."""
    keys, given = list(model.state_dict()), x()
    report = llcompile.convert(model, given)
    assert not report.converted
    assert len(report.declined) == 1, report
    assert reason in report.declined[0].reason
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(compiled_output(model, given), model(given))
    assert list(model.state_dict()) == keys


def test_the_right_function_is_converted(make: Make) -> None:
    model, given = make(linear_attention), x()
    report = llcompile.convert(model, given)
    assert [c.certificate.against for c in report.converted] == [""]
    torch.testing.assert_close(compiled_output(model, given), model(given))


def test_a_signature_that_is_not_the_rows(make: Make) -> None:
    check_declined(make(linear_attention, constants=("scale", "normalize")), "has no argument normalize")


def test_an_argument_that_some_versions_lack(make: Make) -> None:
    model = make(linear_attention, constants=("scale", "normalize"), optional=("normalize",))
    assert len(llcompile.convert(model, x()).converted) == 1


def test_another_default_than_the_row_relies_on(make: Make) -> None:
    check_declined(
        make(linear_attention, defaults={"scale": 1.0}), "has scale=None by default, where the table expects 1.0"
    )


def test_a_refused_argument(make: Make) -> None:
    model = make(linear_attention, {"reverse": True}, refuses={"reverse": "runs backwards"})
    check_declined(model, "argument reverse of linear_attention runs backwards")


def test_a_refused_argument_at_its_default(make: Make) -> None:
    model = make(linear_attention, {"reverse": False}, refuses={"reverse": "runs backwards"})
    assert len(llcompile.convert(model, x()).converted) == 1


def test_an_argument_that_the_row_does_not_know(make: Make) -> None:
    check_declined(
        make(linear_attention, {"reverse": True}), "argument reverse of linear_attention is set, but is not in"
    )


def test_a_combination_that_the_row_does_not_cover(make: Make) -> None:
    requires = lambda a: "has a scale of its own" if a["scale"] else None  # noqa: E731
    model = make(linear_attention, {"scale": 0.5}, requires=requires)
    check_declined(model, "the call of linear_attention has a scale of its own")


def test_a_function_that_computes_something_else(make: Make) -> None:
    check_declined(make(not_causal), "agrees only to ")


@pytest.mark.parametrize("function", [stops_gradients, rounds])
def test_a_function_with_other_gradients(make: Make, function: Any) -> None:
    """That it rounds to float32 inside explains no error of a hundredth."""
    check_declined(make(function), "its gradients differ from the operator's")


def test_an_operand_without_effect(make: Make) -> None:
    model = make(no_keys, bind=lambda a: Mixer("none", "none", a["q"], a["q"], a["v"]))
    # It disagrees, too; what does not depend on its operands must not pass for the right reason either.
    report = llcompile.convert(model, x())
    assert "does not depend on k" in report.declined[0].reason


def test_a_shape_that_the_row_does_not_expect(make: Make) -> None:
    operands = (Operand("q", "B T H 1"), Operand("k", "B T H K"), Operand("v", "B T H V"))
    check_declined(make(linear_attention, tensors=operands), "argument q of linear_attention has shape")


class TestWithoutAReference:
    def test_what_does_not_run_here_is_not_rewritten(self, make: Make) -> None:
        with pytest.raises(llcompile.errors.CaptureError):  # nor does the model
            llcompile.convert(make(gpu_only), x())


class TestAgainstAReference:
    def test_the_reference_stands_in(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        reference = Reference(f"{__name__}:linear_attention")
        model, given = make(gpu_only, references=(reference,), opaque=True), x()
        report = llcompile.convert(model, given)
        assert [c.certificate.against for c in report.converted] == [reference.name]
        expected = model.project(given).unflatten(-1, (3, HEADS, WIDTH)).unbind(2)
        torch.testing.assert_close(compiled_output(model, given), linear_attention(*expected)[0].flatten(2))

    def test_the_functions_own_code_over_a_reference(self, make: Make) -> None:
        reference = Reference(f"{__name__}:linear_attention", callee="kernel")
        report = llcompile.inspect(make(gpu_only, references=(reference,), opaque=True), x())
        assert [c.certificate.against for c in report.converted] == [f"gpu_only over {reference.name}"]

    def test_a_reference_that_disagrees(self, make: Make) -> None:
        model = make(launches, references=(Reference(f"{__name__}:not_causal"),), opaque=True)
        # The function itself runs on a CPU here, and comes first.
        assert len(llcompile.inspect(model, x()).converted) == 1


class TestKernelsThatNoCompilerTraces:
    def test_capture_sees_through_the_compile_guard(self, make: Make) -> None:
        model, given = make(launches, opaque=True), x()
        report = llcompile.convert(model, given)
        assert len(report.converted) == 1
        assert report.graphs == 1
        torch.testing.assert_close(compiled_output(model, given), model(given))

    def test_a_call_declined_while_it_is_traced_breaks_the_graph(self, make: Make) -> None:
        model = make(launches, {"reverse": True}, opaque=True, refuses={"reverse": "runs backwards"})
        check_declined(model, "argument reverse of launches runs backwards")

    def test_a_call_declined_after_the_trace_breaks_the_graph(self, make: Make) -> None:
        model = make(launches, opaque=True, bind=lambda a: Mixer("none", "none", a["q"], a["k"], a["v"], scale=3.0))
        check_declined(model, "agrees only to ")
