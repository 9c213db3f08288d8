"""What a look holds about one mixer, as plain records."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from llcompile.passes.records import Certificate
from llcompile.patterns.families import Correction, Decay


@dataclass(frozen=True)
class Excerpt:
    """Lines of a file around one of them, as they were when the look was taken.

    Args:
        file, line, function: where; `line` counts from 1.
        first: the number of the first of `lines`.
        lines: the code; empty where the file cannot be read.
    """

    file: str
    line: int
    function: str
    first: int = 1
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Sizes of a mixer's operands in the example: q, k [B, T, G, K], v [B, T, H, V]; T is 1 for a decode step."""

    batch: int
    length: int
    heads: int
    groups: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class MixerLook:
    """One mixer that was converted or declined, before and after.

    Args:
        module: its module's name in the model.
        fate: "converted" or "declined".
        family: what the field calls it; "" for a near miss that is of no family.
        decay, correction: its cell of the table of families, or None.
        origin: "function" or "graph".
        reason, hint: why it was declined, and what to do.
        certificate: the outcome of its proof, or None.
        sizes: sizes of the operands, or None where nothing was bound.
        levels: L, level weights of each token; None for the linear operator.
        level_weights: their kind, or "none".
        parameters: how many numbers the level weights add.
        before: the region as code, one operation a line, with shapes.
        after: the code that takes its place; "" where it was declined.
        source: the user's lines that the region comes from.
        notes: what holds for this graph only.
    """

    module: str
    fate: str
    where: str
    family: str = ""
    decay: Decay | None = None
    correction: Correction | None = None
    origin: str = ""
    reason: str = ""
    hint: str = ""
    certificate: Certificate | None = None
    sizes: Sizes | None = None
    dtype: str = ""
    levels: int | None = None
    level_weights: str = "none"
    parameters: int = 0
    before: str = ""
    after: str = ""
    source: Excerpt | None = None
    notes: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def diff(self) -> str:
        """From `before` to `after`, as a unified diff; "" where nothing changes."""
        if not self.after:
            return ""
        name = self.module or "(root)"
        lines = difflib.unified_diff(
            self.before.splitlines(), self.after.splitlines(), f"{name} before", f"{name} after", lineterm=""
        )
        return "\n".join(lines)
