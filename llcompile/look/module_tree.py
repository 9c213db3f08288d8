"""Module tree: the modules of a model that have a fate, as a tree in which equal numbered modules stand once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from llcompile.folding import grouped, runs


@dataclass
class Branch:
    """One module, or those of a list that are alike.

    Args:
        name: the last part of its name; "0-2,4-6" for several.
        kind: its class.
        fates: (fate, what it is, anchor) of the module itself.
        children: modules below it.
        count: how many modules it stands for.
    """

    name: str
    kind: str
    fates: list[tuple[str, str, str]] = field(default_factory=list)
    children: list[Branch] = field(default_factory=list)
    count: int = 1

    def alike(self) -> object:
        """Equal for modules that look the same, their names apart."""
        return self.kind, tuple(self.fates), tuple((c.name, c.alike()) for c in self.children)


def tree(model: nn.Module, fates: Mapping[str, list[tuple[str, str, str]]]) -> Branch:
    """The modules on the way to those that have a fate."""
    root = Branch("", type(model).__name__, fates.get("", []))
    branches = {"": root}
    modules = dict(model.named_modules())
    for path in fates:
        parts = path.split(".") if path else []
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in branches:
                kind = type(modules[name]).__name__ if name in modules else ""
                branches[name] = Branch(parts[depth - 1], kind, fates.get(name, []))
                branches[".".join(parts[: depth - 1])].children.append(branches[name])
    _fold(root)
    return root


def _fold(branch: Branch) -> None:
    for child in branch.children:
        _fold(child)
    branch.children.sort(key=lambda c: (not c.name.isdigit(), int(c.name) if c.name.isdigit() else 0))
    folded = []
    for alike in grouped(branch.children, lambda c: ("" if c.name.isdigit() else c.name, c.alike())):
        if len(alike) > 1:
            alike[0].name, alike[0].count = runs(int(c.name) for c in alike), len(alike)
        folded.append(alike[0])
    branch.children = folded
