"""The language that kernels are written in: Triton source with conditions and inclusions, a line each.

* ``#if fact``, ``#elif fact``, ``#else``, ``#end``: lines kept for some descriptions only. A condition is a Python
  expression over the names of :meth:`.description.Description.facts`; conditions nest.
* ``<<name word ...>>`` alone on a line: the lines of that block, at this indentation, the words for ``$1``, ``$2``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from types import CodeType

_INCLUDE = re.compile(r"^(\s*)<<(\w+)((?:\s+[\w.]+)*)>>$")


class TemplateError(Exception):
    """A template is written wrongly: a bug of this package, not of the user."""


def expand(template: str, facts: Mapping[str, bool], blocks: Mapping[str, str]) -> str:
    """The source that ``template`` stands for where ``facts`` hold; raises :class:`TemplateError`."""
    return "\n".join(_lines(template.strip("\n"), facts, blocks)) + "\n"


def _lines(template: str, facts: Mapping[str, bool], blocks: Mapping[str, str]) -> Iterator[str]:
    kept: list[tuple[bool, bool]] = []  # for each open condition: is this branch kept, was one before
    for line in template.split("\n"):
        word, _, condition = line.strip().partition(" ")
        if word == "#if":
            holds = _holds(condition, facts)
            kept.append((holds, holds))
        elif word in ("#elif", "#else"):
            _, taken = _top(kept, line)
            holds = not taken and (word == "#else" or _holds(condition, facts))
            kept[-1] = (holds, taken or holds)
        elif word == "#end":
            _top(kept, line)
            kept.pop()
        elif all(holds for holds, _ in kept):
            yield from _included(line, facts, blocks)
    if kept:
        raise TemplateError("a condition is not closed")


def _included(line: str, facts: Mapping[str, bool], blocks: Mapping[str, str]) -> Iterator[str]:
    found = _INCLUDE.match(line)
    if found is None:
        yield line
        return
    indent, name, words = found.groups()
    if name not in blocks:
        raise TemplateError(f"no block {name!r}")
    text = blocks[name].strip("\n")
    for number, word in enumerate(words.split(), 1):
        text = text.replace(f"${number}", word)
    for inner in _lines(text, facts, blocks):
        yield indent + inner if inner else inner


def _top(kept: list[tuple[bool, bool]], line: str) -> tuple[bool, bool]:
    if not kept:
        raise TemplateError(f"no open condition at {line.strip()!r}")
    return kept[-1]


@cache
def _code(condition: str) -> CodeType:
    return compile(condition.strip(), "<condition>", "eval")


def _holds(condition: str, facts: Mapping[str, bool]) -> bool:
    try:
        return bool(eval(_code(condition), {"__builtins__": {}}, facts))
    except (NameError, SyntaxError) as error:
        raise TemplateError(f"condition {condition!r}: {error}") from None
