"""Mixer look: plain records of one mixer in the result of `inspect`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from llcompile.kernels.description import Description
from llcompile.patterns.families import Correction, Decay
from llcompile.patterns.records import Certificate

Kind = Literal["inside", "outside", "parameter"]


@dataclass(frozen=True)
class Excerpt:
    """Lines of a file around one of them, as they were when the model was inspected.

    Args:
        file, line, function: where; `line` counts from 1.
        first: the number of the first of `lines`.
        lines: the code; empty where the file cannot be read.
        marked: the numbers of the lines that the mixer comes from.
    """

    file: str
    line: int
    function: str
    first: int = 1
    lines: tuple[str, ...] = ()
    marked: tuple[int, ...] = ()


@dataclass(frozen=True)
class Operand:
    """One tensor that comes into a mixer.

    Args:
        roles: what it becomes: "query", "key", "value", "decay", "beta", "state", or "output" for what acts on the
            result alone; a step size is part of both value and decay. Empty if the call was declined unread.
        argument: the known function's own name for it; "" in hand-written code.
        name: the value in the code that it is.
        axes: letters for its axes, B, T, H, G, K, V.
        shape: its sizes.
        dtype: "f32", "bf16".
    """

    roles: tuple[str, ...]
    argument: str
    name: str
    axes: tuple[str, ...]
    shape: tuple[str, ...]
    dtype: str

    @property
    def role(self) -> str:
        """Its roles in words."""
        return " and ".join(self.roles)

    @property
    def title(self) -> str:
        """What it is and what it is called: "key B", "query"."""
        return " ".join(dict.fromkeys(filter(None, (self.role, self.argument))))

    @property
    def text(self) -> str:
        """One line of a comment."""
        axes = f"[{', '.join(self.axes)}] = " if self.axes else ""
        name = f", {self.name}" if self.name and self.name != self.title else ""
        return f"# {self.title}: {axes}[{', '.join(self.shape)}] {self.dtype}{name}"


@dataclass(frozen=True)
class OperandSizes:
    """Sizes of the operator's operands: q, k [B, T, G, K], v [B, T, H, V]; T is 1 for a decode step."""

    batch: int
    length: int
    heads: int
    groups: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class OperatorCall:
    """The call of the operator that replaces a mixer, with the sizes of the example.

    Args:
        operator: its name in `torch.ops.llcompile`.
        sizes: of its operands.
        levels: L, level weights of each token; None for the linear operator.
        description: what its kernels are generated from.
    """

    operator: str
    sizes: OperandSizes
    levels: int | None
    description: Description


@dataclass(frozen=True)
class Box:
    """One box of a drawing: an operation, or all operations of one line of the user's code.

    Args:
        name: its name in edges.
        title: the operation.
        detail: the shape of its result.
        kind: inside the mixer, outside it, or a tensor of the model.
        count: number of operations that it represents.
        where: the user's line.
    """

    name: str
    title: str
    detail: str
    kind: Kind
    count: int = 1
    where: str = ""


@dataclass(frozen=True)
class Drawing:
    """A mixer and its surroundings, as boxes and edges (from, to)."""

    boxes: tuple[Box, ...] = ()
    edges: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class LevelTable:
    """Level weights as numbers.

    Args:
        mean, spread: [H][L]: mean and standard deviation of w over normally distributed inputs; empty if there are
            no values (on the meta device).
        identity: every weight is exactly 1, for any input.
    """

    mean: tuple[tuple[float, ...], ...] = ()
    spread: tuple[tuple[float, ...], ...] = ()
    identity: bool = False


@dataclass(frozen=True)
class MixerLook:
    """One mixer that was converted or declined, before and after.

    Args:
        module: its module's name in the model; "" for the model itself.
        fate: "converted" or "declined".
        where: the user's file and line.
        family: its usual name; "" for a near miss.
        decay, correction: its cell of the table of families, or None.
        origin: "function" or "graph".
        reason, hint, code: why it was declined, what to do, and the reason's stable code.
        certificate: the result of its proof, or None.
        level_weights: their kind, or "none".
        parameters: number of parameters that the level weights add.
        operands: the tensors that come into it.
        before: the region as code, one operation per line, with shapes.
        after: the code that replaces it; "" if it was declined.
        call: the operator's call in `after`.
        source: the user's lines that the region comes from.
        notes: conditions that apply to this graph only.
        drawing_before, drawing_after: the region and its surroundings as boxes.
        table: the level weights as numbers; None if there are none.
    """

    module: str
    fate: Literal["converted", "declined"]
    where: str
    family: str = ""
    decay: Decay | None = None
    correction: Correction | None = None
    origin: str = ""
    reason: str = ""
    hint: str = ""
    code: str = ""
    certificate: Certificate | None = None
    level_weights: str = "none"
    parameters: int = 0
    operands: tuple[Operand, ...] = ()
    before: str = ""
    after: str = ""
    call: OperatorCall | None = None
    source: Excerpt | None = None
    notes: tuple[str, ...] = ()
    drawing_before: Drawing = Drawing()
    drawing_after: Drawing = Drawing()
    table: LevelTable | None = None

    @property
    def name(self) -> str:
        """The module's name for display."""
        return self.module or "(root)"

    @property
    def diff(self) -> str:
        """From `before` to `after`, as a unified diff; "" if nothing changes."""
        if not self.after:
            return ""
        old, new = self.before.splitlines(), self.after.splitlines()
        lines = difflib.unified_diff(old, new, f"{self.name} before", f"{self.name} after", lineterm="")
        return "\n".join(lines)
