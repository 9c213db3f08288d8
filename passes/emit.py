"""Emit: what every rewrite needs, inputs for the level weights and values for the nodes that it adds."""

from __future__ import annotations

from torch import fx

from llcompile.errors import MissedLevelWeightsError
from llcompile.passes.candidate import Candidate
from llcompile.passes.marks import marked_tensors
from llcompile.passes.session import Session
from llcompile.torch_internals import reach
from llcompile.torch_internals.inputs import fake_mode_of, hold_tensor
from llcompile.torch_internals.owner_input import HELD
from llcompile.torch_internals.places import place_of


def weight_inputs(session: Session, candidate: Candidate, inputs: dict[tuple[int, str], fx.Node]) -> list[fx.Node]:
    """The level weights' tensors: as the owner's call has them, else as inputs of the program, each made once.

    Inputs are handed into the candidate's region.
    """
    if candidate.level_weights is None or candidate.owner is None:
        return []
    marked = marked_tensors(session.marks, candidate.region, place_of(candidate.node)[0], candidate.attribute)
    if marked is not None:
        return list(marked)
    nodes = []
    for name, tensor in candidate.level_weights.tensors():
        key = (id(tensor), name)
        if key not in inputs:
            if session.settings.dry_run:  # nothing is attached that Dynamo could read
                inputs[key] = hold_tensor(session.module, (candidate.attribute, name), tensor)
            else:
                path = session.settings.path(candidate.owner, candidate.attribute)
                inputs[key] = _input(session, candidate, (candidate.attribute, *path, name))
        nodes.append(candidate.region.lift(inputs[key]))
    return nodes


def _input(session: Session, candidate: Candidate, path: tuple[str, ...]) -> fx.Node:
    assert candidate.owner is not None
    try:
        return reach.add_tensor_input(session.graph, candidate.owner, path)
    except LookupError as error:
        raise MissedLevelWeightsError(
            f"{candidate.module or type(candidate.owner).__name__}: its level weights cannot be read in this frame: "
            f"{error}. Compile the model as a whole, or run the call uncompiled."
        ) from error


def owner_input(session: Session, candidate: Candidate) -> fx.Node:
    """What the owner was called with, [B, T, D], as an input of the program, handed into the candidate's region."""
    assert candidate.owner is not None
    assert candidate.owner_input is not None
    if session.settings.dry_run:
        return candidate.region.lift(hold_tensor(session.module, (candidate.attribute, HELD), candidate.owner_input))
    path = (candidate.attribute, *session.settings.path(candidate.owner, candidate.attribute), HELD)
    return candidate.region.lift(_input(session, candidate, path))


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
