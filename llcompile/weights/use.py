"""Use: which level weights a compiled graph reads, noted at each of its calls (see `attachment.warn_if_ignored`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from llcompile.passes.session import Session
from llcompile.torch_internals.inputs import graph_inputs
from llcompile.weights.held import copies

# id of each tensor of level weights that a compiled graph read since its owner's last call began.
_used: set[int] = set()


def read_by(session: Session) -> list[tuple[nn.Module, str]]:
    """The owners whose level weights the rewritten graph reads, and the names of those."""
    candidates = [s for s in session.candidates if s.open and s.level_weights is not None]
    return [(s.owner, s.attribute) for s in candidates if s.owner is not None]


def noting_use(session: Session) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wraps the compiled form of a rewritten graph: each call notes which level weights have their part in it.

    By the tensors that come in, because one graph may serve many layers.
    """
    read = {key for owner, name in read_by(session) for key in _ids(owner, name)}
    positions = [i for i, value in enumerate(graph_inputs(session.graph)) if id(value) in read]

    def noting(compiled: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            # A compiled function with `_boxed_call` takes one list of its inputs, and the inputs one by one as well.
            given = args[0] if len(args) == 1 and isinstance(args[0], list) else args
            _used.update(id(given[i]) for i in positions)
            return compiled(*args)

        if hasattr(compiled, "_boxed_call"):
            run._boxed_call = compiled._boxed_call  # type: ignore[attr-defined]
        return run if positions else compiled

    return noting


def is_used(owner: nn.Module, name: str) -> bool:
    """Whether a compiled graph has read the level weights of a module under a name since its call began."""
    return not _used.isdisjoint(_ids(owner, name))


def forget_use(owner: nn.Module) -> None:
    """A call of a module begins."""
    for name in owner._modules:
        _used.difference_update(_ids(owner, name))


def _ids(owner: nn.Module, name: str) -> list[int]:
    return [id(tensor) for weights in copies(name, owner._modules[name]) for _, tensor in weights.tensors()]
