"""Tables of library functions that are mixers, one file a library, one entry a function."""

from __future__ import annotations

from llcompile.patterns.known import fla, mamba_ssm, transformers
from llcompile.patterns.known.entry import Arguments, KnownFunction, Tensor

ENTRIES: tuple[KnownFunction, ...] = (*transformers.ENTRIES, *fla.ENTRIES, *mamba_ssm.ENTRIES)

_registered: list[KnownFunction] = []


def register(entry: KnownFunction) -> None:
    """Adds a function of a user's own library, for this process; it is proved like all others before it is rewritten.

    Call it before the model is converted or compiled.
    """
    _registered.append(entry)


def entries() -> tuple[KnownFunction, ...]:
    """Every entry: the tables', and those that were registered."""
    return (*ENTRIES, *_registered)


__all__ = ["ENTRIES", "Arguments", "KnownFunction", "Tensor", "entries", "register"]
