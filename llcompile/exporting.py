"""torch.export of a converted model: the exported program contains the operator.

Eagerly a converted model runs its library's own code, and torch.export records what runs eagerly. So, while it is
exported, Dynamo traces a converted module first, the passes rewrite the graph, and export records the rewritten one.
The numbers of the exported program are those of `torch.compile(model, backend="loglinear")`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from llcompile import driver
from llcompile.errors import LLCompileError
from llcompile.options import Options
from llcompile.passes import pipeline
from llcompile.patterns import reasons
from llcompile.torch_internals.inputs import graph_inputs
from llcompile.torch_internals.trace import below_export, restart_trace, surfacing, traced_once
from llcompile.weights import attachment, missed


def rewritten_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's output, computed by its rewritten graph, as the export under way records it."""
    with below_export() as record:
        return traced_once(module, _ExportBackend(record))(*args, **kwargs)


class _ExportBackend:
    """A backend that rewrites each graph and has export record it."""

    _llcompile = True
    __name__ = "loglinear_export"

    def __init__(self, record: Callable[..., Any]) -> None:
        self.record = record
        self.kwargs = {"options": {"level_weights": Options().level_weights}}

    def __call__(self, module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        with surfacing(LLCompileError), _disable_current_modes():
            _rewrite(module)
        return self.record(module, graph_inputs(module.graph))


def _rewrite(module: fx.GraphModule) -> None:
    session = driver.new_session(module, Options(), compiles=True)
    driver.look(session)
    for owner, name in session.attached:
        attachment.detach_one(owner, name)
    for candidate in session.candidates:
        if (candidate.owner, candidate.attribute) in session.attached:
            candidate.decline(reasons.NOT_EXPORTED())
    missed.check(session, Options().on_miss)
    if driver.give_up_opaque(session):
        restart_trace("a declined call must run by itself")
    pipeline.change(session)
