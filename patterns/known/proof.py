"""Proof: runs a known function and our operator on the same random inputs.

The inputs are small, fresh and generic (no zeros, ones or saturated gates), on the CPU in float64 whatever the model's
device and dtype, at several lengths; every operand is checked to matter, and gradients are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llcompile.kernels.choice import portable
from llcompile.kernels.state import linear_state, pack_state
from llcompile.patterns import reasons
from llcompile.patterns.agreement import BUDGETS, EXACT, apart, difference, gradients, precision
from llcompile.patterns.known.arguments import is_level_state, read_call
from llcompile.patterns.known.capture import CapturedFunction
from llcompile.patterns.known.draws import draw_call
from llcompile.patterns.known.entry import Arguments
from llcompile.patterns.known.lower import lower, ones_like_weights
from llcompile.patterns.known.state_layout import from_operator, to_operator
from llcompile.patterns.reasons import GivenReason
from llcompile.patterns.records import Certificate

LENGTHS = (3, 70, 133)  # shorter than a chunk, across one chunk, and across two with a remainder
LEVELS = 9  # enough for the longest of them
_IDLE = 1e-6  # a result that changes by less does not depend on what was changed
_AMPLIFIED = 30  # times what rounding the inputs alone does to a gradient
_STEEPEST = 1e-3  # where rounding does more, no gradient is compared with it


class DoesNotRun(Exception):
    """Neither the function nor anything that stands for it runs here and now."""


@dataclass(frozen=True)
class Original:
    """Something that computes what the known function does, and how closely it can be met.

    Args:
        run: takes the function's arguments.
        against: what it is, where it is not the function itself.
        device, dtype: where and on what it is run.
        precisions: those that may round in it, the strictest first.
    """

    run: Callable[..., Any]
    against: str = ""
    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    precisions: tuple[str, ...] = EXACT


def prove_call(captured: CapturedFunction, call: Arguments, weighted: bool) -> Certificate | GivenReason:
    """The certificate of a call, or why there is none.

    Args:
        captured: the function.
        call: a call of it.
        weighted: whether it gets level weights.

    Raises:
        DoesNotRun: there is nothing to compare with.
    """
    failures = []
    for original in _originals(captured):
        try:
            with portable():
                return _Proof(captured, call, weighted, original).outcome()
        except Exception as error:
            what = f"{original.against or captured.entry.function} ({original.device})"
            failures.append(f"{what} does not run here: {type(error).__name__}: {error}".split("\n")[0])
    raise DoesNotRun("; ".join(failures))


def _originals(captured: CapturedFunction) -> Iterator[Original]:
    """What to compare with, in turn until one runs: the function, the library's references, the function's kernels."""
    yield Original(captured.plain)
    for name, reference in captured.references():
        yield Original(reference, against=name)
    if captured.entry.opaque:  # a kernel for CPUs that takes no float64
        yield Original(captured.function, dtype=torch.float32, precisions=("float32",))
    if captured.entry.opaque and torch.cuda.is_available():
        # Triton's products of float32 are TF32 by default, and some of these functions take no float32 at all.
        yield Original(captured.function, device="cuda", dtype=torch.float32, precisions=("tf32",))
        yield Original(captured.function, device="cuda", dtype=torch.bfloat16, precisions=("bfloat16",))


class _Proof:
    """One call, compared with one original."""

    def __init__(self, captured: CapturedFunction, call: Arguments, weighted: bool, original: Original) -> None:
        self.entry, self.plain, self.call = captured.entry, captured.plain, call
        self.weighted, self.original = weighted, original
        self.state, self.state_axes = self.entry.state, self.entry.state_axes(call.values)

    def outcome(self) -> Certificate | GivenReason:
        """The certificate, or why there is none; raises what the original raises."""
        original, budget = self.original, BUDGETS[self.original.precisions[-1]]
        worst = max(self.error(seed, length) for seed, length in enumerate(LENGTHS))
        slopes, idle = self.gradient_error(), self.idle_operand()
        if idle:
            return reasons.IDLE_OPERAND(operand=idle)
        if worst <= budget < slopes and slopes > self.gradient_bound(worst):
            return reasons.GRADIENTS_DIFFER(error=slopes)
        if worst <= budget:
            return Certificate(worst, precision(worst, original.precisions), len(LENGTHS), original.against)
        against = f" with {original.against}" if original.against else ""
        return reasons.FUNCTION_DIFFERS(against=against, error=worst, bound=budget)

    def error(self, seed: int, length: int) -> float:
        """How far the results are apart on one draw."""
        expected, actual = self._both(seed, self._draw(seed, length))
        return max(difference(a, b) for a, b in zip(expected, actual, strict=True))

    def gradient_error(self) -> float:
        """How far the gradients of a fixed function of the output are apart, on a draw of its own.

        0 where the function has no backward: there is nothing that a rewrite could change.
        """
        leaves, theirs = self._leaves()
        with torch.inference_mode(False), torch.enable_grad():
            expected, actual = self._both(len(LENGTHS), theirs)
            try:
                slopes = gradients(expected[:1], leaves)
            except (RuntimeError, NotImplementedError):
                return 0.0
            return apart(slopes, gradients(actual[:1], leaves))

    def gradient_bound(self, error: float) -> float:
        """How far gradients may be apart where the outputs are by `error`.

        A function that casts to float32 inside rounds, and a gradient that is a sum over all tokens (a decay of one
        head) may be far smaller than what it sums: it is as exact as the function itself can be.
        """
        budget = BUDGETS[self.original.precisions[-1]]
        if precision(error, self.original.precisions) != "float32":
            return budget
        noise, found = torch.Generator().manual_seed(0), list[list[torch.Tensor]]()
        for rounded in (False, True):
            leaves, theirs = self._leaves()
            with torch.inference_mode(False), torch.no_grad():
                for leaf in leaves if rounded else ():
                    unit = torch.randn(leaf.shape, generator=noise).to(leaf.device, leaf.dtype)
                    leaf.mul_(1 + torch.finfo(torch.float32).eps * unit)
            with torch.inference_mode(False), torch.enable_grad():
                found.append(gradients(self._results(self.original.run(**theirs), theirs)[:1], leaves))
        return max(budget, min(_STEEPEST, _AMPLIFIED * apart(found[0], found[1])))

    def _leaves(self) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """What gradients are taken of, and the arguments that are made of it: always the same draw."""
        drawn = self._draw(len(LENGTHS), LENGTHS[1])
        written = self.entry.writes_state
        names = [n for n, x in drawn.items() if isinstance(x, torch.Tensor) and x.is_floating_point() and n != written]
        leaves = [_once(drawn[name]).clone() for name in names]
        with torch.inference_mode(False), torch.enable_grad():
            # What is written must not be a view that was made without gradients.
            theirs = {name: x.clone() if name == written else x for name, x in drawn.items()}
            for name, leaf in zip(names, leaves, strict=True):
                theirs[name] = leaf.requires_grad_().expand(drawn[name].shape)
        return leaves, theirs

    def idle_operand(self) -> str:
        """The first operand that can be drawn anew without changing the output, or ""."""
        output = lambda x: self._results(self.original.run(**x), x)[0]  # noqa: E731
        base, other = output(self._draw(0, LENGTHS[1])), self._draw(1, LENGTHS[1])
        for tensor in self.entry.tensors:
            changed = self._draw(0, LENGTHS[1])
            if isinstance(changed.get(tensor.name), torch.Tensor):
                changed[tensor.name] = other[tensor.name]
                if difference(base, output(changed)) < _IDLE:
                    return tensor.name
        return ""

    def _draw(self, seed: int, length: int) -> dict[str, Any]:
        dtype = self.original.dtype
        # Kernels insist on float32 at least for a state.
        low = dtype if dtype == torch.float64 else torch.float32
        drawn = draw_call(self.entry, self.call, seed, length)
        return _moved(drawn, lambda name: (self.original.device, low if name == self.state else dtype))

    def _both(self, seed: int, theirs: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the function and what our operator give for the same values."""
        # Rounded the same way, in float64; copies, because either side may write the state.
        ours = _moved(theirs, lambda name: ("cpu", torch.float64))
        # A state without levels that the function writes gets levels first (the pass `states`).
        if is_level_state(self.call[self.state]) or (self.weighted and self.entry.writes_state is not None):
            ours[self.state] = self._split_over_levels(ours[self.state], seed)
        expected = self._results(self.original.run(**theirs), theirs)
        call = read_call(self.entry, self.plain, ours)
        weights = ones_like_weights(self.entry, call, LEVELS).float() if self.weighted else None
        return [x.cpu() for x in expected], self._results(lower(self.entry, call, call, weights), ours)

    def _results(self, result: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
        """The output as [T, ...], and the linear state where there is one; it, and a single token, as [1, ...]."""
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        if self.entry.writes_state is not None:
            results.append(arguments[self.entry.writes_state])
        output, *states = (r for r in results if r is not None)
        linear = (from_operator(linear_state(s), self.state_axes) if is_level_state(s) else s for s in states)
        time = self.entry.time_axis(self.call.ranks[self.entry.value.name])
        return [output[None] if time is None else output.movedim(time, 0), *(s[None] for s in linear)]

    def _split_over_levels(self, linear: torch.Tensor, seed: int) -> torch.Tensor:
        """A level state at a generic position whose levels sum to the given linear state."""
        state, noise = to_operator(linear, self.state_axes), torch.Generator().manual_seed(seed)
        parts = torch.randn(*state.shape[:2], LEVELS, *state.shape[2:], generator=noise, dtype=state.dtype)
        parts[:, :, 0] += state - parts.sum(2)
        return pack_state(parts.float(), torch.full(state.shape[:1], 37))


def _moved(values: dict[str, Any], place: Callable[[str], tuple[str, torch.dtype]]) -> dict[str, Any]:
    """Copies of the tensors on another device and in another dtype; broadcast axes stay broadcast."""
    moved = dict(values)
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            device, dtype = place(name)
            moved[name] = _once(value).to(device, dtype, copy=True).expand(value.shape)
    return moved


def _once(value: torch.Tensor) -> torch.Tensor:
    """The values of a tensor without their repetitions along broadcast axes."""
    return value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())]
