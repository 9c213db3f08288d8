"""A line for a person who waits while generated code is compiled. Commands say where it goes; a library is silent."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_log = logging.getLogger("llcompile.kernels")
_listener: ContextVar[Callable[[str], None] | None] = ContextVar("llcompile_kernel_progress", default=None)


@contextlib.contextmanager
def told_to(listener: Callable[[str], None]) -> Iterator[None]:
    """Pass each line to `listener` inside, in this thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def on_stderr(line: str) -> None:
    """A listener for commands: standard output is for their results."""
    print(f"llcompile: {line}", file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Tell the log, and the listener if there is one."""
    _log.info("%s", line)
    listener = _listener.get()
    if listener is not None:
        listener(line)
