"""How many launches per-level readouts take on Triton, counted without a GPU: kernels, and ATen operations.

Kernels are recorded in place of being run. ATen operations that only allocate, or only view what there is, take none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from llcompile.kernels import choice, operators, readout_operators, routing_state
from llcompile.kernels.state import empty_state
from llcompile.kernels.triton import acceptance, autotune, limits, readout_source, readouts

LEVELS, NO_SEQUENCES, NOTHING = 16, (None, None, None), torch.empty(0)
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
Count = Callable[[Callable[[], Any]], list[str]]


class Operations(TorchDispatchMode):
    """Keeps the names of operations that compute."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = (r.alias_info is not None and not r.alias_info.is_write for r in operation._schema.returns)
        if not any(views) and operation.overloadpacket.__name__ not in ALLOCATIONS:
            self.found.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    """Runs a call below the dispatcher, where an operator's values are made; returns its launches in their order."""
    found: list[str] = []

    def recorded(name: str) -> Any:
        return lambda grid, arguments: found.append(name)

    kernels = {name: recorded(name) for name in readout_source.KERNELS}
    monkeypatch.setattr(readouts, "kernels_of", lambda d: kernels)
    monkeypatch.setattr(autotune, "run", lambda launch: found.append(launch.kernel.name))
    monkeypatch.setattr(limits, "interpreted", lambda: True)  # or operands on a CPU are refused
    monkeypatch.setattr(acceptance, "interpreted", lambda: True)  # and kernels tested
    monkeypatch.setattr(routing_state, "check_positions", lambda *given: None)  # reads values where they are at hand
    monkeypatch.setattr("llcompile.kernels.implementations.check_positions", lambda *given: None)

    def launches(call: Callable[[], Any]) -> list[str]:
        found.clear()
        with choice.use("triton"), Operations(found):
            call()
        return list(found)

    return launches


def operands(length: int) -> tuple[Tensor, Tensor]:
    query, key = torch.ones(2, 1, length, 8, 16, dtype=torch.bfloat16)
    return query, key


def forward(length: int, state: Tensor | None = None, final: bool = False, sequences: Any = NO_SEQUENCES) -> Any:
    given = (*operands(length), LEVELS, state, *sequences, final, "")
    return lambda: readout_operators._readouts(*given)


def backward(length: int, sequences: Any = NO_SEQUENCES) -> Any:
    grad = torch.ones(1, length, 8, LEVELS)
    given = (grad, NOTHING, *operands(length), LEVELS, None, *sequences, False, "")
    return lambda: readout_operators._readouts_backward(*given)


@pytest.mark.parametrize("length", [20, 1000, 20_000])
def test_passes(count, length):
    """As many at every length, and nothing but kernels."""
    assert count(forward(length)) == ["key_nodes", "readouts"]
    assert count(backward(length)) == ["both_nodes", "readouts_gradient"]


def test_states(count):
    """A prefill, and one that continues; and what is kept of it in the mixer's state."""
    assert count(forward(1000, final=True)) == ["key_nodes", "readouts", "final_state"]
    state = routing_state.empty(1, 8, LEVELS, 16)
    assert count(forward(1000, state, final=True)) == ["key_nodes", "readouts", "final_state"]
    mixer = empty_state(1, 8, 64, 64, LEVELS)
    assert count(lambda: routing_state.write(mixer, state)) == ["copy_"]


def test_packed(count):
    """Where sequences lie is made out in the kernels; what belongs to none of them is 0."""
    bounds = (torch.tensor([0, 300, 1000]), None, None)
    found = count(forward(1000, sequences=bounds, final=True))
    assert found[-4:] == ["zeros", "key_nodes", "readouts", "final_state"]
    assert "_local_scalar_dense" not in found[found.index("zeros") :]  # nothing waits for a value
    found = count(backward(1000, bounds))
    assert found[-4:] == ["zeros", "zeros", "both_nodes", "readouts_gradient"]


def test_token(count):
    """A step reads the header of the mixer's state, and the mixer's own step writes the one of its new state."""
    query, key = (x[:, 0] for x in operands(1))
    state, new = empty_state(1, 8, 64, 64, LEVELS), routing_state.empty(1, 8, LEVELS, 16)
    assert count(lambda: readout_operators._step(query, key, state, LEVELS, "")) == ["readouts_step"]
    q, k, v = torch.ones(3, 1, 8, 64, dtype=torch.bfloat16)
    weights, decay = torch.ones(1, 8, LEVELS), -torch.ones(1, 8)
    given = (q, k, v, weights, state, decay, None, None, None, None, 1.0, "")
    assert count(lambda: operators._attention_step(*given, new)) == ["decode"]
    assert count(lambda: operators._attention_step(*given, None)) == ["decode"]


def test_operations_are_seen(count):
    """The count is not of kernels alone."""
    query, key = operands(40)
    other = query.mT.contiguous().mT  # channels apart: copied first
    found = count(lambda: readout_operators._readouts(other, key, LEVELS, None, *NO_SEQUENCES, False, ""))
    assert found == ["clone", "key_nodes", "readouts"]
