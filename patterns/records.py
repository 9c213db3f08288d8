"""What the passes find out about a model, as plain records; the report is made of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from llcompile.patterns.families import Correction, Decay
from llcompile.patterns.reasons import GivenReason


@dataclass(frozen=True)
class Certificate:
    """The result of a proof: how far the rewritten form was from the original at w = 1.

    Args:
        max_error: largest difference over all draws at any position, relative to the original's largest value at that
            position (see `agreement.difference`). A single token and a state that goes out are one position each.
        dtype: precision in which the two agreed: "float64", or "float32" where the original computes in that inside.
        draws: number of independent random inputs (each with another length, where the function has one).
        against: what the operator was compared with, where that is not the function itself.
    """

    max_error: float
    dtype: str
    draws: int
    against: str = ""


@dataclass(frozen=True)
class ModelCertificate:
    """The whole converted model, run through the backend on the example inputs and compared with the model's own run.

    Args:
        error: largest difference of any output at w = 1, relative to that output's largest value.
        gradient_error: the same for the gradients of the model's own parameters; None where it has none.
        acts: the modules whose level weights move the output and get a gradient.
        dtype: precision of the model.
        seconds: what the check took.
    """

    error: float
    gradient_error: float | None
    acts: tuple[str, ...]
    dtype: str
    seconds: float


@dataclass(frozen=True)
class Converted:
    """A mixer that was rewritten. `parameters` counts the new level weights; `origin` is "function" or "graph".

    `notes` say what holds for this graph only: a length that its code is written out for, numbers read when compiled.
    """

    module: str
    family: str
    decay: Decay
    correction: Correction
    origin: str
    certificate: Certificate
    parameters: int
    heads: int
    key_dim: int
    value_dim: int
    level_weights: str = "none"
    where: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Declined:
    """A linear-time mixer that was seen and not rewritten.

    Args:
        module: its module's name in the model.
        reason: why, in a sentence.
        where: the user's file and line.
        hint: what to do.
        code: the reason's stable code; docs/reasons.md lists them.
    """

    module: str
    reason: str
    where: str
    hint: str = ""
    code: str = field(kw_only=True)

    @classmethod
    def because(cls, given: GivenReason, module: str, where: str) -> Declined:
        """The record of a mixer that a reason was given for."""
        return cls(module, given.text, where, given.hint, code=given.code)

    @property
    def given(self) -> GivenReason:
        """Its reason."""
        return GivenReason(self.code, self.reason, self.hint)


@dataclass(frozen=True)
class GraphBreak:
    """A line of the user's code at which Dynamo ends one graph and begins another; no mixer is seen across it."""

    reason: str
    where: str


@dataclass(frozen=True)
class Untouched:
    """Another mechanism, left as it is.

    Args:
        module: the module that has it.
        kind: its usual name, and what the graph tells about it: "softmax attention (GQA, 4 heads over 2 groups)".
        where: the user's file and line.
        heads: how many heads an attention has, where the graph tells.
        groups: how many sets of keys and values its heads share (as many as heads: none are shared).
    """

    module: str
    kind: str
    where: str = ""
    heads: int | None = None
    groups: int | None = None
