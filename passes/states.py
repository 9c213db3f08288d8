"""States: one that comes in must belong to its mixer, one without levels is taken up as a level, and one that goes out
must reach a call that knows its levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from llcompile.errors import StateError
from llcompile.passes.session import Session
from llcompile.passes.site import CallSite, WrittenSite
from llcompile.patterns import reasons
from llcompile.patterns.known.arguments import is_level_state, state_argument
from llcompile.patterns.known.states import state_problem
from llcompile.torch_internals.inputs import input_value


def states(session: Session) -> int:
    """Checks the state of every known call; returns how many come in.

    Raises:
        StateError: it was made by another model, for other sizes, or of another kind.
    """
    for site in session.sites:
        if isinstance(site, WrittenSite) and session.settings.kind != "none" and site.found.takes_state():
            site.decline(reasons.LINEAR_STATE())
    held = [site for site in session.sites if isinstance(site, CallSite) and _state_node(site) is not None]
    for site in held:
        levels = _levels(session, site)
        problem = state_problem(site.leaf.row, site.arguments, levels, session.settings.kind != "none")
        if problem is None and not site.open and is_level_state(_state(site)):
            problem = f"it has levels, and this call has to run the library's own code, because {site.reason}"
        if problem is not None:
            raise StateError(
                f"{site.module or 'the model'} ({site.where}) received a state that does not belong to it: {problem}"
            )
        linear = session.settings.kind != "none" and not is_level_state(_state(site))
        if site.open and linear and _tensor(site) is None and site.leaf.row.wants_state(site.call):
            site.decline(reasons.STATE_WITHOUT_PLACE())
    return len(held)


def adopt(session: Session) -> list[CallSite]:
    """Turns linear states of the program's inputs into level states, in place; returns the sites that have one.

    All that such a state holds goes to the last level, and positions count from here. The tensor object stays the one
    that the user's cache holds, so that the next call finds the levels in it.
    """
    adopted = []
    for site in session.sites:
        if not isinstance(site, CallSite) or not site.open or site.level_weights is None:
            continue
        tensor = _tensor(site)
        if tensor is None or tensor.dim() != 4:
            continue
        linear = tensor.detach().float()
        linear = linear.transpose(-1, -2) if _value_first(site) else linear
        levels = site.level_weights.levels
        state = linear.new_zeros(*linear.shape[:2], 1 + levels, *linear.shape[2:])
        state[:, :, -1] = linear
        tensor.data = state
        adopted.append(site)
    return adopted


def _value_first(site: CallSite) -> bool:
    """Whether the linear state of this call is [..., V, K]."""
    row = site.leaf.row
    tensor = next(t for t in row.tensors if t.draw == "state")
    axes = row.axes(tensor, 4, site.call.values)
    return axes is not None and axes[-1] == "K"


def _levels(session: Session, site: CallSite) -> int:
    weights = None if site.owner is None else session.settings.find(site.owner, site.attribute)
    return int(weights.levels) if weights is not None else session.settings.levels


def _state_node(site: CallSite) -> fx.Node | None:
    node = site.node.kwargs.get(state_argument(site.leaf.row))
    return node if isinstance(node, fx.Node) else None


def _state(site: CallSite) -> Any:
    node = _state_node(site)
    return None if node is None else node.meta["example_value"]


def _tensor(site: CallSite) -> torch.Tensor | None:
    """The tensor of the user's program that holds the state; None where the graph computes it, or it is trained."""
    node = _state_node(site)
    if node is None:
        return None
    outer = site.region.outer(node)
    held = input_value(outer) if outer.op == "placeholder" else None
    return held if isinstance(held, torch.Tensor) and not isinstance(held, nn.Parameter) else None
