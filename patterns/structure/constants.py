"""Constants: tensors that code in a loop makes anew for each piece, with nothing of the model in them.

`torch.arange(start, stop)` for the positions of a chunk, `torch.tensor(t)`, a list of angles. Which piece one belongs
to is told by what it meets; here it is told which are made anew, and with which numbers.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from llcompile.patterns.boundary import running
from llcompile.patterns.structure.program import Program, Value

_MOST = 1 << 16  # numbers in the rows of all pieces


@dataclass(eq=False)
class Made:
    """A tensor that is made anew for each piece.

    Args:
        like: that of the first piece seen.
        known: position -> its numbers, as nested lists.
    """

    like: Value
    known: dict[int, Any]

    def listed(self, count: int, device: torch.device) -> torch.Tensor:
        """All of them, [N, ...]; a piece that the code leaves out has any."""
        some = next(iter(self.known.values()))
        rows = [self.known.get(i, some) for i in range(count)]
        return torch.tensor(rows, dtype=self.like.dtype, device=device)

    @property
    def device(self) -> torch.device:
        """Where the program makes it."""
        example = None if self.like.node is None else self.like.node.meta.get("example_value")
        return example.device if isinstance(example, torch.Tensor) else torch.device("cpu")


class Makers:
    """The places of a program at which tensors are made of nothing."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def is_anew(self, value: Value, count: int) -> bool:
        """Whether so many pieces may have a tensor of their own from the same line, and not all the same one."""
        if not _is_made(value) or value.dtype.is_complex or count * value_size(value) > _MOST:
            return False
        made, calls = self._made[line_of(value)], self._calls[line_of(value)]
        return calls > 1 and made >= max(2, count if count < 4 else count - 1)

    @functools.cached_property
    def _found(self) -> list[Value]:
        return [v for v in self.program.values() if _is_made(v)]

    @functools.cached_property
    def _made(self) -> Counter[Any]:
        return Counter(map(line_of, self._found))

    @functools.cached_property
    def _calls(self) -> Counter[Any]:
        """Line -> how many different tensors are made there."""
        return Counter(line for line, _ in {(line_of(v), _call(v)) for v in self._found})


def numbers_of(value: Value) -> Any:
    """The numbers of a tensor that is made of nothing, as nested lists.

    Raises:
        NotKnown: it does not run.
    """
    if value.data is not None:
        return value.data.detach().cpu().tolist()
    op = value.op
    assert op is not None
    with running(op.target):
        return op.target(*op.args, **{**op.kwargs, "device": torch.device("cpu")}).tolist()


def value_size(value: Value) -> int:
    """How many numbers it has."""
    return functools.reduce(lambda n, size: n * size, value.shape, 1)


def _is_made(value: Value) -> bool:
    """Whether it is made of numbers of the code alone: no buffer, no random numbers, no sizes that vary."""
    op = value.op
    if op is None:
        return value.data is not None and value.node is not None and value.node.op.startswith("call")
    fresh = not op.inputs and not op.is_random and isinstance(op.target, torch._ops.OpOverload)
    varies = (isinstance(n.meta.get("example_value"), (torch.SymInt, torch.SymFloat)) for n in op.node.all_input_nodes)
    return fresh and len(op.outputs) == 1 and "empty" not in op.name and not any(varies)


def line_of(value: Value) -> Any:
    """Equal for tensors that one line of a loop makes."""
    node = value.op.node if value.op is not None else value.node
    trace = None if node is None else node.meta.get("stack_trace")
    return None if value.op is None else value.op.target, value.shape, value.dtype, trace


def _call(value: Value) -> Any:
    """Equal for tensors with the same numbers."""
    if value.op is not None:
        return repr((value.op.args, value.op.kwargs))
    return id(value) if value_size(value) > _MOST or value.data is None else repr(value.data.tolist())
