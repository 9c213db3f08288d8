"""Emit: what every rewrite needs, inputs for the level weights and values for the nodes that it adds."""

from __future__ import annotations

from torch import fx

from llcompile.passes import dynamo
from llcompile.passes.session import Session, Site


def weight_inputs(session: Session, site: Site, inputs: dict[tuple[int, str], fx.Node]) -> list[fx.Node]:
    """The level weights' tensors as inputs of the program, each made once, handed into the site's region."""
    if site.level_weights is None or site.owner is None:
        return []
    nodes = []
    for name, tensor in site.level_weights.tensors():
        key = (id(tensor), name)
        if key not in inputs:
            path = (site.attribute, name)
            if session.settings.dry_run:  # nothing is attached that Dynamo could read
                inputs[key] = dynamo.hold_tensor(session.module, path, tensor)
            else:
                inputs[key] = dynamo.add_tensor_input(session.graph, site.owner, path)
        nodes.append(site.region.lift(inputs[key]))
    return nodes


def infer_values(nodes: list[fx.Node], template: fx.Node) -> None:
    """Gives new nodes what Dynamo gives its own: a fake value, the module and the line that they stand for."""
    mode = dynamo.fake_mode_of(template.graph)
    for node in nodes:
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in template.meta:
                node.meta[key] = template.meta[key]
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["example_value"])  # type: ignore[misc]
        with mode:
            if node.op == "call_method":
                node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.meta["example_value"] = node.target(*args, **kwargs)  # type: ignore[operator]
