"""Lengths: a graph that serves many lengths, with a mixer in it that is known at one, becomes a graph for that one.

Dynamo then guards the length and traces the frame again for another. The level weights act at each; what is paid is a
compilation for each length.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from llcompile.patterns.structure.barriers import around
from llcompile.patterns.structure.found import Found
from llcompile.patterns.structure.lifted import Lifted
from llcompile.patterns.structure.positions import numbers_vary, symbolic
from llcompile.patterns.structure.program import Value
from llcompile.torch_internals.sizes import hold_size

log = logging.getLogger("llcompile")


def hold(found: Found, with_it: Iterable[Found] = ()) -> None:
    """Fixes the length of a mixer that is known at no other; notes on it where the length cannot be fixed.

    Args:
        found: the mixer.
        with_it: its denominators.
    """
    group = [found, *with_it]
    found.fixed = next((f.fixed for f in group if f.fixed is not None), None)
    if found.fixed is not None:
        found.held = hold_sizes(size for one in group for size in (*_times(one), *_numbers(one)))
        log.debug("lengths: %s, %s", found.fixed.text, "fixed" if found.held else "which must vary")


def hold_sizes(sizes: Iterable[Any]) -> bool:
    """Makes numbers of all these sizes; False, where one of them has to vary."""
    return all(hold_size(size) for size in sizes)


def _times(found: Found) -> Iterator[Any]:
    """The sizes along time of what comes into the mixer."""
    analysis = found.analysis
    for live_in in found.subgraph.live_ins:
        value = live_in.base.value if isinstance(live_in, Lifted) and live_in.base is not None else live_in
        if not isinstance(value, Value) or value.node is None or value not in analysis.followed.axes:
            continue
        example = value.node.meta.get("example_value")
        if isinstance(example, torch.Tensor):
            axes = analysis.axes(value)
            yield from (n for n, axis in zip(example.shape, axes, strict=True) if any(map(analysis.is_time, axis)))


def _numbers(found: Found) -> Iterator[Any]:
    """The sizes that come into it as numbers (and, where both stand in one call, as sizes)."""
    for op in dict.fromkeys((*found.ops, *around(found.subgraph, found.tail))):
        sizes = [size for _, size in symbolic(op.node)]
        yield from (size for size in sizes if isinstance(size, torch.SymFloat) or numbers_vary(op))
