"""Which axes are time: those of the model's inputs, and what is cut out of them or put together from them.

What is found is used to rule things out, and to tell a sum over positions from one over features.
"""

from __future__ import annotations

from collections.abc import Iterator

from llcompile.patterns.graph.walk import walk
from llcompile.patterns.structure.axes import Axis
from llcompile.patterns.structure.follow import WEIGHTED, Followed
from llcompile.patterns.structure.program import Op, Program, Value

# Their results have the axes of their operands, of another length.
_CUTS = frozenset({"slice", "cat", "constant_pad_nd", "split", "split_with_sizes", "slice_scatter", "flip", "roll"})
# What maps or normalises the features.
_FEATURES = WEIGHTED | {"native_layer_norm", "_fused_rms_norm", "mean"}


class Times:
    """The time axes of a program's values.

    Args:
        program: the program.
        followed: its axes.
        activations: values that depend on what the model is given.
    """

    def __init__(self, program: Program, followed: Followed, activations: set[Value]) -> None:
        self.followed = followed
        self.axes: set[Axis] = set()
        for value in program.inputs:
            if value in activations and value in followed.axes:
                self.axes.add(followed.dims.leaves(self._root(value)))
        for op in program.ops:
            if op.name in _CUTS:
                self._carry(op)

    def _root(self, value: Value) -> Axis:
        """Of token numbers and masks [B, T], of embeddings [B, T, D]; of anything else time may be any axis."""
        axes = self.followed.axes[value]
        if len(axes) == 2 and not value.dtype.is_floating_point:
            return axes[-1]
        if len(axes) != 3 or not value.dtype.is_floating_point:
            return ()
        leaves = self.followed.dims.leaves
        for op in self._readers(value):
            if op.name == "convolution":  # runs along its last axis, in whatever layout the input has
                along = leaves(self.followed.axes[op.inputs[0]][-1])
                return next((axis for axis in axes if leaves(axis) == along), ())
            mixed = {leaf for axis in self.followed.mixed[op] for leaf in leaves(axis)}
            if not mixed.isdisjoint(leaves(axes[-1])):
                return axes[-2]
        return ()

    def _readers(self, value: Value) -> Iterator[Op]:
        """What first maps or normalises features of an input, the nearest first."""
        onward = lambda op: () if op.name in _FEATURES else (user for made in op.outputs for user in made.users)  # noqa: E731
        return (op for op in walk(value.users, onward) if op.name in _FEATURES and op in self.followed.mixed)

    def _carry(self, op: Op) -> None:
        for value in op.inputs:
            for made in op.outputs:
                if len(made.shape) == len(value.shape):
                    for axis, new in zip(self.followed.axes[value], self.followed.axes[made], strict=True):
                        if self.is_time(axis):
                            self.axes.add(self.followed.dims.leaves(new))

    def is_time(self, axis: Axis) -> bool:
        """Whether positions along an axis are those in time: all of them, and nothing else."""
        return bool(axis) and self.followed.dims.leaves(axis) in self.axes

    def along(self, value: Value, dim: int) -> bool:
        """Whether a value has time as its axis with this number."""
        return self.is_time(self.followed.axes[value][dim])

    def mixes(self, op: Op) -> bool:
        """Whether an operation joins positions of time."""
        return any(self.is_time(axis) for axis in self.followed.mixed[op])
