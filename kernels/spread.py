"""Calls whose sequence is spread over processes: `llcompile.distributed` puts here what runs them.

It is one for the process, not for a thread or a context: autograd runs a backward pass in threads of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from llcompile.kernels.operands import Operands


class Spread(Protocol):
    """Runs a call of which this process holds a part of the tokens; as `choice.forward` and `choice.backward`.

    `from_before` gives what the process before this one passed, `from_after` what the one after it did; zeros at the
    ends of the sequence.
    """

    def forward(self, x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]: ...  # noqa: D102
    def backward(  # noqa: D102
        self, x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None
    ) -> list[Tensor | None]: ...
    def from_before(self, x: Tensor) -> Tensor: ...  # noqa: D102
    def from_after(self, x: Tensor) -> Tensor: ...  # noqa: D102


_current: Spread | None = None


def current() -> Spread | None:
    """What runs calls of the operator on sequences; None where each process has whole ones."""
    return _current


@contextlib.contextmanager
def run_by(spread: Spread | None) -> Iterator[None]:
    """Have `spread` run the calls inside, or each process its own."""
    global _current
    before, _current = _current, spread
    try:
        yield
    finally:
        _current = before
