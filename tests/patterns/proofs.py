"""Runs the proof of one row on a call that is given by its arguments, without a model around it."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from llcompile.passes import prove
from llcompile.patterns.known import ROWS, KnownFunction
from llcompile.patterns.known.arguments import axis_size, read_call
from llcompile.patterns.known.capture import Leaf
from llcompile.patterns.mixer import validate
from llcompile.patterns.records import Certificate
from llcompile.torch_internals.substitution import unsubstituted

# More heads than groups, and no two sizes alike.
SIZES = {"B": 2, "T": 70, "G": 2, "H": 4, "K": 7, "V": 5}


def row_of(library: str, function: str) -> KnownFunction:
    return next(row for row in ROWS if (row.library, row.function) == (library, function))


def leaf_of(row: KnownFunction, function: Any) -> Leaf:
    return Leaf(row, unsubstituted(function))


def operands(row: KnownFunction, absent: tuple[str, ...] = (), sizes: Mapping[str, int] = SIZES) -> dict[str, Any]:
    """Zeros for the tensor arguments of a row, with broadcast axes where the row wants them."""
    values = {}
    for tensor in row.tensors:
        if tensor.name not in absent:
            axes = tensor.layouts()[0]
            full = [axis_size(axis.lstrip("*"), sizes) for axis in axes]
            once = [1 if axis.startswith("*") else n for axis, n in zip(axes, full, strict=True)]
            values[tensor.name] = torch.zeros(once).expand(full)
    return values


def proof(leaf: Leaf, arguments: Mapping[str, Any], weighted: bool = True) -> Certificate | str:
    """The certificate, or the reason against it."""
    call = read_call(leaf.row, leaf.plain, arguments)
    validate(leaf.row.bind(call))
    candidate: Any = SimpleNamespace(leaf=leaf, call=call)  # what a proof reads of a Candidate
    with torch.no_grad():
        return prove._run_proof(candidate, weighted)
