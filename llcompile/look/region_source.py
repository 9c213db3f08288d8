"""A piece of a graph as Python source that runs without the model: a module, and what it is called with."""

from __future__ import annotations

import base64
import re
import textwrap
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llcompile.errors import ReproError
from llcompile.look import source_text
from llcompile.patterns.known.capture import captured_function, positions_of
from llcompile.torch_internals.inputs import input_value, module_tensors
from llcompile.torch_internals.places import module_of
from llcompile.torch_internals.sizes import size_hint

# Where a piece begins: what lies between these and a mixer says how its operands are bounded.
_PROJECTIONS = ("linear", "matmul", "bmm", "conv1d", "embedding", "layer_norm", "rms_norm")
_WRITTEN_OUT = 64  # numbers of a buffer that stand in the source one by one
_PACKED = 1 << 16  # and of one that stands there in base64: a mask, a table of decays; of a larger one only the shape


@dataclass(frozen=True)
class RegionSource:
    """Source of a piece.

    Args:
        imports: lines that import what it calls.
        code: the method `forward`, indented by nothing.
        operands: for each argument a line of Python that makes it, with its shape and dtype.
        buffers: the same for each buffer that `forward` reads: by its numbers, such as those of a mask, a mixer may be
            recognised.
    """

    imports: tuple[str, ...]
    code: str
    operands: tuple[str, ...]
    buffers: tuple[str, ...] = ()


def region_source(core: Iterable[fx.Node], result: fx.Node | None = None) -> RegionSource:
    """The nodes and what bounds their operands, up to the projections, as source.

    `result` is what it comes to; without one, everything of the core that other code reads. (What else a mixer's code
    hands to other code may be an intermediate that only dead code reads, and would make it another mixer.)

    Raises:
        ReproError: the piece has a body of control flow in it.
    """
    core = list(core)
    graph, module = core[0].graph, module_of(core[-1].meta)[0]
    piece = _with_bounds(set(core), module)
    nodes = [node for node in graph.nodes if node in piece]
    inputs = [node for node in graph.nodes if node not in piece and any(user in piece for user in node.users)]
    held = {node: numbers for node in inputs if (numbers := _numbers(node)) is not None}
    copy, made = fx.Graph(), {}
    for node in inputs:
        if node not in held:
            made[node] = copy.placeholder(_short(node.name))
    for node in held:
        made[node] = copy.create_node("get_attr", f"buffer_{_short(node.name)}")
    for node in nodes:
        made[node] = copy.node_copy(node, made.__getitem__)
        captured = captured_function(node.target)
        if captured is not None:
            first, rest = captured.names[: positions_of(node.target)], dict(made[node].kwargs)  # type: ignore[arg-type]
            made[node].args = tuple(rest.pop(name) for name in first)
            made[node].kwargs = rest
            made[node].target = captured.function
    read = [node for node in nodes if node in core and any(user not in piece for user in node.users)]
    results = [made[node] for node in (read if result is None else [result])]
    copy.output(results[0] if len(results) == 1 else tuple(results))
    written = copy.python_code("self")
    code, imports = _unannotated(written.src), []
    for name, value in written.globals.items():
        if re.search(rf"\b{name}\b", code) and name != "torch":
            plain = _plain_name(name, value)
            known_as = name if _is_used(plain, code) else plain  # a result may be called like the function it is of
            imports.append(_import(name, value, known_as))
            code = re.sub(rf"\b{name}\b", known_as, code)
    operands = tuple(f"{made[node].name} = {_operand(node)}" for node in inputs if node not in held)
    return RegionSource(tuple(imports), code, operands, tuple(f"{made[n].target} = {_written(held[n])}" for n in held))


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
                f"{node.format_node()} is a body of control flow, which cannot be written to one file; "
                "set TORCH_TRACE to see the whole graph"
            )
    return piece


def _belongs(node: fx.Node, module: str) -> bool:
    if node.op not in ("call_function", "call_method") or module_of(node.meta)[0] != module:
        return False
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    return name not in _PROJECTIONS


def _plain_name(name: str, value: Any) -> str:
    return getattr(value, "__name__", name)


def _is_used(name: str, code: str) -> bool:
    """Whether the code has a name of its own that is this one; attributes do not count."""
    return re.search(rf"(?<![.\w]){re.escape(name)}\b", code) is not None


def _import(name: str, value: Any, known_as: str) -> str:
    if isinstance(value, float):  # inf and nan
        return f"from math import {name}"
    plain, module = _plain_name(name, value), "torch" if name == "device" else value.__module__
    alias = "" if plain == known_as else f" as {known_as}"
    source_text.check_import(module, plain)
    return f"from {module} import {plain}{alias}"


def _unannotated(source: str) -> str:
    """Without the lines that only free variables, and without the annotations that fx writes."""
    lines = [line.split(";  ")[0] for line in source.strip().splitlines()]
    return "\n".join(line for line in lines if line.strip())


def _operand(node: fx.Node) -> str:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return source_text.literal(value)
    shape, dtype = [int(size_hint(n) or 1) for n in value.shape], value.dtype
    if dtype.is_floating_point:
        return f"torch.randn({shape}, dtype={dtype})"
    return f"torch.ones({shape}, dtype={dtype})"


def _written(held: torch.Tensor) -> str:
    if held.numel() <= _WRITTEN_OUT:
        return f"torch.tensor({held.tolist()}, dtype={held.dtype})"
    packed = base64.b64encode(zlib.compress(held.contiguous().view(torch.uint8).numpy().tobytes(), 9)).decode()
    lines = "\n".join(f'    "{line}"' for line in textwrap.wrap(packed, 100))
    return f"unpacked({list(held.shape)}, {held.dtype},\n{lines},\n)"


def _numbers(node: fx.Node) -> torch.Tensor | None:
    """The numbers of a buffer or constant that is not large; a parameter's are nobody's business."""
    held = input_value(node)
    known = isinstance(held, torch.Tensor) and id(held) in module_tensors() and not held.is_meta
    return held.detach().cpu() if known and held.numel() <= _PACKED else None
