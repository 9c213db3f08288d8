"""Places: the module and the line of the user's code that a node of a graph was traced in."""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from llcompile.torch_internals import reach
from llcompile.torch_internals.inputs import input_value

# Dynamo's name of a child whose own name is a number, as the modules of `torch.export.unflatten` have them.
_CHILD = re.compile(r"getattr\(([^()]*), '([^']+)'\)")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
# How many nodes above a mixer are asked for a parameter that says whose it is.
_NEAR = 400
_PACKAGE = Path(__file__).parent.parent
# Not one folder above them all: in a clone of the repository that one holds examples and tests, too.
# PyTorch's own frames (vmap, a scan) stand below the user's line, too.
_OURS = tuple(
    str(folder.resolve()) + os.sep
    for folder in (
        _PACKAGE,
        *(_PACKAGE / name for name in ("kernels", "passes", "patterns")),
        Path(torch.__file__).parent,
    )
)

# Libraries that are another way to write array operations: whose line it is, is said by the line above theirs.
_NOTATIONS = ("einops", "einx", "opt_einsum")


def place_of(node: fx.Node) -> tuple[str, str]:
    """As `module_of`, of a node of the graph under work, whose level weights belong there.

    Code may run a module as `layer.forward(x)`, which Dynamo takes for code of what stands around it. In a module's
    call the node belongs to such a layer if it stands in that forward, and works with parameters from below it; in a
    frame that is no module's call, to the innermost module that holds the parameters and was not called itself.
    """
    inside = _run_as_forward(node)
    if inside is not None:
        return str(id(inside)), ""
    if node.meta.get("nn_module_stack") or reach.is_call_of_a_module():
        return module_of(node.meta)
    parameter = _parameter_above(node)
    owner = None if parameter is None else reach.innermost_holding(parameter, reach.modules_in(node.graph))
    return module_of(node.meta) if owner is None else (str(id(owner)), "")


def _run_as_forward(node: fx.Node) -> nn.Module | None:
    """The module whose forward was called, and not the module itself, and that the node was traced in."""
    key, _ = module_of(node.meta)
    outer = reach.find_module(key) if key else None
    if outer is None:
        return None
    frames = user_frames(node.meta)
    touched = (m for m in outer.modules() if m is not outer and reach.is_touched(m))
    below = {id(m) for m in touched if any(is_forward_of(m, f) for f in frames)}
    called = reach.modules_in(node.graph) if below else []
    fitting = below - {id(m) for m in called}
    parameter = _parameter_above(node) if fitting else None
    inside = None if parameter is None else reach.innermost_holding(parameter, called)
    return inside if id(inside) in fitting else None


def is_forward_of(module: nn.Module, frame: Mapping[str, str]) -> bool:
    """Whether a frame (see `user_frames`) is in the forward of a module's class."""
    span = _span(type(module))  # type: ignore[arg-type]
    return span is not None and frame["file"] == span[0] and span[1] <= int(frame["line"]) <= span[2]


@functools.lru_cache(maxsize=1024)
def _span(kind: type[nn.Module]) -> tuple[str, int, int] | None:
    """File, first and last line of a class's forward; None where it is not written in Python."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    if code is None:
        return None
    lines = [line for _, _, line in code.co_lines() if line]
    return (code.co_filename, code.co_firstlineno, max(lines)) if lines else None


def _parameter_above(node: fx.Node) -> nn.Parameter | None:
    """A parameter nearest to the node, of those that its value is computed from."""
    queue = [node]
    for current in queue:  # which grows
        held = input_value(current) if current.op == "placeholder" else None
        if isinstance(held, nn.Parameter) or len(queue) > _NEAR:
            return held
        queue.extend(above for above in current.all_input_nodes if above not in queue)
    return None


def module_of(meta: Mapping[str, Any]) -> tuple[str, str]:
    """The key and the dotted name of the innermost module that a node was traced in; ("", "") for none."""
    stack = meta.get("nn_module_stack") or {}
    if not stack:
        root = reach.root_module()
        return ("", "") if root is None else (str(id(root)), "")
    key = list(stack)[-1]
    path = stack[key][0]
    while _CHILD.search(path):
        path = _CHILD.sub(r"\1.\2", path)
    # A decorator that takes `*args` holds the model as the first of them.
    name = re.sub(r"^L\['args'\]\[0\]\.?|^L\['?\w+'?\]\.?|^G\['?\w+'?\]\.?", "", path)
    name = re.sub(r"\._modules\['([^']+)'\]|\[['\"]?(\w+)['\"]?\]", lambda m: "." + (m.group(1) or m.group(2)), name)
    name = name.lstrip(".")
    if not key.split("@")[0].isdigit():
        exported = reach.exported_module(name)
        return ("", name) if exported is None else (str(id(exported)), name)
    return key, name


def user_frames(meta: Mapping[str, Any]) -> list[dict[str, str]]:
    """The frames (file, line, function) of the user's code that led to a node, the outermost first."""
    frames = [m.groupdict() for m in _FRAME.finditer(meta.get("stack_trace") or "")]
    return [f for f in frames if _is_users(f["file"])]


@functools.lru_cache(maxsize=4096)
def _is_users(file: str) -> bool:
    """Whether a file is the user's, or of a library whose layers the user has."""
    path = str(Path(file).resolve())
    loaded = (sys.modules.get(name) for name in _NOTATIONS)
    notations = tuple(str(Path(m.__file__).resolve().parent) + os.sep for m in loaded if m and m.__file__)
    return not path.startswith(_OURS + notations)


def user_line(meta: Mapping[str, Any]) -> str:
    """`file:line in function` of the user's code that made a node, or ""."""
    frames = user_frames(meta)
    return "{file}:{line} in {function}".format(**frames[-1]) if frames else ""
