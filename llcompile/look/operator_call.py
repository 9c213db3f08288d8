"""Operator call: the operator's call in a rewritten graph: its sizes, and the kernels that it would run by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from llcompile.kernels.description import describe, describe_step
from llcompile.kernels.operands import DIFFERENTIABLE, Operands, Token
from llcompile.look.mixer_look import OperandSizes, OperatorCall
from llcompile.torch_internals.sizes import size_hint

_SEQUENCE = "loglinear_attention"
_STEP = "loglinear_attention_step"


def call_in(nodes: Iterable[fx.Node]) -> OperatorCall | None:
    """The last call of the operator among the nodes a mixer was rewritten to: the earlier ones are denominators."""
    calls = [(node, name) for node in nodes if (name := _operator(node))]
    return _call(*calls[-1]) if calls else None


def weight_nodes(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Those of a mixer's new nodes that compute its level weights."""
    new = set(nodes)
    pending = [a for n in new if _operator(n) for a in n.args[3:4] if isinstance(a, fx.Node)]
    found: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in new and node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def _operator(node: fx.Node) -> str:
    name = str(node.target).removeprefix("llcompile.").removesuffix(".default")
    return name if node.op == "call_function" and name.startswith(_SEQUENCE) else ""


def _call(node: fx.Node, name: str) -> OperatorCall:
    given = [a.meta["example_value"] if isinstance(a, fx.Node) else a for a in node.args]
    q, _, v, weights = (_fixed(x) for x in given[:4])
    if name == _STEP:
        description = describe_step(Token(*(_fixed(x) for x in given[: len(Token._fields) - 1])))
        q, v = q[:, None], v[:, None]
    else:
        tensors = [_fixed(x) for x in given[:DIFFERENTIABLE]]
        # Sequences that do not fill their rows run packed: a start and a length each.
        packed = any(x is not None for x in given[DIFFERENTIABLE + 2 : DIFFERENTIABLE + 5])
        spans = (torch.empty(v.shape[0], device="meta"),) * 2 if packed else ()
        description = describe(Operands(*tensors, *spans), bool(given[DIFFERENTIABLE + 1]))
    sizes = OperandSizes(v.shape[0], v.shape[1], v.shape[2], q.shape[2], q.shape[3], v.shape[3])
    return OperatorCall(name, sizes, None if weights is None else int(weights.shape[-1]), description)


def _fixed(value: Any) -> Any:
    """A tensor of the same sizes without values; symbolic sizes as they were in the example."""
    if not isinstance(value, torch.Tensor):
        return value
    shape = [int(size_hint(size) or 1) for size in value.shape]
    return torch.empty(shape, dtype=value.dtype, device="meta")
