"""Walk: everything that some values lead to, the one way in which passes and recognition go through a graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def walk(start: Iterable[T], onward: Callable[[T], Iterable[T]]) -> Iterator[T]:
    """What one starts from and all that `onward` leads to, each once, the nearest first.

    A value is handed out before `onward` is asked where it leads.
    """
    queue = list(dict.fromkeys(start))
    seen = set(queue)
    for value in queue:  # which grows
        yield value
        new = [v for v in dict.fromkeys(onward(value)) if v not in seen]
        seen.update(new)
        queue.extend(new)
