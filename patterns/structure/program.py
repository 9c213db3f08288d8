"""Program: a graph as ATen operations on values, functional, one spelling per operation."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from llcompile.patterns.structure.modes import USUAL, Mode


@dataclass(eq=False)
class Value:
    """One tensor of the program.

    Args:
        shape, dtype: of the tensor (symbolic sizes stand as their hints).
        op: what computes it; None for an input.
        index: its place among the results of `op`.
        node: the graph's node that it is the result of, where there is one.
        data: its numbers, where they are known: constants, and buffers of the model.
        parameter: whether it is a parameter of the model.
        lost: whether it is a buffer on the device meta, so that nobody has its numbers.
        held: the tensor of the user's program, for a parameter or an argument of few numbers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    op: Op | None = None
    index: int = 0
    node: fx.Node | None = None
    data: torch.Tensor | None = None
    parameter: bool = False
    lost: bool = False
    held: torch.Tensor | None = None
    number: int = 0
    users: list[Op] = field(default_factory=list)

    @property
    def is_read(self) -> bool:
        """Whether its numbers were read off a tensor that the user's program holds, and may change."""
        return self.data is not None and self.node is not None and self.node.op == "placeholder"

    def __repr__(self) -> str:
        return f"%{self.number}{list(self.shape)}"


class Row(Value):
    """The pieces of a loop as one value, which no operation of the program makes: its `op` says how it would be."""


@dataclass(eq=False)
class Op:
    """One ATen call.

    Args:
        target: what is called.
        args, kwargs: its arguments, values where the call takes tensors.
        node: the graph's node that it comes from.
        number: its place in the program.
        inputs, outputs: its values.
        mode: the modes that it runs in.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    node: fx.Node
    number: int = 0
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    mode: Mode = USUAL

    @functools.cached_property
    def name(self) -> str:
        """The operation's name without overload: "bmm"."""
        return self.target._schema.name.split("::")[-1] if isinstance(self.target, torch._ops.OpOverload) else "opaque"

    @property
    def is_random(self) -> bool:
        """Whether it draws numbers."""
        return torch.Tag.nondeterministic_seeded in getattr(self.target, "tags", ())

    def __repr__(self) -> str:
        return f"{self.outputs} = {self.name}{self.args}"


@dataclass(eq=False)
class Program:
    """The operations in order, and how they lie in the graph they were read from.

    Args:
        ops: every operation.
        inputs: values of placeholders and constants.
        results: node -> the value that it returns.
        reads: (user, node) -> the value that `user` sees of `node`; another one than `results` after a mutation.
        unnamed: value that no node returns, left in a node by a write -> the first reader that sees it there, the node.
        grad: whether gradients are taken where the graph starts.
    """

    ops: list[Op] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    results: dict[fx.Node, Value] = field(default_factory=dict)
    reads: dict[tuple[fx.Node, fx.Node], Value] = field(default_factory=dict)
    unnamed: dict[Value, tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    grad: bool = True

    def values(self) -> Iterator[Value]:
        """Inputs first, then results in the order of the operations."""
        yield from self.inputs
        for op in self.ops:
            yield from op.outputs
