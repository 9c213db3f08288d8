"""Findings: what a dry run has found, as data and as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from llcompile.look.cost import MixerCost, cost_of
from llcompile.look.generated import GeneratedKernels, kernels_of
from llcompile.look.groups import as_row, groups
from llcompile.look.mixer_look import MixerLook
from llcompile.look.model_cost import Elsewhere, ModelCost
from llcompile.look.state_size import StateSize, as_dicts, as_table, state_sizes
from llcompile.patterns.records import Timing
from llcompile.report import Report


@dataclass(frozen=True)
class Subject:
    """The model that was inspected, and the inputs that it was run on.

    `converted()` converts the model for the length of a `with` statement.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    converted: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Findings(Report):
    """The report of a dry run and one record for each mixer.

    Args:
        mixers: one record for each mixer that was converted or declined, in the order in which the model calls them.
        elsewhere: the matrix products outside of the converted mixers.
        timings: how long each step of this run took.
        subject: the model and its inputs.
    """

    mixers: tuple[MixerLook, ...] = ()
    elsewhere: Elsewhere = field(default_factory=Elsewhere)
    timings: tuple[Timing, ...] = field(default=(), compare=False)
    subject: Subject | None = field(default=None, compare=False, repr=False)

    @property
    def graph_before(self) -> str:
        """Each mixer's region as readable code with shapes, as the model has it."""
        return _joined(self.mixers, lambda mixer: mixer.before)

    @property
    def graph_after(self) -> str:
        """The code that replaces each converted mixer."""
        return _joined(self.mixers, lambda mixer: mixer.after or "# unchanged: " + mixer.reason)

    @property
    def diff(self) -> str:
        """The unified diffs of all regions."""
        return "\n".join(mixer.diff for mixer in self.mixers if mixer.diff)

    @cached_property
    def kernels(self) -> tuple[GeneratedKernels, ...]:
        """The generated sources of the converted mixers, an entry for each kind of call."""
        return kernels_of(self.mixers)

    @cached_property
    def costs(self) -> tuple[MixerCost, ...]:
        """The cost of each converted mixer."""
        return tuple(cost for mixer in self.mixers if (cost := cost_of(mixer)) is not None)

    @property
    def cost(self) -> ModelCost:
        """The cost of the whole model: all converted mixers, and the matrix products elsewhere."""
        return ModelCost(self.elsewhere, self.costs)

    def to_dict(self) -> dict[str, Any]:
        """The report, the mixers, the cost and the timings as plain dicts, lists and numbers, ready for JSON.

        `groups` has a row for each group of equal mixers, as the page does; `mixers` has each of them.
        """
        return {
            **self.report.to_dict(),
            "state_sizes": as_dicts(self.state_sizes),
            "groups": [as_row(group) for group in groups(self.mixers, self.kernels)],
            "mixers": [_mixer(mixer) for mixer in self.mixers],
            "cost": {"at": self.cost.at(), "elsewhere": asdict(self.elsewhere)},
            "timings": [asdict(timing) for timing in self.timings],
        }

    @cached_property
    def state_sizes(self) -> tuple[StateSize, ...]:
        """Bytes per sequence that the converted mixers keep of the past, at 4k, 32k and 128k tokens."""
        return state_sizes(self.mixers)

    def _tables(self) -> Iterable[Any]:
        yield from super()._tables()
        if self.state_sizes:
            yield as_table(self.state_sizes)

    @property
    def report(self) -> Report:
        """The report alone."""
        return Report(
            *(self.converted, self.declined, self.untouched, self.graphs, self.title, self.breaks),
            remarks=self.remarks,
            own_parameters=self.own_parameters,
        )


def _joined(mixers: tuple[MixerLook, ...], text: Callable[[MixerLook], str]) -> str:
    blocks = (f"# {mixer.name}: {mixer.family or mixer.reason}\n{text(mixer)}" for mixer in mixers)
    return "\n\n".join(blocks)


def _mixer(mixer: MixerLook) -> dict[str, Any]:
    """A mixer without its drawings, with its cost as text and at the example's length."""
    found = {k: v for k, v in asdict(mixer).items() if not k.startswith("drawing")}
    cost = cost_of(mixer)
    if cost is not None:
        forms = {"linear": cost.linear, "loglinear": cost.loglinear}
        found["cost"] = {
            "at": cost.at(),
            "values": dict(cost.values),
            "symbolic": {form: {k: str(v) for k, v in vars(c).items()} for form, c in forms.items()},
        }
    return found
