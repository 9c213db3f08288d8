"""Roles: what each argument of a known function becomes, query, key, value or another operand of the operator.

Read off the entry's own binding, which is run on symbols: an argument's name says little. Mamba-2's `C` is the query,
and its `B` is the key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import fx

from llcompile.patterns.graph.walk import walk
from llcompile.patterns.known import Arguments, KnownFunction
from llcompile.patterns.mixer import Mixer

_NAMES = {"log_decay": "decay", "decay_rate": "decay", "initial_state": "state"}
_OUTPUT = "output"  # acts on the result, and is no operand: a skip connection, a gate


def roles_of(entry: KnownFunction, call: Arguments) -> dict[str, tuple[str, ...]]:
    """Name of a tensor argument -> its roles, in the operator's order."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    given = [t.name for t in entry.tensors if isinstance(call[t.name], torch.Tensor)]
    nodes = {name: graph.placeholder(name) for name in given}
    proxies = {name: fx.Proxy(node, tracer) for name, node in nodes.items()}
    mixer = entry.bind(call.with_values({**call.values, **proxies}))
    made_of = {role: set(walk(operand, lambda n: n.all_input_nodes)) for role, operand in _operands(mixer).items()}
    roles = {name: tuple(role for role, above in made_of.items() if node in above) for name, node in nodes.items()}
    return {name: found or (_OUTPUT,) for name, found in roles.items()}


def _operands(mixer: Mixer) -> Mapping[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = {}
    for name, value in _proxies(mixer):
        found.setdefault(_NAMES.get(name, name.replace("_", " ")), []).append(value.node)
    return found


def _proxies(mixer: Mixer) -> Iterator[tuple[str, Any]]:
    for field in fields(mixer):
        value = getattr(mixer, field.name)
        if isinstance(value, fx.Proxy):
            yield field.name, value
