"""Launch parameters that tuning picks inside of segments are tested by what runs in segments. No GPU is needed."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from llcompile.kernels.implementations import ATEN, Triton
from llcompile.kernels.operands import Operands
from llcompile.kernels.triton import autotune, segments
from llcompile.kernels.triton.acceptance_passes import cases
from llcompile.kernels.triton.launch import Kernel
from tests.kernels.kernel_cases import operands
from tests.kernels.launches import recorded

pytestmark = pytest.mark.usefixtures("fresh_kernels")
CPU = torch.device("cpu")
SHORT, LEVELS = 128, 11
FAMILIES = [
    {"decay": "token"},
    {"decay": "rate"},
    {"decay": "token", "delta": True},
    pytest.param({"decay": "channel", "delta": True}, marks=pytest.mark.slow),
    pytest.param({"decay": "channel", "delta": "erase"}, marks=pytest.mark.slow),
]


class Watched:
    """Tests of kernels that find nothing wrong; `now` is the pass whose test watches launches."""

    now: Any = None

    def rejection(self, d, sweep):
        return None

    @contextlib.contextmanager
    def watched(self, d, sweep):
        assert self.now is None
        self.now = d, sweep
        yield
        self.now = None


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("state", [None, "linear", "level", "lengths"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_test_runs_all_kernels(family, state, final):
    """Of the forward pass, of the states before segments, and of gradients: no pick is refused for want of a test."""
    kind = None if state == "lengths" else state
    case = {"batch": 1, "levels": LEVELS, "dtype": torch.float32, "state": kind, **family}
    x = Operands(*operands(5 * SHORT - 7, **case).values())  # type: ignore[arg-type]
    if state == "lengths":
        x = x._replace(lengths=torch.tensor([400]))
    grad_state = torch.zeros(1, 4, 1 + LEVELS, 5, 3) if final else None
    tests, ran = Watched(), {}

    def note(launch) -> None:
        ran.setdefault(tests.now, set()).add(launch.kernel)

    with autotune.handed_to(note), torch.no_grad():
        segments.forward_by(x, 1.0, final, SHORT, tests)
        segments.backward_by(x, 1.0, x.v, grad_state, SHORT, tests)
    assert {sweep for _, sweep in ran} == {"forward", "backward"}
    for (d, sweep), kernels in ran.items():
        assert kernels <= in_the_test(d, sweep)


def in_the_test(d, sweep) -> set[Kernel]:
    """What the test of a pass launches."""
    with torch.no_grad():
        found = recorded(lambda: [case(Triton(), case.given) for case in cases(ATEN, d, CPU, sweep)])
    return {launch.kernel for launch in found}
