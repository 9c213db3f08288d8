"""Execute: runs a part of a program on numbers, in float64 and, where its axes allow it, at other sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from llcompile.passes.structure.axes import Axis
from llcompile.passes.structure.program import Op, Value

# Argument that holds the sizes of the result.
_SHAPED = "view _unsafe_view reshape expand zeros ones full empty rand randn new_zeros new_ones new_full new_empty"
_SIZES = dict.fromkeys(_SHAPED.split(), "size")
_FLOATS = {torch.float16, torch.bfloat16, torch.float32}

SizeOf = Callable[[Axis], int]


def run(
    ops: Sequence[Op],
    env: dict[Value, Tensor],
    sizes: Callable[[Value], tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.float64,
    last: Mapping[Value, int] | None = None,
) -> None:
    """Runs the operations in order, filling `env`.

    Args:
        ops: in order.
        env: value -> its numbers; inputs are there.
        sizes: the shape that a value is to have, where that is not the program's.
        dtype: of all floating-point numbers.
        last: value -> the position of the last operation that reads it, so that it can be dropped after.
    """
    for position, op in enumerate(ops):
        args, kwargs = tree_map(lambda a: _number(a, env, dtype), (op.args, op.kwargs))
        args, kwargs = _retyped(args, dtype), {k: _retyped_one(k, v, dtype) for k, v in kwargs.items()}
        if "dtype" in _argument_names(op) and op.outputs[0].dtype in _FLOATS and not _has_dtype(args, kwargs):
            kwargs["dtype"] = dtype  # torch.zeros(n) without one is float32
        if sizes is not None:
            args, kwargs = _resized(op, list(args), kwargs, sizes)
        # The strides of the draws are not those of the trace.
        target = torch.ops.aten.reshape.default if op.name in ("view", "_unsafe_view") else op.target
        result = target(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        env.update(zip(op.outputs, made, strict=True))
        if last is not None:
            for value in op.inputs:
                if last.get(value) == position:
                    env.pop(value, None)


def _argument_names(op: Op) -> tuple[str, ...]:
    if not isinstance(op.target, torch._ops.OpOverload) or op.inputs:
        return ()
    return tuple(a.name for a in op.target._schema.arguments)


def _has_dtype(args: Any, kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("dtype") is not None or any(isinstance(a, torch.dtype) for a in args)


def _number(leaf: Any, env: dict[Value, Tensor], dtype: torch.dtype) -> Any:
    if not isinstance(leaf, Value):
        return leaf
    if leaf not in env:
        assert leaf.data is not None, f"{leaf} has no numbers"
        data = leaf.data.detach().cpu()
        env[leaf] = data.to(dtype) if data.is_floating_point() else data
    return env[leaf]


def _retyped(args: Any, dtype: torch.dtype) -> list[Any]:
    return [dtype if isinstance(a, torch.dtype) and a in _FLOATS else a for a in args]


def _retyped_one(name: str, value: Any, dtype: torch.dtype) -> Any:
    if name == "device":
        return torch.device("cpu")
    if name in ("pin_memory", "layout", "memory_format", "non_blocking"):
        return None if name == "layout" else value
    return dtype if isinstance(value, torch.dtype) and value in _FLOATS else value


def _resized(
    op: Op, args: list[Any], kwargs: dict[str, Any], sizes: Callable[[Value], tuple[int, ...]]
) -> tuple[list[Any], dict[str, Any]]:
    """The call's arguments with every size as the results' axes have it."""
    name = _SIZES.get(op.name)
    if name is not None:
        shape = list(sizes(op.outputs[0]))
        at = next(i for i, a in enumerate(op.target._schema.arguments) if a.name == name)
        if at < len(args):
            args[at] = shape
        else:
            kwargs[name] = shape
    elif op.name == "arange" and _is_plain_range(op):
        args = [*args[: len(args) - 1], sizes(op.outputs[0])[0]]
    elif op.name == "eye":
        args = list(sizes(op.outputs[0]))[: len(op.args)]
    elif op.name == "repeat":
        old, new = sizes(op.inputs[0]), sizes(op.outputs[0])
        old = (1,) * (len(new) - len(old)) + tuple(old)
        args[1] = [n // o for n, o in zip(new, old, strict=True)]
    elif op.name == "slice" and op.outputs[0].shape == op.inputs[0].shape:
        args = args[:1]
    return args, kwargs


def _is_plain_range(op: Op) -> bool:
    numbers = [a for a in op.args if isinstance(a, int)]
    return numbers == [op.outputs[0].shape[0]] or numbers == [0, op.outputs[0].shape[0]]
