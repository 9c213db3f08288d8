"""An example: a model with the inputs that it is run on, and its run, traced for a backend that looks at each graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from llcompile import driver
from llcompile.checks.transaction import Snapshot, transaction
from llcompile.options import Options
from llcompile.passes import pipeline
from llcompile.passes.session import Session
from llcompile.patterns import reasons
from llcompile.report import Report
from llcompile.torch_internals import reach, recompile_room
from llcompile.torch_internals.trace import forget_guards_of_one_call, traced_once

# Is given each session with its report when all is decided; may return what is to run.
Visit = Callable[[Session, Report], Callable[..., Any] | None]


@dataclass(frozen=True)
class Example:
    """A model and inputs that it runs on."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @cached_property
    def names(self) -> dict[int, str]:
        """id of a module -> its dotted name in the model."""
        return {id(module): name for name, module in self.model.named_modules()}

    def transaction(self) -> AbstractContextManager[Snapshot]:
        """Whatever is run inside leaves no trace on the model, the inputs and the random state."""
        return transaction(self.model, self.args, self.kwargs)

    def run(self) -> Any:
        """The model's own output; what the run changes stays changed."""
        return self.model(*self.args, **self.kwargs)

    def trace(self, backend: Callable[..., Any], prepare: Callable[[], Any] = lambda: None) -> None:
        """Runs the model once, traced for the backend; all that `prepare` and the run have changed is put back."""
        with self.transaction(), lengths_as_they_are(), garbage_later():
            prepare()
            traced_once(self.model, backend)(*self.args, **self.kwargs)


class LookBackend:
    """A backend that looks at each graph of an example run and has the model's own code run.

    Args:
        options: as of the backend.
        names: id of a module -> its dotted name in the model.
        dry_run: attach nothing.
        visit: see `Visit`.
    """

    _llcompile = True
    __name__ = "loglinear_looking"

    def __init__(self, options: Options, names: Mapping[int, str], dry_run: bool, visit: Visit) -> None:
        self.options, self.names, self.dry_run, self.visit = options, names, dry_run, visit
        self.kwargs = {"options": {"level_weights": options.level_weights}}

    def __call__(self, module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Looks at one graph."""
        recompile_room.make_room(reach.root_module())
        reach.guard_modules()  # behind a graph break, equal layers would share the look at the first of them
        session = driver.new_session(module, self.options, self.names, self.dry_run)
        report = driver.look(session)
        code = self.visit(session, report) or _original_code(session)
        forget_guards_of_one_call()
        return code


@contextmanager
def lengths_as_they_are() -> Iterator[None]:
    """What other models have taught Dynamo about lengths that vary does not make a trace inside another one."""
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield


@contextmanager
def garbage_later() -> Iterator[None]:
    """No search for cycles among the objects of a trace, millions that live until its end: a tenth of its time.

    Nor at its end, where Dynamo would start one: Python itself does, once there is reason to.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with torch._dynamo.config.patch(run_gc_after_compile=False):
            yield
    finally:
        if enabled:
            gc.enable()


def _original_code(session: Session) -> Callable[..., Any]:
    """The graph with every captured call back as the library's own code, to be run as it is."""
    for candidate in session.candidates:
        candidate.decline(reasons.EXAMPLE_RUN())
    pipeline.change(session)
    return session.module.forward
