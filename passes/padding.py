"""Padding: finds the mask by which the model's own code keeps padded tokens out of a mixer.

Libraries hand a mixer's kernel no mask: they multiply what it reads by one. So a mask is looked for in the graph, and
taken only where the graph shows that it is one: it is made of the model's whole numbers alone (no activation has a part
in it), it has a value for each token, and no path leads from the model's input to an operand of the mixer that does not
pass a multiplication by it. A token at which it is zero then cannot be told from any other such token: it is padding,
provided that it writes nothing to the state (see masked_values.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llcompile.passes.candidate import CallCandidate, Candidate, GraphCandidate
from llcompile.passes.masked_values import writes_nothing
from llcompile.passes.session import Session
from llcompile.passes.weight_input import data_inputs, is_constant_input
from llcompile.patterns.boundary import boundary
from llcompile.patterns.graph.walk import walk
from llcompile.torch_internals.sizes import size_hint

_UNFOLLOWED = (
    "a padding mask is applied inside it but does not cover every operand, so levels count from the start of a row"
)
_WRITTEN = (
    "a padding mask is applied before it, but a bias after the mask makes padded tokens nonzero again: they count as "
    "tokens, as in the model's own code, and levels count from the start of a row"
)


@dataclass(frozen=True)
class Mask:
    """A mask [B, T] in the graph; `inverted`: it is non-zero at padding."""

    node: fx.Node
    inverted: bool = False


# Spellings of "zero where masked": target -> (features, mask, whether the mask is non-zero at padding).
_Rule = Callable[[fx.Node], tuple[Any, Any, bool] | None]


def _product(node: fx.Node) -> tuple[Any, Any, bool] | None:
    left, right = node.args[:2]
    return (left, right, False) if _rank(left) >= _rank(right) and not _is_whole(left) else (right, left, False)


def _filled(node: fx.Node) -> tuple[Any, Any, bool] | None:
    x, mask, value = (*node.args, *node.kwargs.values())[:3]
    return (x, mask, True) if value == 0 else None


def _chosen(node: fx.Node) -> tuple[Any, Any, bool] | None:
    mask, x, value = node.args[:3]
    return (x, mask, False) if isinstance(value, (int, float)) and value == 0 else None


_RULES: dict[Any, _Rule] = {
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), _product),
    **dict.fromkeys((torch.masked_fill, "masked_fill", "masked_fill_"), _filled),
    torch.where: _chosen,
}
# Steps from a mask [B, T] to what is multiplied, and those that turn it over.
_KEEPS = {operator.getitem, torch.unsqueeze, "unsqueeze", "to", "type", "type_as", "float", "bool", "int", "long"}
_KEEPS |= {"contiguous", "expand", "view", "reshape", "half", "bfloat16", torch.ne, "ne", operator.ne}
_TURNS = {operator.invert, torch.logical_not, "logical_not", torch.bitwise_not, torch.eq, "eq", operator.eq}
_COMPARES = {torch.ne, "ne", operator.ne, torch.eq, "eq", operator.eq}


def padding(session: Session) -> int:
    """Gives candidates their padding mask where the graph has one; returns how many have."""
    for candidate in session.candidates:
        if candidate.open and _has_rows(candidate):
            with boundary(f"the padding of {candidate.where}"):
                _find(candidate)
    return sum(candidate.mask is not None for candidate in session.candidates)


def _has_rows(candidate: Candidate) -> bool:
    """Whether it works on rows of several tokens, which may be padded."""
    if isinstance(candidate, CallCandidate):
        return candidate.has_time and not candidate.packed
    return isinstance(candidate, GraphCandidate)


def _find(candidate: Candidate) -> None:
    operands = candidate.activations()
    masked: dict[Mask, set[fx.Node]] = {}
    for node in _ancestors(operands):
        mask = _mask_of(node)
        if mask is not None:
            masked.setdefault(mask, set()).add(node)
    candidate.masks = frozenset(mask.node for mask in masked)
    if isinstance(candidate, GraphCandidate):
        masked = {
            mask: nodes for mask, nodes in masked.items() if candidate.found.batch_and_time == tuple(_sizes(mask.node))
        }
    covering = [mask for mask, nodes in masked.items() if not _reached(candidate, operands, nodes)]
    if covering and not writes_nothing(candidate, masked[covering[0]]):
        candidate.notes.append(_WRITTEN)
    elif covering:
        candidate.mask, candidate.mask_inverted = covering[0].node, covering[0].inverted
    elif masked:
        candidate.notes.append(_UNFOLLOWED)


def _ancestors(nodes: list[fx.Node]) -> Iterator[fx.Node]:
    """The nodes and everything above them, the nearest first."""
    return walk(nodes, data_inputs)


def _mask_of(node: fx.Node) -> Mask | None:
    """The mask by which a node zeroes features [B, T, ...], if it is such a node."""
    rule = _RULES.get(node.target)
    found = rule(node) if rule is not None and len(node.args) >= 2 else None
    if found is None:
        return None
    features, factor, inverted = found
    if not isinstance(factor, fx.Node) or not isinstance(features, fx.Node) or _rank(factor) != _rank(features):
        return None
    while _rank(factor) > 2 or not _is_whole(factor):
        turned = factor.target in _TURNS
        if not (turned or factor.target in _KEEPS) or not _is_against_zero(factor):
            return None
        inverted ^= turned
        factor = factor.args[0]
        if not isinstance(factor, fx.Node):
            return None
    same = _rank(factor) == 2 and _sizes(factor) == _sizes(features)[:2]
    return Mask(factor, inverted) if same and _is_input(factor) else None


def _is_against_zero(node: fx.Node) -> bool:
    return node.target not in _COMPARES or bool(len(node.args) > 1 and str(node.args[1]) in ("0", "False"))


def _is_input(mask: fx.Node) -> bool:
    """Whether a mask is made of whole numbers that the model is given, and of nothing that it computes."""
    above = [node for node in _ancestors([mask]) if isinstance(_value(node), torch.Tensor)]
    return all(_is_whole(node) for node in above) and any(node.op == "placeholder" for node in above)


def _reached(candidate: Candidate, operands: list[fx.Node], masked: set[fx.Node]) -> bool:
    """Whether an operand depends on the model's input by a way that no masked node lies on."""
    open_ = lambda nodes: (n for n in nodes if n not in masked)  # noqa: E731
    reached = walk(open_(operands), lambda node: open_(data_inputs(node)))
    return any(node.op == "placeholder" and not is_constant_input(candidate.region.outer(node)) for node in reached)


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _rank(node: Any) -> int:
    value = _value(node)
    return value.dim() if isinstance(value, torch.Tensor) else -1


def _is_whole(node: Any) -> bool:
    """Whether a node is a tensor of whole numbers or truth values."""
    value = _value(node)
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and not value.is_complex()


def _sizes(node: fx.Node) -> list[Any]:
    return [size_hint(size) for size in _value(node).shape]
