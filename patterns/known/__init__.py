"""Tables of library functions that are mixers: one file per library, one entry per function."""

from __future__ import annotations

from llcompile.patterns.known import fast_transformers, fla, fla_more, mamba_ssm, transformers
from llcompile.patterns.known.entry import Arguments, KnownFunction, Tensor

ENTRIES: tuple[KnownFunction, ...] = (
    *transformers.ENTRIES,
    *fla.ENTRIES,
    *fla_more.ENTRIES,
    *mamba_ssm.ENTRIES,
    *fast_transformers.ENTRIES,
)

_registered: list[KnownFunction] = []


def register(entry: KnownFunction) -> None:
    """Register a function of your own library for this process. It is proved like any other before it is rewritten.

    Call this before you convert or compile the model.
    """
    _registered.append(entry)


def entries() -> tuple[KnownFunction, ...]:
    """Every entry, from the tables and from `register`."""
    return (*ENTRIES, *_registered)


__all__ = ["ENTRIES", "Arguments", "KnownFunction", "Tensor", "entries", "register"]
