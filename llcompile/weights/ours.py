"""Whether the trace under way is made for our backend, and with how many levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from llcompile.torch_internals import reach
from llcompile.torch_internals.backends import around_backend, backend_mark, mark_backend, tracing_backend
from llcompile.torch_internals.trace import note_trace
from llcompile.weights.held import held
from llcompile.weights.ignored import warn_other_backend

Compiled = Callable[..., Any]
# What a backend is marked with that turned out to call ours.
_LATE = "_llcompile_late"


@dataclass(frozen=True)
class Late:
    """What our backend was asked for by one that had hidden it until it called us.

    Args:
        level_weights: the option of that name.
        rewrite: rewrites a graph; what it returns is to be called with the compiled graph.
        instead: compiles a graph in the place of the hiding backend: (backend, graph, inputs) -> compiled graph.
    """

    level_weights: str
    rewrite: Callable[[fx.GraphModule], Callable[[Compiled], Compiled]]
    instead: Callable[[Compiled, fx.GraphModule, list[Any]], Compiled]


def mark_late(late: Late) -> None:
    """Has later traces for the same backend know that it calls ours."""
    mark_backend(_LATE, late)


def late() -> Late | None:
    """What `mark_late` noted about the backend of the trace under way."""
    return backend_mark(_LATE)  # type: ignore[no-any-return]


def is_ours(has_level_weights: bool = False) -> bool:
    """Whether the trace under way ends in one of our backends.

    What wraps a backend may hide it. Then the answer is no until it calls us (see `Late`), and only if it does not is
    the user told that level weights of this trace (`has_level_weights`) have no effect.
    """
    hidden = late()
    ours = hidden is not None or getattr(tracing_backend()[0], "_llcompile", False) is True
    note_trace("asked", ours)
    if hidden is not None:
        around_backend(hidden.instead)
    elif has_level_weights and not ours:
        around_backend(_warn_if_other)
    return ours


def _warn_if_other(backend: Compiled, module: fx.GraphModule, inputs: list[Any]) -> Compiled:
    """In the place of a backend that is not known to be ours: had it called us, the trace would be no more."""
    compiled: Compiled = backend(module, inputs)
    warn_other_backend()
    return compiled


def levels_of_trace() -> int | None:
    """Number of levels of the mixer being traced; None for the linear operator."""
    hidden = late()
    kind = hidden.level_weights if hidden else (tracing_backend()[1].get("options") or {}).get("level_weights")
    owner = reach.innermost_module() if kind != "none" else None
    found = [] if owner is None else [weights for _, weights in held(owner)]
    return found[0].levels if found else None
