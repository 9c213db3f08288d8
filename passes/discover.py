"""Discover: finds the captured calls in the graph and names the module and the line that each belongs to."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import llcompile
from llcompile import kernels, passes, patterns
from llcompile.passes import dynamo, reach
from llcompile.passes.capture import leaf_of, take_refused
from llcompile.passes.records import Declined
from llcompile.passes.session import Session, Site, module_name

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
# How many nodes above a mixer are asked for a parameter that says whose it is.
_NEAR = 400
_CLOSED = "move the mixer out of the control flow, or compile the part inside by itself"
# Not one folder above them all: in a clone of the repository that one holds examples and tests, too.
# PyTorch's own frames (vmap, a scan) stand below the user's line, too.
_OURS = tuple(str(Path(p.__path__[0]).resolve()) + os.sep for p in (llcompile, passes, patterns, kernels, torch))


def discover(session: Session) -> int:
    """Fills `session.sites`; returns how many mixers were found."""
    captured = [(r, n, leaf_of(n.target)) for r in session.regions for n in r.graph.nodes if n.op == "call_function"]
    for region, node, leaf in captured:
        if leaf is None:
            continue
        key, name = place_of(node)
        site = Site(node, region, leaf, session.name(key, name), user_line(node.meta))
        if region.closed:
            site.decline(f"it stands in the body of {region.closed}, which takes no further operands", _CLOSED)
        if key:
            site.owner = reach.find_module(key)
            site.owner_missing = site.owner is None
        session.sites.append(site)
    session.refused.extend(refused_calls(session.settings.names))
    return len(session.sites)


def refused_calls(names: Mapping[int, str]) -> list[Declined]:
    """The calls of opaque functions at which the trace has broken the graph since this was last asked."""
    hint = "the graph breaks there and the library's own code runs, as it does without this backend"
    calls = take_refused()
    found = [Declined(module_name(names, *module_of(c.meta)), c.reason, user_line(c.meta), hint) for c in calls]
    return list(dict.fromkeys(found))  # Dynamo traces up to a break more than once


def place_of(node: fx.Node) -> tuple[str, str]:
    """As `module_of`, of a node of the graph under work, whose level weights belong there.

    In a frame that is no module's call (a function that calls `layer.forward(x)`) that is the innermost module which
    holds the parameters that the node works with, and was not called itself.
    """
    if node.meta.get("nn_module_stack") or reach.is_call_of_a_module():
        return module_of(node.meta)
    parameter = _parameter_above(node)
    owner = None if parameter is None else reach.innermost_holding(parameter, reach.modules_in(node.graph))
    return module_of(node.meta) if owner is None else (str(id(owner)), "")


def _parameter_above(node: fx.Node) -> nn.Parameter | None:
    """A parameter nearest to the node, of those that its value is computed from."""
    queue = [node]
    for current in queue:  # which grows
        held = dynamo.input_value(current) if current.op == "placeholder" else None
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
    return [f for f in frames if not str(Path(f["file"]).resolve()).startswith(_OURS)]


def user_line(meta: Mapping[str, Any]) -> str:
    """`file:line in function` of the user's code that made a node, or ""."""
    frames = user_frames(meta)
    return "{file}:{line} in {function}".format(**frames[-1]) if frames else ""
