"""Prove: runs each known function and our operator on the same random inputs; only agreement rewrites.

The inputs are small, fresh and generic (no zeros, ones or saturated gates), on the CPU in float64 whatever the model's
device and dtype, at several lengths; every operand is checked to matter. One proof serves every call with the same
function, constants and set of operands: the layers of a model are proved once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from llcompile.passes.draws import draw_call, small_sizes
from llcompile.passes.lower import lower
from llcompile.passes.records import Certificate
from llcompile.passes.session import Session, Site
from llcompile.patterns.known import KnownFunction
from llcompile.patterns.known.arguments import is_level_state, read_call, state_argument

LENGTHS = (3, 70, 133)  # shorter than a chunk, across one chunk, and across two with a remainder
LEVELS = 9  # enough for the longest of them
# float64 inputs: a function that keeps them agrees to rounding; one that casts to float32 inside, to float32's.
BUDGETS = (("float64", 1e-10), ("float32", 2e-5))

_proofs: dict[Any, Certificate | str] = {}


def prove(session: Session) -> int:
    """Gives every open site its certificate or declines it; returns how many were proved."""
    for site in session.sites:
        if site.open:
            _prove(site, session.settings.kind != "none")
    return sum(site.open for site in session.sites)


def _prove(site: Site, weighted: bool) -> None:
    assert site.call is not None
    key = (site.leaf.function, weighted, _fingerprint(site))
    if key not in _proofs:
        with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            _proofs[key] = torch._dynamo.disable(_run_proof)(site, weighted)
    result = _proofs[key]
    if isinstance(result, Certificate):
        site.certificate = result
    else:
        site.decline(result, "the call runs the library's own code, so the model is what it was")


def _fingerprint(site: Site) -> Any:
    """What a proof depends on: constants, which operands are given, the kind of state, and the small sizes."""
    assert site.call is not None
    facts = []
    for name, value in sorted(site.call.values.items()):
        facts.append((name, "state" if is_level_state(value) else "tensor" if isinstance(value, torch.Tensor) else repr(value)))
    return tuple(facts), tuple(sorted(small_sizes(site.call.sizes).items()))


def _run_proof(site: Site, weighted: bool) -> Certificate | str:
    assert site.call is not None
    row, failures = site.leaf.row, []
    for against, original in _originals(site):
        try:
            worst = 0.0
            for seed, length in enumerate(LENGTHS):
                worst = max(worst, _error(row, original, site, weighted, seed, length))
            idle = _idle_operand(row, original, site)
        except Exception as error:
            failures.append(f"{against or row.function} does not run here ({type(error).__name__}: {error})".split("\n")[0])
            continue
        if idle:
            return f"its result does not depend on {idle}, so that agreement would prove nothing"
        for dtype, budget in BUDGETS:
            if worst <= budget:
                return Certificate(worst, dtype, len(LENGTHS), against)
        return f"agrees at w = 1 to {worst:.0e} only, where {BUDGETS[-1][1]:.0e} is the bound"
    return f"it cannot be proved on this machine: {'; '.join(failures)}"


def _originals(site: Site) -> list[tuple[str, Callable[..., Any]]]:
    """What to compare with: the function itself, then the library's reference for machines where it does not run."""
    originals = [("", site.leaf.plain)]
    reference = site.leaf.reference()
    return [*originals, (site.leaf.row.reference or "", reference)] if reference is not None else originals


def _error(row: KnownFunction, original: Callable[..., Any], site: Site, weighted: bool, seed: int, length: int) -> float:
    assert site.call is not None
    theirs = draw_call(row, site.call, seed, length)
    ours = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in theirs.items()}
    state_name = state_argument(row)
    if is_level_state(site.call[state_name]):
        ours[state_name] = _split_over_levels(theirs[state_name], row, seed)
    expected = _flat(row, original(**theirs), theirs)
    call = read_call(row, site.leaf.plain, ours)
    weights = None
    if weighted:
        value = call[row.tensor_with("V").name]
        weights = torch.ones(*value.shape[:-1], LEVELS, dtype=torch.float32)
    actual = _flat(row, lower(row, call, call, weights), ours)
    return max(_difference(a, _sum_levels(b, row)) for a, b in zip(expected, actual, strict=True))


def _flat(row: KnownFunction, result: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    if row.writes_state is not None:
        results.append(arguments[row.writes_state])
    return [r for r in results if r is not None]


def _difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    if expected.shape != actual.shape:
        return float("inf")
    error = (expected.double() - actual.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def _sum_levels(state: torch.Tensor, row: KnownFunction) -> torch.Tensor:
    """A level state as the linear state that the function would return: the sum over its levels."""
    if not is_level_state(state):
        return state
    linear = state[:, :, 1:].sum(2)
    return linear.transpose(-1, -2) if _is_transposed(row) else linear


def _is_transposed(row: KnownFunction) -> bool:
    axes = next(t.axes for t in row.tensors if t.draw == "state").split()
    return axes[-2:] == ["V", "K"]


def _split_over_levels(linear: torch.Tensor, row: KnownFunction, seed: int) -> torch.Tensor:
    """A level state at a generic position whose levels sum to the given linear state."""
    state = linear.transpose(-1, -2) if _is_transposed(row) else linear
    noise = torch.Generator().manual_seed(seed)
    parts = torch.randn(*state.shape[:2], LEVELS, *state.shape[2:], generator=noise, dtype=state.dtype)
    parts[:, :, 0] += state - parts.sum(2)
    header = torch.zeros_like(parts[:, :, :1])
    header[..., 0, 0] = 37.0
    return torch.cat([header, parts], dim=2).float()


def _idle_operand(row: KnownFunction, original: Callable[..., Any], site: Site) -> str:
    """The first operand that can be drawn anew without changing the result, or ""."""
    assert site.call is not None
    length = LENGTHS[1]
    base = _output(original, draw_call(row, site.call, 0, length))
    other = draw_call(row, site.call, 1, length)
    for tensor in row.tensors:
        changed = draw_call(row, site.call, 0, length)
        if not isinstance(changed.get(tensor.name), torch.Tensor):
            continue
        changed[tensor.name] = other[tensor.name]
        if _difference(base, _output(original, changed)) < 1e-6:
            return tensor.name
    return ""


def _output(function: Callable[..., Any], arguments: dict[str, Any]) -> torch.Tensor:
    result = function(**arguments)
    return result[0] if isinstance(result, (tuple, list)) else result
