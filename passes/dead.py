"""Dead: removes what a rewrite left without use, and nothing else."""

from __future__ import annotations

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
    empty = _empty_vmaps(graph, set(graph.nodes))
    held = {node for node in graph.nodes if node in before or node not in now}  # what the rewrite wrote needs no vmap
    for node in reversed(list(graph.nodes)):
        if node in gone:
            graph.erase_node(node)
    for node in _empty_vmaps(graph, held) - empty:
        graph.erase_node(node)


def _empty_vmaps(graph: fx.Graph, held: set[fx.Node]) -> set[fx.Node]:
    """The nodes that open and close a vmap of which no operation is one of those `held`."""
    found: set[fx.Node] = set()
    opened: list[tuple[fx.Node, list[fx.Node]]] = []  # and what it holds
    for node in graph.nodes:
        if not is_nesting(node):
            for _, holds in opened if node in held else ():
                holds.append(node)
        elif _name(node) == "_vmap_increment_nesting":
            opened.append((node, []))
        elif _name(node) == "_vmap_decrement_nesting" and opened:
            start, holds = opened.pop()
            if not holds:
                found |= {start, node}
    return found


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", ""))
