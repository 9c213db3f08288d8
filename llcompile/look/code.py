"""Code: nodes of a graph as lines that a person reads, each with its shape and the user's line."""

from __future__ import annotations

import builtins
import inspect
import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llcompile.torch_internals.inputs import input_name
from llcompile.torch_internals.places import user_line

_INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%", operator.pow: "**", operator.matmul: "@", operator.and_: "&", operator.or_: "|",
    operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
    operator.iadd: "+", operator.isub: "-", operator.imul: "*", operator.itruediv: "/",
}  # fmt: skip
_PREFIX = {operator.neg: "-", operator.invert: "~"}
_SHORT = (
    (r"^torch\.nn\.functional\.", "F."),
    (r"^torch\._C\._nn\.", "F."),
    (r"^torch\._C\._(special|linalg|fft)\.", r"torch.\1."),
    (r"^torch\._C\._VariableFunctions(Class)?\.", "torch."),
    (r"^torch\._ops\.", "torch.ops."),
    (r"^llcompile\.passes\.\w+\.", ""),
)
_HELD = re.compile(r"_(?:modules|parameters|buffers)\[['\"]([^'\"]+)['\"]\]")
_DTYPES = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "int32": "i32"}


@dataclass(frozen=True)
class Step:
    """One node of a graph as a line of code.

    Args:
        name: of its result.
        shape: "[1, 64, 8, 16] f32", or what kind of thing it is.
        call: what computes it, as Python.
        operation: the last part of the called function's name, for a box in a drawing.
        inputs: names of the results that it reads.
        where: the user's file and line, `file:line in function`.
    """

    name: str
    shape: str
    call: str
    operation: str
    inputs: tuple[str, ...] = ()
    where: str = ""

    @property
    def text(self) -> str:
        """The line."""
        shape = f": {self.shape}" if self.shape else ""
        line = self.where.partition(" in ")[0].rpartition("/")[2]
        return f"{self.name}{shape} = {self.call}" + (f"  # {line}" if line else "")


def steps(nodes: Iterable[fx.Node], module: str) -> list[Step]:
    """The nodes as steps; tensors that a module holds get their own names, those of `module` as `self.…`."""
    return [_step(node, module) for node in nodes]


def text(steps: Iterable[Step]) -> str:
    """The steps as code. Lines that name the line of code before them once more leave it out."""
    lines, last = [], ""
    for step in steps:
        line = step.text
        if step.where and step.where == last:
            line = line.rpartition("  # ")[0]
        last = step.where or last
        lines.append(line)
    return "\n".join(lines)


def name_of(node: fx.Node, module: str) -> str:
    """What a node is called: a parameter or buffer by its place in the model."""
    if "held_as" in node.meta:
        return f"self.{node.meta['held_as']}"
    if node.op != "placeholder":
        return node.name
    path = _HELD.findall(input_name(node))
    if not path:
        return re.sub(r"^l_(kwargs_)?|_$", "", node.name)
    dotted = ".".join(path)
    own = f"{module}." if module else ""
    # The compiled frame may hold the model itself, or what the model is a part of.
    return "self." + f".{dotted}".partition(f".{own}")[2] if f".{own}" in f".{dotted}" else dotted


def shape_of(value: Any) -> str:
    """A tensor's sizes and dtype; the kind of anything else."""
    if isinstance(value, torch.Tensor):
        return f"[{', '.join(map(str, value.shape))}] {dtype_name(value.dtype)}"
    if isinstance(value, (tuple, list)):
        parts = [shape_of(v) if v is not None else "None" for v in value]
        return f"({', '.join(parts)})" if len(parts) < 5 else f"({parts[0]}, … {len(parts)} in all)"
    return ""


def dtype_name(dtype: torch.dtype) -> str:
    """A short name of a dtype: f32, bf16."""
    name = str(dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)


def _step(node: fx.Node, module: str) -> Step:
    rename = lambda n: name_of(n, module)  # noqa: E731
    call, operation = _call(node, rename)
    inputs = tuple(dict.fromkeys(map(rename, node.all_input_nodes)))
    shape = shape_of(node.meta.get("example_value"))
    return Step(rename(node), shape, call, operation, inputs, user_line(node.meta))


def _call(node: fx.Node, rename: Callable[[fx.Node], str]) -> tuple[str, str]:
    args = [_written(a, rename) for a in node.args]
    named = [f"{key}={_written(value, rename)}" for key, value in node.kwargs.items()]
    if node.op == "call_method":
        return f"{args[0]}.{node.target}({', '.join([*args[1:], *named])})", str(node.target).strip("_")
    if node.op != "call_function":
        return f"{node.op}({node.target})", node.op
    target: Any = node.target
    if target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return f"{args[0]}[{', '.join(_index(i, rename) for i in index)}]", "getitem"
    if target is operator.setitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return f"setitem({args[0]}, [{', '.join(_index(i, rename) for i in index)}], {args[2]})", "setitem"
    if target in _INFIX and len(args) == 2:
        return f"{args[0]} {_INFIX[target]} {args[1]}", target.__name__.removeprefix("i")
    if target in _PREFIX:
        return f"{_PREFIX[target]}{args[0]}", target.__name__
    name = _function_name(target)
    return f"{name}({', '.join([*args, *named])})", name.rpartition(".")[2]


def _function_name(target: Any) -> str:
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return "torch.ops." + str(target).removesuffix(".default")
    name = getattr(target, "__name__", str(target))
    if getattr(torch, name, None) is target:
        return f"torch.{name}"
    if inspect.isfunction(target) or inspect.isbuiltin(target):
        full = f"{target.__module__ or 'torch'}.{name}"
        for pattern, short in _SHORT:
            full = re.sub(pattern, short, full)
        return full.removeprefix("builtins.") if hasattr(builtins, name) else full
    return name


def _written(argument: Any, rename: Callable[[fx.Node], str]) -> str:
    if isinstance(argument, fx.Node):
        return rename(argument)
    if isinstance(argument, (tuple, list)):
        inner = ", ".join(_written(a, rename) for a in argument)
        single = isinstance(argument, tuple) and len(argument) == 1
        return (f"({inner},)" if single else f"({inner})") if isinstance(argument, tuple) else f"[{inner}]"
    if isinstance(argument, slice):
        return f"slice({_index(argument, rename)})"
    if isinstance(argument, float) and not math.isfinite(argument):
        return f"{'-' if argument < 0 else ''}math.inf" if math.isinf(argument) else "math.nan"
    return str(argument) if isinstance(argument, (torch.dtype, torch.device)) else repr(argument)


def _index(index: Any, rename: Callable[[fx.Node], str]) -> str:
    if index is Ellipsis:
        return "..."
    if not isinstance(index, slice):
        return _written(index, rename)
    ends = ["" if end is None else _written(end, rename) for end in (index.start, index.stop)]
    step = "" if index.step is None else f":{_written(index.step, rename)}"
    return ":".join(ends) + step
