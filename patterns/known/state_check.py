"""Whether a state that comes into a known call can be one of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llcompile.patterns.known.arguments import axis_size, is_level_state, sizes_of
from llcompile.patterns.known.entry import KnownFunction
from llcompile.torch_internals.sizes import size_hint


def state_problem(entry: KnownFunction, given: Mapping[str, Any], levels: int | None, weighted: bool) -> str | None:
    """What speaks against the state of a call, or None.

    Args:
        entry: the function's entry.
        given: the call's arguments by name; tensors may be fake.
        levels: how many levels the mixer's weights have, where that is known.
        weighted: whether the mixer has level weights.
    """
    state = given.get(entry.state)
    if not isinstance(state, torch.Tensor):
        return None
    sizes, axes = sizes_of(entry, given), entry.state_axes(given)
    if not axes or any(not set(axis.split(".")) <= set(sizes) for axis in axes[1:]):
        return None
    linear = [axis_size(axis, sizes) for axis in axes[1:]]
    shape = f"its shape is {_shown(state.shape)}"
    entries, batch = size_hint(state.shape[0]), size_hint(rows_of(entry, given))
    if None not in (entries, batch) and entries != batch:
        return f"{shape}, for a batch of {entries}, but this batch has {batch}"
    if not is_level_state(state):
        own = [int(n) for n in state.shape[1:]] == linear
        return None if own else f"{shape}, expected {_shown(['B', *linear])}"
    if not weighted:
        return f"{shape}, a state with levels, and level weights are off (level_weights='none'): prefill again"
    heads, key, value = sizes["H"], sizes["K"], sizes.get("V", 1)
    found = [int(n) for n in state.shape[1:]]
    if [found[0], *found[2:]] != [heads, key, value] or found[1] < 2:
        return f"{shape}, expected {_shown(['B', heads, '1 + L', key, value])}"
    if levels is not None and found[1] != 1 + levels:
        return f"{shape}, which is {found[1] - 1} levels, and the level weights have {levels}"
    return None


def rows_of(entry: KnownFunction, given: Mapping[str, Any]) -> Any:
    """How many rows the state of a call must have; as many as it has where sequences are packed, one row for each."""
    own = given[entry.state].shape[0]
    packed = any(given.get(name) is not None for name in entry.packing)
    return own if packed else sizes_of(entry, given).get("B", own)


def _shown(shape: Any) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in map(size_hint, shape)) + "]"
