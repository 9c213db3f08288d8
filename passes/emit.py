"""Emit: what every rewrite needs, inputs for the level weights and values for the nodes that it adds."""

from __future__ import annotations

from torch import fx

from llcompile.errors import MissedLevelWeightsError
from llcompile.passes.marks import marked_tensors
from llcompile.passes.session import Session
from llcompile.passes.site import Site
from llcompile.torch_internals import reach
from llcompile.torch_internals.inputs import fake_mode_of, hold_tensor
from llcompile.torch_internals.owner_input import HELD
from llcompile.torch_internals.places import place_of


def weight_inputs(session: Session, site: Site, inputs: dict[tuple[int, str], fx.Node]) -> list[fx.Node]:
    """The level weights' tensors: as the owner's call has them, else as inputs of the program, each made once.

    Inputs are handed into the site's region.
    """
    if site.level_weights is None or site.owner is None:
        return []
    marked = marked_tensors(session.marks, site.region, place_of(site.node)[0], site.attribute)
    if marked is not None:
        return list(marked)
    nodes = []
    for name, tensor in site.level_weights.tensors():
        key = (id(tensor), name)
        if key not in inputs:
            if session.settings.dry_run:  # nothing is attached that Dynamo could read
                inputs[key] = hold_tensor(session.module, (site.attribute, name), tensor)
            else:
                path = session.settings.path(site.owner, site.attribute)
                inputs[key] = _input(session, site, (site.attribute, *path, name))
        nodes.append(site.region.lift(inputs[key]))
    return nodes


def _input(session: Session, site: Site, path: tuple[str, ...]) -> fx.Node:
    assert site.owner is not None
    try:
        return reach.add_tensor_input(session.graph, site.owner, path)
    except LookupError as error:
        raise MissedLevelWeightsError(
            f"{site.module or type(site.owner).__name__}: its level weights cannot be read in this frame: {error}. "
            "Compile the model as a whole, or run the call uncompiled."
        ) from error


def owner_input(session: Session, site: Site) -> fx.Node:
    """What the owner was called with, [B, T, D], as an input of the program, handed into the site's region."""
    assert site.owner is not None
    assert site.owner_input is not None
    if session.settings.dry_run:
        return site.region.lift(hold_tensor(session.module, (site.attribute, HELD), site.owner_input))
    path = (site.attribute, *session.settings.path(site.owner, site.attribute), HELD)
    return site.region.lift(_input(session, site, path))


def infer_values(nodes: list[fx.Node], template: fx.Node) -> None:
    """Gives new nodes what Dynamo gives its own: a fake value, the module and the line that they stand for."""
    mode = fake_mode_of(template.graph)
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
