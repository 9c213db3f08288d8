"""Prove: runs each known function and our operator on the same random inputs; only agreement rewrites.

The inputs are small, fresh and generic (no zeros, ones or saturated gates), on the CPU in float64 whatever the model's
device and dtype, at several lengths; every operand is checked to matter, and gradients are compared. One proof serves
every call with the same function, constants and set of operands: the layers of a model are proved once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from llcompile.passes.behaviour import behaviour
from llcompile.passes.candidate import CallCandidate
from llcompile.passes.draws import draw_call, small_sizes
from llcompile.passes.session import Session
from llcompile.patterns import reasons
from llcompile.patterns.agreement import BUDGETS, apart, gradients
from llcompile.patterns.boundary import boundary
from llcompile.patterns.known import KnownFunction
from llcompile.patterns.known.arguments import is_level_state, read_call, state_argument
from llcompile.patterns.known.lower import lower
from llcompile.patterns.reasons import GivenReason
from llcompile.patterns.records import Certificate

LENGTHS = (3, 70, 133)  # shorter than a chunk, across one chunk, and across two with a remainder
LEVELS = 9  # enough for the longest of them

_proofs: dict[Any, Certificate | GivenReason] = {}


def prove(session: Session) -> int:
    """Gives every open candidate its certificate or declines it; returns how many were proved."""
    failed: dict[Any, GivenReason] = {}
    for candidate in session.candidates:
        if candidate.open and isinstance(candidate, CallCandidate):
            with boundary(candidate.where) as outcome:
                _prove(candidate, session.settings.kind != "none", failed)
            if outcome.failed:
                candidate.decline(outcome.given)
    return sum(candidate.open for candidate in session.candidates)


def _prove(candidate: CallCandidate, weighted: bool, failed: dict[Any, GivenReason]) -> None:
    """`failed` are proofs that did not run in this look: want of memory, say, which need not last."""
    key = (candidate.captured.function, behaviour(candidate.captured.plain), weighted, _fingerprint(candidate))
    if key not in _proofs and key not in failed:
        with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            try:
                _proofs[key] = torch._dynamo.disable(_run_proof)(candidate, weighted)
            except _DoesNotRun as error:
                failed[key] = reasons.NOT_PROVABLE_HERE(problem=error)
    result = _proofs[key] if key in _proofs else failed[key]
    if isinstance(result, Certificate):
        candidate.certificate = result
    else:
        candidate.decline(result)


class _DoesNotRun(Exception):
    """Neither the function nor anything that stands for it runs here and now."""


def _fingerprint(candidate: CallCandidate) -> Any:
    """What a proof depends on: constants, which operands are given, the kind of state, and the small sizes."""
    facts = []
    for name, value in sorted(candidate.call.values.items()):
        if name in candidate.captured.entry.packing:
            continue
        facts.append(
            (name, "state" if is_level_state(value) else "tensor" if isinstance(value, torch.Tensor) else repr(value))
        )
    return tuple(facts), tuple(sorted(small_sizes(candidate.call.sizes).items()))


@dataclass(frozen=True)
class Original:
    """Something that computes what the known function does, and how closely it can be met.

    Args:
        run: takes the function's arguments.
        against: what it is, where it is not the function itself.
        device, dtype: where and on what it is run.
        budgets: (precision, largest relative difference), the strictest first.
    """

    run: Callable[..., Any]
    against: str = ""
    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    budgets: tuple[tuple[str, float], ...] = BUDGETS


def _run_proof(candidate: CallCandidate, weighted: bool) -> Certificate | GivenReason:
    entry, failures = candidate.captured.entry, []
    for original in _originals(candidate):
        try:
            worst = 0.0
            for seed, length in enumerate(LENGTHS):
                theirs = _draw(entry, original, candidate, seed, length)
                worst = max(worst, _error(entry, original, candidate, weighted, seed, theirs))
            slopes = _gradient_error(entry, original, candidate, weighted)
            idle = _idle_operand(entry, original, candidate)
        except Exception as error:
            what = f"{original.against or entry.function} ({original.device})"
            failures.append(f"{what} does not run here: {type(error).__name__}: {error}".split("\n")[0])
            continue
        if idle:
            return reasons.IDLE_OPERAND(operand=idle)
        if worst <= original.budgets[-1][1] < slopes:
            return reasons.GRADIENTS_DIFFER(error=slopes)
        for dtype, budget in original.budgets:
            if worst <= budget:
                return Certificate(worst, dtype, len(LENGTHS), original.against)
        against = f" with {original.against}" if original.against else ""
        return reasons.FUNCTION_DIFFERS(against=against, error=worst, bound=original.budgets[-1][1])
    raise _DoesNotRun("; ".join(failures))


def _originals(candidate: CallCandidate) -> Iterator[Original]:
    """What to compare with, in turn until one runs: the function, the library's references, the function on a GPU."""
    yield Original(candidate.captured.plain)
    for name, reference in candidate.captured.references():
        yield Original(reference, against=name)
    if candidate.captured.entry.opaque and torch.cuda.is_available():
        # Triton's products of float32 are TF32 by default, and some of these functions take no float32 at all.
        function = candidate.captured.function
        yield Original(function, device="cuda", dtype=torch.float32, budgets=(("tf32", 5e-3),))
        yield Original(function, device="cuda", dtype=torch.bfloat16, budgets=(("bfloat16", 2e-2),))


