"""Nested: an operation's arguments, which are lists in tuples at most; quicker than PyTorch's pytrees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def mapped(function: Callable[[Any], Any], argument: Any) -> Any:
    """The argument with the function of every leaf in the leaf's place."""
    if isinstance(argument, tuple):
        return tuple(mapped(function, a) for a in argument)
    if isinstance(argument, list):
        return [mapped(function, a) for a in argument]
    if isinstance(argument, dict):
        return {name: mapped(function, a) for name, a in argument.items()}
    return function(argument)


def leaves(argument: Any) -> Iterator[Any]:
    """Everything in the argument that holds nothing else, in order."""
    if isinstance(argument, (tuple, list)):
        for inner in argument:
            yield from leaves(inner)
    elif isinstance(argument, dict):
        for inner in argument.values():
            yield from leaves(inner)
    else:
        yield argument
