"""Captured: tensors that code holds beside its modules: in a closure, a global, or a container of a module.

A table of decays or angles at the top of a file is such a tensor. It is no input of the call: its numbers are the same
at every call until the program changes them, as those of a buffer are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.source import CellContentsSource, GlobalSource, LocalSource

from llcompile.torch_internals.frame import current_output, kept_for_the_trace, outermost_frame
from llcompile.torch_internals.owner_input import HELD


def is_captured(node: fx.Node, tensor: torch.Tensor) -> bool:
    """Whether a placeholder's tensor is captured, and looks like a table of constants: of two axes, or square.

    A function without arguments (`lambda: model(x)`) captures the model's input instead; none of its tensors counts.
    """
    source = _source(node)
    if source is None or tensor.requires_grad or not _is_table(tensor) or not _takes_tensors():
        return False
    chain = list(_chain(source))
    return any(map(_is_kept, chain)) and not any(getattr(link, "member", "") == HELD for link in chain)


def _is_table(tensor: torch.Tensor) -> bool:
    long = [size for size in tensor.shape if size != 1]
    return len(long) <= 2 or long[-1] == long[-2]


@kept_for_the_trace
def _takes_tensors() -> bool:
    """Whether the traced frame is given a tensor of two axes or more, which may be a sequence."""
    output = current_output()
    nodes = output.graph.find_nodes(op="placeholder") if output is not None else ()
    given = ((_source(node), node.meta.get("example_value")) for node in nodes)
    return any(
        isinstance(example, torch.Tensor) and example.dim() > 1 and not any(map(_is_kept, _chain(source)))
        for source, example in given
    )


def _source(node: fx.Node) -> Any:
    return getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)


def _chain(source: Any) -> Iterator[Any]:
    """A source and those that it is reached from."""
    while source is not None:
        yield source
        source = getattr(source, "base", None)


def _is_kept(source: Any) -> bool:
    """Whether what is reached from here outlives a call."""
    if isinstance(source, LocalSource):
        frame = outermost_frame()
        return not source.is_input or (
            frame is not None and isinstance(frame.f_locals.get(source.local_name), nn.Module)
        )
    return isinstance(source, (GlobalSource, CellContentsSource))
