"""convert, inspect and revert: the eager front door."""

from __future__ import annotations

import functools
import inspect as inspect_module
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llcompile import backend, driver
from llcompile.checks import other_mode
from llcompile.checks import verify as verify_
from llcompile.checks.transaction import transaction
from llcompile.errors import CaptureError, LLCompileError, ModelError
from llcompile.integrations import versions
from llcompile.look.collect import collect, without_graph
from llcompile.look.findings import Subject
from llcompile.look.look import Look
from llcompile.look.records import MixerLook
from llcompile.options import Options
from llcompile.passes import discover
from llcompile.passes.candidate import Candidate
from llcompile.passes.session import Session
from llcompile.report import Report
from llcompile.torch_internals import reach
from llcompile.torch_internals.breaks import why_no_graph
from llcompile.torch_internals.forget import forget_compiled
from llcompile.weights import adapters, attachment, checkpoint, withheld

Visit = Callable[[Session], None]


def convert(
    model: nn.Module,
    *example_args: Any,
    options: dict[str, Any] | None = None,
    verify: bool = True,
    **example_kwargs: Any,
) -> Report:
    """Attach level weights to every linear-time mixer of `model`. Call it before you build the optimizer.

    The model computes what it did before: all level weights start at exactly 1. They take effect when the model runs
    through `torch.compile(model, backend="loglinear")`. At the end the converted model is run on the example inputs
    and compared with the model's own output and gradients (`report.certificate`). A mixer that makes a difference, or
    whose level weights have no effect, is declined with what was measured.

    Args:
        model: any nn.Module that Dynamo can trace; changed in place (modules named `loglinear` are added).
        example_args: inputs that the model runs on; their values do not matter.
        options: as for the backend; only `level_weights`, `levels` and `strict` are used here.
        verify: whether to run and compare the converted model; if False, the report says so.
        example_kwargs: keyword inputs of the model.

    Returns:
        What was converted, declined and left untouched.

    Raises:
        ModelError: `model` is not an nn.Module.
        CaptureError: the model does not run on the example inputs, or cannot be traced.
        OptionError: an option is unknown or has a wrong value.
        LevelWeightsError: the model has level weights of another kind or size.
        CheckpointError: the model was loaded without the level weights that its checkpoint has.
        StrictError: `strict=True`, and a mixer was declined or none was found.

    If an error is raised, the model is unchanged.
    """
    report, _ = _captured(model, example_args, example_kwargs, options, dry_run=False, check=verify)
    return report


def inspect(model: nn.Module, *example_args: Any, options: dict[str, Any] | None = None, **example_kwargs: Any) -> Look:
    """Report what `convert` would do, with the same decisions and proofs, and change nothing.

    Models on the device `meta` work, too: shapes are read, values are not.

    Args:
        model: any nn.Module that Dynamo can trace; not changed.
        example_args: inputs that the model runs on.
        options: as for `convert`.
        example_kwargs: keyword inputs of the model.

    Returns:
        The report, with `graph_before`, `graph_after`, `diff`, `costs`, `kernels`, `to_html(path)` and `to_mlir()`.

    Raises:
        ModelError: `model` is not an nn.Module.
        CaptureError: the model does not run on the example inputs, or cannot be traced.
        OptionError: an option is unknown or has a wrong value.
    """
    report, capture = _captured(model, example_args, example_kwargs, options, dry_run=True)
    wishes = {**vars(Options.parse(options)), "strict": False}
    converted = functools.partial(_converted, model, example_args, example_kwargs, wishes)
    subject = Subject(model, example_args, example_kwargs, converted)
    seen = {(mixer.module, mixer.where) for mixer in capture.mixers}
    unseen = [without_graph(record) for record in report.declined if (record.module, record.where) not in seen]
    return Look(**vars(report), mixers=(*capture.mixers, *unseen), subject=subject)


def revert(model: nn.Module) -> int:
    """Remove all level weights, with their hooks, from `model`, and return how many there were.

    Raises:
        ModelError: `model` is not an nn.Module.
    """
    _check_model(model, "revert")
    checkpoint.forget(model)
    return attachment.detach(model)


