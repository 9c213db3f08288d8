"""Source lines: the user's code around a line, read when the look is taken."""

from __future__ import annotations

import linecache
import re

from llcompile.look.records import Excerpt

_WHERE = re.compile(r"^(?P<file>.+):(?P<line>\d+) in (?P<function>.+)$")
_AROUND = 6


def excerpt(where: str, around: int = _AROUND) -> Excerpt | None:
    """The lines around `file:line in function`; None where it says nothing, no lines where the file cannot be read."""
    match = _WHERE.match(where)
    if match is None:
        return None
    file, line = match["file"], int(match["line"])
    linecache.checkcache(file)  # it may have been edited since it was imported
    lines = linecache.getlines(file)
    first = max(1, line - around)
    shown = tuple(text.rstrip("\n") for text in lines[first - 1 : line + around])
    return Excerpt(file, line, match["function"], first, shown)
