"""The options of the backend: names, types, defaults and limits, in one table."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from llcompile.errors import OptionError
from llcompile.kernels.levels import MOST_LEVELS
from llcompile.patterns.mixer import FEATURES
from llcompile.weights.default_kind import AUTO
from llcompile.weights.level_kinds import KINDS

ON_MISS = ("raise", "warn")
INNER = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class Options:
    """Options of the backend, as in `torch.compile(options={...})`.

    Args:
        level_weights: kind of new level weights: "linear", "static", "mlp", "paper", "routed"; "auto" (the default) for
            "linear", or "mlp" where linear ones would have more than a million parameters per mixer; or "none" for the
            linear operator.
        levels: number of levels L of new level weights. Sequences of up to 2^(L-1) tokens have one weight per level;
            in longer ones the last weight applies to all higher levels.
        routing_features: width R of a routing query, for level weights of kind "routed".
        strict: raise if a linear-time mixer is declined, or nothing that mixes positions is found.
        on_miss: what to do if a module that owns level weights runs but the graph does not read them: "raise" (the
            default), or "warn".
        inner: the compiler of the rewritten graph: "inductor", "aot_eager" or "eager".
        inductor: options for Inductor itself, as in `torch.compile(options=...)`.
    """

    level_weights: str = AUTO
    levels: int = 17
    routing_features: int = FEATURES
    strict: bool = False
    on_miss: str = "raise"
    inner: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)

    # The names that `parse` was given; the others have their defaults, which contradict nothing.
    given: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for name, kind in _TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise OptionError(
                    f"option {name!r} takes {_article(kind)}, got {value!r} of type {type(value).__name__}."
                )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise OptionError(
                    f"option {name!r} must be one of {', '.join(map(repr, allowed))}; got {getattr(self, name)!r}"
                    f"{_nearest(str(getattr(self, name)), allowed)}"
                )
        if not 1 <= self.levels <= MOST_LEVELS:
            raise OptionError(
                f"option 'levels' must be between 1 and {MOST_LEVELS} (2^(levels-1) tokens), got {self.levels}."
            )
        if not 1 <= self.routing_features <= 256:
            raise OptionError(f"option 'routing_features' must be between 1 and 256, got {self.routing_features}.")

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Options:
        """Options from a plain dict.

        Raises:
            OptionError: an unknown name (the nearest known one is named), or a value of a wrong type or range.
        """
        if given is not None and not isinstance(given, Mapping):
            raise OptionError(f"options must be a dict, got {type(given).__name__}.")
        known = tuple(f.name for f in fields(cls))
        for name in given or {}:
            if name not in known:
                raise OptionError(
                    f"backend 'loglinear' has no option {name!r}{_nearest(str(name), known)}"
                    f" Known options: {', '.join(known)}. Pass Inductor's options as options={{'inductor': {{...}}}}."
                )
        options = cls(**(given or {}))
        object.__setattr__(options, "given", frozenset(given or {}))
        return options

    def as_given(self) -> dict[str, Any]:
        """The options that were given; what was not asked for would contradict level weights of another kind."""
        return {name: getattr(self, name) for name in self.given}

    @property
    def asked(self) -> Mapping[str, Any]:
        """What was said about level weights, by the names that `LevelWeights` has for it: its kind and sizes."""
        said = {name: getattr(self, option) for option, name in _ASKED.items() if option in self.given}
        return {name: value for name, value in said.items() if value != AUTO}


_TYPES: dict[str, Any] = {
    "level_weights": str,
    "levels": int,
    "routing_features": int,
    "strict": bool,
    "on_miss": str,
    "inner": str,
    "inductor": Mapping,
}
_ASKED = {"level_weights": "kind", "levels": "levels", "routing_features": "features"}
_CHOICES: dict[str, tuple[str, ...]] = {"level_weights": (AUTO, *KINDS, "none"), "inner": INNER, "on_miss": ON_MISS}


def _article(kind: type) -> str:
    name = {"Mapping": "dict"}.get(kind.__name__, kind.__name__)
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _nearest(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."
