"""Run: what one node of a graph computes on given arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx


def run(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of a call's node, with these arguments in the place of its own."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
