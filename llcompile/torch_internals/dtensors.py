"""DTensors: below autograd, as the values of tensors, and in Dynamo's graphs.

`torch.distributed.tensor` is imported only where a DTensor is at hand, so that its package has been loaded.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

# What moves a tensor between a process's own part and all processes; releases of torch put `prim_` before the names.
_MOVES = ("from_local", "redistribute", "to_local", "full_tensor")


def is_dtensor(x: object) -> bool:
    """Whether an object is a DTensor; imports nothing."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return isinstance(x, Tensor) and isinstance(x, getattr(loaded, "DTensor", ()))


def possible() -> bool:
    """Whether there may be DTensors at all: a mesh needs processes that know of each other."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


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


@contextmanager
def first_of_mesh(tensors: Iterable[Tensor]) -> Iterator[bool]:
    """Whether this process is the first of the mesh of some tensors; at the end, all of the mesh wait for it.

    True without DTensors, where each process is on its own.
    """
    mesh: Any = next((x.device_mesh for x in tensors if is_dtensor(x)), None)  # type: ignore[attr-defined]
    try:
        yield mesh is None or not any(mesh.get_coordinate())
    finally:
        for dim in range(0 if mesh is None else mesh.ndim):
            torch.distributed.barrier(group=mesh.get_group(dim))


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


def sharded_ways(x: Tensor) -> int:
    """Over how many processes a tensor is sharded; 1 for one that each process has whole."""
    if not is_dtensor(x):
        return 1
    at: Any = x
    return math.prod(at.device_mesh.size(i) for i, p in enumerate(at.placements) if p.is_shard())


def read_on_all(x: Tensor, like: Tensor, dims: Sequence[int]) -> Tensor:
    """A tensor that all processes have, read by what each of them does with its own part: gradients are summed.

    Args:
        x: plain, or a DTensor on the mesh of `like`.
        like: a DTensor.
        dims: the dimensions of its mesh over which the parts are spread.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    everywhere = [Replicate()] * mesh.ndim
    spread: Any = x if is_dtensor(x) else DTensor.from_local(x, mesh, everywhere, run_check=False)
    spread = spread.redistribute(placements=everywhere)
    return spread.to_local(grad_placements=[Partial() if i in dims else Replicate() for i in range(mesh.ndim)])  # type: ignore[no-any-return]


def own_part(x: Tensor, like: Tensor, dims: Sequence[int]) -> Tensor:
    """This process's part of a sharded tensor; one that all have is `read_on_all`; a plain one is all of it."""
    if not is_dtensor(x):
        return x
    at: Any = x
    if any(p.is_shard() for p in at.placements):
        return at.to_local()  # type: ignore[no-any-return]
    return read_on_all(at.to_local(), like, dims)


def as_dtensor(x: Tensor, like: Tensor, rows: Sequence[int]) -> Tensor:
    """A plain tensor as a DTensor on the mesh of `like`: its first axis is sharded over the dimensions `rows`."""
    if is_dtensor(x):
        return x
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    placements = [Shard(0) if i in rows else Replicate() for i in range(mesh.ndim)]
    return DTensor.from_local(x, mesh, placements, run_check=False)
