"""Guards on numbers: a graph that was compiled for a tensor's values is traced again when they change."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx
from torch._dynamo.guards import install_guard
from torch._subclasses.fake_tensor import FakeTensor

_CHEAP = 1 << 14  # numbers that are compared in microseconds


class SameNumbers:
    """A check that a tensor holds the numbers that it held; they are compared only where it may have changed."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.numbers = tensor.detach().clone()
        self.seen = self._mark(tensor)

    def __call__(self, tensor: Any) -> bool:
        """Whether these are the numbers."""
        if isinstance(tensor, FakeTensor):  # torch.export, which has put it in the place of what was read
            return tensor.shape == self.numbers.shape and tensor.dtype == self.numbers.dtype
        # Writes through `.data` are not counted: what costs little is always compared.
        cheap = tensor.device.type == "cpu" and tensor.numel() <= _CHEAP
        if not cheap and self._mark(tensor) == self.seen and self.seen[1] >= 0:
            return True
        same = tensor.shape == self.numbers.shape and tensor.dtype == self.numbers.dtype
        same = same and tensor.device == self.numbers.device and self._equal(tensor.detach())
        if same:
            self.seen = self._mark(tensor)
        return same

    def _equal(self, tensor: torch.Tensor) -> bool:
        if tensor.is_floating_point() or tensor.is_complex():
            return torch.allclose(tensor, self.numbers, rtol=0, atol=0, equal_nan=True)
        return torch.equal(tensor, self.numbers)

    def _mark(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Where the numbers are, and how often they were written; tensors of inference mode do not count."""
        return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def guard_numbers(node: fx.Node, tensor: torch.Tensor) -> bool:
    """Has Dynamo trace the frame again once the tensor that fills a placeholder holds other numbers than these.

    False where there is no trace under way that the guard could belong to.
    """
    source = getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)
    if source is None or torch._guards.TracingContext.try_get() is None:
        return False
    install_guard(source.make_guard(partial(_guard_numbers, check=SameNumbers(tensor))))
    return True


def _guard_numbers(builder: Any, guard: Any, check: SameNumbers) -> None:
    code = [f"the numbers of {guard.name} are those that the graph was compiled for"]
    manager = builder.get_guard_manager(guard)
    try:
        manager.add_lambda_guard(check, code, guard.user_stack)
    except TypeError:  # before torch 2.12 there was no stack
        manager.add_lambda_guard(check, code)
