"""Groups: the mixers of a look that a page shows as one, the mixers of a family side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llcompile.folding import folded, grouped
from llcompile.look.generated import GeneratedKernels
from llcompile.look.mixer_look import MixerLook


@dataclass(frozen=True)
class Group:
    """Mixers of equal code, shown once.

    Args:
        anchor: the fragment of the page.
        mixers: the first one stands for all.
        kernels: the fragment of their generated kernels, or "".
    """

    anchor: str
    mixers: tuple[MixerLook, ...]
    kernels: str = ""

    @property
    def first(self) -> MixerLook:
        """The one that is shown."""
        return self.mixers[0]

    @property
    def names(self) -> str:
        """Their modules, numbers folded."""
        return ", ".join(folded(m.module for m in self.mixers))

    @property
    def family(self) -> str:
        """The heading that it stands under."""
        return _heading(self.first)

    @property
    def error(self) -> float | None:
        """The largest error of their proofs."""
        errors = [m.certificate.max_error for m in self.mixers if m.certificate is not None]
        return max(errors, default=None)

    @property
    def parameters(self) -> int:
        """Of the level weights of all of them."""
        return sum(m.parameters for m in self.mixers)


def groups(mixers: tuple[MixerLook, ...], kernels: tuple[GeneratedKernels, ...]) -> list[Group]:
    """The groups, those of a family one after the other, what was declined last."""
    files = {file.description: kernels_anchor(i) for i, file in enumerate(kernels)}
    found: list[Group] = []
    for family in sorted(grouped(mixers, _heading), key=lambda members: members[0].fate != "converted"):
        for alike in grouped(family, _alike):
            call = alike[0].call
            anchor = "" if call is None else files.get(call.description, "")
            found.append(Group(f"mixer-{len(found)}", alike, anchor))
    return found


def as_row(group: Group) -> dict[str, Any]:
    """A group as a row of JSON: `modules` is their names, numbers folded, `parameters` are those of all of them."""
    first = group.first
    return {
        "modules": group.names,
        "count": len(group.mixers),
        "fate": first.fate,
        "family": first.family,
        "reason": first.reason,
        "where": first.where,
        "origin": first.origin,
        "level_weights": first.level_weights,
        "parameters": group.parameters,
        "max_error": group.error,
    }


def kernels_anchor(index: int) -> str:
    """The fragment of a page at which the kernels of this index stand."""
    return f"kernels-{index}"


def _heading(mixer: MixerLook) -> str:
    return mixer.family[:1].upper() + mixer.family[1:] if mixer.fate == "converted" else "Declined"


def _alike(m: MixerLook) -> object:
    """Equal for mixers of the same code with the same sizes; level weights that were trained are their own."""
    return m.where, m.fate, m.family, m.reason, m.call, m.notes, m.level_weights
