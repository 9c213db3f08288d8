"""Frame: what Dynamo is tracing at this moment in this thread, and the modules that the traced frame holds.

Dynamo is asked anew each time; what it takes a while to find out is kept for the length of the trace.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch import nn
from torch._dynamo.source import AttrSource, GetItemSource, GlobalSource, LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import Source

# Values of a frame are looked into so many containers deep.
_DEPTH = 3

T = TypeVar("T")


def current_translator() -> InstructionTranslator | None:
    """The frame that Dynamo is tracing, or None."""
    try:
        return InstructionTranslator.current_tx()
    except AttributeError:
        return None


def current_output() -> Any:
    """What Dynamo has made of the trace under way so far (its `OutputGraph`), or None."""
    translator = current_translator()
    return None if translator is None else translator.output


def outermost_frame() -> Any:
    """The frame that the trace began with, while it or what it calls is traced; None outside of a trace."""
    translator = current_translator()
    return None if translator is None else translator.output.root_tx or translator


def kept_for_the_trace(find: Callable[[], T]) -> Callable[[], T]:
    """The function, run once for each trace; outside of a trace it is run at each call."""
    name = f"_llcompile_{find.__name__.strip('_')}"

    @functools.wraps(find)
    def kept() -> T:
        output = current_output()
        if output is None:
            return find()
        if not hasattr(output, name):
            setattr(output, name, find())
        return getattr(output, name)  # type: ignore[no-any-return]

    return kept


@kept_for_the_trace
def modules_of_frame() -> list[tuple[Source, nn.Module]]:
    """The modules that the outermost traced frame holds: in its arguments, other locals, cells and globals."""
    frame = outermost_frame()
    return [] if frame is None else list(_frame_modules(frame))


def _frame_modules(frame: Any) -> Iterator[tuple[Source, nn.Module]]:
    code = frame.f_code
    cells = set(code.co_freevars) | set(code.co_cellvars)
    # `self` first: what follows a graph break takes the values that were on the stack before the locals.
    for name, value in sorted(frame.f_locals.items(), key=lambda item: item[0] != "self"):
        if isinstance(value, types.CellType):
            try:
                value = value.cell_contents
            except ValueError:  # not filled yet
                continue
        source = LocalSource(name, is_input=name not in cells, is_derefed_cell_contents=name in cells)
        yield from _modules_of(source, value)
    for name in code.co_names:
        if name in frame.f_globals:
            yield from _modules_of(GlobalSource(name), frame.f_globals[name])


def _modules_of(source: Source, value: Any, depth: int = _DEPTH) -> Iterator[tuple[Source, nn.Module]]:
    if isinstance(value, nn.Module):
        yield source, value
    elif depth:
        for inner, element in _elements(source, value):
            yield from _modules_of(inner, element, depth - 1)


def _elements(source: Source, value: Any) -> Iterable[tuple[Source, Any]]:
    """What a method, partial or container leads to."""
    if isinstance(value, types.MethodType):
        return [(AttrSource(source, "__self__"), value.__self__)]
    if isinstance(value, functools.partial):
        arguments = AttrSource(source, "args")
        return [
            (AttrSource(source, "func"), value.func),
            *((GetItemSource(arguments, i), x) for i, x in enumerate(value.args)),
        ]
    if type(value) in (list, tuple):
        return [(GetItemSource(source, i), element) for i, element in enumerate(value[:64])]
    return []
