"""What one eager call of the public functions asks of the host: operators of torch, and launches; exact, without a GPU.

Each operator of torch costs the host some microseconds, and so does each launch: below a few thousand tokens, and in
decoding, they are what a call takes. The operands are fake tensors on a CUDA device, which have shapes and no memory,
so what runs is what runs there; launches are listed and not run.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llcompile import ops
from llcompile.kernels import choice, operands, torch_operator
from llcompile.kernels.implementations import IMPLEMENTATIONS, Triton
from llcompile.kernels.operands import DIFFERENTIABLE, Operands, Token
from llcompile.kernels.triton import autotune
from llcompile.kernels.triton.cost.case import SCALE, Case, operands_of, token_of
from llcompile.kernels.triton.cost.families import FAMILIES, PASSES
from llcompile.kernels.triton.launch import Launch
from llcompile.torch_internals.fake_device import FAKE, Indexing, fake_cuda


class Asked(NamedTuple):
    """Calls of torch's operators by name, allocations and views included, and launches by kernel."""

    operators: Counter[str]
    launches: Counter[str]


class Ceiling(NamedTuple):
    """The most operators and launches that a pass may ask for; what was counted last."""

    operators: int
    launches: int


def _cases(levels: int | None) -> Iterator[Case]:
    for family in FAMILIES:
        sizes = (16, 1, 1536, 1) if family.startswith("rate") else (128, 128, 32, 32)
        for operation in PASSES:
            if operation in ("replay", "fold"):  # of a `ReplayState`, which is no function
                continue
            if (family, operation) != ("rate/none", "step in place"):  # the step, and a copy
                yield Case(family, operation, *sizes, length=1024, levels=levels)


# Calls of 1,024 tokens, and steps after as many.
CASES = (*_cases(12), *_cases(None))
# By family and pass: with level weights, and without.
CEILINGS: dict[tuple[str, str], tuple[Ceiling, Ceiling]] = {
    ("none/none", "forward"): (Ceiling(3, 5), Ceiling(3, 3)),
    ("none/none", "backward"): (Ceiling(16, 11), Ceiling(15, 7)),
    ("none/none", "step"): (Ceiling(2, 1), Ceiling(2, 1)),
    ("none/none", "step in place"): (Ceiling(1, 2), Ceiling(1, 1)),
    ("scalar/none", "forward"): (Ceiling(7, 5), Ceiling(7, 3)),
    ("scalar/none", "backward"): (Ceiling(20, 11), Ceiling(17, 7)),
    ("scalar/none", "step"): (Ceiling(5, 1), Ceiling(5, 1)),
    ("scalar/none", "step in place"): (Ceiling(4, 2), Ceiling(4, 1)),
    ("channel/none", "forward"): (Ceiling(8, 6), Ceiling(8, 4)),
    ("channel/none", "backward"): (Ceiling(23, 13), Ceiling(19, 9)),
    ("channel/none", "step"): (Ceiling(5, 1), Ceiling(5, 1)),
    ("channel/none", "step in place"): (Ceiling(4, 2), Ceiling(4, 1)),
    ("none/delta", "forward"): (Ceiling(5, 6), Ceiling(5, 4)),
    ("none/delta", "backward"): (Ceiling(25, 20), Ceiling(22, 12)),
    ("none/delta", "step"): (Ceiling(2, 1), Ceiling(2, 1)),
    ("none/delta", "step in place"): (Ceiling(1, 2), Ceiling(1, 1)),
    ("scalar/delta", "forward"): (Ceiling(9, 6), Ceiling(9, 4)),
    ("scalar/delta", "backward"): (Ceiling(27, 20), Ceiling(24, 12)),
    ("scalar/delta", "step"): (Ceiling(5, 1), Ceiling(5, 1)),
    ("scalar/delta", "step in place"): (Ceiling(4, 2), Ceiling(4, 1)),
    ("channel/delta", "forward"): (Ceiling(11, 7), Ceiling(11, 5)),
    ("channel/delta", "backward"): (Ceiling(29, 22), Ceiling(26, 14)),
    ("channel/delta", "step"): (Ceiling(5, 1), Ceiling(5, 1)),
    ("channel/delta", "step in place"): (Ceiling(4, 2), Ceiling(4, 1)),
    ("channel/erase", "forward"): (Ceiling(17, 8), Ceiling(17, 6)),
    ("channel/erase", "backward"): (Ceiling(45, 21), Ceiling(42, 13)),
    ("channel/erase", "step"): (Ceiling(5, 1), Ceiling(5, 1)),
    ("channel/erase", "step in place"): (Ceiling(4, 2), Ceiling(4, 1)),
    ("rate/none", "forward"): (Ceiling(5, 1), Ceiling(5, 1)),
    ("rate/none", "backward"): (Ceiling(23, 2), Ceiling(20, 2)),
    ("rate/none", "step"): (Ceiling(13, 1), Ceiling(11, 1)),
}


