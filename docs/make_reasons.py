"""Write docs/reasons.md from the table in patterns/reasons.py: python docs/make_reasons.py"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from llcompile.patterns.reasons import TABLE, Reason

PAGE = Path(__file__).resolve().with_name("reasons.md")
HEAD = """\
# Why a mixer is declined

Every record in `report.declined` has a `code`, a `reason`, the user's line in `where`, and a `hint`. The code is
stable, so programs may test for it: `[d.module for d in report.declined if d.code == "not-causal"]` (see
[public-api.md](public-api.md)). The wording of reasons and hints may change. A printed report shows the code in
brackets; `report.to_dict()`, `llcompile inspect --json` and the HTML page contain it as well.

In a report, each `{name}` in a sentence is replaced by what was found. For how mixers are found and proved, see
[recognition.md](recognition.md). To regenerate this page from the table in `patterns/reasons.py`, run
`python docs/make_reasons.py`.
"""


def page() -> str:
    """The page's text."""
    return "\n".join([HEAD, *_groups()])


def _groups() -> Iterator[str]:
    for group in TABLE:
        yield f"## {group.title}\n\n{group.about}\n"
        yield "| code | reason | what to do |\n|---|---|---|"
        yield from map(_row, group.entries)
        yield ""


def _row(reason: Reason) -> str:
    said = re.sub(r"\{(\w+)[^}]*\}", r"{\1}", reason.sentence)
    meaning = f": {reason.meaning}" if reason.meaning else ""
    return f"| `{reason.code}` | `{said}`{meaning} | {reason.hint} |"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
