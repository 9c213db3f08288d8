"""Heads that are split over processes, as tensor parallel does it, and the level weights that belong to them.

Projections that are DTensors give each process its own heads: as plain tensors, or as DTensors that go on through the
mixer. Level weights are then DTensors, sharded by heads over the same processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from llcompile.errors import LevelWeightsError
from llcompile.patterns.graph.walk import walk
from llcompile.torch_internals.dtensors import as_dtensor, is_dtensor, is_move, own_part, possible, read_on_all


@dataclass(frozen=True)
class HeadSplit:
    """How a mixer's heads are split.

    Args:
        mesh: the processes.
        heads: the dimensions of the mesh over which heads are split.
        rows: those over which the batch is.
        inside: the mixer's operands are DTensors of all heads, and not plain tensors of this process's.
        size: of the axis that is split, on all processes together; 0 where none is.
    """

    mesh: Any
    heads: tuple[int, ...]
    rows: tuple[int, ...]
    inside: bool
    size: int = 0

    @property
    def ways(self) -> int:
        """Over how many processes the heads are split."""
        return math.prod(self.mesh.size(i) for i in self.heads)

    @property
    def seen(self) -> int:
        """How many times as many heads there are as the graph sees."""
        return 1 if self.inside else self.ways

    def inputs(self, x: Any, tensors: list[Any]) -> tuple[Any, list[Any]]:
        """What level weights read and their tensors (proxies), as their function needs them here."""
        like = tensors[0]
        if self.inside:
            wrapped = [_call(as_dtensor, t, like, ()) for t in tensors]
            return _call(as_dtensor, x, like, self.rows), wrapped
        return _call(read_on_all, x, like, self.heads), [_call(own_part, t, like, self.heads) for t in tensors]


def _call(function: Any, x: fx.Proxy, like: fx.Proxy, dims: tuple[int, ...]) -> fx.Proxy:
    return x.tracer.create_proxy("call_function", function, (x, like, dims), {})


def head_split(values: Iterable[fx.Node]) -> HeadSplit | None:
    """How the heads of these values are split; None where each process has all of them as plain tensors."""
    if not possible():  # the walk goes up to the graph's inputs where there are none
        return None
    for node in walk(values, _above):
        example = node.meta.get("example_value")
        if is_dtensor(example):
            return _split(example, inside=True)
        given = _taken_apart(node)
        if given is not None:
            found = _split(given.meta["example_value"], inside=False)
            return found if found.heads else None
    return None


def _taken_apart(node: fx.Node) -> fx.Node | None:
    """The DTensor of which a node is this process's part."""
    if not is_move(node) or not node.all_input_nodes:
        return None
    (given, *_) = node.all_input_nodes
    return given if is_dtensor(given.meta.get("example_value")) else None


def _above(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes


def _split(x: Any, inside: bool) -> HeadSplit:
    dims = {i: p.dim % x.dim() for i, p in enumerate(x.placements) if p.is_shard()}
    # A projection's features are its last axis; inside of a mixer, heads are any axis but that of the batch.
    heads = tuple(i for i, dim in dims.items() if (dim > 0 if inside else dim == x.dim() - 1))
    size = int(x.shape[dims[heads[0]]]) if heads else 0
    return HeadSplit(x.device_mesh, heads, tuple(i for i, dim in dims.items() if dim == 0), inside, size)


def expect_even(where: str, split: HeadSplit | None) -> None:
    """Every process must have as many heads of the mixer at `where` as the others.

    Raises:
        LevelWeightsError: they have not, so that no process knows how many there are in all.
    """
    if split is not None and split.size % split.ways:
        raise LevelWeightsError(
            f"the mixer at {where} is split over {split.ways} processes along an axis of size {split.size}, which is "
            f"no multiple of {split.ways}: the processes would have different numbers of heads. Use a number of "
            "processes that divides the heads, or leave the mixer whole"
        )


def expect_fitting(name: str, where: str, weights: Any, split: HeadSplit | None) -> None:
    """Level weights, by their name, must be split as the heads of the mixer at `where` are.

    Raises:
        LevelWeightsError: they are not.
    """
    first = weights.tensors()[0][1]
    style = "llcompile.distributed.LevelWeightsParallel()"
    if split is not None and not is_dtensor(first):
        raise LevelWeightsError(
            f"{name}: the heads of the mixer at {where} are split over {split.ways} processes, and its level "
            f"weights, {weights.extra_repr()}, are not; put {name!r}: {style} into the plan of parallelize_module"
        )
    if split is None and weights.own_heads != weights.heads:
        raise LevelWeightsError(
            f"{name}: its level weights, {weights.extra_repr()}, are split over {weights.heads // weights.own_heads} "
            f"processes, and each of them has all heads of the mixer at {where}; leave {style} for {name!r} "
            "out of the plan, or split the projections of the mixer, too"
        )
    if split is not None and first.device_mesh != split.mesh:
        raise LevelWeightsError(
            f"{name}: its level weights are on {first.device_mesh}, and the heads of the mixer at {where} on "
            f"{split.mesh}; give both the same mesh"
        )
