"""Page: a look as one HTML file that needs no network."""

from __future__ import annotations

import importlib.util
import textwrap
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from llcompile import __version__
from llcompile.errors import MissingLibraryError
from llcompile.look.cost import SYMBOLS, cost_of
from llcompile.look.environment import environment
from llcompile.look.findings import Findings
from llcompile.look.mask import blocks
from llcompile.look.mixer_look import Excerpt, MixerLook
from llcompile.look.module_tree import Branch, tree
from llcompile.look.picture import Picture, lay_out

MASK_TOKENS = 32
_LIBRARIES = ("jinja2", "pygments", "grandalf")
_LENGTHS = (4_096, 65_536, 1_048_576)
_LONG = 400  # lines of code that a page shows of one region


@dataclass(frozen=True)
class Group:
    """Mixers of equal code, shown once.

    Args:
        anchor: the fragment of the page.
        mixers: the first one stands for all.
    """

    anchor: str
    mixers: tuple[MixerLook, ...]

    @property
    def first(self) -> MixerLook:
        """The one that is shown."""
        return self.mixers[0]


def page(look: Findings) -> str:
    """The page's text.

    Raises:
        MissingLibraryError: a library of the extra `html` is not installed.
    """
    check_libraries()
    groups = _groups(look)
    template = _environment().get_template("page.html.j2")
    return template.render(
        look=look,
        groups=groups,
        tree=_tree(look, groups),
        pictures={g.anchor: _pictures(g.first) for g in groups},
        kernels=[(f"kernels-{i}", k) for i, k in enumerate(look.kernels)],
        costs={group.anchor: cost_of(group.first) for group in groups},
        lengths=_LENGTHS,
        symbols=SYMBOLS,
        mask=list(blocks(MASK_TOKENS)),
        mask_tokens=MASK_TOKENS,
        versions=f"llcompile {__version__}, torch {torch.__version__}",
    )


def check_libraries() -> None:
    """Raises MissingLibraryError where a library of the extra `html` is not installed."""
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingLibraryError(f"the page needs {' and '.join(missing)}: pip install 'llcompile[html]'")


def _groups(look: Findings) -> list[Group]:
    found: dict[Any, list[MixerLook]] = {}
    for m in look.mixers:
        # The same line of code with the same sizes is the same code; level weights that were trained are their own.
        key = m.where, m.fate, m.family, m.reason, m.call, m.notes, m.level_weights
        found.setdefault(key, []).append(m)
    return [Group(f"mixer-{i}", tuple(mixers)) for i, mixers in enumerate(found.values())]


def _tree(look: Findings, groups: list[Group]) -> Branch | None:
    fates: dict[str, list[tuple[str, str, str]]] = {}
    for group in groups:
        for m in group.mixers:
            what = m.family if m.fate == "converted" else m.reason
            fates.setdefault(m.module, []).append((m.fate, what, group.anchor))
    for record in look.untouched:
        fates.setdefault(record.module, []).append(("untouched", record.kind, "untouched"))
    return None if look.subject is None or not fates else tree(look.subject.model, fates)


def _pictures(mixer: MixerLook) -> dict[str, Picture]:
    drawings = {"before": mixer.drawing_before, "after": mixer.drawing_after}
    return {name: lay_out(drawing) for name, drawing in drawings.items() if drawing.boxes}


@cache
def _environment() -> Any:
    return environment(_FILTERS, code_styles=_code_styles)


def _highlighted(text: str, lexer: Any, **options: Any) -> Any:
    import pygments
    from markupsafe import Markup
    from pygments.formatters import HtmlFormatter

    return Markup(pygments.highlight(text, lexer, HtmlFormatter(cssclass="code", **options)))


def _code(text: str) -> Any:
    """Python with syntax colours; what is longer than a page shows is left out, and the page says so."""
    lines = text.splitlines()
    if len(lines) > _LONG:
        text = "\n".join(
            [*lines[:_LONG], f"# … {len(lines) - _LONG:,} more lines; see look.graph_before for all of them"]
        )
    return _whole(text)


def _whole(text: str) -> Any:
    from pygments.lexers import PythonLexer

    return _highlighted(text, PythonLexer(stripnl=False))


def _cpp(text: str) -> Any:
    from pygments.lexers import CppLexer

    return _highlighted(text, CppLexer(stripnl=False))


def _excerpt(source: Excerpt) -> Any:
    from pygments.lexers import PythonLexer

    text = textwrap.dedent("\n".join(source.lines))
    marked = [line - source.first + 1 for line in source.marked]
    numbers = {"linenos": "inline", "linenostart": source.first, "hl_lines": marked}
    return _highlighted(text, PythonLexer(stripnl=False), **numbers)


def _diff(text: str) -> Any:
    from pygments.lexers import DiffLexer

    return _highlighted(text, DiffLexer())


def _code_styles() -> Any:
    from markupsafe import Markup
    from pygments.formatters import HtmlFormatter

    light, dark = (HtmlFormatter(style=style, cssclass="code") for style in ("friendly", "github-dark"))
    rules = light.get_style_defs(".code")
    return Markup(f"{rules}\n@media (prefers-color-scheme: dark) {{\n{dark.get_style_defs('.code')}\n}}")


def _engineering(number: float, unit: str = "") -> str:
    """12,345,678 as "12.3 M"."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:.0f} {unit}".rstrip()


def _shade(value: float, top: float) -> str:
    """How strongly a weight is painted: 0 hardly, 1 half way, the table's largest (2 at least) fully."""
    part = value if value < 1 else 1 + (value - 1) / max(top - 1, 1)
    return f"{0.05 + 0.45 * max(part, 0):.3f}"


def _weight(value: float) -> str:
    return f"{value:.3g}"


def _lines(text: str) -> int:
    return len(text.splitlines())


_FILTERS = {
    "code": _code,
    "whole": _whole,
    "cpp": _cpp,
    "excerpt": _excerpt,
    "diff": _diff,
    "engineering": _engineering,
    "shade": _shade,
    "weight": _weight,
    "lines": _lines,
}
