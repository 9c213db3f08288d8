"""A piece of a graph as Python source that runs without the model: a module, and what it is called with."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llcompile.errors import ReproError
from llcompile.passes import dynamo
from llcompile.passes.capture import leaf_of
from llcompile.passes.discover import module_of

# Where a piece begins: what lies between these and a mixer says how its operands are bounded.
_PROJECTIONS = ("linear", "matmul", "bmm", "conv1d", "embedding", "layer_norm", "rms_norm")
_WRITTEN_OUT = 64  # numbers of a constant that stand in the source; of a larger one only the shape matters


@dataclass(frozen=True)
class RegionSource:
    """Source of a piece.

    Args:
        imports: lines that import what it calls.
        code: the method `forward`, indented by nothing.
        operands: for each argument a line of Python that makes it, with its shape and dtype.
    """

    imports: tuple[str, ...]
    code: str
    operands: tuple[str, ...]


def region_source(core: Iterable[fx.Node]) -> RegionSource:
    """The nodes and what bounds their operands, up to the projections, as source.

    Raises:
        ReproError: the piece has a body of control flow in it.
    """
    core = list(core)
    graph, module = core[0].graph, module_of(core[-1].meta)[0]
    piece = _with_bounds(set(core), module)
    nodes = [node for node in graph.nodes if node in piece]
    inputs = [node for node in graph.nodes if node not in piece and any(user in piece for user in node.users)]
    copy, made = fx.Graph(), {}
    for node in inputs:
        made[node] = copy.placeholder(_short(node.name))
    for node in nodes:
        made[node] = copy.node_copy(node, made.__getitem__)
        leaf = leaf_of(node.target)
        made[node].target = node.target if leaf is None else leaf.function
    results = [made[node] for node in nodes if node in core and any(user not in piece for user in node.users)]
    copy.output(results[0] if len(results) == 1 else tuple(results))
    written = copy.python_code("self")
    code, imports = _unannotated(written.src), []
    for name, value in written.globals.items():
        if re.search(rf"\b{name}\b", code) and name != "torch":
            imports.append(_import(name, value))
            code = re.sub(rf"\b{name}\b", _plain_name(name, value), code)
    return RegionSource(tuple(imports), code, tuple(f"{made[node].name} = {_operand(node)}" for node in inputs))


def _short(name: str) -> str:
    """The name of an input; a parameter's without the path that Dynamo puts in front."""
    return re.split(r"_(?:parameters|buffers)_", name)[-1].removeprefix("l_").strip("_")


def _with_bounds(core: set[fx.Node], module: str) -> set[fx.Node]:
    """The core, and what is computed above it in its module down from the last projections."""
    piece, pending = set(core), list(core)
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in piece and _belongs(node, module):
                piece.add(node)
                pending.append(node)
    for node in piece:
        if node.op not in ("call_function", "call_method"):
            raise ReproError(
                f"{node.format_node()} is a body of control flow, which cannot be written as one file; "
                "TORCH_TRACE shows the whole graph"
            )
    return piece


def _belongs(node: fx.Node, module: str) -> bool:
    if node.op not in ("call_function", "call_method") or module_of(node.meta)[0] != module:
        return False
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    return name not in _PROJECTIONS


def _plain_name(name: str, value: Any) -> str:
    return getattr(value, "__name__", name)


def _import(name: str, value: Any) -> str:
    if isinstance(value, float):  # inf and nan
        return f"from math import {name}"
    return f"from {'torch' if name == 'device' else value.__module__} import {_plain_name(name, value)}"


def _unannotated(source: str) -> str:
    """Without the lines that only free variables, and without the annotations that fx writes."""
    lines = [line.split(";  ")[0] for line in source.strip().splitlines()]
    return "\n".join(line for line in lines if line.strip())


def _operand(node: fx.Node) -> str:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return repr(value)
    held = _numbers(node)
    shape, dtype = [int(dynamo.hint(n) or 1) for n in value.shape], value.dtype
    if held is not None:
        return f"torch.tensor({held.tolist()}, dtype={dtype})"
    if dtype.is_floating_point:
        return f"torch.randn({shape}, dtype={dtype})"
    return f"torch.ones({shape}, dtype={dtype})"


def _numbers(node: fx.Node) -> torch.Tensor | None:
    """The numbers of a small buffer or constant; a parameter's are nobody's business."""
    held = dynamo.input_value(node)
    known = isinstance(held, torch.Tensor) and id(held) in dynamo.module_tensors() and not held.is_meta
    return held.detach().cpu() if known and held.numel() <= _WRITTEN_OUT else None
