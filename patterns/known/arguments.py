"""Reads one call of a known function: fills in defaults, names the sizes, and says what does not fit the entry."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from llcompile.kernels.state import is_level_state as has_levels
from llcompile.patterns import reasons
from llcompile.patterns.known.entry import Arguments, KnownFunction, Tensor
from llcompile.patterns.reasons import GivenReason


class CallRejection(Exception):
    """A call of a known function that its entry does not cover."""

    def __init__(self, given: GivenReason) -> None:
        super().__init__(given.text)
        self.given = given


def read_call(entry: KnownFunction, function: Callable[..., Any], given: Mapping[str, Any]) -> Arguments:
    """The call's arguments with their defaults and sizes.

    Args:
        entry: the function's entry.
        function: the function, for its defaults.
        given: arguments by name; tensors may be fake.

    Raises:
        CallRejection: an argument that the entry refuses or does not know is set, or a tensor has an unexpected shape.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    _check_refused(entry, defaults, given)
    values = {**{n: d for n, d in defaults.items() if n in entry.parameters}, **given}
    tensors = {t: values[t.name] for t in entry.tensors if isinstance(values.get(t.name), torch.Tensor)}
    sizes = sizes_of(entry, values)
    for tensor, value in tensors.items():
        if not (tensor.is_state and is_level_state(value)):
            _check_shape(entry, tensor, value, values, sizes)
    dtypes = {tensor.name: value.dtype for tensor, value in tensors.items()}
    ranks = {tensor.name: value.dim() for tensor, value in tensors.items()}
    arguments = Arguments(values, sizes, dtypes, ranks)
    problem = (entry.requires(arguments) if entry.requires is not None else None) or _packing_problem(entry, arguments)
    if problem is not None:
        raise CallRejection(reasons.CALL_NOT_COVERED(function=entry.function, problem=problem))
    return arguments


def _packing_problem(entry: KnownFunction, arguments: Arguments) -> str | None:
    """Why this way of packing is not covered, or None."""
    if entry.packed_by(arguments, "indices") is None or entry.packed_by(arguments, "bounds") is not None:
        return None
    if arguments[entry.state] is not None or entry.wants_state(arguments):
        return "combines seq_idx with states, of which each sequence needs its own; use cu_seqlens"
    return None


def is_level_state(value: Any) -> bool:
    """Whether a tensor is a state of ours, [B, H, 1 + L, K, V], rather than the function's own linear one."""
    return isinstance(value, torch.Tensor) and has_levels(value)


def _check_refused(entry: KnownFunction, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    known = {t.name for t in entry.tensors} | set(entry.constants) | set(entry.packing)
    for name, value in given.items():
        if name in known or value is None:
            continue
        default = defaults.get(name)
        if not isinstance(value, torch.Tensor) and type(value) is type(default) and value == default:
            continue
        if name in entry.refuses:
            raise CallRejection(
                reasons.ARGUMENT_REFUSED(argument=name, function=entry.function, problem=entry.refuses[name])
            )
        raise CallRejection(reasons.ARGUMENT_UNKNOWN(argument=name, function=entry.function))


def sizes_of(entry: KnownFunction, values: Mapping[str, Any]) -> dict[str, Any]:
    """The size of every named axis, as the first argument that has it says; the state, which may be another's, apart.

    Batch and length may be symbolic: no guard is put on them.
    """
    sizes: dict[str, Any] = {}
    for tensor in entry.tensors:
        value = values.get(tensor.name)
        axes = entry.axes(tensor, value.dim(), values) if isinstance(value, torch.Tensor) else None
        if axes is not None and not tensor.is_state:
            for axis, size in zip(axes, values[tensor.name].shape, strict=True):
                name = axis.lstrip("*")
                if name.isalpha():
                    sizes.setdefault(name, size if name in "BT" else int(size))
    return sizes


def _check_shape(
    entry: KnownFunction, tensor: Tensor, value: torch.Tensor, values: Mapping[str, Any], sizes: Mapping[str, Any]
) -> None:
    axes = entry.axes(tensor, value.dim(), values)
    found = {"argument": tensor.name, "function": entry.function, "shape": list(value.shape)}
    if axes is None:
        expected = f"{' or '.join(str(len(a)) for a in tensor.layouts())} axes"
        raise CallRejection(reasons.ARGUMENT_SHAPE(**found, expected=expected, axes=tensor.axes))
    for axis, size, stride in zip(axes, value.shape, value.stride(), strict=True):
        name = axis.lstrip("*")
        if axis.startswith("*") and stride != 0 and size != 1:
            raise CallRejection(reasons.ARGUMENT_VARIES(**found, axis=name))
        if name not in "BT" and axis_size(name, sizes) != int(size):
            expected = f"{name} = {axis_size(name, sizes)}"
            raise CallRejection(reasons.ARGUMENT_SHAPE(**found, expected=expected, axes=tensor.axes))


def axis_size(name: str, sizes: Mapping[str, Any]) -> int:
    """The size of a named axis: "K", "H.K" for two in one, "1" for itself."""
    return math.prod(int(part) if part.isdigit() else sizes[part] for part in name.split("."))
