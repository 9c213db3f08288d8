"""The operators on DTensors: sharded over the batch or over the heads, each process runs them on its own part.

One plan for each dimension of the mesh, read off the operands' placements. What the plan does not shard, all processes
hold whole, and its gradient is the sum over them (`Partial`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from llcompile.errors import DistributedError
from llcompile.torch_internals.dtensors import joined, part

Plan = Literal["batch", "heads", "whole"]

_HEADS = "HGW"
_SAID = {"T": "tokens", "K": "key channels", "V": "value channels", "L": "levels", "R": "routing channels"}
_GIVEN = {
    **dict.fromkeys(("q", "k", "erase_query", "erase_key"), "BTGK"),
    **dict.fromkeys(("v", "grad_o"), "BTHV"),
    **dict.fromkeys(("log_decay", "beta"), "BTHK"),
    **dict.fromkeys(("state", "initial_state", "grad_state"), "BH"),
    "level_weights": "BTWL",
    "decay_rate": "HK",
    "routing_state": "BW",
    **dict.fromkeys(("attention_mask", "seq_idx"), "BT"),
    "cu_seqlens": "",
}
_READOUTS = {
    **dict.fromkeys(("query", "key"), "BTWR"),
    "grad": "BTWL",
    **dict.fromkeys(("state", "initial_state", "grad_state"), "BW"),
    **dict.fromkeys(("attention_mask", "seq_idx"), "BT"),
    "cu_seqlens": "",
}
# Operator -> the axes of its tensors by name, and the names of its outputs; a gradient has its operand's name.
_TRANSITION = ("log_decay", "decay_rate", "beta", "erase_query", "erase_key")
_OPERANDS = ("q", "k", "v", "level_weights", *_TRANSITION, "initial_state")
OPERATORS: dict[str, tuple[Mapping[str, str], tuple[str, ...]]] = {
    "loglinear_attention": (_GIVEN, ("v", "initial_state")),
    "loglinear_attention_backward": (_GIVEN, _OPERANDS),
    "loglinear_attention_step": (_GIVEN, ("v", "state")),
    "level_readouts": (_READOUTS, ("grad", "initial_state")),
    "level_readouts_backward": (_READOUTS, ("query", "key", "initial_state")),
    "level_readouts_step": (_READOUTS, ("grad", "state")),
}


class _Call(NamedTuple):
    """A call's tensors by name, their axes, and what is done with each dimension of the mesh."""

    name: str
    mesh: DeviceMesh
    tensors: Mapping[str, Tensor]
    axes: Mapping[str, str]
    plans: Sequence[Plan]

    def size(self, axis: str) -> int:
        """The number of rows, or of heads, groups or sets of level weights, on all processes."""
        return next(int(x.shape[self.axes[n].index(axis)]) for n, x in self.tensors.items() if axis in self.axes[n])

    @property
    def ways(self) -> int:
        """Over how many processes heads are sharded."""
        return math.prod(self.mesh.size(i) for i, plan in enumerate(self.plans) if plan == "heads")

    def placements(self, axes: str, otherwise: Placement | None = None) -> list[Placement]:
        """Where a tensor with these axes lies; `otherwise` in the dimensions of the mesh that do not shard it."""
        return [self._placement(plan, axes, otherwise or Replicate()) for plan in self.plans]

    def _placement(self, plan: Plan, axes: str, otherwise: Placement) -> Placement:
        if plan == "whole":
            return Replicate()
        found = [a for a in axes if a == "B"] if plan == "batch" else [a for a in axes if a in _HEADS]
        # One group, or one set of level weights, serves the heads of all processes.
        if not found or (plan == "heads" and found[0] != "H" and self.size(found[0]) == 1):
            return otherwise
        return Shard(axes.index(found[0]))


