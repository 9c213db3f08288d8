"""The result of a trial: tables, JSON, a page and a plot of its outcome."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llcompile.look import files
from llcompile.trials.outcome import Gain, Outcome
from llcompile.trials.page import number, page
from llcompile.trials.plot import plot


class Trial(Outcome):
    """What a trial found. `print(trial)` shows the verdict and the tables; for the numbers, see `Outcome`."""

    def to_json(self, path: str | Path) -> Path:
        """Write `to_dict` to a file.

        Raises:
            OutputError: it cannot be written.
        """
        return files.write_text(path, json.dumps(self.to_dict(), indent=2, default=str) + "\n")

    def to_html(self, path: str | Path) -> Path:
        """Write a page that needs no network.

        Raises:
            OutputError: it cannot be written.
        """
        return files.write_text(path, page(self))

    def to_plot(self, path: str | Path) -> Path:
        """Draw the arms, and the gain by position, into a file (.png, .svg, .pdf).

        Raises:
            MissingLibraryError: matplotlib is not installed.
            OutputError: it cannot be written.
        """
        return plot(self, path)

    def __str__(self) -> str:
        console = Console(width=180, force_terminal=False, color_system=None)
        with console.capture() as captured:
            for part in self._parts():
                console.print(part, soft_wrap=isinstance(part, str), markup=False)
        return captured.get().rstrip()

    def _parts(self) -> Iterable[Any]:
        yield str(self.verdict)
        if not self.arms:
            yield str(self.report)
            return
        yield ""
        yield str(self.report).splitlines()[0]
        yield self._table()
        for name, reason in self.left_out.items():
            yield f"not tried: {name}: {reason}"
        for title, gains in (("position", self.by_position), ("distance", self.by_distance)):
            if gains:
                yield ""
                yield self._gain_table(title, gains)

    def _table(self) -> Table:
        metric = self.plan.metric
        table = Table(title=f"held out, mean of {len(self.plan.seeds)} seeds", title_justify="left")
        heads = ("loss", "accuracy", f"gain in {metric}", f"{metric} inside", "beyond", "levels at 1")
        for head in ("arm", *heads, "trained", "state", "ms/step", "ms/token"):
            table.add_column(head, justify="left" if head == "arm" else "right", overflow="fold")
        for row in self.rows:
            failed = f"diverged with seed {', '.join(map(str, row.diverged))}" if row.diverged else ""
            gain = failed or ("control" if row.arm == self.verdict.control else str(row.gain) if row.gain else "-")
            numbers = (row.inside, row.beyond, row.reset)
            table.add_row(
                row.arm, number(row.loss), number(row.accuracy), gain, *map(number, numbers), f"{row.trained:,}",
                "-" if row.state_bytes is None else f"{row.state_bytes:,} B",
                "-" if row.step_ms is None else f"{row.step_ms:.1f}",
                "-" if row.token_ms is None else f"{row.token_ms:.3f}",
            )  # fmt: skip
        return table

    def _gain_table(self, axis: str, gains: Sequence[Gain]) -> Table:
        title = f"{self.verdict.arm} against {self.verdict.control}, {self.plan.metric} by {axis}"
        table = Table(title=title, title_justify="left")
        for head in (axis, self.verdict.control, self.verdict.arm, "gain", "labels"):
            table.add_column(head, justify="right")
        for g in gains:
            beyond = " (beyond)" if axis == "position" and g.low >= self.trained else ""
            table.add_row(f"{g.low}-{g.high}{beyond}", number(g.control), number(g.arm), str(g.gain), f"{g.labels:,}")
        return table
