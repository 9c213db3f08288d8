"""Look: the findings of a dry run, with the page and the MLIR that can be made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llcompile.look import mlir
from llcompile.look.files import write_text
from llcompile.look.findings import Findings


@dataclass(frozen=True)
class Look(Findings):
    """The report of `llcompile.inspect`, and what there is to see. It prints as the report."""

    def to_html(self, path: str | Path) -> Path:
        """Writes the look as one page that needs no network; returns its path.

        Raises:
            MissingLibraryError: a library of the extra `html` is not installed.
            OutputError: the file cannot be written.
        """
        from llcompile.look.page import page

        return write_text(path, page(self))

    def to_mlir(self, dialect: str = "torch", mixer: str | None = None) -> str:
        """The rewritten model as MLIR, or one of its mixers; see `llcompile.look.mlir.to_mlir`."""
        return mlir.to_mlir(self, dialect, mixer)
