"""convert, inspect and revert: the eager front door."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llcompile import backend, driver
from llcompile.checks import failure, other_mode
from llcompile.checks import verify as verify_
from llcompile.checks.example import Example, LookBackend
from llcompile.checks.runs import Mixer, VerifyBackend
from llcompile.errors import ModelError
from llcompile.integrations import versions
from llcompile.look.collect import collect, without_graph
from llcompile.look.findings import Subject
from llcompile.look.look import Look
from llcompile.look.mixer_look import MixerLook
from llcompile.look.model_cost import Elsewhere, elsewhere
from llcompile.look.timings import Stopwatch
from llcompile.options import Options
from llcompile.passes import discover
from llcompile.passes.candidate import Candidate
from llcompile.passes.session import Session
from llcompile.report import Report
from llcompile.torch_internals import reach
from llcompile.torch_internals.forget import forget_compiled
from llcompile.weights import adapters, attachment, checkpoint, withheld, wrapped

_NOT_ASKED = "convert was called with verify=False"


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
        model: any nn.Module that runs; changed in place (modules named `loglinear` are added).
        example_args: inputs that the model runs on; their values do not matter.
        options: as for the backend; only `level_weights`, `levels` and `strict` are used here.
        verify: whether to run and compare the converted model; if False, the report says so.
        example_kwargs: keyword inputs of the model.

    Returns:
        What was converted, declined and left untouched.

    Raises:
        ModelError: `model` is not an nn.Module.
        CaptureError: the model does not run on the example inputs, or its analysis failed.
        OptionError: an option is unknown or has a wrong value.
        LevelWeightsError: the model has level weights of another kind or size.
        CheckpointError: the model was loaded without the level weights that its checkpoint has.
        DistributedError: DDP or FSDP was applied before.
        StrictError: `strict=True`, and a mixer was declined, or nothing that mixes positions was found.

    If an error is raised, the model is unchanged.
    """
    example, parsed = _checked("convert", model, example_args, example_kwargs, options)
    checkpoint.expect_whole([model])
    with _undone_on_error(example) as before:
        run = _Conversion(example, parsed, before)
        found = run.look()
        wrapped.expect_none(owner for owner, _ in attachment.attached_new(model, before))
        report = _verified(run, found) if verify else replace(found, unverified=_NOT_ASKED)
        driver.check_strict(report, parsed)
        adapters.enlist(model, attachment.attached_new(model, before))
        _keep_declined(model, report)
    return report


def inspect(model: nn.Module, *example_args: Any, options: dict[str, Any] | None = None, **example_kwargs: Any) -> Look:
    """Report what `convert` would do, with the same decisions and proofs, and change nothing.

    Models on the device `meta` work, too: shapes are read, values are not.

    Args:
        model: any nn.Module that runs; not changed.
        example_args: inputs that the model runs on.
        options: as for `convert`.
        example_kwargs: keyword inputs of the model.

    Returns:
        The report, with `graph_before`, `graph_after`, `diff`, `costs`, `kernels`, `to_html(path)` and `to_mlir()`.

    Raises:
        ModelError: `model` is not an nn.Module.
        CaptureError: the model does not run on the example inputs, or its analysis failed.
        OptionError: an option is unknown or has a wrong value.
    """
    run = _inspected(model, example_args, example_kwargs, options)
    wishes = {**run.options.as_given(), "strict": False}
    converted = functools.partial(_converted, model, example_args, example_kwargs, wishes)
    subject = Subject(model, example_args, example_kwargs, converted)
    seen = {(mixer.module, mixer.where) for mixer in run.mixers}
    unseen = [without_graph(record) for record in run.report.declined if (record.module, record.where) not in seen]
    mixers, timings = (*run.mixers, *unseen), run.watch.timings()
    return Look(**vars(run.report), mixers=mixers, elsewhere=run.elsewhere, timings=timings, subject=subject)


def revert(model: nn.Module) -> int:
    """Remove all level weights, with their hooks, from `model`, and return how many there were.

    Raises:
        ModelError: `model` is not an nn.Module.
    """
    _check_model(model, "revert")
    checkpoint.forget(model)
    return attachment.detach(model)


def visit_graphs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], visit: Callable[[Session], None]
) -> Report:
    """As `inspect`; `visit` is given the session of each graph when all is decided and nothing rewritten."""
    return _inspected(model, args, kwargs, None, visit).report


@contextmanager
def _converted(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: dict[str, Any]
) -> Iterator[None]:
    """The model is converted inside, and as it was afterwards."""
    before = attachment.ids_attached(model)
    try:
        convert(model, *args, options=options, **kwargs)
        yield
    finally:
        attachment.detach_new(model, before)


def _inspected(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: dict[str, Any] | None,
    visit: Callable[[Session], None] = lambda session: None,
) -> _Inspection:
    example, parsed = _checked("inspect", model, args, kwargs, options)
    with _undone_on_error(example, keep_withheld=True):
        run = _Inspection(example, parsed, visit)
        driver.check_strict(run.look(), parsed)
    if said := checkpoint.dropped(model):  # `convert` raises that
        run.report = replace(run.report, remarks=(*run.report.remarks, said))
    return run


def _checked(
    call: str, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: dict[str, Any] | None
) -> tuple[Example, Options]:
    """What a call was given, once it is known to be fit."""
    parsed = Options.parse(options)
    _check_model(model, call)
    wrapped.expect_traceable(model)
    backend.prepare()
    versions.announce()
    return Example(model, args, kwargs), parsed


def _check_model(model: Any, call: str) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"llcompile.{call} takes an nn.Module, got {type(model).__name__}.")


