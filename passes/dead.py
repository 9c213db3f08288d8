"""Dead: removes what a rewrite left without use, and nothing else."""

from __future__ import annotations

import itertools

from torch import fx

from llcompile.patterns.graph.effects import Effects, is_nesting


def live(graph: fx.Graph, effects: Effects) -> set[fx.Node]:
    """The nodes that the graph's outputs, its inputs afterwards, or its other effects depend on.

    A write counts where its memory is read later, or outlives the graph.
    """
    read: set[int] = set(effects.outside)
    found: set[fx.Node] = set()
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        written = not read.isdisjoint(effects.writes(node))
        if node in needed or written or node.op in ("placeholder", "output") or effects.acts(node):
            found.add(node)
            needed.update(node.all_input_nodes)
            read.update(*map(effects.shows, node.all_input_nodes))
    return found


def erase_dead(graph: fx.Graph, effects: Effects, before: set[fx.Node]) -> None:
    """Erases what was live `before` the rewrite and is not any more, with what was dead already and read that."""
    now = live(graph, effects)
    gone: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in now and (node in before or not gone.isdisjoint(node.all_input_nodes)):
            gone.add(node)
    empty = _empty_vmaps(graph, set())
    for node in reversed(list(graph.nodes)):
        if node in gone:
            graph.erase_node(node)
    for opened, closed in _empty_vmaps(graph, empty):
        graph.erase_node(closed)
        graph.erase_node(opened)


def _empty_vmaps(graph: fx.Graph, known: set[tuple[fx.Node, fx.Node]]) -> set[tuple[fx.Node, fx.Node]]:
    """The pairs of nodes that open and close a vmap with nothing in between."""
    nodes = list(graph.nodes)
    pairs = itertools.pairwise(nodes)
    found = {(a, b) for a, b in pairs if is_nesting(a) and is_nesting(b) and _opens(a) and not _opens(b)}
    return found - known


def _opens(node: fx.Node) -> bool:
    return "increment" in str(getattr(node.target, "__name__", ""))
