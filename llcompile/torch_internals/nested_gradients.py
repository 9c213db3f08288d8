"""Nested gradients: while passes look at a graph of torch.func.grad, its operations read what was handed in itself.

Dynamo writes torch.func.grad out: inputs are wrapped for a level of differentiation, the operations read the wrapped
tensors, and the gradient is taken of their result with respect to these. No number changes by that. So `unwrap` lets
the operations read the inputs, where the passes know parameters by identity, and `wrap` undoes it for all that stands
inside by then, the rewrite's nodes included.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

_OPENS, _CLOSES, _WRAPS = "_grad_increment_nesting", "_grad_decrement_nesting", "_wrap_for_grad"
# These are about wrapped tensors; none of them writes to a tensor.
_ABOUT = (_WRAPS, "_unwrap_for_grad", "_set_tensor_requires_grad", "_autograd_grad")
_AROUND = (
    _OPENS,
    _CLOSES,
    "set_inplace_requires_grad_allowed",
    "_saved_tensors_hooks_disable",
    "_saved_tensors_hooks_enable",
)


def is_about(node: fx.Node) -> bool:
    """Whether the node wraps or unwraps a tensor for a gradient, or takes the gradient."""
    return node.op == "call_function" and _name(node) in _ABOUT


def is_around(node: fx.Node) -> bool:
    """Whether the node opens or closes a level of differentiation, or says what holds inside of it."""
    return node.op == "call_function" and _name(node) in _AROUND


def unwrap(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Has every operation inside of torch.func.grad read what is wrapped; returns that -> its wrapper, for `wrap`.

    What is read inside in two ways (wrapped twice, or as it is, too) stays: there it matters which of them is read.
    """
    read: dict[fx.Node, set[fx.Node]] = {}
    depth = 0
    for node in graph.nodes:
        depth += (_name(node) == _OPENS) - (_name(node) == _CLOSES)
        if depth and not is_about(node):
            for source in node.all_input_nodes:
                read.setdefault(_bare(source), set()).add(source)
    found = {given: sources.pop() for given, sources in read.items() if len(sources) == 1}
    found = {given: wrapper for given, wrapper in found.items() if wrapper is not given}
    for given, wrapper in found.items():
        wrapper.replace_all_uses_with(given, delete_user_cb=lambda user: not is_about(user))
    return found


def wrap(graph: fx.Graph, wrappers: Mapping[fx.Node, fx.Node]) -> None:
    """Undoes `unwrap`: whatever stands behind a wrapper and inside of its level reads it."""
    levels: list[set[fx.Node]] = []
    for node in graph.nodes:
        name = _name(node)
        if name == _OPENS:
            levels.append(set())
        elif name == _CLOSES:
            levels.pop()
        elif name == _WRAPS and levels:
            levels[-1].add(node)
        elif not is_about(node):
            for given in node.all_input_nodes:
                wrapper = wrappers.get(given)
                if wrapper is not None and any(wrapper in level for level in levels):
                    node.replace_input_with(given, wrapper)


def _bare(node: fx.Node) -> fx.Node:
    """What is inside of all wrappers."""
    while _name(node) == _WRAPS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""
