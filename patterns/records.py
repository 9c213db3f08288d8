"""Plain records of what the passes found in a model; the report consists of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from llcompile.patterns.families import Correction, Decay
from llcompile.patterns.reasons import GivenReason


@dataclass(frozen=True)
class Certificate:
    """The result of a proof: the error of the rewritten form at w = 1.

    Args:
        max_error: largest difference over all draws at any position, relative to the original's largest value at that
            position (see `agreement.difference`). A single token and a returned state are one position each.
        dtype: precision to which the two agreed: "float64", or "float32" if the original computes in it inside.
        draws: number of independent random inputs (of different lengths, if the length can vary).
        against: the reference that the operator was compared with, if not the function itself.
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
        acts: the modules whose level weights change the output and have gradients.
        dtype: precision of the model.
        seconds: duration of the check.
    """

    error: float
    gradient_error: float | None
    acts: tuple[str, ...]
    dtype: str
    seconds: float


@dataclass(frozen=True)
class Converted:
    """A mixer that was rewritten. `parameters` counts the new level weights; `origin` is "function" or "graph".

    `weight_sets` of level weights serve the heads; as many neighbouring heads share each (docs/level-weights.md).
    `notes` list what holds for this graph only, such as an unrolled length or constants read at compile time.
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
    weight_sets: int = 0
    where: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Declined:
    """A linear-time mixer, or a near miss, that was not rewritten.

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
    """A line of the user's code at which Dynamo ends one graph and starts another; a mixer across it is not found.

    Args:
        reason: why, as Dynamo says it.
        where: the user's file and line.
        count: how many graphs end there: a line in a layer ends one for each layer.
    """

    reason: str
    where: str
    count: int = 1


@dataclass(frozen=True)
class Timing:
    """How long a step of a look took, measured in that run.

    Args:
        step: its name: a pass, a proof, or what is done beside the passes.
        seconds: of all times together.
        count: how often it was done.
        within: the step that its time is part of, or "".
        what: what it does.
    """

    step: str
    seconds: float
    count: int = 1
    within: str = ""
    what: str = ""


@dataclass(frozen=True)
class Untouched:
    """Another mechanism, left unchanged.

    Args:
        module: the module that has it.
        kind: its usual name, and details from the graph: "softmax attention (GQA, 4 heads over 2 groups)".
        where: the user's file and line.
        heads: number of attention heads, if the graph shows it.
        groups: number of key and value heads; equal to `heads` if none are shared.
    """

    module: str
    kind: str
    where: str = ""
    heads: int | None = None
    groups: int | None = None
