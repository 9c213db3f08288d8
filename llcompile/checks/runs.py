"""Runs of a converted model: its own, and those through the backend with some mixers rewritten, from the same state."""

from __future__ import annotations

import copy
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree

from llcompile import backend
from llcompile.checks.compare import Result, difference, gradient_difference, leaves
from llcompile.checks.example import Example, lengths_as_they_are
from llcompile.checks.transaction import Snapshot, put_back
from llcompile.options import Options
from llcompile.patterns import reasons
from llcompile.patterns.reasons import GivenReason
from llcompile.torch_internals.dtensors import like, whole
from llcompile.torch_internals.places import user_line
from llcompile.torch_internals.trace import traced_once
from llcompile.weights import attachment, withheld
from llcompile.weights.level_weights import LevelWeights

log = logging.getLogger("llcompile")

# (precision, largest difference), relative to the largest value; beyond, the model's own sensitivity decides.
MODEL_BUDGETS = {torch.float64: 1e-8, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_AMPLIFIED = 30  # times what rounding at the mixers alone does to the output
_LOOSE = 0.5  # a bound beyond this lets any output pass, in more than 16 bits


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


class Unverified(Exception):
    """There is nothing to compare with; says why."""


class Runs:
    """The model, run in several ways from the same state."""

    def __init__(self, example: Example, options: Options, mixers: Sequence[Mixer]) -> None:
        self.example, self.model, self.mixers = example, example.model, list(mixers)
        self.options = {**options.as_given(), "inner": "eager", "strict": False, "on_miss": "warn", "inductor": {}}
        self.snapshot = Snapshot(self.model, example.args, example.kwargs)
        levels = {id(p) for _, _, weights in attachment.attached(self.model) for p in weights.parameters()}
        self.own = {n: p for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in levels}
        self.dtype = torch.float32
        self.kept: list[Mixer] = []
        self.want = Result([])  # the model's own, once it has run
        self.last = Result([])
        self.compiled: tuple[frozenset[tuple[int, str]], Callable[..., Any]] | None = None

    def reference(self) -> None:
        """The model's own output and gradients."""
        try:
            with _dtypes_of([m.owner for m in self.mixers]) as inside:
                self.want = self.plain()
        except Exception as error:
            raise Unverified(f"the model does not run without the backend here: {first_line(error)}") from error
        if not self.want.outputs:
            raise Unverified("the model returns no floating-point tensor")
        if not all(out.isfinite().any() for out in self.want.outputs):
            raise Unverified("the model's own output is not finite")
        exact = all(m.proof == "float64" for m in self.mixers)
        inside.update(t.dtype for t in (*self.model.parameters(), *self.want.outputs))
        self.dtype = max(inside.intersection(MODEL_BUDGETS), key=lambda d: MODEL_BUDGETS[d])
        if self.dtype == torch.float64 and not exact:
            self.dtype = torch.float32  # some of it computes in float32 inside

    def compare(self, mixers: Sequence[Mixer]) -> tuple[float, float | None, GivenReason | None]:
        """(error, gradient error, why they are too large or None) with these mixers rewritten and no other."""
        try:
            self.last = got = self.rewritten(mixers)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise Unverified(first_line(error)) from error
        except Exception as error:
            log.info("verify: the rewritten program does not run", exc_info=error)
            return float("inf"), None, reasons.REWRITE_NOT_RUN(where=_user_line(error))
        off, gradient_off = difference(got, self.want), gradient_difference(got, self.want)
        if max(off, gradient_off or 0.0) <= MODEL_BUDGETS[self.dtype]:
            return off, gradient_off, None
        self.expect_repeatable()
        if self.is_nearer(got):
            return off, gradient_off, None
        bounds = [max(MODEL_BUDGETS[self.dtype], _AMPLIFIED * rounding) for rounding in self.rounding()]
        dtype = str(self.dtype).removeprefix("torch.")
        if off > bounds[0]:
            return off, gradient_off, reasons.OUTPUT_CHANGES(error=off, dtype=dtype)
        if gradient_off is not None and gradient_off > bounds[1]:
            return off, gradient_off, reasons.GRADIENTS_CHANGE(error=gradient_off, dtype=dtype)
        if max(bounds) > _LOOSE and self.dtype.itemsize > 2:
            raise Unverified(
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
            args, kwargs = _pytree.tree_map(to, (self.example.args, dict(self.example.kwargs)))
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
                    drawn = like(torch.randn(out.shape, generator=generator).to(out.device, out.dtype), out)
                    out.data.add_(drawn * epsilon * out.detach().abs().max())

        try:
            with hooked([m.owner for m in self.mixers], disturb):
                got = self.plain()
        except Exception:
            return 0.0, 0.0
        return difference(got, self.want), gradient_difference(got, self.want) or 0.0

    def expect_repeatable(self) -> None:
        """A model that gives something else each time cannot be compared with."""
        again = difference(self.plain(), self.want)
        if again > MODEL_BUDGETS[self.dtype]:
            raise Unverified(f"the model's own output changes by {again:.1e} from run to run")

    def plain(self) -> Result:
        """One run of the model without us."""
        return self._run(self.model, (), gradients=True)

    def rewritten(self, mixers: Sequence[Mixer], gradients: bool = True) -> Result:
        """One run through the backend, with these mixers rewritten and no other; compiled once."""
        self.kept = list(mixers)
        kept = frozenset(m.key for m in self.kept)
        if self.compiled is None or self.compiled[0] != kept:
            self.compiled = kept, traced_once(self.model, VerifyBackend(self.options))
        without = frozenset(m.key for m in self.mixers) - kept
        with withheld.withholding(without), lengths_as_they_are():
            return self._run(self.compiled[1], mixers, gradients)

    def _run(self, call: Callable[..., Any], mixers: Sequence[Mixer], gradients: bool) -> Result:
        """Outputs and gradients of one run, after which all is as it was; only these mixers have level weights in it.

        Code may go over its module's children or parameters: level weights that are there are seen by it.
        """
        self.snapshot.restore_random_state()
        try:
            with _away([m for m in self.mixers if m not in mixers]):
                outputs = leaves(call(*self.example.args, **self.example.kwargs))
                result = Result([whole(out.detach()).clone() for out in outputs])
                if gradients:
                    held = [weights for m in mixers if (weights := m.weights) is not None]
                    result.take_gradients(outputs, self.own, held, self.want)
            return result
        finally:
            put_back(self.model, self.snapshot)


class VerifyBackend:
    """The backend itself, with the options of this conversion and an inner compiler that changes nothing."""

    _llcompile = _llcompile_runs = True
    __name__ = "loglinear_verify"

    def __init__(self, options: dict[str, Any]) -> None:
        self.kwargs = {"options": options}

    def __call__(self, module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """As `backend.loglinear`."""
        return backend.loglinear(module, example_inputs, options=self.kwargs["options"])


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
def kept_values(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """These tensors are bit for bit what they were."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def _user_line(error: Exception) -> str:
    """The line of the user's code at which a run stopped; code that was generated has none."""
    frames = [frame for frame in traceback.format_tb(error.__traceback__) if 'File "<' not in frame]
    return user_line({"stack_trace": "".join(frames)}) or "a generated line"


def first_line(error: BaseException) -> str:
    """The first line of an error; Dynamo's wrapping says nothing."""
    inner = getattr(error, "inner_exception", None) or error
    return f"{type(inner).__name__}: {inner}".split("\n")[0]


@contextmanager
def _dtypes_of(owners: Iterable[nn.Module]) -> Iterator[set[torch.dtype]]:
    """The precisions that the modules, and those in them, compute in: under autocast, not that of their parameters."""
    found: set[torch.dtype] = set()

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        found.update(out.dtype for out in leaves(output))

    modules = {id(m): m for owner in owners for m in owner.modules()}
    with hooked(modules.values(), note):
        yield found


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    """The modules have a forward hook for a while."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
