"""The torch.compile backend `loglinear`: looks, rewrites, and hands the graph to an inner compiler."""

from __future__ import annotations

import functools
import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import fx

from llcompile import driver
from llcompile.distributed import compiled as shards
from llcompile.errors import LLCompileError, WrappedBackendError
from llcompile.integrations import versions
from llcompile.options import Options
from llcompile.passes import pipeline, states
from llcompile.passes.session import Session
from llcompile.patterns.known import capture
from llcompile.report import Report
from llcompile.torch_internals import (
    compile_check,
    dtensors,
    inner,
    logs,
    reach,
    recompile_room,
    splitters,
    untraceable,
)
from llcompile.torch_internals.backends import tracing_backend, unwrapped
from llcompile.torch_internals.forget import forget_others
from llcompile.torch_internals.inputs import graph_inputs
from llcompile.torch_internals.trace import (
    is_traced_graph,
    note_trace,
    restart_trace,
    surfacing,
    trace_note,
    without_traces_of_transforms,
)
from llcompile.weights import adapters, checkpoint, first_call, fresh, missed, ours, wrapped
from llcompile.weights.ignored import runs_levels, warn_if_switched_off
from llcompile.weights.ours import Late
from llcompile.weights.use import noting_use, read_by

log = logging.getLogger("llcompile")


class _Last(threading.local):
    report = Report()


_last = _Last()


def loglinear(
    module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compiles one Dynamo graph: its linear-time mixers become log-linear, the rest goes to the inner compiler.

    Args:
        module: the graph, as Dynamo hands it over.
        example_inputs: its inputs (replaced by those of the rewritten graph, which reads the level weights as well).
        mode: a mode of Inductor ("max-autotune", ...); expanded to its options.
        options: see `llcompile.Options`.
        _: what a later torch.compile hands to every backend, as the `name` of torch 2.15.

    Raises:
        OptionError: unknown or ill-typed options.
        StrictError: `strict=True`, and a linear-time mixer stays unconverted or nothing was found.
        LevelWeightsError: the module owns level weights of another size.
        CheckpointError: the model was loaded without the level weights that its checkpoint has.
        DistributedError: level weights were attached, and DDP or FSDP was applied before.
        MissedLevelWeightsError: `on_miss="raise"`, and level weights of a module that ran have no part in the graph.
    """
    versions.announce()
    with surfacing(LLCompileError), fresh.kept_on_success(), without_traces_of_transforms():
        parsed = Options.parse(options)
        if trace_note("rewritten"):  # the whole, before it was cut or copied
            return _compiled(module, example_inputs, parsed, mode)
        if trace_note("asked") is False or not is_traced_graph(module):
            _trace_as_ours(parsed)
        finish = _rewrite(module, parsed)
        return finish(_compiled(module, graph_inputs(module.graph), parsed, mode))


def _compiled(module: fx.GraphModule, inputs: list[Any], parsed: Options, mode: str | None) -> Callable[..., Any]:
    untraceable.let_break(module)
    return inner.compile_graph(module, inputs, parsed.inner, parsed.inductor, mode, str(parsed))


def _rewrite(module: fx.GraphModule, parsed: Options) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Rewrites a Dynamo graph; what it returns is to be called with the compiled graph and gives what is to run."""
    recompile_room.make_room(reach.root_module())
    checkpoint.expect_whole([reach.root_module(), *reach.modules_in(module.graph)])
    session = driver.new_session(module, parsed, compiles=True)
    report = driver.look(session)
    driver.check_strict(report, parsed)
    if parsed.level_weights == "none":
        warn_if_switched_off(candidate.owner for candidate in session.candidates)
    else:
        missed.check(session, parsed.on_miss)
    adapters.warn_if_frozen(read_by(session), graph_inputs(module.graph))
    _settle(session)
    pipeline.change(session)
    if not dtensors.possible():  # which the operator has no rule for
        pipeline.update_in_place(session)
    ready = shards.prepare(module)
    _tell(report, module)
    note_trace("rewritten", True)
    noting = noting_use(session)
    return lambda compiled: shards.guarded(noting(compiled), ready)


def _settle(session: Session) -> None:
    """Has Dynamo trace once more where it must see for itself what is new: modules with their guards and hooks, states,
    or a call that runs by itself."""
    broken, adopted = driver.give_up_opaque(session), states.adopt(session)
    wrapped.expect_none(owner for owner, _ in session.attached)
    first_call.warn_attached(session)
    first_call.warn_adopted(adopted)
    if session.attached:
        forget_others({type(owner) for owner, _ in session.attached}, runs_levels)
    if session.attached or broken or adopted:
        restart_trace("level weights were attached, states got levels, or a declined call must run by itself")


def _tell(report: Report, module: fx.GraphModule) -> None:
    """Keeps the report, and writes it and the rewritten graph where torch's logs and traces are asked for."""
    _last.report = report
    log.info("%s", report)
    logs.artifact("loglinear_report", lambda: json.dumps(report.to_dict(), default=str), "json")
    logs.artifact("loglinear_graph", lambda: module.print_readable(print_output=False))


loglinear._llcompile = True  # type: ignore[attr-defined]
loglinear._llcompile_runs = True  # type: ignore[attr-defined]


def last_report() -> Report:
    """The report on the graph that the backend compiled last in this thread."""
    return _last.report


def _trace_as_ours(parsed: Options) -> NoReturn:
    """The trace was made for a backend that hid us: once more, with what we have Dynamo trace in its own way."""
    hidden = tracing_backend()[0]
    known = ours.late() is not None
    ours.mark_late(
        Late(
            parsed.level_weights,
            functools.partial(_rewrite, parsed=parsed),
            functools.partial(_rewrite_first, parsed=parsed),
        )
    )
    if known or ours.late() is None:
        raise WrappedBackendError(
            f"{hidden!r} passes backend 'loglinear' a part or a copy of the graph that Dynamo traced, so its modules "
            "and inputs are unknown. Pass the backend itself to torch.compile, or a functools.partial of it."
        )
    restart_trace("a wrapper that calls the backend 'loglinear' was taken for another backend")


def _rewrite_first(
    backend: Callable[..., Any], module: fx.GraphModule, inputs: list[Any], parsed: Options
) -> Callable[..., Any]:
    """In the place of a wrapper that calls us in the end: it is handed the rewritten graph."""
    with surfacing(LLCompileError), fresh.kept_on_success(done=False):
        finish = _rewrite(module, parsed)
    return finish(backend(module, graph_inputs(module.graph)))


def _rewrite_whole(module: fx.GraphModule, backend: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
    """In the place of what is going to split a graph."""
    function, keywords = unwrapped(backend)
    late = ours.late()
    if trace_note("rewritten") or (late is None and function is not loglinear):
        return None
    with surfacing(LLCompileError), fresh.kept_on_success(done=False):
        return late.rewrite(module) if late else _rewrite(module, Options.parse(keywords.get("options")))


def prepare() -> None:
    """Makes the known functions of the libraries imported so far leaves; called whenever torch.compile asks for us."""
    capture.install(ours.is_ours, ours.levels_of_trace)


compile_check.install(loglinear, Options.parse, prepare, wrapped.expect_traceable)
splitters.install(_rewrite_whole)
