"""Runs the proof of one row on a call that is given by its arguments, without a model around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llcompile.patterns.known import ENTRIES, KnownFunction
from llcompile.patterns.known.arguments import axis_size, read_call
from llcompile.patterns.known.capture import CapturedFunction
from llcompile.patterns.known.proof import prove_call
from llcompile.patterns.mixer import validate
from llcompile.patterns.records import Certificate
from llcompile.torch_internals.substitution import unsubstituted

# More heads than groups, and no two sizes alike.
SIZES = {"B": 2, "T": 70, "G": 2, "H": 4, "K": 7, "V": 5}


def row_of(library: str, function: str) -> KnownFunction:
    return next(entry for entry in ENTRIES if (entry.library, entry.function) == (library, function))


def captured_function(entry: KnownFunction, function: Any) -> CapturedFunction:
    return CapturedFunction(entry, unsubstituted(function))


def operands(entry: KnownFunction, absent: tuple[str, ...] = (), sizes: Mapping[str, int] = SIZES) -> dict[str, Any]:
    """Zeros for the tensor arguments of a row, with broadcast axes where the row wants them."""
    values = {}
    for tensor in entry.tensors:
        if tensor.name not in absent:
            axes = tensor.layouts()[0]
            full = [axis_size(axis.lstrip("*"), sizes) for axis in axes]
            once = [1 if axis.startswith("*") else n for axis, n in zip(axes, full, strict=True)]
            values[tensor.name] = torch.zeros(once).expand(full)
    return values


def proof(captured: CapturedFunction, arguments: Mapping[str, Any], weighted: bool = True) -> Certificate | str:
    """The certificate, or the reason against it."""
    call = read_call(captured.entry, captured.plain, arguments)
    validate(captured.entry.bind(call))
    with torch.no_grad():
        result = prove_call(captured, call, weighted)
    return result if isinstance(result, Certificate) else result.text
