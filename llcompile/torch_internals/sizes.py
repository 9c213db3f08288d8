"""Sizes that may vary from call to call: their example values, and making them numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def size_hint(size: Any, factor: int = 1) -> Any:
    """The number that a symbolic size had in the example, or None where it depends on data.

    With a `factor`, the number that it would have if all sizes that may vary were that many times as large.
    """
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return size
    if not size.node.has_hint():
        return None
    if factor == 1:
        return size.node.hint
    values = size.node.shape_env.backed_var_to_val
    found = size.node.expr.subs({symbol: value * factor for symbol, value in values.items()})
    return int(found) if found.is_Integer else size.node.hint


def dims_by_stride(x: torch.Tensor) -> list[int] | None:
    """The dimensions from the outermost in memory to the innermost; None where the tensor is not dense."""
    order = sorted(range(x.dim()), key=lambda dim: (-int(size_hint(x.stride(dim)) or 0), dim))
    return order if x.permute(order).is_contiguous() else None


def hold_size(size: Any) -> bool:
    """Makes a size that may vary a number: Dynamo guards it, and traces the frame again where it is another one.

    False where the user demands that it varies (`mark_dynamic`, a dimension of an export).
    """
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return True
    node = size.node
    if not node.has_hint() or node.expr.free_symbols & _demanded(node.shape_env):
        return False
    if isinstance(size, torch.SymInt):
        int(size)
    elif isinstance(size, torch.SymFloat):
        float(size)
    else:
        bool(size)
    return True


def _demanded(shape_env: Any) -> set[Any]:
    """The symbols of sizes that must not become numbers."""
    found: set[Any] = set()
    for tracked in getattr(shape_env, "tracked_fakes", None) or ():
        constraints = getattr(getattr(tracked, "symbolic_context", None), "constraint_sizes", None) or ()
        for dim, constraint in enumerate(constraints):
            if constraint is not None and not getattr(constraint, "warn_only", False):
                size = tracked.fake.shape[dim]
                found |= size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()
    return found


def is_symbolic(graph: fx.Graph) -> bool:
    """Whether some size of the graph's inputs may vary from call to call."""
    inputs = [node.meta.get("example_value") for node in graph.find_nodes(op="placeholder")]
    sizes = [size for x in inputs for size in (x.shape if isinstance(x, torch.Tensor) else (x,))]
    return any(isinstance(size, torch.SymInt) for size in sizes)