def _error(
    entry: KnownFunction,
    original: Original,
    candidate: CallCandidate,
    weighted: bool,
    seed: int,
    theirs: dict[str, Any],
) -> float:
    """The largest relative difference of a result."""
    transposed = _is_transposed(entry, candidate)
    expected, actual = _both(entry, original, candidate, weighted, seed, theirs)
    return max(_difference(a.cpu(), _sum_levels(b, transposed)) for a, b in zip(expected, actual, strict=True))


def _both(
    entry: KnownFunction,
    original: Original,
    candidate: CallCandidate,
    weighted: bool,
    seed: int,
    theirs: dict[str, Any],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the function and what our operator give for the same values."""
    # Rounded the same way, in float64; copies, because either side may write the state.
    ours = _moved(theirs, lambda name: ("cpu", torch.float64))
    state_name = state_argument(entry)
    # A state without levels that the function writes gets levels first (the pass `states`).
    gets_levels = weighted and entry.writes_state is not None
    if is_level_state(candidate.call[state_name]) or gets_levels:
        ours[state_name] = _split_over_levels(ours[state_name], _is_transposed(entry, candidate), seed)
    expected = _flat(entry, original.run(**theirs), theirs)
    call = read_call(entry, candidate.captured.plain, ours)
    weights = None
    if weighted:
        value = call[entry.tensor_with("V").name]
        weights = torch.ones(*value.shape[:-1], LEVELS, dtype=torch.float32)
    return expected, _flat(entry, lower(entry, call, call, weights), ours)


def _gradient_error(entry: KnownFunction, original: Original, candidate: CallCandidate, weighted: bool) -> float:
    """The largest relative difference of the gradients of a fixed function of the result, on a draw of its own.

    0 where the function has no backward: there is nothing that a rewrite could change.
    """
    drawn = _draw(entry, original, candidate, len(LENGTHS), LENGTHS[1])
    written = entry.writes_state
    names = [n for n, x in drawn.items() if isinstance(x, torch.Tensor) and x.is_floating_point() and n != written]
    leaves = [_once(drawn[name]).clone() for name in names]
    with torch.inference_mode(False), torch.enable_grad():
        # What is written must not be a view that was made without gradients.
        theirs = {name: x.clone() if name == written else x for name, x in drawn.items()}
        for name, leaf in zip(names, leaves, strict=True):
            theirs[name] = leaf.requires_grad_().expand(drawn[name].shape)
        expected, actual = _both(entry, original, candidate, weighted, len(LENGTHS), theirs)
        try:
            slopes = gradients(expected[0], leaves)
        except (RuntimeError, NotImplementedError):
            return 0.0
        return apart(slopes, gradients(actual[0], leaves))


def _draw(entry: KnownFunction, original: Original, candidate: CallCandidate, seed: int, length: int) -> dict[str, Any]:
    state = state_argument(entry)  # kernels insist on float32 for it at least
    low = original.dtype if original.dtype == torch.float64 else torch.float32
    place = lambda name: (original.device, low if name == state else original.dtype)  # noqa: E731
    return _moved(draw_call(entry, candidate.call, seed, length), place)


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


def _flat(entry: KnownFunction, result: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    if entry.writes_state is not None:
        results.append(arguments[entry.writes_state])
    return [r for r in results if r is not None]


def _difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    if expected.shape != actual.shape:
        return float("inf")
    error = (expected.double() - actual.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def _sum_levels(state: torch.Tensor, transposed: bool) -> torch.Tensor:
    """A level state as the linear state that the function would return: the sum over its levels."""
    if not is_level_state(state):
        return state
    linear = state[:, :, 1:].sum(2)
    return linear.transpose(-1, -2) if transposed else linear


def _is_transposed(entry: KnownFunction, candidate: CallCandidate) -> bool:
    """Whether the state of this call is [..., V, K]."""
    state = next((t for t in entry.tensors if t.draw == "state"), None)
    axes = entry.axes(state, 4, candidate.call.values) if state is not None else None
    return axes is not None and axes[-1] == "K"


def _split_over_levels(linear: torch.Tensor, transposed: bool, seed: int) -> torch.Tensor:
    """A level state at a generic position whose levels sum to the given linear state."""
    state = linear.transpose(-1, -2) if transposed else linear
    noise = torch.Generator().manual_seed(seed)
    parts = torch.randn(*state.shape[:2], LEVELS, *state.shape[2:], generator=noise, dtype=state.dtype)
    parts[:, :, 0] += state - parts.sum(2)
    header = torch.zeros_like(parts[:, :, :1])
    header[..., 0, 0] = 37.0
    return torch.cat([header, parts], dim=2).float()


def _idle_operand(entry: KnownFunction, original: Original, candidate: CallCandidate) -> str:
    """The first operand that can be drawn anew without changing the result, or ""."""
    length = LENGTHS[1]
    base = _output(original.run, _draw(entry, original, candidate, 0, length))
    other = _draw(entry, original, candidate, 1, length)
    for tensor in entry.tensors:
        changed = _draw(entry, original, candidate, 0, length)
        if not isinstance(changed.get(tensor.name), torch.Tensor):
            continue
        changed[tensor.name] = other[tensor.name]
        if _difference(base, _output(original.run, changed)) < 1e-6:
            return tensor.name
    return ""


def _output(function: Callable[..., Any], arguments: dict[str, Any]) -> torch.Tensor:
    result = function(**arguments)
    return result[0] if isinstance(result, (tuple, list)) else result
