"""DTensors in a recorded graph: each is recorded as the whole tensor that it stands for.

What only moves numbers between a process's own part and a DTensor is then nothing, or a cut.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from llcompile.torch_internals.dtensors import is_dtensor, is_move

Cut = tuple[int, int, int]  # dimension, start, length


def cuts_of(node: fx.Node) -> list[Cut] | None:
    """What a move cuts out of its input, [] where nothing; None where it is no move, or more than a cut."""
    if not is_move(node) or not node.all_input_nodes:
        return None
    given: Any = node.all_input_nodes[0].meta.get("example_value")
    made: Any = node.meta.get("example_value")
    if not is_dtensor(given):
        alike = is_dtensor(made) and all(placement.is_replicate() for placement in made.placements)
        return [] if alike else None
    if is_dtensor(made) or (isinstance(made, Tensor) and made.shape == given.shape):
        return [] if is_dtensor(made) or not any(p.is_partial() for p in given.placements) else None
    return _own_part(given, made)


def _own_part(given: Any, made: Any) -> list[Cut] | None:
    """The part of an evenly sharded DTensor that this process has."""
    cuts: list[Cut] = []
    coordinate = given.device_mesh.get_coordinate()
    for i, placement in enumerate(given.placements):
        if placement.is_replicate():
            continue
        dim = placement.dim % given.dim() if placement.is_shard() else -1
        length = given.shape[dim] // given.device_mesh.size(i)
        if dim < 0 or coordinate is None or made.shape[dim] != length or dim in (cut[0] for cut in cuts):
            return None
        cuts.append((dim, coordinate[i] * length, length))
    return cuts


def own_numbers(held: Any) -> Any:
    """A tensor of the user's program, or this process's part of it, whose numbers can be read."""
    return held.to_local() if is_dtensor(held) else held
