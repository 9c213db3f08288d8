"""convert, inspect and revert: the eager front door."""

from __future__ import annotations

import inspect as inspect_module
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from llcompile import adapters, attachment, backend, compile_run, recompile_room
from llcompile.errors import CaptureError, LLCompileError, ModelError
from llcompile.look.collect import collect, without_graph
from llcompile.look.look import Look, Subject
from llcompile.look.records import MixerLook
from llcompile.options import Options
from llcompile.passes import discover, dynamo, reach
from llcompile.passes.session import Session
from llcompile.report import Report
from llcompile.transaction import transaction

Visit = Callable[[Session], None]


def convert(
    model: nn.Module, *example_args: Any, options: dict[str, Any] | None = None, **example_kwargs: Any
) -> Report:
    """Attaches level weights to every linear-time mixer of `model`, so that an optimiser built next knows them.

    The model computes what it did before: all level weights start at exactly 1. They take effect when the model runs
    through `torch.compile(model, backend="loglinear")`.

    Args:
        model: any nn.Module that Dynamo can trace; changed in place (modules named `loglinear` are added).
        example_args, example_kwargs: inputs that the model runs on; their values do not matter.
        options: as for the backend; `level_weights`, `levels` and `strict` have a meaning here.

    Returns:
        What was converted, declined and left untouched.

    Raises:
        ModelError: `model` is not an nn.Module.
        CaptureError: the model does not run on the example inputs, or cannot be traced.
        OptionError, LevelWeightsError, StrictError: see `llcompile.errors`. The model is as it was.
    """
    report, _ = _captured(model, example_args, example_kwargs, options, dry_run=False)
    return report


def inspect(model: nn.Module, *example_args: Any, options: dict[str, Any] | None = None, **example_kwargs: Any) -> Look:
    """What `convert` would do: the same decisions and proofs, nothing attached, nothing changed.

    A model on the device `meta` will do: shapes are looked at, no values.

    Args and raises: as for `convert`.

    Returns:
        The report, and everything there is to see: `graph_before`, `graph_after`, `diff`, `costs`, `kernels`,
        `to_html(path)`, `to_mlir()`.
    """
    report, capture = _captured(model, example_args, example_kwargs, options, dry_run=True)
    subject = Subject(model, example_args, example_kwargs, Options.parse(options))
    seen = {(mixer.module, mixer.where) for mixer in capture.mixers}
    unseen = [without_graph(record) for record in report.declined if (record.module, record.where) not in seen]
    return Look(**vars(report), mixers=(*capture.mixers, *unseen), subject=subject)


def revert(model: nn.Module) -> int:
    """Removes all level weights (and their hooks) that were attached below `model`; returns how many there were.

    Raises:
        ModelError: `model` is not an nn.Module.
    """
    _check_model(model, "revert")
    return attachment.detach(model)


def visit_graphs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], visit: Visit) -> Report:
    """As `inspect`; `visit` is given the session of each graph when all is decided and nothing rewritten."""
    report, _ = _captured(model, args, kwargs, None, dry_run=True, visit=visit)
    return report


def _captured(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: dict[str, Any] | None,
    dry_run: bool,
    visit: Visit | None = None,
) -> tuple[Report, _Capture]:
    options = Options.parse(given)
    _check_model(model, "inspect" if dry_run else "convert")
    backend.prepare()
    before = {id(weights) for _, _, weights in attachment.attached(model)}
    capture = _Capture(model, options, dry_run, visit)
    discover.refused_calls({})  # what another run has left
    try:
        _run(model, capture, args, kwargs)
        if not capture.report.graphs:
            _expect_graph(model, args, kwargs)
        broken = Report(declined=tuple(discover.refused_calls(capture.names)))  # after the last graph
        report = _titled(capture.report.merged(broken), model)
        compile_run.check_strict(report, options)
    except BaseException as error:
        detach_new(model, before)
        own = _own_error(error)
        if own is not None:
            raise own from None
        if not isinstance(error, Exception):
            raise
        raise CaptureError(_capture_message(model, args, kwargs, error)) from error
    new = [(owner, name) for owner, name, weights in attachment.attached(model) if id(weights) not in before]
    if new:
        adapters.enlist(model, new)
        dynamo.forget_compiled()
    return report, capture


class _Capture:
    """A backend that looks at each graph, keeps the report, and runs the model's own code."""

    _llcompile = True
    __name__ = "loglinear_capture"

    def __init__(self, model: nn.Module, options: Options, dry_run: bool, visit: Visit | None) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.options = options
        self.dry_run = dry_run
        self.visit = visit
        self.report = Report()
        self.mixers: list[MixerLook] = []
        self.kwargs = {"options": {"level_weights": options.level_weights}}

    def __call__(self, module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        recompile_room.make_room(reach.root_module())
        session = compile_run.new_session(module, self.options, self.names, self.dry_run)
        found = compile_run.look(session)
        self.report = self.report.merged(found)
        if not self.dry_run:
            return compile_run.original_code(session)
        if self.visit is not None:
            self.visit(session)
        mixers, original = collect(session)
        # A frame that was traced twice is looked at twice; the later look holds.
        again = {(mixer.module, mixer.where) for mixer in mixers}
        self.mixers = [m for m in self.mixers if (m.module, m.where) not in again] + mixers
        return original


def _run(model: nn.Module, capture: _Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # What other models have taught Dynamo about lengths that vary must not make this trace another one.
    static = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    with transaction(model, args, kwargs), torch.no_grad(), static:
        dynamo.traced_once(run, capture)(*args, **kwargs)


def _expect_graph(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A model that computes something must have become a graph."""
    with transaction(model, args, kwargs), torch.no_grad():
        refused = dynamo.no_graph(model.forward, args, kwargs)
    if refused is not None:
        reason, where = refused
        code = inspect_module.unwrap(type(model).forward).__code__
        where = where or f"{code.co_filename}:{code.co_firstlineno} in {code.co_name}"
        raise CaptureError(
            f"no graph could be made of {type(model).__name__}, so nothing is known about it: {reason} ({where}). "
            "TORCH_LOGS=graph_breaks says more; nothing was changed."
        )


def _check_model(model: Any, call: str) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"llcompile.{call} takes an nn.Module, got {type(model).__name__}.")


def detach_new(model: nn.Module, before: set[int]) -> None:
    """Removes the level weights whose ids are not in `before`."""
    for owner, name, weights in list(attachment.attached(model)):
        if id(weights) not in before:
            attachment.detach_one(owner, name)


def _own_error(error: BaseException | None) -> LLCompileError | None:
    """Our own error inside Dynamo's wrapping, if that is what it is."""
    while error is not None:
        if isinstance(error, LLCompileError):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__
    return None


def _capture_message(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> str:
    shown = [_shown(a) for a in args] + [f"{k}={_shown(v)}" for k, v in kwargs.items()]
    return (
        f"{type(model).__name__} does not run on the example inputs ({', '.join(shown) or 'none given'}): "
        f"{type(error).__name__}: {error}. Pass inputs that model(*inputs) takes; nothing was changed."
    )


def _shown(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:60]


def _titled(report: Report, model: nn.Module) -> Report:
    return replace(report, title=type(model).__name__)
