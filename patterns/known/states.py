"""Whether a state that comes into a known call can be one of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llcompile.patterns.known.arguments import axis_size, is_level_state
from llcompile.patterns.known.entry import KnownFunction


def state_problem(entry: KnownFunction, given: Mapping[str, Any], levels: int | None, weighted: bool) -> str | None:
    """What speaks against the state of a call, or None.

    Args:
        row: the function's row.
        given: the call's arguments by name; tensors may be fake.
        levels: how many levels the mixer's weights have, where that is known.
        weighted: whether the mixer has level weights.
    """
    tensor = next((t for t in entry.tensors if t.draw == "state"), None)
    state = given.get(tensor.name) if tensor is not None else None
    if tensor is None or not isinstance(state, torch.Tensor):
        return None
    sizes = state_sizes(entry, given)
    axes = entry.axes(tensor, 4, given)
    if axes is None or any(not set(axis.split(".")) <= set(sizes) for axis in axes[1:]):
        return None
    linear = [axis_size(axis, sizes) for axis in axes[1:]]
    shape = f"its shape is {_shown(state.shape)}"
    entries, batch = _number(state.shape[0]), _number(batch_size(entry, given, state))
    if None not in (entries, batch) and entries != batch:
        return f"{shape}, for a batch of {entries}, but this batch has {batch}"
    if not is_level_state(state):
        own = state.dim() == 4 and [int(n) for n in state.shape[1:]] == linear
        return None if own else f"{shape}, expected {_shown(['B', *linear])}"
    if not weighted:
        return f"{shape}, a state with levels, and level weights are off (level_weights='none'): prefill again"
    heads, key, value = sizes["H"], sizes["K"], sizes["V"]
    found = [int(n) for n in state.shape[1:]]
    if [found[0], *found[2:]] != [heads, key, value] or found[1] < 2:
        return f"{shape}, expected {_shown(['B', heads, '1 + L', key, value])}"
    if levels is not None and found[1] != 1 + levels:
        return f"{shape}, which is {found[1] - 1} levels, and the level weights have {levels}"
    return None


def state_sizes(entry: KnownFunction, given: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of heads and widths, from every tensor but the state."""
    sizes: dict[str, int] = {}
    for tensor in entry.tensors:
        value = given.get(tensor.name)
        axes = entry.axes(tensor, value.dim(), given) if isinstance(value, torch.Tensor) else None
        if tensor.draw == "state" or axes is None:
            continue
        assert isinstance(value, torch.Tensor)
        for axis, size in zip(axes, value.shape, strict=True):
            if axis.isalpha() and axis not in "BT":
                sizes.setdefault(axis, int(size))
    return sizes


def batch_size(entry: KnownFunction, given: Mapping[str, Any], state: torch.Tensor) -> Any:
    """How many rows the state of a call must have; the state's own where sequences are packed, one row for each."""
    if any(given.get(name) is not None for name in entry.packing):
        return state.shape[0]
    for tensor in entry.tensors:
        value = given.get(tensor.name)
        axes = entry.axes(tensor, value.dim(), given) if isinstance(value, torch.Tensor) else None
        if tensor.draw != "state" and axes is not None and "B" in axes:
            assert isinstance(value, torch.Tensor)
            return value.shape[axes.index("B")]
    return state.shape[0]


def _number(size: Any) -> int | None:
    """A size as a number that no guard is put on; None where it depends on data."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.hint) if size.node.has_hint() else None


def _shown(shape: Any) -> str:
    sizes = ((size if isinstance(size, str) else _number(size)) for size in shape)
    return "[" + ", ".join("?" if size is None else str(size) for size in sizes) + "]"
