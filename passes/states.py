"""States: one that comes in must belong to its mixer, one without levels is taken up as a level, and one that goes out
must reach a call that knows its levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from llcompile.errors import StateError
from llcompile.passes.candidate import CallCandidate, GraphCandidate
from llcompile.passes.session import Session
from llcompile.patterns import reasons
from llcompile.patterns.known.arguments import is_level_state
from llcompile.patterns.known.state_check import state_problem
from llcompile.patterns.known.state_layout import to_operator
from llcompile.torch_internals.inputs import input_value


def states(session: Session) -> int:
    """Checks the state of every known call; returns how many come in.

    Raises:
        StateError: it was made by another model, for other sizes, or of another kind.
    """
    for candidate in session.candidates:
        if isinstance(candidate, GraphCandidate) and session.settings.kind != "none" and candidate.found.takes_state():
            candidate.decline(reasons.LINEAR_STATE())
    held = [
        candidate
        for candidate in session.candidates
        if isinstance(candidate, CallCandidate) and _state_node(candidate) is not None
    ]
    for candidate in held:
        levels = _levels(session, candidate)
        problem = state_problem(candidate.captured.entry, candidate.arguments, levels, session.settings.kind != "none")
        if problem is None and not candidate.open and is_level_state(_state(candidate)):
            problem = f"it has levels, but this call must run the library's own code, because {candidate.reason}"
        if problem is not None:
            raise StateError(
                f"{candidate.module or 'the model'} ({candidate.where}) received a state that does not belong to it: "
                f"{problem}"
            )
        linear = session.settings.kind != "none" and not is_level_state(_state(candidate))
        if (
            candidate.open
            and linear
            and _tensor(candidate) is None
            and candidate.captured.entry.wants_state(candidate.call)
        ):
            candidate.decline(reasons.STATE_WITHOUT_PLACE())
    return len(held)


def adopt(session: Session) -> list[CallCandidate]:
    """Turns linear states of the program's inputs into level states, in place; returns the candidates that have one.

    All that such a state holds goes to the last level, and positions count from here. The tensor object stays the one
    that the user's cache holds, so that the next call finds the levels in it.
    """
    adopted = []
    for candidate in session.candidates:
        if not isinstance(candidate, CallCandidate) or not candidate.open or candidate.level_weights is None:
            continue
        tensor = _tensor(candidate)
        if tensor is None or is_level_state(tensor):
            continue
        linear = to_operator(tensor.detach().float(), candidate.captured.entry.state_axes(candidate.call.values))
        levels = candidate.level_weights.levels
        state = linear.new_zeros(*linear.shape[:2], 1 + levels, *linear.shape[2:])
        state[:, :, -1] = linear
        tensor.data = state
        adopted.append(candidate)
    return adopted


def _levels(session: Session, candidate: CallCandidate) -> int:
    weights = None if candidate.owner is None else session.settings.find(candidate.owner, candidate.attribute)
    return int(weights.levels) if weights is not None else session.settings.levels


def _state_node(candidate: CallCandidate) -> fx.Node | None:
    node = candidate.node.kwargs.get(candidate.captured.entry.state)
    return node if isinstance(node, fx.Node) else None


def _state(candidate: CallCandidate) -> Any:
    node = _state_node(candidate)
    return None if node is None else node.meta["example_value"]


def _tensor(candidate: CallCandidate) -> torch.Tensor | None:
    """The tensor of the user's program that holds the state; None where the graph computes it, or it is trained."""
    node = _state_node(candidate)
    if node is None:
        return None
    outer = candidate.region.outer(node)
    held = input_value(outer) if outer.op == "placeholder" else None
    return held if isinstance(held, torch.Tensor) and not isinstance(held, nn.Parameter) else None
