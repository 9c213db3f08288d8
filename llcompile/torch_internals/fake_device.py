"""Tensors on a CUDA device that need not be there: shapes, dtypes and strides without memory."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

FAKE: type[Tensor] = FakeTensor


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors that are made inside are fake, on whatever device; autograd records nothing of them."""
    with warnings.catch_warnings(), torch.no_grad(), FakeTensorMode(), Indexing():
        # Addresses are 0, which is aligned, as memory of a device is.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


class Indexing(TorchFunctionMode):
    """Indexing as its operators: `x[...]` looks for the tensor's device first, which a CPU's torch does not know.

    Off within an operator that is called inside; enter another one there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _indexed(*args)
        return func(*args, **(kwargs or {}))


def _indexed(x: Tensor, index: Any) -> Tensor:
    parts, axis = index if isinstance(index, tuple) else (index,), 0
    for at, part in enumerate(parts):
        if part is None:
            x, axis = x.unsqueeze(axis), axis + 1
        elif part is Ellipsis:
            axis = x.dim() - sum(later is not None for later in parts[at + 1 :])
        elif isinstance(part, slice):
            if part != slice(None):
                x = torch.ops.aten.slice(x, axis, *part.indices(x.shape[axis]))
            axis += 1
        else:
            x = x.select(axis, part)
    return x
