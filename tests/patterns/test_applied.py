"""Known functions that are autograd.Functions: the causal product of pytorch-fast-transformers.

The library's kernels are compiled when it is installed. Its row is proved against them where it can be imported; the
other tests run a Function of the same form, over kernels that Dynamo cannot trace and that take float32 only.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import llcompile
from llcompile.patterns.known import capture
from llcompile.patterns.known.applied import as_function, is_applied
from llcompile.patterns.known.fast_transformers import ENTRIES
from llcompile.patterns.records import Certificate
from tests.helpers import small
from tests.helpers.small import difference
from tests.patterns.proofs import operands, proof

HEADS, WIDTH = 2, 4
(ROW,) = ENTRIES
_names = itertools.count()


@torch.compiler.disable
def kernel(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Takes what pybind11 would hand to a C++ function: the memory of float32 tensors."""
    if {x.dtype for x in (q, k, v, out)} != {torch.float32}:
        raise RuntimeError("expected scalar type Float but found Double")
    q.numpy(force=True)
    out.copy_((q @ k.mT).tril() @ v)


@torch.compiler.disable
def kernel_of_gradients(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    scores = (g @ v.mT).tril()
    dq.copy_(scores @ k)
    dk.copy_(scores.mT @ q)
    dv.copy_((q @ k.mT).tril().mT @ g)


@torch.compiler.disable
def kernel_of_all_tokens(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    out.copy_(q @ k.mT @ v)


@torch.compiler.disable
def kernel_of_no_key(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    kernel_of_gradients(q, k, v, g, dq, dk, dv)
    dk.zero_()


def causal_product(ahead: Callable[..., None] = kernel, back: Callable[..., None] = kernel_of_gradients) -> Any:
    """An autograd.Function as the library has it: the kernels are in tables by device."""

    class CausalDotProduct(torch.autograd.Function):
        dot: ClassVar = {"cpu": ahead}
        dot_backward: ClassVar = {"cpu": back}

        @staticmethod
        def forward(ctx: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
            ctx.save_for_backward(Q, K, V)
            product = torch.zeros((*Q.shape[:3], V.shape[3]), device=Q.device)
            CausalDotProduct.dot[Q.device.type](Q.data, K.data, V.data, product)
            return product

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            saved = ctx.saved_tensors
            slopes = tuple(torch.zeros_like(x) for x in saved)
            CausalDotProduct.dot_backward[grad_out.device.type](*(x.data for x in saved), grad_out, *slopes)
            return slopes

    return CausalDotProduct


class Performer(nn.Module):
    """The product over a denominator of its own, as those who call the function write it."""

    def __init__(self, product: Callable[..., Tensor]) -> None:
        super().__init__()
        self.project = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, K]
        q, k = q.exp(), k.exp()
        norm = torch.einsum("bhtk,bhtk->bht", q, k.cumsum(2))
        return (self.product(q, k, v) / norm[..., None]).transpose(1, 2).flatten(2)


class Direct(Performer):
    """Calls the Function itself, without a denominator."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)
        function: Any = self.product
        return function.apply(q, k, v).transpose(1, 2).flatten(2)  # type: ignore[no-any-return]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Callable[..., Any]:
    """Puts a Function into a library of its own that the row knows."""

    def install(applied: Any) -> Any:
        name = f"fake_transformers_{next(_names)}"
        module = types.ModuleType(name)
        applied.__module__ = name
        vars(module)[ROW.function] = applied
        monkeypatch.setitem(sys.modules, name, module)
        known = (*capture.entries(), replace(ROW, library=name))
        monkeypatch.setattr(capture, "entries", lambda: known)
        return applied

    return install


def x(length: int = 21) -> Tensor:
    return torch.randn(2, length, HEADS * WIDTH)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="loglinear", options={"inner": "aot_eager"})


@pytest.mark.parametrize("form", [lambda f: Performer(f.apply), Direct], ids=["an alias of apply", "the class"])
def test_converted(library: Callable[..., Any], form: Callable[..., nn.Module]) -> None:
    model, given = form(library(causal_product())), x()
    expected = model(given).detach()
    report = llcompile.convert(model, given)
    assert report.declined == ()
    found = report.converted
    assert [(c.origin, c.family, c.heads, c.key_dim, c.value_dim) for c in found] == [
        ("function", "linear attention", HEADS, WIDTH, WIDTH)
    ]
    assert found[0].certificate.dtype == "float32"
    assert difference(compiled(model)(given), expected) < 1e-5
    small.perturb(model)
    assert difference(compiled(model)(given), expected) > 1e-3


def test_gradients(library: Callable[..., Any]) -> None:
    model, given = Performer(library(causal_product()).apply), x()
    model(given).square().sum().backward()
    (expected,) = (p.grad.clone() for n, p in model.named_parameters() if n == "project.weight" and p.grad is not None)
    assert llcompile.convert(model, given).converted
    model.zero_grad()
    compiled(model)(given).square().sum().backward()
    assert difference(model.project.weight.grad, expected) < 1e-4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("product", "code"),
    [
        (causal_product(kernel_of_all_tokens), "function-differs"),
        (causal_product(back=kernel_of_no_key), "gradients-differ"),
    ],
    ids=["not causal", "no gradient of the keys"],
)
def test_declined(library: Callable[..., Any], product: Any, code: str) -> None:
    """The graph breaks there, and the kernel runs as it did."""
    model, given = Performer(library(product).apply), x()
    report = llcompile.convert(model, given)
    assert [d.code for d in report.declined] == [code]
    assert not report.converted
    assert torch.equal(compiled(model)(given), model(given))


def test_other_backends_see_the_function_itself(library: Callable[..., Any]) -> None:
    product = library(causal_product())
    model, given = Performer(product.apply), x()
    assert llcompile.inspect(model, given).converted
    ran: list[int] = []
    product.dot["cpu"] = torch.compiler.disable(lambda *operands: (ran.append(1), kernel(*operands)))
    torch._dynamo.reset()
    assert difference(torch.compile(model, backend="eager")(given), model(given)) < 1e-6
    assert len(ran) == 2


def test_a_function_with_a_context_of_its_own() -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, by: float = 2.0) -> Tensor:
            return x * by

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

    assert is_applied(Scaled)
    assert not is_applied(Scaled.forward)
    function = as_function(Scaled)
    assert capture.positional_names(function) == ("x", "by")
    assert function(torch.ones(1)).item() == 2.0
    assert function(torch.ones(1), by=3.0).item() == 3.0


def test_the_librarys_own_kernel() -> None:
    module = pytest.importorskip(
        "fast_transformers.causal_product", reason="pytorch-fast-transformers is not installed (it is compiled then)"
    )
    found = capture.CapturedFunction(ROW, as_function(module.CausalDotProduct))
    assert found.problem is None
    for weighted in (True, False):
        result = proof(found, operands(ROW), weighted)
        assert isinstance(result, Certificate), result
        assert (result.dtype, result.against) == ("float32", "")