@contextmanager
def _converted(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: dict[str, Any]
) -> Iterator[None]:
    """The model is converted inside, and as it was afterwards."""
    before = {id(weights) for _, _, weights in attachment.attached(model)}
    try:
        convert(model, *args, options=options, **kwargs)
        yield
    finally:
        _detach_new(model, before)


def visit_graphs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], visit: Visit) -> Report:
    """As `inspect`; `visit` is given the session of each graph when all is decided and nothing rewritten."""
    report, _ = _captured(model, args, kwargs, None, dry_run=True, visit=visit)
    return report


# Dynamo's settings and the warnings' filters, which a conversion changes for its time, belong to all threads.
_one_at_a_time = threading.RLock()


def _captured(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: dict[str, Any] | None,
    dry_run: bool,
    visit: Visit | None = None,
    check: bool = False,
) -> tuple[Report, _Capture]:
    options = Options.parse(given)
    _check_model(model, "inspect" if dry_run else "convert")
    if not dry_run:
        checkpoint.expect_whole([model])
    backend.prepare()
    versions.announce()
    with _one_at_a_time, _uncompiled(model):
        before = {id(weights) for _, _, weights in attachment.attached(model)}
        set_aside = withheld.forget_withheld(model)
        capture = _Capture(model, options, dry_run, visit, before)
        try:
            report = _titled(_look(model, capture, args, kwargs), model)
            if not dry_run:
                report = _verified(model, capture, args, kwargs, report) if check else _unverified(report)
            driver.check_strict(report, options)
        except BaseException as error:
            _detach_new(model, before)
            withheld.forget_withheld(model)
            withheld.put_withheld(set_aside)
            raise _as_ours(model, args, kwargs, error) from error
        finally:
            new = [(owner, name) for owner, name, weights in attachment.attached(model) if id(weights) not in before]
            forget_compiled({type(owner) for owner, _ in new}, _is_ours)
        adapters.enlist(model, new)
        if dry_run:
            withheld.put_withheld(set_aside)
        else:
            _keep_declined(model, report)
    return report, capture


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Takes what `module.compile()` has set off for a while: the modules' own code is looked at, and compared with."""
    compiled = [(m, m._compiled_call_impl) for m in model.modules() if m._compiled_call_impl is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call


def _look(model: nn.Module, capture: _Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Report:
    discover.refused_calls({})  # what another run has left
    _run(model, capture, args, kwargs)
    if not capture.report.graphs:
        _expect_graph(model, args, kwargs)
    broken = Report(declined=tuple(discover.refused_calls(capture.names)))  # after the last graph
    return capture.report.merged(broken)


def _verified(
    model: nn.Module, capture: _Capture, args: tuple[Any, ...], kwargs: dict[str, Any], report: Report
) -> Report:
    """The report after the converted model's run; mixers that are to blame lose their level weights."""
    mixers = list(capture.found.values())
    other = other_mode.judge(model, args, kwargs, capture.options, mixers, capture.asked)
    report = _without_blamed(report, other)
    verdict = verify_.verify(model, args, kwargs, capture.options, [m for m in mixers if m not in other.blamed])
    report = _without_blamed(report, verdict)
    return replace(report, certificate=verdict.certificate, unverified=verdict.unverified)


def _keep_declined(model: nn.Module, report: Report) -> None:
    """What was declined stays as it is in every call, also in one in which it would look like a mixer."""
    modules = dict(model.named_modules())
    for record in report.declined:
        if record.module in modules:
            withheld.withhold_all(modules[record.module], record.given)


def _without_blamed(report: Report, verdict: verify_.Verdict) -> Report:
    for mixer, given in verdict.blamed.items():
        withheld.withhold(mixer.owner, mixer.attribute, given)
        if mixer.fresh and mixer.weights is not None:
            attachment.detach_one(mixer.owner, mixer.attribute)
    return verify_.judged(report, verdict)


def _unverified(report: Report) -> Report:
    return replace(report, unverified="convert was called with verify=False")


def _as_ours(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException) -> BaseException:
    """The error that the user meets: our own from inside of Dynamo's wrapping, or what the run came to."""
    own = _own_error(error)
    if own is not None:
        own.__suppress_context__ = True
        return own
    if not isinstance(error, Exception):
        return error
    return CaptureError(_capture_message(model, args, kwargs, error, _own_run(model, args, kwargs)))


def _own_run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    """What the model raises on the example inputs without us, or None."""
    try:
        with transaction(model, args, kwargs), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(*args, **kwargs)
    except Exception as error:
        return error
    return None


class _Capture:
    """What the example run of a conversion has found."""

    def __init__(
        self, model: nn.Module, options: Options, dry_run: bool, visit: Visit | None, before: set[int]
    ) -> None:
        self.names = driver.names_in(model)
        self.options = options
        self.dry_run = dry_run
        self.visit = visit
        self.before = before
        self.report = Report()
        self.found: dict[tuple[int, str], verify_.Mixer] = {}
        self.asked: set[int] = set()  # ids of modules whose `training` the code has read
        self.mixers: list[MixerLook] = []

    def backend(self) -> driver.Looking:
        """The backend of the run."""
        return driver.Looking(self.options, self.names, self.dry_run, self._note)

    def _note(self, session: Session, found: Report) -> Callable[..., Any] | None:
        self.report = self.report.merged(found)
        self.asked.update(id(module) for module in reach.modules_asked("training"))
        if not self.dry_run:
            mixers = map(self._mixer, driver.distinct(session.candidates))
            self.found.update({mixer.key: mixer for mixer in mixers if mixer is not None})
            return None
        if self.visit is not None:
            self.visit(session)
        mixers_seen, original = collect(session)
        # A frame that was traced twice is looked at twice; the later look holds.
        again = {(mixer.module, mixer.where) for mixer in mixers_seen}
        self.mixers = [m for m in self.mixers if (m.module, m.where) not in again] + mixers_seen
        return original

    def _mixer(self, candidate: Candidate) -> verify_.Mixer | None:
        if candidate.owner is None:
            return None
        proof = "" if candidate.certificate is None else candidate.certificate.dtype
        fresh = id(candidate.level_weights) not in self.before
        return verify_.Mixer(candidate.owner, candidate.attribute, candidate.module, candidate.where, proof, fresh)


def _is_ours(other: Any) -> bool:
    """Whether compiled code was made for a conversion, and serves no call of the user's."""
    return isinstance(other, (driver.Looking, verify_.Backend))


def _run(model: nn.Module, capture: _Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # In the caller's grad mode: `detach` and `no_grad` inside of the model are part of what it is.
    try:
        driver.run_example(model, args, kwargs, capture.backend())
    except Exception as error:
        if capture.report.graphs or not torch.is_grad_enabled() or _own_error(error) is not None:
            raise
        with torch.no_grad():  # some code runs without gradients only
            driver.run_example(model, args, kwargs, capture.backend())


def _expect_graph(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A model that computes something must have become a graph."""
    with transaction(model, args, kwargs):
        refused = why_no_graph(model.forward, args, kwargs)
    if refused is not None:
        reason, where = refused
        code = inspect_module.unwrap(type(model).forward).__code__
        where = where or f"{code.co_filename}:{code.co_firstlineno} in {code.co_name}"
        raise CaptureError(
            f"Dynamo could not trace {type(model).__name__}, so it was not analysed: {reason} ({where}). "
            "Set TORCH_LOGS=graph_breaks for details; nothing was changed."
        )


def _check_model(model: Any, call: str) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"llcompile.{call} takes an nn.Module, got {type(model).__name__}.")


def _detach_new(model: nn.Module, before: set[int]) -> None:
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


def _capture_message(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception, own: Exception | None
) -> str:
    shown = ", ".join([*map(_shown, args), *(f"{k}={_shown(v)}" for k, v in kwargs.items())]) or "none given"
    name = type(model).__name__
    if own is not None:
        what = f"{type(own).__name__}: {own}"
        return (
            f"{name} does not run on the example inputs ({shown}): {what}. Pass inputs that model(*inputs) takes; "
            "nothing was changed."
        )
    cause = getattr(error, "inner_exception", None) or error
    return (
        f"{name} runs on the example inputs ({shown}), but its analysis failed: {type(cause).__name__}: {cause}. "
        "This is a bug in llcompile or in Dynamo, not in the inputs; nothing was changed. Please report it with the "
        "traceback above; torch.compile(model, backend='eager') shows whether Dynamo can trace the model."
    )


def _shown(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:60]


def _titled(report: Report, model: nn.Module) -> Report:
    return replace(report, title=type(model).__name__)
