"""Arms: the ways of training on from the checkpoint, as one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llcompile.trials.plan import Plan

STAY, PASSING, LEVELS, ALL = "stay", "stay, state passing", "level weights", "all weights"


@dataclass(frozen=True)
class Arm:
    """One way of training on.

    Args:
        what: STAY, PASSING, LEVELS or ALL.
        kind: of its level weights; "" where the model stays as it is.
        rate: peak learning rate of the model's own weights; None where they are not trained.
        named_rate: whether the rate is a part of the name, as there are several.
    """

    what: str
    kind: str = ""
    rate: float | None = None
    named_rate: bool = False

    @property
    def name(self) -> str:
        """For tables and files: "level weights (mlp)", "stay at 0.001"."""
        kind = f" ({self.kind})" if self.kind else ""
        return f"{self.what}{kind}{f' at {self.rate:g}' if self.named_rate else ''}"

    @property
    def converted(self) -> bool:
        """Whether it has level weights; otherwise it is a control."""
        return bool(self.kind)


def arms(plan: Plan, passing: bool, kinds: Sequence[str], all_kinds: Sequence[str]) -> tuple[Arm, ...]:
    """All arms of a trial; `passing` says whether the model can pass a state."""
    several = len(plan.rates) > 1
    controls = [what for what, possible in ((STAY, True), (PASSING, passing)) if possible]
    return (
        *(Arm(what, "", rate, several) for what in controls for rate in plan.rates),
        *(Arm(LEVELS, kind) for kind in kinds),
        *(Arm(ALL, kind, rate, several) for kind in all_kinds for rate in plan.rates),
    )
