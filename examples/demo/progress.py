"""Progress bars on a terminal; a line a stage where there is none, as in the log of a CI machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Bars:
    """A bar for each stage; a stage ends when the next one begins."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (SpinnerColumn(), TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn())
        self.progress = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        self.prefix = ""  # stands before the name of each stage
        self.current: tuple[str, float] | None = None

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._end()
        self.progress.stop()

    def stage(self, text: str, steps: int | None = None) -> Callable[[], None]:
        """Begins a stage of so many steps (None: one, whose length nobody knows); call the result after each step."""
        self._end()
        self.current = (self.prefix + text, time.perf_counter())
        task = self.progress.add_task(self.prefix + text, total=steps)

        def tick() -> None:
            if steps is None:
                self.progress.update(task, total=1)
            self.progress.advance(task)

        return tick

    def _end(self) -> None:
        if self.current and not self.console.is_terminal:
            text, began = self.current
            self.console.print(f"  {text}: {time.perf_counter() - began:.1f} s", highlight=False)
        self.current = None