# Dynamo's settings and the warnings' filters, which a conversion changes for its time, belong to all threads.
_one_at_a_time = threading.RLock()


@contextmanager
def _undone_on_error(example: Example, keep_withheld: bool = False) -> Iterator[set[int]]:
    """An error inside leaves the model as it was, and reaches the user as one of ours.

    Mixers that an earlier conversion has withheld are looked at anew inside; `keep_withheld` says whether they are
    withheld again afterwards. Yields the ids of the level weights that were there before.
    """
    model = example.model
    with _one_at_a_time, _uncompiled(model):
        before = attachment.ids_attached(model)
        set_aside = withheld.forget_withheld(model)
        try:
            yield before
        except BaseException as error:
            attachment.detach_new(model, before)
            withheld.forget_withheld(model)
            withheld.put_withheld(set_aside)
            raise failure.as_ours(example, error) from error
        finally:
            new = attachment.attached_new(model, before)
            forget_compiled({type(owner) for owner, _ in new}, _is_for_a_look)
        if keep_withheld:
            withheld.put_withheld(set_aside)


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


def _is_for_a_look(other: Any) -> bool:
    """Whether code was compiled for a conversion, and serves no call of the user's."""
    return isinstance(other, (LookBackend, VerifyBackend))


class _Run:
    """An example run, and what it has found so far."""

    dry_run: bool

    def __init__(self, example: Example, options: Options) -> None:
        self.example, self.options = example, options
        self.report = Report()

    def look(self) -> Report:
        """The report on all graphs of a run."""
        discover.refused_calls({})  # what another run has left
        self._trace()
        if not self.report.graphs:
            self.report = self.report.merged(failure.without_graph(self.example))
        self.report = self.report.merged(failure.recurrent(self.example))
        broken = Report(declined=tuple(discover.refused_calls(self.example.names)))  # after the last graph
        model = self.example.model
        own = attachment.own_parameters(model)
        self.report = replace(self.report.merged(broken), title=type(model).__name__, own_parameters=own)
        return self.report

    def _trace(self) -> None:
        looking = LookBackend(self.options, self.example.names, self.dry_run, self._note)
        # In the caller's grad mode: `detach` and `no_grad` inside of the model are part of what it is.
        try:
            self.example.trace(looking)
        except Exception as error:
            if self.report.graphs or not torch.is_grad_enabled() or failure.own_error(error) is not None:
                raise
            with torch.no_grad():  # some code runs without gradients only
                self.example.trace(looking)

    def _note(self, session: Session, found: Report) -> Callable[..., Any] | None:
        self.report = self.report.merged(found)
        return None


class _Conversion(_Run):
    """A run that attaches level weights.

    Args:
        before: ids of the level weights that were there already.
    """

    dry_run = False

    def __init__(self, example: Example, options: Options, before: set[int]) -> None:
        super().__init__(example, options)
        self.before = before
        self.found: dict[tuple[int, str], Mixer] = {}
        self.asked: set[int] = set()  # ids of modules whose `training` the code has read

    def _note(self, session: Session, found: Report) -> None:
        super()._note(session, found)
        self.asked.update(id(module) for module in reach.modules_asked("training"))
        mixers = map(self._mixer, driver.distinct(session.candidates))
        self.found.update({mixer.key: mixer for mixer in mixers if mixer is not None})

    def _mixer(self, candidate: Candidate) -> Mixer | None:
        if candidate.owner is None:
            return None
        proof = "" if candidate.certificate is None else candidate.certificate.dtype
        fresh = id(candidate.level_weights) not in self.before
        return Mixer(candidate.owner, candidate.attribute, candidate.module, candidate.where, proof, fresh)


class _Inspection(_Run):
    """A run that attaches nothing and collects what there is to see."""

    dry_run = True

    def __init__(self, example: Example, options: Options, visit: Callable[[Session], None]) -> None:
        super().__init__(example, options)
        self.visit = visit
        self.mixers: list[MixerLook] = []
        self.elsewhere = Elsewhere()
        self.watch = Stopwatch()

    def _note(self, session: Session, found: Report) -> Callable[..., Any]:
        super()._note(session, found)
        self.visit(session)
        since = time.perf_counter()
        self.elsewhere += elsewhere(session)
        mixers, original = collect(session)
        self.watch.add(session, since)
        # A frame that was traced twice is looked at twice; the later look holds.
        again = {(mixer.module, mixer.where) for mixer in mixers}
        self.mixers = [m for m in self.mixers if (m.module, m.where) not in again] + mixers
        return original


def _verified(run: _Conversion, report: Report) -> Report:
    """The report after the converted model's run; mixers that are to blame lose their level weights."""
    mixers = list(run.found.values())
    other = other_mode.judge(run.example, run.options, mixers, run.asked)
    report = _without_blamed(report, other)
    verdict = verify_.verify(run.example, run.options, [m for m in mixers if m not in other.blamed])
    report = _without_blamed(report, verdict)
    return replace(report, certificate=verdict.certificate, unverified=verdict.unverified)


def _without_blamed(report: Report, verdict: verify_.Verdict) -> Report:
    for mixer, given in verdict.blamed.items():
        withheld.withhold(mixer.owner, mixer.attribute, given)
        if mixer.fresh and mixer.weights is not None:
            attachment.detach_one(mixer.owner, mixer.attribute)
    return verify_.judged(report, verdict)


def _keep_declined(model: nn.Module, report: Report) -> None:
    """What was declined stays as it is in every call, also in one in which it would look like a mixer."""
    modules = dict(model.named_modules())
    for record in report.declined:
        if record.module in modules:
            withheld.withhold_all(modules[record.module], record.given)
