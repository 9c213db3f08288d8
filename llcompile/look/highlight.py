"""Highlight: code as HTML with a few colours.

Of the many kinds of tokens that pygments tells apart, only those are marked that a page has a colour for, and
neighbours of one kind share a mark: the generated kernels are thousands of lines.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from typing import Any

from llcompile.look.mixer_look import Excerpt

_LONG = 400  # lines of code that a page shows of one region


def code(text: str) -> Any:
    """Python; what is longer than a page shows is left out, and the page says so."""
    lines = text.splitlines()
    if len(lines) > _LONG:
        more = f"# … {len(lines) - _LONG:,} more lines; see look.graph_before for all of them"
        text = "\n".join([*lines[:_LONG], more])
    return whole(text)


def whole(text: str) -> Any:
    """Python, all of it."""
    return _block("\n".join(_lines(text, "python")))


def cpp(text: str) -> Any:
    """C++."""
    return _block("\n".join(_lines(text, "cpp")))


def diff(text: str) -> Any:
    """A unified diff."""
    return _block("\n".join(_lines(text, "diff")))


def excerpt(source: Excerpt) -> Any:
    """The user's lines with their numbers; those that the mixer comes from are marked."""
    lines = _lines(textwrap.dedent("\n".join(source.lines)), "python")
    numbered = enumerate(lines, source.first)
    width = len(str(source.first + len(source.lines)))
    rows = (
        f'<span class="{"line marked" if n in source.marked else "line"}"><i>{n:>{width}}</i>{line}</span>'
        for n, line in numbered
    )
    return _block("".join(rows))


def _block(inner: str) -> Any:
    from markupsafe import Markup

    return Markup(f'<div class="code"><pre>{inner}</pre></div>')


def _lines(text: str, language: str) -> list[str]:
    """The lines as HTML; a mark ends with its line."""
    from markupsafe import escape

    found = []
    for kind, tokens in groupby(_tokens(text, language), key=lambda token: token[0]):
        value = "".join(part for _, part in tokens)
        parts = (str(escape(part)) for part in value.split("\n"))
        found.append("\n".join(f'<b class="{kind}">{part}</b>' if kind and part else part for part in parts))
    return "".join(found).rstrip("\n").split("\n")


def _tokens(text: str, language: str) -> Iterator[tuple[str, str]]:
    """(kind, text); white space belongs to what stands before it, so that it splits no mark."""
    from pygments.lexers import get_lexer_by_name

    kind = ""
    for token, value in get_lexer_by_name(language, stripnl=False).get_tokens(text):
        if value.strip():
            kind = next((name for known, name in _kinds() if token in known), "")
        yield kind, value


@cache
def _kinds() -> tuple[tuple[Any, str], ...]:
    """Kinds of tokens and the class of their mark (page.css)."""
    from pygments.token import Comment, Generic, Keyword, Name, Number, Operator, String

    return (
        (Comment, "c"), (Keyword, "k"), (Operator.Word, "k"), (String, "s"), (Number, "m"), (Name.Function, "f"),
        (Name.Class, "f"), (Name.Decorator, "f"), (Generic.Inserted, "in"), (Generic.Deleted, "de"), (Generic, "c"),
    )  # fmt: skip
