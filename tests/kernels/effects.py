"""What a generated kernel does to the memory behind its parameters, read off its source."""

from __future__ import annotations

import ast


def effects(tree: ast.Module, kernel: str) -> tuple[set[str], set[str]]:
    """Parameters of ``kernel`` whose memory is read, and those whose memory is written; with numbers that give a place.

    An address is a sum of a parameter and numbers, perhaps by way of a local name. It is the first argument of what
    stores (``store_*``) or loads and stores (``add_*``), and any argument of what loads (every other function).
    """
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == kernel)
    behind = _parameters_behind(function)
    read, written = set[str](), set[str]()
    for call in ast.walk(function):
        if isinstance(call, ast.Call) and call.args:
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            first, *others = ({p for n in _names(x) for p in behind.get(n, ())} for x in call.args)
            if name.startswith(("store", "add_")):
                written |= first
            if not name.startswith("store"):
                read |= first.union(*others)
    return read, written


def _parameters_behind(function: ast.FunctionDef) -> dict[str, set[str]]:
    """For each name in ``function``, the parameters that its value is a sum with."""
    behind = {a.arg: {a.arg} for a in function.args.args}
    assignments = [n for n in ast.walk(function) if isinstance(n, (ast.Assign, ast.AugAssign))]
    settled = False
    while not settled:  # a name may be used above its assignment, in a loop
        settled = True
        for node in assignments:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = {p for n in _names(node.value) for p in behind.get(n, ())}
            for target in (n for t in targets for n in _names(t)):
                if not found <= behind.setdefault(target, set()):
                    behind[target] |= found
                    settled = False
    return behind


def _names(node: ast.expr) -> set[str]:
    """Names in an expression, but for those inside calls: what a call gives is a value, not an address."""
    if isinstance(node, ast.Call):
        return set()
    if isinstance(node, ast.Name):
        return {node.id}
    return {n for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr) for n in _names(child)}
