"""In place: a decoded token's state is updated where the model copies it to, if that is where the old one was.

Nobody can tell the difference: the model changes that memory itself, and nothing reads or writes it in between.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from llcompile.kernels import in_place_operator  # noqa: F401  (registers the torch operator)
from llcompile.kernels.state import state_dtype
from llcompile.passes.session import Session
from llcompile.patterns.graph.effects import Effects

_STATE = 4  # which argument of a step


def in_place(session: Session) -> int:
    """Rewrites the steps of a graph that is compiled without gradients; returns how many."""
    if torch.is_grad_enabled():
        return 0
    found = 0
    for region in session.regions:
        for node in list(region.graph.nodes):
            if node.target is torch.ops.llcompile.loglinear_attention_step:
                copy = _copy_back(region.effects, node)
                if copy is not None:
                    _rewrite(node, copy)
                    found += 1
    return found


def _copy_back(effects: Effects, step: fx.Node) -> fx.Node | None:
    """The node that copies the new state to where the old one was, if it is all that reads the new one."""
    state = step.args[_STATE]
    results = [user for user in step.users if user.target is operator.getitem and user.args[1] == 1]
    copies = [user for result in results for user in result.users]
    if len(results) != 1 or len(copies) != 1 or not isinstance(state, fx.Node) or not _is_kept_as_it_is(step, state):
        return None
    (copy,) = copies
    if (copy.op, copy.target, copy.args[1:]) != ("call_method", "copy_", (results[0],)) or copy.kwargs:
        return None
    if copy.args[0] is not state:
        return None
    shown, nodes = effects.shows(state), list(step.graph.nodes)
    for node in nodes[nodes.index(step) + 1 : nodes.index(copy)]:
        if any(x is state or not shown.isdisjoint(effects.shows(x)) for x in node.all_input_nodes):
            return None
    return copy


def _is_kept_as_it_is(step: fx.Node, state: fx.Node) -> bool:
    """Whether the new state has the kind and the dtype of the old one, `[B, H, (1 + L,) K, V]`."""
    value, operands = state.meta.get("example_value"), step.args[2]
    if not isinstance(value, torch.Tensor) or not isinstance(operands, fx.Node):
        return False
    v = operands.meta.get("example_value")
    levels = step.args[3] is not None
    return isinstance(v, torch.Tensor) and value.dtype == state_dtype(v.dtype) and value.dim() == 4 + levels


def _rewrite(step: fx.Node, copy: fx.Node) -> None:
    """Writes the operator that changes the state in the place of the step and of the copy."""
    graph, state = step.graph, step.args[_STATE]
    assert isinstance(state, fx.Node)
    with graph.inserting_before(step):
        new = graph.call_function(torch.ops.llcompile.loglinear_attention_step_, step.args, dict(step.kwargs))
    new.meta = dict(step.meta)
    new.meta["example_value"] = step.meta["example_value"][0]
    copy.replace_all_uses_with(state)
    graph.erase_node(copy)
    for result in list(step.users):
        if result.args[1] == 0:
            result.replace_all_uses_with(new)
        graph.erase_node(result)
    graph.erase_node(step)