def run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Run one of `OPERATORS` on each process's part of its operands.

    Raises:
        DistributedError: the operands' placements do not belong together, or an axis is sharded that must be whole.
    """
    name = func._schema.name.split("::")[1]
    arguments = [a.name for a in func._schema.arguments]
    given = {**dict(zip(arguments, args, strict=False)), **kwargs}
    call = _planned(name, {n: x for n, x in given.items() if isinstance(x, Tensor)})
    with torch.no_grad():
        local = {n: _local(call, n, x) if isinstance(x, Tensor) else x for n, x in given.items()}
        in_order = [local.pop(n) for n in arguments[: len(args)]]
        results = func(*in_order, **local)
        return tuple(_joined(call, n, x) for n, x in zip(OPERATORS[name][1], results, strict=True))


def _planned(name: str, tensors: Mapping[str, Tensor]) -> _Call:
    table, step = OPERATORS[name][0], name.endswith("_step")
    axes = {n: _axes(table[n].replace("T", "") if step else table[n], n, x) for n, x in tensors.items()}
    operands = {n: x for n, x in tensors.items() if not n.startswith("grad")}
    meshes = {n: x.device_mesh for n, x in operands.items() if isinstance(x, DTensor)}
    mesh = next(iter(meshes.values()))
    for other, x in operands.items():
        if not isinstance(x, DTensor) or x.device_mesh != mesh:
            what = f"a DTensor on another mesh, {meshes[other]}" if other in meshes else "a plain tensor"
            raise DistributedError(
                f"{name}: {next(iter(meshes))} is a DTensor on {mesh} and {other} {list(x.shape)} is {what}; all "
                "operands must be DTensors on one mesh: distribute_tensor(x, mesh, [Replicate()]), with Shard(0) for "
                "a part of the batch or the shard of the axis of heads"
            )
    plans = [_plan(name, mesh, i, operands, axes) for i in range(mesh.ndim)]
    call = _Call(name, mesh, tensors, axes, plans)
    _check_sizes(call)
    return call


def _axes(axes: str, name: str, x: Tensor) -> str:
    """The axes of one tensor: a decay of the heads alone has no others; an absent gradient has none."""
    if name == "log_decay" and x.dim() == 1:
        return "H"
    return "" if x.dim() == 1 and x.shape[0] == 0 else axes[: x.dim()]


def _plan(name: str, mesh: DeviceMesh, i: int, operands: Mapping[str, Tensor], axes: Mapping[str, str]) -> Plan:
    """What dimension `i` of the mesh is used for."""
    found: dict[Plan, str] = {}
    for operand, x in operands.items():
        placement = x.placements[i]  # type: ignore[attr-defined]
        if isinstance(placement, (Replicate, Partial)):
            continue
        dim = placement.dim % x.dim() if isinstance(placement, Shard) else -1
        axis = axes[operand][dim : dim + 1] if dim >= 0 else ""
        if axis != "B" and axis not in list(_HEADS):
            raise DistributedError(
                f"{name}: {operand} {list(x.shape)} has placement {placement} on {_dimension(mesh, i)}, which shards "
                f"its {_SAID.get(axis, 'other axes')}. The operator can be sharded over batch and heads: redistribute "
                f"{operand} before the call. For sequences that are spread over processes, see "
                "llcompile.distributed.context_parallel"
            )
        found.setdefault("batch" if axis == "B" else "heads", operand)
    if len(found) > 1:
        raise DistributedError(
            f"{name}: on {_dimension(mesh, i)}, {found['batch']} is sharded over the batch and {found['heads']} over "
            "heads; redistribute one of them"
        )
    if "batch" in found and "cu_seqlens" in operands:
        raise DistributedError(
            f"{name}: {found['batch']} is sharded over the batch on {_dimension(mesh, i)}, but with cu_seqlens all "
            "sequences lie in one row; shard the heads, or give each process sequences of its own"
        )
    return next(iter(found), "whole")


def _dimension(mesh: DeviceMesh, i: int) -> str:
    names = mesh.mesh_dim_names
    return f"dimension {i} of the mesh" if not names else f"mesh dimension {names[i]!r}"


def _check_sizes(call: _Call) -> None:
    """Every process must get the same number of heads, and the groups and level weights that belong to them."""
    if call.ways == 1:
        return
    there = "".join(call.axes.values())
    for axis, what in (("H", "heads"), ("G", "query groups"), ("W", "sets of level weights")):
        size = call.size(axis) if axis in there else call.ways
        if size % call.ways and (axis == "H" or size > 1):
            shapes = ", ".join(f"{n} {list(x.shape)}" for n, x in call.tensors.items() if axis in call.axes[n])
            raise DistributedError(
                f"{call.name}: {size} {what} cannot be sharded over {call.ways} processes ({shapes}); their number "
                f"must be a multiple of it{'' if axis == 'H' else ', or 1'}"
            )


def _local(call: _Call, name: str, x: Tensor) -> Tensor:
    """This process's part."""
    if not isinstance(x, DTensor):  # the gradient of an output that nobody read
        x = joined(x, call.mesh, [Replicate()] * call.mesh.ndim, x.shape)
    return part(x, call.placements(call.axes[name]))


def _joined(call: _Call, name: str, local: Tensor) -> Tensor:
    """An output of all processes, out of this one's. Outputs have the axes of the operand that they are named after."""
    step, table = call.name.endswith("_step"), OPERATORS[call.name][0]
    axes = _axes(table[name].replace("T", "") if step else table[name], name, local)
    is_gradient = call.name.endswith("_backward")
    placements = call.placements(axes, Partial() if is_gradient and axes else None)
    shape = list(local.shape)
    for placement in placements:
        if isinstance(placement, Shard):
            shape[placement.dim] = call.size(axes[placement.dim])
    return joined(local, call.mesh, placements, shape)
