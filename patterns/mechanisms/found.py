"""What a finder hands back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Found:
    """A mechanism: the node that names its module and line, its usual name, and the nodes that are its inside."""

    node: fx.Node
    kind: str
    heads: int | None = None
    groups: int | None = None
    inside: frozenset[fx.Node] = frozenset()
