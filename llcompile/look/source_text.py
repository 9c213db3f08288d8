"""Names and values of other people's programs in Python source that we write: they are data, and never become code."""

from __future__ import annotations

import keyword
import sys
from typing import Any

import torch

from llcompile.errors import ReproError
from llcompile.torch_internals.sizes import size_hint


def in_docstring(text: str) -> str:
    """A text in one line between triple quotes, where Python reads it back as it was."""
    return text.encode("unicode_escape").decode("ascii").replace('"', '\\"')


def check_import(module: str, name: str) -> None:
    """Raise `ReproError` unless `from module import name` says what it seems to, of a module in use here.

    Both come from attributes of a function, where anything may stand.
    """
    parts = [*str(module).split("."), name]
    plain = all(isinstance(part, str) and part.isidentifier() and not keyword.iskeyword(part) for part in parts)
    if not plain or not hasattr(sys.modules.get(module), name):
        raise ReproError(
            f"the mixer's code calls the function {name!r} of the module {module!r}, which cannot be "
            "imported from there (is it defined inside another function?)"
        )


def literal(value: Any) -> str:
    """A plain value, or the example of a symbolic number, as source; raises `ReproError` for anything else."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        value = size_hint(value)
    if isinstance(value, float) and value - value != 0:  # inf and nan have no literals
        return f"float({float.__repr__(value)!r})"
    if value is None or type(value) in (bool, int, float, str, torch.dtype, torch.device):
        return f"torch.{value!r}" if isinstance(value, torch.device) else repr(value)
    raise ReproError(f"the mixer's code uses a {type(value).__name__}, which cannot be written to a file")
