"""Put the tables and plots into docs/evidence.md, between its marks `<!-- NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.evidence import plots, tables
from benchmarks.evidence.store import read
from benchmarks.evidence.tables import Found
from llcompile.errors import BenchError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"
_MARKED = re.compile(r"(<!-- (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def show(out: Path, page: Path = PAGE) -> None:
    """Print the tables, and write them into the page with the plots beside it, in `pictures`.

    Raises BenchError for a page without the marks.
    """
    found = {name: read(out / name) for name in ("recall", "typeseg", "language")}
    shown = {
        name: f"{write(found[name.partition('_')[0]])}{_where(found[name.partition('_')[0]])}"
        for name, write in _TABLES.items()
    }
    for name, draw in _PLOTS.items():
        picture = page.parent / "pictures" / f"evidence-{name}.png"
        if draw(found[name], picture):
            shown[name] += f"\n\n![{name}](pictures/{picture.name})"
    text = page.read_text()
    marks = [mark[1] for mark in _MARKED.findall(text)]
    if sorted(marks) != sorted(shown):
        raise BenchError(f"{page} has the marks {marks}, expected {sorted(shown)}, each up to <!-- end -->")
    page.write_text(_MARKED.sub(lambda mark: mark[1] + shown[mark[2]] + mark[3], text))
    print("\n\n".join(shown[name] for name in marks))


_TABLES: dict[str, Callable[[Found], str]] = {
    "recall": tables.recall_tables,
    "recall_distance": tables.by_distance,
    "typeseg": tables.typeseg_tables,
    "language": tables.language_tables,
}
_PLOTS: dict[str, Callable[[Found, Path], bool]] = {
    "recall": plots.recall_plot,
    "typeseg": plots.typeseg_plot,
    "language": plots.language_plot,
}


def _where(found: Found) -> str:
    """On which machine and when; of which series, where there are several machines."""
    series: dict[tuple[str, str], dict[str, None]] = {}
    dates: dict[tuple[str, str], set[str]] = {}
    for file in found:
        seen = file["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in seen["versions"].items())
        where = seen["machine"].partition(", load")[0], versions
        series.setdefault(where, {})[re.sub(r"-\d+$", "", file["share"])] = None
        dates.setdefault(where, set()).add(seen["date"][:10])
    lines = []
    for where, names in series.items():
        days = " to ".join(sorted({min(dates[where]), max(dates[where])}))
        of = f"{', '.join(names)}: " if len(series) > 1 else ""
        lines.append(f"\n\n({of}{where[0]}; {days}; {where[1]}.)")
    return "".join(lines)
