"""Discover: finds the captured calls in the graph and names the module and the line that each belongs to."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from torch import fx

from llcompile.passes import dynamo
from llcompile.passes.capture import leaf_of
from llcompile.passes.session import Session, Site

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_OURS = str(Path(__file__).resolve().parent.parent)


def discover(session: Session) -> int:
    """Fills `session.sites`; returns how many mixers were found."""
    calls: Counter[str] = Counter()
    for node in session.graph.nodes:
        leaf = leaf_of(node.target) if node.op == "call_function" else None
        if leaf is None:
            continue
        key, name = module_of(node)
        calls[key] += 1
        site = Site(node, leaf, name, user_line(node))
        if key:
            site.owner = dynamo.find_module(key)
            site.owner_missing = site.owner is None
        if calls[key] > 1:
            site.attribute = f"loglinear_{calls[key]}"
        session.sites.append(site)
    return len(session.sites)


def module_of(node: fx.Node) -> tuple[str, str]:
    """The key and the dotted name of the innermost module that the node was traced in; ("", "") for none."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "", ""
    key = list(stack)[-1]
    path = stack[key][0]
    name = re.sub(r"^L\['?\w+'?\]\.?|^G\['?\w+'?\]\.?", "", path)
    name = re.sub(r"\._modules\['([^']+)'\]|\[['\"]?(\w+)['\"]?\]", lambda m: "." + (m.group(1) or m.group(2)), name)
    return key, name.lstrip(".")


def user_line(node: fx.Node) -> str:
    """`file:line in function` of the user's code that made the node, or ""."""
    frames = [m.groupdict() for m in _FRAME.finditer(node.meta.get("stack_trace") or "")]
    frames = [f for f in frames if not str(Path(f["file"]).resolve()).startswith(_OURS)]
    return "{file}:{line} in {function}".format(**frames[-1]) if frames else ""
