"""Name written: gives what a write through a view leaves in a tensor (`v[:, 0] = 0`) a node of its own in the graph.

Dynamo's graph has a node for each result of a call, and none for what becomes of a tensor that another call writes to.
A mixer's operand may be just that. A view of the whole tensor, taken before the first reader, names it.
"""

from __future__ import annotations

import operator
from typing import Any

from llcompile.patterns.graph.regions import Region
from llcompile.patterns.structure.program import Program


def name_written(region: Region, program: Program) -> None:
    """Adds `v[...]` to the graph for each value of the program that is read and that no node returns.

    Args:
        region: the graph.
        program: the graph's, as it was recorded; it knows the new nodes.
    """
    for value, (reader, node) in program.unnamed.items():
        effects, example = region.effects, node.meta["example_value"]
        is_last = reader.op == "output" or not effects.shows(node).isdisjoint(effects.writes(reader))
        if value.node is not None or is_last:
            continue
        whole: Any = (node, ...)
        with region.graph.inserting_before(reader):
            value.node = region.graph.call_function(operator.getitem, whole)
        value.node.meta.update(value.op.node.meta if value.op is not None else {}, example_value=example)
        effects.place(value.node, effects.shows(node), like=node)
        program.results[value.node] = value
