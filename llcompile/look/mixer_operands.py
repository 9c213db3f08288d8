"""Mixer operands: what comes into a mixer, with the operator's letters for its axes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from llcompile.look.code import dtype_name, name_of
from llcompile.look.mixer_look import Operand
from llcompile.look.roles import roles_of
from llcompile.passes.candidate import CallCandidate, Candidate, GraphCandidate
from llcompile.patterns.structure.found import Found
from llcompile.patterns.structure.lifted import Lifted, LiveIn
from llcompile.patterns.structure.program import Value

# An operand, and the node that it is if it is one node.
Read = tuple[Operand, fx.Node | None]


def operands(candidate: Candidate) -> list[Read]:
    """What comes into a mixer, in the order of the function's arguments or of the operator's."""
    if isinstance(candidate, GraphCandidate):
        return list(_of_part(candidate.found, candidate.module))
    return list(_of_call(candidate)) if isinstance(candidate, CallCandidate) else []


def _of_call(candidate: CallCandidate) -> Iterator[Read]:
    roles = {} if candidate.bound is None else roles_of(candidate.captured.entry, candidate.bound)
    for tensor in candidate.captured.entry.tensors:
        node = candidate.node.kwargs.get(tensor.name)
        value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
        if not isinstance(node, fx.Node) or not isinstance(value, torch.Tensor):
            continue
        values = {} if candidate.bound is None else candidate.bound.values
        axes = candidate.captured.entry.axes(tensor, value.dim(), values) or ()
        shape, name = tuple(map(str, value.shape)), name_of(node, candidate.module)
        yield Operand(roles.get(tensor.name, ()), tensor.name, name, tuple(axes), shape, dtype_name(value.dtype)), node


def _of_part(found: Found, module: str) -> Iterator[Read]:
    hypothesis = found.hypothesis
    named = [("query", hypothesis.query), ("key", hypothesis.key), ("value", hypothesis.value)]
    named += [("decay", hypothesis.decay), ("beta", hypothesis.beta)]
    named += [("erase query", live_in) for live_in in hypothesis.erase_query]
    named += [("erase key", live_in) for live_in in hypothesis.erase_key]
    named += [("own weight", live_in) for live_in in hypothesis.own or () if live_in is not hypothesis.key]
    named += [("factor", live_in) for live_in, _ in hypothesis.factors]
    named += [(f"output {how}", live_in) for live_in, how in hypothesis.post]
    axes = hypothesis.axes
    groups = (("B", axes.batch), ("T", axes.time), ("G", axes.groups), ("H", axes.rest), ("K", axes.key))
    letters = {id(dim): letter for letter, axis in (*groups, ("V", axes.value)) for dim in axis}
    if not axes.groups:
        letters.update({id(dim): "H" for dim in axes.rest})
    shared = not axes.rest
    for role, live_in in named:
        if live_in is None:
            continue
        layout = hypothesis.layouts[live_in]
        read = tuple("*".join(_letter(letters.get(id(a), "·"), shared) for a in axis) or "1" for axis in layout)
        shape = tuple(str(_product(a.size for a in axis)) for axis in layout)
        node = None if isinstance(live_in, Lifted) else live_in.node
        yield Operand((role,), "", _name(live_in, module), read, shape, dtype_name(_dtype(live_in))), node


def _letter(letter: str, shared: bool) -> str:
    """Heads that share no queries are H, whichever operand has them."""
    return "H" if letter == "G" and shared else letter


def _name(live_in: LiveIn, module: str) -> str:
    if isinstance(live_in, Lifted):
        return f"{live_in.count} pieces"
    return name_of(live_in.node, module) if live_in.node is not None else ""


def _dtype(live_in: LiveIn) -> torch.dtype:
    value = live_in.sample if isinstance(live_in, Lifted) else live_in
    return value.dtype if isinstance(value, Value) else torch.float32


def _product(numbers: Iterator[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result
