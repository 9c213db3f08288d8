"""Page: a look as one HTML file that needs no network."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch

from llcompile import __version__
from llcompile.errors import MissingLibraryError
from llcompile.folding import folded, grouped
from llcompile.look import highlight
from llcompile.look.cost import SYMBOLS, cost_of
from llcompile.look.environment import environment
from llcompile.look.findings import Findings
from llcompile.look.generated import GeneratedKernels
from llcompile.look.groups import Group, groups, kernels_anchor
from llcompile.look.mask import blocks
from llcompile.look.mixer_look import MixerLook
from llcompile.look.module_tree import Branch, tree
from llcompile.look.picture import Picture, lay_out
from llcompile.patterns.records import Timing

MASK_TOKENS = 32
_LIBRARIES = ("jinja2", "pygments", "grandalf")
_LENGTHS = (4_096, 65_536, 1_048_576)
_SHORT = 0.01  # seconds; shorter steps are one row


def page(look: Findings) -> str:
    """The page's text.

    Raises:
        MissingLibraryError: a library of the extra `html` is not installed.
    """
    check_libraries()
    found = groups(look.mixers, look.kernels)
    template = _environment().get_template("page.html.j2")
    return template.render(
        look=look,
        groups=found,
        families=grouped(found, lambda group: group.family),
        tree=_tree(look, found),
        pictures={g.anchor: _pictures(g.first) for g in found},
        kernels=[(kernels_anchor(i), file) for i, file in enumerate(look.kernels)],
        costs={group.anchor: cost_of(group.first) for group in found},
        untouched=grouped(look.untouched, lambda record: record.kind),
        timings=_timings(look.timings, look.kernels),
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


def _timings(timings: tuple[Timing, ...], kernels: tuple[GeneratedKernels, ...]) -> list[Timing]:
    """The steps that took long, the short ones together, and what compiled kernels took."""
    long = [t for t in timings if t.seconds >= _SHORT]
    short = [t for t in timings if t.seconds < _SHORT and not t.within]
    if short:
        names = ", ".join(t.step for t in short)
        long.append(Timing("other passes", sum(t.seconds for t in short), len(short), what=names))
    compiled = (
        Timing(f"compile for {chip}", seconds, what=file.name)
        for file in kernels
        for chip, seconds in file.seconds.items()
    )
    return [*long, *compiled]


@cache
def _environment() -> Any:
    return environment(_FILTERS)


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


def _folded(records: Any) -> str:
    return ", ".join(folded(record.module for record in records))


_FILTERS = {
    "code": highlight.code,
    "whole": highlight.whole,
    "cpp": highlight.cpp,
    "excerpt": highlight.excerpt,
    "diff": highlight.diff,
    "folded": _folded,
    "engineering": _engineering,
    "shade": _shade,
    "weight": _weight,
    "lines": _lines,
}
