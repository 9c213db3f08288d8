"""Source lines: the user's code that a mixer comes from, read when the look is taken."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable

from llcompile.look.mixer_look import Excerpt

_WHERE = re.compile(r"^(?P<file>.+):(?P<line>\d+) in (?P<function>.+)$")
_AROUND = 5
_MOST = 40  # lines; a mixer that is spread wider is shown around its last one


def excerpt(where: str, others: Iterable[str] = ()) -> Excerpt | None:
    """The lines around a place, all that a mixer comes from if they stand close together.

    Args:
        where: `file:line in function`.
        others: further places; those of the same function count.

    Returns:
        None where `where` names no line; no lines where the file cannot be read.
    """
    place = _WHERE.match(where)
    if place is None:
        return None
    file, line, function = place["file"], int(place["line"]), place["function"]
    found = [m for m in map(_WHERE.match, others) if m and (m["file"], m["function"]) == (file, function)]
    marked = {line, *(int(m["line"]) for m in found)}
    if max(marked) - min(marked) > _MOST:
        marked = {n for n in marked if abs(n - line) <= _AROUND}
    linecache.checkcache(file)  # it may have been edited since it was imported
    lines = linecache.getlines(file)
    first, last = max(1, min(marked) - _AROUND), max(marked) + _AROUND
    shown = tuple(text.rstrip("\n") for text in lines[first - 1 : last])
    return Excerpt(file, line, function, first, shown, tuple(sorted(marked)))
