"""Discover: finds the captured calls in the graph and names the module and the line that each belongs to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llcompile.passes import dynamo
from llcompile.passes.capture import leaf_of, take_refused
from llcompile.passes.records import Declined
from llcompile.passes.session import Session, Site, module_name

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_OURS = str(Path(__file__).resolve().parent.parent)


def discover(session: Session) -> int:
    """Fills `session.sites`; returns how many mixers were found."""
    calls: Counter[str] = Counter()
    for node in session.graph.nodes:
        leaf = leaf_of(node.target) if node.op == "call_function" else None
        if leaf is None:
            continue
        key, name = module_of(node.meta)
        calls[key] += 1
        site = Site(node, leaf, session.name(key, name), user_line(node.meta))
        if key:
            site.owner = dynamo.find_module(key)
            site.owner_missing = site.owner is None
        if calls[key] > 1:
            site.attribute = f"loglinear_{calls[key]}"
        session.sites.append(site)
    session.refused.extend(refused_calls(session.settings.names))
    return len(session.sites)


def refused_calls(names: Mapping[int, str]) -> list[Declined]:
    """The calls of opaque functions at which the trace has broken the graph since this was last asked."""
    hint = "the graph breaks there and the library's own code runs, as it does without this backend"
    return [
        Declined(module_name(names, *module_of(call.meta)), call.reason, user_line(call.meta), hint)
        for call in take_refused()
    ]


def module_of(meta: Mapping[str, Any]) -> tuple[str, str]:
    """The key and the dotted name of the innermost module that a node was traced in; ("", "") for none."""
    stack = meta.get("nn_module_stack") or {}
    if not stack:
        root = dynamo.root_module()
        return ("", "") if root is None else (str(id(root)), "")
    key = list(stack)[-1]
    path = stack[key][0]
    name = re.sub(r"^L\['?\w+'?\]\.?|^G\['?\w+'?\]\.?", "", path)
    name = re.sub(r"\._modules\['([^']+)'\]|\[['\"]?(\w+)['\"]?\]", lambda m: "." + (m.group(1) or m.group(2)), name)
    return key, name.lstrip(".")


def user_line(meta: Mapping[str, Any]) -> str:
    """`file:line in function` of the user's code that made a node, or ""."""
    frames = [m.groupdict() for m in _FRAME.finditer(meta.get("stack_trace") or "")]
    frames = [f for f in frames if not str(Path(f["file"]).resolve()).startswith(_OURS)]
    return "{file}:{line} in {function}".format(**frames[-1]) if frames else ""
