"""DTensors: below autograd, as values that tensors get, and in Dynamo's graphs.

`torch.distributed.tensor` is imported only where a DTensor is at hand, so that its package has been loaded.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

# What moves a tensor between a process's own part and all processes; releases of torch put `prim_` before the names.
_MOVES = ("from_local", "redistribute", "to_local", "full_tensor")


def is_dtensor(x: object) -> bool:
    """Whether an object is a DTensor; imports nothing."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return isinstance(x, Tensor) and isinstance(x, getattr(loaded, "DTensor", ()))


def part(x: Any, placements: Sequence[Any]) -> Tensor:
    """This process's part of a DTensor, once that is placed so.

    For code below autograd: `DTensor.redistribute` is an autograd function, whose outputs older releases of torch
    detach in place, which no rule of theirs allows there.
    """
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor._redistribute import redistribute_local_tensor

    if tuple(x.placements) == tuple(placements):
        return x._local_tensor  # type: ignore[no-any-return]
    target = DTensorSpec(x.device_mesh, tuple(placements), tensor_meta=x._spec.tensor_meta)
    moved = redistribute_local_tensor(x._local_tensor, x._spec, target)
    waited = getattr(moved, "wait", None)
    return moved if waited is None else waited()  # type: ignore[no-any-return]


def joined(local: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """The DTensor [shape], contiguous, of which `local` is this process's part; for code below autograd."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    spec = DTensorSpec(mesh, tuple(placements), tensor_meta=TensorMeta(torch.Size(shape), stride, local.dtype))
    return DTensor(local.contiguous(), spec, requires_grad=False)


def whole(x: Tensor) -> Tensor:
    """A DTensor as a plain tensor of its whole shape, on all processes, which must all ask; others as they are."""
    return x.full_tensor() if is_dtensor(x) else x  # type: ignore[no-any-return,attr-defined]


def like(values: Tensor, x: Tensor) -> Tensor:
    """Values that all processes have, placed as `x` is."""
    if not is_dtensor(x):
        return values
    from torch.distributed.tensor import distribute_tensor

    at: Any = x
    return distribute_tensor(values, at.device_mesh, at.placements, src_data_rank=None)


def is_move(node: fx.Node) -> bool:
    """Whether a node of a graph only says where a tensor lies: its own part, all of it, or a DTensor's placements."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.removeprefix("prim_") in _MOVES and node.op in ("call_function", "call_method")
