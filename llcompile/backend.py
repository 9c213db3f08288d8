"""The torch.compile backend `loglinear`: looks, rewrites, and hands the graph to an inner compiler."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from llcompile import attachment, compile_check, compile_run, inner, logs, recompile_room, versions
from llcompile.errors import LateAttachWarning, LLCompileError, StateAdoptedWarning
from llcompile.level_weights import LevelWeights
from llcompile.options import Options
from llcompile.passes import capture, dynamo, pipeline, states
from llcompile.passes.session import Session, Site
from llcompile.report import Report

log = logging.getLogger("llcompile")

_last_report = Report()


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
    """
    versions.announce()
    recompile_room.make_room(dynamo.root_module())
    try:
        return _compile(module, Options.parse(options), mode)
    except LLCompileError as error:
        raise dynamo.surfaced(error).with_traceback(error.__traceback__) from None


def _compile(module: fx.GraphModule, parsed: Options, mode: str | None) -> Callable[..., Any]:
    global _last_report
    session = compile_run.new_session(module, parsed, compiles=True)
    try:
        report = compile_run.look(session)
        compile_run.check_strict(report, parsed)
    except LLCompileError:
        for owner, name in session.attached:
            attachment.detach_one(owner, name)
        raise
    if parsed.level_weights == "none":
        attachment.warn_if_switched_off(site.owner for site in session.sites)
    else:
        attachment.warn_if_declined(
            (site.owner, site.attribute, site.reason) for site in session.sites if not site.open
        )
        _warn_missed(session)
    broken = compile_run.give_up_opaque(session)
    adopted = states.adopt(session)
    if session.attached:
        _warn_late(session)
    if adopted:
        _warn_adopted(adopted)
    if session.attached or broken or adopted:
        # Traced once more, so that Dynamo itself sees the new modules (their guards, hooks and states).
        dynamo.restart("level weights were attached, states got levels, or a declined call must run by itself")
    pipeline.change(session)
    _last_report = report
    log.info("%s", report)
    logs.artifact("loglinear_report", lambda: json.dumps(report.to_dict(), default=str), "json")
    logs.artifact("loglinear_graph", lambda: module.print_readable(print_output=False))
    positions = _weight_positions(session)
    compiled = inner.compile_graph(module, dynamo.example_inputs(module.graph), parsed, mode)
    return _marking_use(compiled, positions)


loglinear._llcompile = True  # type: ignore[attr-defined]


def last_report() -> Report:
    """The report on the graph that the backend compiled last in this process."""
    return _last_report


def is_ours() -> bool:
    """Whether the trace under way ends in one of our backends."""
    return getattr(dynamo.tracing_backend()[0], "_llcompile", False)


def levels_of_trace() -> int | None:
    """Number of levels of the mixer being traced; None for the linear operator."""
    _, keywords = dynamo.tracing_backend()
    if (keywords.get("options") or {}).get("level_weights") == "none":
        return None
    owner = dynamo.innermost_module()
    held = [c for c in owner.children() if isinstance(c, LevelWeights)] if owner is not None else []
    return held[0].levels if held else None


def prepare() -> None:
    """Makes the known functions of the libraries imported so far leaves; called whenever torch.compile asks for us."""
    capture.install(is_ours, levels_of_trace)


def _warn_late(session: Session) -> None:
    new = {(id(owner), name) for owner, name in session.attached}
    modules = list(dict.fromkeys(s.module for s in session.sites if (id(s.owner), s.attribute) in new))
    some = ", ".join(modules[:3]) + ", ..." * (len(modules) > 3)
    warnings.warn(
        f"level weights were attached to {len(new)} mixers ({some}) at the first compiled call: an optimiser built "
        "before it does not know them. Call llcompile.convert(model, *example_inputs) before the optimiser is built.",
        LateAttachWarning,
        stacklevel=2,
    )


def _warn_missed(session: Session) -> None:
    """A part of a module's forward may have no mixer in it; the whole of it has."""
    if dynamo.is_whole_frame():
        modules = [module for region in session.regions for module in dynamo.modules_in(region.graph)]
        attachment.warn_if_missed(modules, [site.owner for site in session.sites])


def _warn_adopted(sites: list[Site]) -> None:
    modules = list(dict.fromkeys(site.module for site in sites))
    some = ", ".join(modules[:3]) + ", ..." * (len(modules) > 3)
    warnings.warn(
        f"the states of {len(modules)} mixers ({some}) were made by a model without levels. What they hold was taken "
        "up as their last level, and positions count from here. To have the levels of the past, prefill again through "
        "the compiled model.",
        StateAdoptedWarning,
        stacklevel=2,
    )


def _weight_positions(session: Session) -> list[int]:
    """Which of the graph's inputs are tensors of level weights."""
    weights = [s.level_weights for s in session.sites if s.open and s.level_weights is not None]
    ours = {id(tensor) for w in weights for _, tensor in w.tensors()}
    return [i for i, value in enumerate(dynamo.example_inputs(session.graph)) if id(value) in ours]


def _marking_use(compiled: Callable[..., Any], positions: list[int]) -> Callable[..., Any]:
    """Notes at each call which level weights had their part in it (see `attachment.warn_if_ignored`).

    By the tensors that come in, because one graph may serve many layers.
    """
    if not positions:
        return compiled

    def run(*args: Any) -> Any:
        # A compiled function with `_boxed_call` takes one list of its inputs, and the inputs one by one as well.
        given = args[0] if len(args) == 1 and isinstance(args[0], list) else args
        attachment.mark_used(given[i] for i in positions)
        return compiled(*args)

    if hasattr(compiled, "_boxed_call"):
        run._boxed_call = compiled._boxed_call  # type: ignore[attr-defined]
    return run


compile_check.install(loglinear, prepare)