def asked(case: Case) -> Asked:
    """Count `case`, a call that is not the first of its kind. Its gradients are counted without autograd's own work."""
    launches: list[Launch] = []
    with _pretended(launches):
        run = _public(case)
        run()
        launches.clear()
        with _Watch() as watch:
            run()
    return Asked(watch.operators, Counter(launch.kernel.name for launch in launches))


def ceiling_of(case: Case) -> Ceiling:
    """That of one of `CASES`."""
    return CEILINGS[case.family, case.operation][case.levels is None]


def lines(cases: Iterable[Case] = CASES) -> Iterator[str]:
    """A Markdown table."""
    yield "| family | pass | level weights | operators of torch | ceiling | launches | ceiling | kernels |"
    yield "|---|---|---|---|---|---|---|---|"
    for case in cases:
        found = asked(case)
        kernels = ", ".join(f"{n} x {name}" if n > 1 else name for name, n in found.launches.items())
        levels = "none" if case.levels is None else str(case.levels)
        ceiling = ceiling_of(case)
        numbers = (found.operators.total(), ceiling.operators, found.launches.total(), ceiling.launches)
        cells = (case.family, case.operation, levels, *numbers, kernels)
        yield f"| {' | '.join(map(str, cells))} |"


def _public(case: Case) -> Callable[[], object]:
    """The call, of operands that exist before it."""
    x: Token | Operands
    if case.operation in ("step", "step in place"):
        step = ops.loglinear_attention_step if case.operation == "step" else ops.loglinear_attention_step_
        x = token_of(case, "cuda")
        return partial(step, x.q, x.k, x.v, x.level_weights, x.state, **_named(x), scale=SCALE)
    x = operands_of(case, "cuda")
    if case.operation == "forward":
        return partial(ops.loglinear_attention, x.q, x.k, x.v, x.level_weights, **_named(x), scale=SCALE)
    grad, none = torch.empty_like(x.v), x.v.new_empty(0, dtype=torch.float32)
    backward = torch.ops.llcompile.loglinear_attention_backward
    return partial(backward, grad, none, *x[:DIFFERENTIABLE], SCALE, False)


def _named(x: Token | Operands) -> dict[str, Any]:
    return {name: getattr(x, name) for name in ("log_decay", "beta", "decay_rate", "erase_query", "erase_key")}


class _Untested(Triton):
    """The kernels as they are chosen where their test on the device has passed."""

    def rejection(self, d: Any, device: torch.device, sweep: Any) -> str | None:
        """None."""
        return None

    def current(self, x: Tensor) -> contextlib.AbstractContextManager[object]:
        """There need be no device."""
        return contextlib.nullcontext()


@contextlib.contextmanager
def _pretended(launches: list[Launch]) -> Iterator[None]:
    """A CUDA device, on fake tensors; what would be launched goes to `launches`."""
    before = IMPLEMENTATIONS["triton"]
    IMPLEMENTATIONS["triton"] = _Untested()
    operands.PLAIN.add(FAKE)
    try:
        with fake_cuda(), choice.use("triton"), autotune.handed_to(launches.append):
            yield
    finally:
        IMPLEMENTATIONS["triton"] = before
        operands.PLAIN.discard(FAKE)


class _Watch(TorchDispatchMode):
    """Counts operators; of our own it runs the values, as a device would, and counts what they ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func.namespace == torch_operator.NAMESPACE:
            with self, Indexing():
                return torch_operator.run_values(func, args, kwargs or {})
        self.operators[str(func).removeprefix("aten.")] += 1
        return func(*args, **(kwargs or {}))
