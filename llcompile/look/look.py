"""The result of `inspect`, with its HTML page and MLIR."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llcompile.look import mlir
from llcompile.look.files import write_text
from llcompile.look.findings import Findings


@dataclass(frozen=True)
class Look(Findings):
    """The result of `llcompile.inspect`: the report, with details of each mixer. `print(look)` shows the report."""

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained HTML page and return its path.

        Raises:
            MissingLibraryError: a library of the extra `html` is not installed.
            OutputError: the file cannot be written.
        """
        from llcompile.look.page import page

        return write_text(path, page(self))

    def to_mlir(self, dialect: str = "torch", mixer: str | None = None) -> str:
        """Return the rewritten model, or one of its mixers, as MLIR; see `llcompile.look.mlir.to_mlir`."""
        return mlir.to_mlir(self, dialect, mixer)
