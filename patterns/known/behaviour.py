"""Behaviour: a key for what a function does, that changes when it or a helper that it calls is replaced."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

_OPAQUE = frozenset({"torch", "builtins", "math", "typing"})  # these do not change under a running program
_DEEPEST = 8


def behaviour(function: Callable[..., Any]) -> tuple[Any, ...]:
    """Equal for a function as long as it, the functions it names, and the constants they name are the same objects.

    The key holds what it was made of, so that an id of something dead is never met again.
    """
    return tuple(_Same(value) for value in _parts(function, set(), 0))


class _Same:
    """Compares by identity; plain constants by value."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._plain = isinstance(value, (bool, int, float, str, type(None)))

    def __hash__(self) -> int:
        return hash((type(self.value), self.value)) if self._plain else id(self.value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return False
        same = type(self.value) is type(other.value) and self.value == other.value if self._plain else False
        return same or self.value is other.value


def _parts(value: Any, seen: set[int], depth: int) -> Iterator[Any]:
    if id(value) in seen or depth > _DEEPEST:
        return
    seen.add(id(value))
    yield value
    if not isinstance(value, types.FunctionType) or (value.__module__ or "").split(".")[0] in _OPAQUE:
        return
    yield value.__code__  # replaced in place by some tools
    inner = [value.__defaults__, value.__kwdefaults__, getattr(value, "__wrapped__", None)]
    cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    named = _named(value.__globals__, _names(value.__code__))
    for part in (*_flat(inner), *cells, *named):
        yield from _parts(part, seen, depth + 1)


def _names(code: types.CodeType) -> list[str]:
    """The names that the code reads, with those of the functions inside of it."""
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names(c)]
    return [*code.co_names, *inner]


def _named(names: dict[str, Any], used: list[str]) -> Iterator[Any]:
    """The globals that are used, and what is used of the modules among them."""
    for name in used:
        value = names.get(name)
        if not isinstance(value, types.ModuleType):
            yield value
        elif value.__name__.split(".")[0] not in _OPAQUE:
            yield from (vars(value)[n] for n in used if n in vars(value))


def _flat(values: list[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, tuple):
            yield from value
        else:
            yield value


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
