"""Execute: a subgraph of a program as a function of numbers, in float64 and, where its axes allow it, at other sizes.

A subgraph is run a hundred times before it is proved, and an unrolled loop has thousands of operations: so the function
is written out as Python, once, with the arguments of every call settled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llcompile.patterns.boundary import NotKnown
from llcompile.patterns.structure.nested import leaves
from llcompile.patterns.structure.program import Op, Value

# Argument that holds the sizes of the result.
_SHAPED = "view _unsafe_view expand zeros ones full empty rand randn new_zeros new_ones new_full new_empty"
_SIZES = {**dict.fromkeys(_SHAPED.split(), "size"), "reshape": "shape"}
_FLOATS = {torch.float16, torch.bfloat16, torch.float32}

Sizes = Callable[[Value], tuple[int, ...]]


def function_of(
    ops: Sequence[Op], inputs: Sequence[Value], result: Value, sizes: Sizes | None, dtype: torch.dtype
) -> Callable[..., Tensor]:
    """The function from the numbers of `inputs` to those of `result`.

    Args:
        ops: in order.
        inputs: what no operation computes, or what is to be given although one does.
        result: what is returned.
        sizes: the shape that a value is to have, where that is not the program's.
        dtype: of all floating-point numbers.
    """
    return _Writer(inputs, result, sizes, dtype).write(ops)


class _Writer:
    def __init__(self, inputs: Sequence[Value], result: Value, sizes: Sizes | None, dtype: torch.dtype) -> None:
        self.inputs, self.result, self.sizes, self.dtype = inputs, result, sizes, dtype
        self.names: dict[Value, str] = {value: f"x{i}" for i, value in enumerate(inputs)}
        self.known: dict[str, Any] = {"leaves": _tensors}

    def write(self, ops: Sequence[Op]) -> Callable[..., Tensor]:
        last = {value: i for i, op in enumerate(ops) for value in op.inputs}
        given = set(self.inputs)
        lines = [f"def subgraph({', '.join(self.names[value] for value in self.inputs)}):"]
        for position, op in enumerate(ops):
            call = self._call(op)
            targets = []
            for value in op.outputs:
                self.names.setdefault(value, f"v{len(self.names)}")
                # A value that is given stays what was given.
                targets.append("_" if value in given else self.names[value])
            lines.append(f"    {', '.join(targets)}{'' if _is_single(op) else ','} = {call}")
            gone = [v for v in op.inputs if last[v] == position and v is not self.result and v.data is None]
            gone += [v for v in op.outputs if v not in last and v is not self.result]
            if gone:
                lines.append(f"    {' = '.join(dict.fromkeys(self.names[v] for v in gone))} = None")
        lines.append(f"    return {self.names[self.result]}")
        exec(compile("\n".join(lines), "<subgraph>", "exec"), self.known)
        return self.known["subgraph"]  # type: ignore[no-any-return]

    def _call(self, op: Op) -> str:
        args, kwargs = _retyped(op.args, self.dtype), {k: _retyped_one(k, v, self.dtype) for k, v in op.kwargs.items()}
        if "dtype" in _argument_names(op) and op.outputs[0].dtype in _FLOATS and not _has_dtype(args, kwargs):
            kwargs["dtype"] = self.dtype  # torch.zeros(n) without one is float32
        if self.sizes is not None:
            args, kwargs = _resized(op, list(args), kwargs, self.sizes)
        # The strides of the draws are not those of the trace.
        target = torch.ops.aten.reshape.default if op.name in ("view", "_unsafe_view") else op.target
        written = [*map(self._text, args), *(f"{k}={self._text(v)}" for k, v in kwargs.items())]
        call = f"{self._constant(target)}({', '.join(written)})"
        return call if _is_single(op) else f"leaves({call})"

    def _text(self, argument: Any) -> str:
        if isinstance(argument, Value):
            return self._number(argument)
        if type(argument) in (list, tuple):
            return f"[{', '.join(map(self._text, argument))}]"
        if argument is None or type(argument) in (bool, int, str):
            return repr(argument)
        return self._constant(argument)

    def _number(self, value: Value) -> str:
        if value not in self.names:
            if value.data is None:
                raise NotKnown(f"{value} has no numbers")
            data = value.data.detach().cpu()
            self.names[value] = self._constant(data.to(self.dtype) if data.is_floating_point() else data)
        return self.names[value]

    def _constant(self, thing: Any) -> str:
        name = f"c{id(thing)}"
        self.known[name] = thing  # keeps it, so that no other thing gets its number
        return name


def _is_single(op: Op) -> bool:
    """Whether the call returns one tensor, and not a list of them."""
    if not isinstance(op.target, torch._ops.OpOverload):
        return False
    returns = op.target._schema.returns
    return len(returns) == 1 and str(returns[0].type) == "Tensor"


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]


def _argument_names(op: Op) -> tuple[str, ...]:
    if not isinstance(op.target, torch._ops.OpOverload) or op.inputs:
        return ()
    return tuple(a.name for a in op.target._schema.arguments)


def _has_dtype(args: Any, kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("dtype") is not None or any(isinstance(a, torch.dtype) for a in args)


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
        at = next((i for i, a in enumerate(op.target._schema.arguments) if a.name == name), None)
        if at is None:  # view.dtype
            raise NotKnown(f"{op.target} has no sizes")
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
