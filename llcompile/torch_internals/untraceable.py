"""What an inner compiler cannot trace: Dynamo breaks the graph there, unless it believes that the user wants an error.

It believes so once a trace has met a function of `torch._dynamo.allow_in_graph`. Ours are such: one node for a whole
mixer, and marks. They are no reason, and taken out of the graph before it is compiled. An example are the experts of
transformers before 5.23, whose gradient reads numbers of tokens on the host.
"""

from __future__ import annotations

from torch import fx
from torch._dynamo.trace_rules import is_callable_allowed

from llcompile.torch_internals.frame import current_output


def let_break(module: fx.GraphModule) -> None:
    """Has Dynamo break a graph that cannot be compiled, if no function that was allowed in it is left."""
    output = current_output()
    if output is None or any(_allowed(node) for part in _parts(module) for node in part.graph.nodes):
        return
    output.has_user_defined_allowed_in_graph = False


def _allowed(node: fx.Node) -> bool:
    return node.op == "call_function" and is_callable_allowed(node.target)


def _parts(module: fx.GraphModule) -> list[fx.GraphModule]:
    """The graph, and those of what it calls."""
    return [part for part in module.modules() if isinstance(part, fx.GraphModule)]
