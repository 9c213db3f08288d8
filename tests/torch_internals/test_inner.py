"""The inner compilers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import fx

from llcompile.torch_internals.inner import compile_graph
from llcompile.torch_internals.sources import source_tag

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def backend(name: str, inductor: Mapping[str, Any], mode: str | None = None) -> Callable[..., Any]:
    def compiled(module: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        return compile_graph(module, inputs, name, inductor, mode, "of a test")

    return compiled


@pytest.mark.parametrize("name", ["eager", "aot_eager", "inductor"])
def test_what_is_compiled_is_the_graph(name: str) -> None:
    """A product of matrices, for which Inductor generates no kernel."""
    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(3, 4)
    run = torch.compile(torch.mm, backend=backend(name, {}))
    torch.testing.assert_close(run(a, b), a @ b)
    run(a, b).sum().backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad, b.sum(1).expand(2, 3))


def test_inductor_is_given_its_options_and_a_tag_for_its_cache() -> None:
    tags: list[str] = []

    def look(graph: fx.Graph) -> None:
        tags.append(torch.compiler.config.cache_key_tag)

    before = torch.compiler.config.cache_key_tag
    run = torch.compile(torch.mm, backend=backend("inductor", {"post_grad_custom_pre_pass": look}))
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=False, enable_autograd_cache=False):
        product = run(torch.randn(2, 3, requires_grad=True), torch.randn(3, 4))
        assert len(tags) == 1
        product.sum().backward()  # compiles the backward pass
    assert tags == 2 * [f"{before}:llcompile:{source_tag()}:of a test"]
    assert torch.compiler.config.cache_key_tag == before


@pytest.mark.parametrize(
    ("inductor", "mode", "message"),
    [({"no_such_option": 1}, None, "no_such_option"), ({}, "no-such-mode", "no-such-mode")],
    ids=["options", "mode"],
)
def test_only_inductor_reads_options_and_mode(inductor: dict[str, Any], mode: str | None, message: str) -> None:
    x = torch.randn(2, 2)
    torch.compile(torch.mm, backend=backend("aot_eager", inductor, mode))(x, x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message):
        torch.compile(torch.mm, backend=backend("inductor", inductor, mode))(x, x)
