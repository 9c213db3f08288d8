"""What is saved for a backward inside is not seen by hooks on saved tensors around it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llcompile.torch_internals.tape import own_tape


def test_hooks_outside_see_nothing_of_it() -> None:
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    x = torch.randn(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with own_tape():
            x.sin().sum().backward()
        assert seen == []
        x.sin().sum().backward()  # the control: behind it they see everything again
        assert len(seen) == 1
    torch.testing.assert_close(x.grad, 2 * x.cos().detach())


def test_where_hooks_are_forbidden() -> None:
    """A transform of torch.func forbids them: there is nothing to hide from."""

    def loss(x: Tensor) -> Tensor:
        with own_tape():
            return x.sin().sum()

    x = torch.randn(3)
    torch.testing.assert_close(torch.func.grad(loss)(x), x.cos())


def test_a_backward_through_what_was_written_over_is_an_error_inside_too() -> None:
    """Autograd checks that by itself where there are no hooks; a proof must not compare gradients that are wrong."""
    x, state = torch.randn(3, requires_grad=True), torch.randn(3)
    with own_tape():
        product = x * state
        state.zero_()
        with pytest.raises(RuntimeError, match="changed in place"):
            product.sum().backward()
        (x * state).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
