"""Tables of library functions that are mixers, one file a library, one row a function."""

from __future__ import annotations

from llcompile.patterns.known import fla, mamba_ssm, transformers
from llcompile.patterns.known.row import Arguments, KnownFunction, Tensor

ROWS: tuple[KnownFunction, ...] = (*transformers.ROWS, *fla.ROWS, *mamba_ssm.ROWS)

__all__ = ["ROWS", "Arguments", "KnownFunction", "Tensor"]
