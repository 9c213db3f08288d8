"""The end of a conversion: what will run is run, and compared with the model's own output and gradients.

The model goes through the backend on the example inputs, in its own training mode and the caller's grad mode, with an
inner compiler that changes nothing. Level weights of 1 must give what the model gives; level weights off 1 must
change it, and must have gradients. What does not pass costs the mixers that are to blame, never the run.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree

from llcompile import backend, driver
from llcompile.compare import Result, difference, gradient_difference, leaves
from llcompile.options import Options
from llcompile.patterns import reasons
from llcompile.patterns.reasons import GivenReason
from llcompile.patterns.records import Declined, ModelCertificate
from llcompile.report import Report
from llcompile.torch_internals.trace import traced_once
from llcompile.transaction import Snapshot, put_back
from llcompile.weights import attachment, withheld
from llcompile.weights.level_weights import LevelWeights

# (precision, largest difference), relative to the largest value; beyond, the model's own sensitivity decides.
BUDGETS = {torch.float64: 1e-8, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_AMPLIFIED = 30  # times what rounding at the mixers alone does to the output
_LOOSE = 0.5  # a bound beyond this lets any output pass, in more than 16 bits
_NOISE = 0.3
_ALONE = 6  # groups of mixers that are tried by themselves before all are declined


@dataclass(frozen=True)
class Mixer:
    """A converted mixer: where its level weights are, and what the report calls it."""

    owner: nn.Module
    attribute: str
    module: str
    where: str
    proof: str
    fresh: bool = True

    @property
    def key(self) -> tuple[int, str]:
        """What `withheld.withhold` knows it by."""
        return id(self.owner), self.attribute

    @property
    def weights(self) -> LevelWeights | None:
        """Its level weights; None for the linear operator."""
        return attachment.find(self.owner, self.attribute)


@dataclass
class Verdict:
    """What the run showed: the certificate, or why there is none, and the mixers that must not be rewritten."""

    certificate: ModelCertificate | None = None
    unverified: str = ""
    blamed: dict[Mixer, GivenReason] = field(default_factory=dict)
    notes: dict[Mixer, str] = field(default_factory=dict)


def judged(report: Report, verdict: Verdict) -> Report:
    """The report with the mixers that are to blame among the declined, and the notes."""
    blamed = [(m.module, m.where, given) for m, given in verdict.blamed.items()]
    notes = {(m.module, m.where): note for m, note in verdict.notes.items()}
    kept, declined = [], list(report.declined)
    for record in report.converted:
        found = next((b for b in blamed if b[:2] == (record.module, record.where)), None)
        if found is None:
            note = notes.get((record.module, record.where))
            kept.append(record if note is None else replace(record, notes=(*record.notes, note)))
            continue
        blamed.remove(found)
        declined.append(Declined.because(found[2], record.module, record.where))
    return replace(report, converted=tuple(kept), declined=tuple(declined))


class _Unverified(Exception):
    """There is nothing to compare with; says why."""


def verify(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, mixers: Sequence[Mixer]
) -> Verdict:
    """Runs the converted model; never raises for what it finds, nor for reasons of its own."""
    start = time.perf_counter()
    reason = _no_values(model, args, kwargs)
    if reason or not mixers:
        return Verdict(unverified=reason)
    with warnings.catch_warnings(), _identity(mixers):
        warnings.simplefilter("ignore")
        try:
            verdict = _judge(_Runs(model, args, kwargs, options, mixers))
        except _Unverified as reason_:
            return Verdict(unverified=str(reason_))
        except Exception as error:  # nothing is counted as verified, and the conversion goes on
            return Verdict(unverified=_line(error))
    if verdict.certificate is not None:
        seconds = time.perf_counter() - start
        verdict.certificate = replace(verdict.certificate, seconds=round(seconds, 3))
    return verdict


def _judge(run: _Runs) -> Verdict:
    """Compares, and takes mixers out until what is left agrees."""
    run.reference()
    blamed: dict[Mixer, GivenReason] = {}
    error, gradient_error, reason = run.compare(run.mixers)
    if reason is not None:
        blamed = _to_blame(run, reason)
        left = [m for m in run.mixers if m not in blamed]
        try:
            error, gradient_error, reason = run.compare(left)
        except _Unverified as unverified:  # those that were found remain to blame
            return Verdict(unverified=str(unverified), blamed=blamed)
        if reason is not None:  # only together, or the search was cut short
            blamed.update(dict.fromkeys(left, reason))
            return Verdict(unverified="nothing is left to verify", blamed=blamed)
        if not left:
            return Verdict(blamed=blamed)
    left = [m for m in run.mixers if m not in blamed]
    acting, idle, notes = run.acting(left)
    blamed.update(idle)
    names = tuple(m.module for m in acting)
    certificate = ModelCertificate(error, gradient_error, names, str(run.dtype).removeprefix("torch."), 0.0)
    return Verdict(certificate, "", blamed, notes)


def _to_blame(run: _Runs, reason: GivenReason) -> dict[Mixer, GivenReason]:
    """The mixers whose rewrite makes the difference; those that stand in the same line of code are one."""
    _, _, without = run.compare([])
    if without is not None:
        problem = f"even compiled without a rewrite, the model does not reproduce its own output: {without.text}"
        raise _Unverified(problem)
    groups: dict[Any, list[Mixer]] = {}
    for mixer in run.mixers:
        groups.setdefault((type(mixer.owner), mixer.attribute, mixer.where), []).append(mixer)
    if len(groups) == 1 or len(groups) > _ALONE:
        return dict.fromkeys(run.mixers, reason)
    blamed: dict[Mixer, GivenReason] = {}
    for group in groups.values():
        _, _, alone = run.compare(group)
        if alone is not None:
            blamed.update(dict.fromkeys(group, alone))
    return blamed or dict.fromkeys(run.mixers, reason)


@contextmanager
def _dtypes_of(owners: Iterable[nn.Module]) -> Iterator[set[torch.dtype]]:
    """The precisions that the modules, and those in them, compute in: under autocast, not that of their parameters."""
    found: set[torch.dtype] = set()

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        found.update(out.dtype for out in leaves(output))

    modules = {id(m): m for owner in owners for m in owner.modules()}
    hooks = [m.register_forward_hook(note) for m in modules.values()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class _Runs:
    """The model, run in several ways from the same state."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Options,
        mixers: Sequence[Mixer],
    ) -> None:
        self.model, self.args, self.kwargs, self.mixers = model, args, kwargs, list(mixers)
        # What was not asked for stays unsaid: it would contradict level weights of another kind.
        asked = {name: getattr(options, name) for name in options.given}
        self.options = {**asked, "inner": "eager", "strict": False, "on_miss": "warn", "inductor": {}}
        self.snapshot = Snapshot(model, args, kwargs)
        levels = {id(p) for _, _, weights in attachment.attached(model) for p in weights.parameters()}
        self.own = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in levels}
        self.dtype = torch.float32
        self.kept: list[Mixer] = []
        self.want = Result([])  # the model's own, once it has run
        self.last = Result([])
        self.compiled: tuple[frozenset[tuple[int, str]], Callable[..., Any]] | None = None

    def reference(self) -> None:
        """The model's own output and gradients."""
        try:
            with _dtypes_of([m.owner for m in self.mixers]) as inside:
                self.want = self.run(self._call)
        except Exception as error:
            raise _Unverified(f"the model does not run without the backend here: {_line(error)}") from error
        if not self.want.outputs:
            raise _Unverified("the model returns no floating-point tensor")
        if not all(out.isfinite().any() for out in self.want.outputs):
            raise _Unverified("the model's own output is not finite")
        exact = all(m.proof == "float64" for m in self.mixers)
        inside.update(t.dtype for t in (*self.model.parameters(), *self.want.outputs))
        self.dtype = max(inside.intersection(BUDGETS), key=lambda d: BUDGETS[d])
        if self.dtype == torch.float64 and not exact:
            self.dtype = torch.float32  # some of it computes in float32 inside

    def compare(self, mixers: Sequence[Mixer]) -> tuple[float, float | None, GivenReason | None]:
        """(error, gradient error, why they are too large or None) with these mixers rewritten and no other."""
        try:
            self.last = got = self.run(self.through_backend(mixers), mixers, mixers)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise _Unverified(_line(error)) from error
        except Exception as error:
            return float("inf"), None, reasons.REWRITE_NOT_RUN(error=_line(error))
        off, gradient_off = difference(got, self.want), gradient_difference(got, self.want)
        if max(off, gradient_off or 0.0) <= BUDGETS[self.dtype]:
            return off, gradient_off, None
        self.expect_repeatable()
        if self.is_nearer(got):
            return off, gradient_off, None
        bounds = [max(BUDGETS[self.dtype], _AMPLIFIED * rounding) for rounding in self.rounding()]
        dtype = str(self.dtype).removeprefix("torch.")
        if off > bounds[0]:
            return off, gradient_off, reasons.OUTPUT_CHANGES(error=off, dtype=dtype)
        if gradient_off is not None and gradient_off > bounds[1]:
            return off, gradient_off, reasons.GRADIENTS_CHANGE(error=gradient_off, dtype=dtype)
        if max(bounds) > _LOOSE and self.dtype.itemsize > 2:
            raise _Unverified(
                f"rounding at the mixers alone changes the model's output by {max(bounds) / _AMPLIFIED:.1e}, so "
                "no comparison can tell a correct program from a wrong one"
            )
        return off, gradient_off, None

    def is_nearer(self, got: Result) -> bool:
        """Whether a run of 16 bits is no further from the model in float32 than the model's own run is."""
        exact = self.in_float32() if self.dtype.itemsize == 2 else None
        if exact is None:
            return False
        pairs = [(f(got, exact), f(self.want, exact)) for f in (difference, gradient_difference)]
        return all((ours or 0.0) <= (theirs or 0.0) < float("inf") for ours, theirs in pairs)

    def in_float32(self) -> Result | None:
        """The model's own run in float32; None where it holds dtypes of its own and does not run so."""
        to = lambda x: x.float() if isinstance(x, torch.Tensor) and x.dtype == self.dtype else x  # noqa: E731
        try:
            wide = copy.deepcopy(self.model).float()
            args, kwargs = _pytree.tree_map(to, (self.args, self.kwargs))
            self.snapshot.restore_random_state()
            outputs = leaves(wide(*args, **kwargs))
            result = Result([out.detach() for out in outputs])
            result.take_gradients(outputs, {n: p for n, p in wide.named_parameters() if n in self.own}, [])
        except Exception:
            return None
        finally:
            put_back(self.model, self.snapshot)
        return result

    def rounding(self) -> tuple[float, float]:
        """What rounding at the mixers alone does to the output and the gradients."""
        epsilon, generator = torch.finfo(self.dtype).eps, torch.Generator().manual_seed(0)

        def disturb(owner: nn.Module, inputs: Any, output: Any) -> Any:
            for out in leaves(output):
                if out.numel() and not out.is_inference():
                    drawn = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
                    out.data.add_(drawn * epsilon * out.detach().abs().max())

        hooks = [m.owner.register_forward_hook(disturb) for m in self.mixers]
        try:
            got = self.run(self._call)
        except Exception:
            return 0.0, 0.0
        finally:
            for hook in hooks:
                hook.remove()
        return difference(got, self.want), gradient_difference(got, self.want) or 0.0

    def expect_repeatable(self) -> None:
        """A model that gives something else each time cannot be compared with."""
        again = difference(self.run(self._call), self.want)
        if again > BUDGETS[self.dtype]:
            raise _Unverified(f"the model's own output changes by {again:.1e} from run to run")

    def acting(self, mixers: list[Mixer]) -> tuple[list[Mixer], dict[Mixer, GivenReason], dict[Mixer, str]]:
        """The mixers whose level weights act; those that do not, with the reason; and notes on the rest."""
        weighted = [m for m in mixers if m.weights is not None]
        if not weighted or self._all_act(weighted):
            return weighted, {}, {}
        with _noise([m.weights for m in weighted], self.model):
            base = self.run(self.through_backend(mixers), mixers, weighted)
        silent = [m for m in weighted if not base.has_levels(m.weights)]
        moving = {m for m in silent if self._moves(m, mixers, base)}
        idle: dict[Mixer, GivenReason] = {}
        notes: dict[Mixer, str] = {}
        for mixer in silent:
            if mixer in moving and not base.graded:
                continue
            if mixer not in moving and self._is_zero(mixer):
                notes[mixer] = (
                    "its output is zero on the example inputs, so they cannot show whether its level weights act"
                )
                continue
            idle[mixer] = reasons.WEIGHTS_WITHOUT_GRADIENT() if mixer in moving else reasons.WEIGHTS_IDLE()
        acting = [m for m in weighted if m not in idle and m not in notes]
        return acting, idle, notes

    def _all_act(self, weighted: list[Mixer]) -> bool:
        """Whether the comparison itself has shown gradients of all level weights, and noise on them moves the output.

        That is the common case, and costs one forward pass.
        """
        if not all(self.last.has_levels(m.weights) for m in weighted):
            return False
        with _noise([m.weights for m in weighted], None):
            moved = self.run(self.through_backend(self.kept), self.kept, gradients=False)
        return difference(moved, self.last) > 4 * torch.finfo(self.dtype).eps

    def _moves(self, mixer: Mixer, mixers: list[Mixer], base: Result) -> bool:
        """Whether other values of these level weights alone give another output."""
        others = [m.weights for m in mixers if m.weights is not None]
        with _noise(others, self.model), _noise([mixer.weights], None, seed=1):
            return difference(self.run(self.through_backend(mixers), mixers), base) > 4 * torch.finfo(self.dtype).eps

    def _is_zero(self, mixer: Mixer) -> bool:
        """Whether the mixer's module gives nothing but zeros on the example inputs."""
        seen: list[bool] = []
        look = lambda owner, inputs, out: seen.extend(not o.any() for o in leaves(out))  # noqa: E731
        hook = mixer.owner.register_forward_hook(look)
        try:
            self.run(self._call)
        finally:
            hook.remove()
        return bool(seen) and all(seen)

    def run(
        self,
        call: Callable[..., Any],
        mixers: Sequence[Mixer] = (),
        weighted: Sequence[Mixer] = (),
        gradients: bool = True,
    ) -> Result:
        """Outputs and gradients of one run, after which all is as it was; only these mixers have level weights in it.

        Code may go over its module's children or parameters: level weights that are there are seen by it.
        """
        self.snapshot.restore_random_state()
        try:
            with _away([m for m in self.mixers if m not in mixers]):
                outputs = leaves(call(*self.args, **self.kwargs))
                result = Result([out.detach().clone() for out in outputs])
                if gradients:
                    held = [m.weights for m in weighted if m.weights is not None]
                    result.take_gradients(outputs, self.own, held, self.want)
            return result
        finally:
            put_back(self.model, self.snapshot)

    def through_backend(self, mixers: Iterable[Mixer]) -> Callable[..., Any]:
        """The model, compiled with these mixers rewritten and no other; compiled once."""
        self.kept = list(mixers)
        kept = frozenset(m.key for m in self.kept)
        if self.compiled is None or self.compiled[0] != kept:
            self.compiled = kept, traced_once(self._as_function(), Backend(self.options))
        compiled, without = self.compiled[1], frozenset(m.key for m in self.mixers) - kept

        def call(*args: Any, **kwargs: Any) -> Any:
            with withheld.withholding(without), driver.lengths_as_they_are():
                return compiled(*args, **kwargs)

        return call

    def _as_function(self) -> Callable[..., Any]:
        model = self.model

        def run(*args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

        return run

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class Backend:
    """The backend itself, with the options of this conversion and an inner compiler that changes nothing."""

    _llcompile = _llcompile_runs = True
    __name__ = "loglinear_verify"

    def __init__(self, options: dict[str, Any]) -> None:
        self.kwargs = {"options": options}

    def __call__(self, module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """As `backend.loglinear`."""
        return backend.loglinear(module, example_inputs, options=self.kwargs["options"])


def _no_values(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    tensors = [*model.parameters(), *model.buffers(), *leaves((args, kwargs))]
    return "the model is on the device meta, so it has no values" if any(t.is_meta for t in tensors) else ""


@contextmanager
def _away(mixers: Sequence[Mixer]) -> Iterator[None]:
    """These mixers' modules are without their level weights for a while."""
    modules = {id(m.owner): (m.owner, dict(m.owner._modules)) for m in mixers}
    for mixer in mixers:
        mixer.owner._modules.pop(mixer.attribute, None)
    try:
        yield
    finally:
        for owner, before in modules.values():
            later = {name: child for name, child in owner._modules.items() if name not in before}
            owner._modules.clear()
            owner._modules.update({**before, **later})


@contextmanager
def _identity(mixers: Sequence[Mixer]) -> Iterator[None]:
    """Level weights that were trained before stand at 1 for the comparison."""
    held = [m.weights for m in mixers if not m.fresh]
    with _kept([t for weights in held if weights is not None for _, t in weights.tensors()]):
        for weights in held:
            if weights is not None:
                weights.set_to_one()
        yield


@contextmanager
def _noise(held: Iterable[LevelWeights | None], model: nn.Module | None, seed: int = 0) -> Iterator[None]:
    """Noise on level weights and, so that nothing hides them, on parameters of the model that are zero as a whole."""
    learned = [p for weights in held if weights is not None for p in weights.parameters()]
    own = [] if model is None else [p for p in model.parameters() if p.dtype in BUDGETS and p.numel()]
    zero = [p for p in own if not p.any()]
    ours = {id(p) for p in learned}
    tensors = learned + [p for p in zero if id(p) not in ours]
    with _kept(tensors):
        for i, tensor in enumerate(tensors):
            drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed * 7919 + i))
            with torch.no_grad():
                tensor.add_(_NOISE * drawn.to(tensor.device, tensor.dtype))
        yield


@contextmanager
def _kept(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """These tensors are bit for bit what they were."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def _line(error: BaseException) -> str:
    """The first line of an error; Dynamo's wrapping says nothing."""
    inner = getattr(error, "inner_exception", None) or error
    return f"{type(inner).__name__}: {inner}".split("\n")[0]
