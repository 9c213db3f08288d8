"""The passes, flat and in order, with a check of the graph after each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from llcompile.passes.attach import attach
from llcompile.passes.bind import bind
from llcompile.passes.check import check
from llcompile.passes.discover import discover
from llcompile.passes.functions import functions
from llcompile.passes.identify import identify
from llcompile.passes.in_place import in_place
from llcompile.passes.names import names
from llcompile.passes.one_token import one_token
from llcompile.passes.padding import padding
from llcompile.passes.placing import placing
from llcompile.passes.prove import prove
from llcompile.passes.recognise import recognise
from llcompile.passes.rewrite import rewrite
from llcompile.passes.session import Session
from llcompile.passes.states import states
from llcompile.passes.withhold import withhold
from llcompile.patterns.records import Timing
from llcompile.torch_internals import nested_gradients
from llcompile.torch_internals.inputs import tracing_fake_mode
from llcompile.torch_internals.tape import own_tape

log = logging.getLogger("llcompile")

Pass = Callable[[Session], int]

# What is there and what it is; nothing is changed.
LOOK: tuple[Pass, ...] = (
    functions,
    discover,
    recognise,
    names,
    one_token,
    withhold,
    identify,
    bind,
    states,
    placing,
    prove,
    padding,
)
# What is done about it.
CHANGE: tuple[Pass, ...] = (rewrite,)


def look(session: Session) -> None:
    """Finds the mixers of a graph, proves them, and finds or makes their level weights."""
    _run(session, (*LOOK, attach))


def change(session: Session) -> None:
    """Rewrites the graph; `look` has been run on it."""
    with tracing_fake_mode(session.graph):
        _run(session, CHANGE)
    nested_gradients.wrap(session.graph, session.wrappers)
    for region in session.regions:
        region.module.recompile()


def update_in_place(session: Session) -> None:
    """Has states updated in place where the model does so; `change` has been run, and the graph is to be compiled."""
    _run(session, (in_place,))
    for region in session.regions:
        region.module.recompile()


def _run(session: Session, passes: tuple[Pass, ...]) -> None:
    for step in passes:
        start = time.perf_counter()
        with own_tape():
            count = step(session)
        check(session, step.__name__)
        seconds = time.perf_counter() - start
        session.timings.append(Timing(step.__name__, seconds))
        log.debug("pass %s: %d in %.1f ms", step.__name__, count, 1e3 * seconds)
