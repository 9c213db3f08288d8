"""Modes: under which of PyTorch's modes each operation of a graph runs, as far as they change what it means.

Dynamo writes `torch.no_grad()` and `torch.autocast()` into its graph as calls that switch a mode for what comes after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx


class Mode(NamedTuple):
    """The modes of one operation.

    Args:
        grad: whether gradients pass it.
        autocast: what an enclosing `torch.autocast` in the graph was called with; None outside of one.
        function: the call of an autograd.Function that it is in, which has a backward of its own; None outside of one.
    """

    grad: bool = True
    autocast: tuple[Any, ...] | None = None
    function: fx.Node | None = None


USUAL = Mode()


class Modes:
    """Follows the modes through a graph, node by node.

    Args:
        graph: the graph.
        grad: whether gradients are taken where it starts, should it not say so itself.
    """

    def __init__(self, graph: fx.Graph, grad: bool) -> None:
        switches = (node for node in graph.nodes if node.target is torch._C._set_grad_enabled)
        first = next(switches, None)
        # Dynamo writes a switch only where the mode changes.
        self.now = Mode(grad if first is None else not first.args[0])
        self._left: dict[fx.Node, Mode] = {}  # where a mode was entered -> what it was before

    def switch(self, node: fx.Node) -> bool:
        """Whether the node does nothing but switch a mode; if so, the mode is switched."""
        if node.op != "call_function" or node.target not in _SWITCHES:
            return False
        entered = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if entered is not None:
            self.now = self._left.get(entered, self.now)
            return True
        self._left[node] = self.now
        self.now = _SWITCHES[node.target](self.now, node.args)
        return True


def is_function(node: fx.Node) -> bool:
    """Whether the node calls an autograd.Function."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "autograd_function_apply"


# What switches a mode -> the mode that comes after it, from the one before and the call's arguments.
_SWITCHES: dict[Any, Callable[[Mode, tuple[Any, ...]], Mode]] = {
    torch._C._set_grad_enabled: lambda now, args: now._replace(grad=bool(args[0])),
    torch.autograd.grad_mode._enter_inference_mode: lambda now, args: now._replace(grad=now.grad and not args[0]),
    torch.autograd.grad_mode._exit_inference_mode: lambda now, args: now,
    torch.amp.autocast_mode._enter_autocast: lambda now, args: now._replace(autocast=tuple(args)),
    torch.amp.autocast_mode._exit_autocast: lambda now, args: now,
}
