"""What a finder hands back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from llcompile.patterns.structure.program import Value


@dataclass(frozen=True)
class Found:
    """A mechanism: the node that names its module and line, its usual name, and the values that are its inside."""

    node: fx.Node
    kind: str
    inside: frozenset[Value]
    heads: int | None = None
    groups: int | None = None
