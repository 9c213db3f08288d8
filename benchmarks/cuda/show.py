"""What a run says on the screen: a line a case while it runs, tables and goals at the end."""

from __future__ import annotations

from typing import Any

from benchmarks.cuda.cases import PHASES, Case

Answer = dict[str, Any]
_MARKS = {True: "met", False: "NOT met", None: "not measured"}
_WORDS = {True: "green", False: "red", None: "yellow"}


def line(result: Answer) -> str:
    """One case: its time, or why it has none."""
    title = Case(**result["case"]).title
    if "milliseconds" not in result:
        return f"{title}: {reason(result)}"
    floor = result.get("roofline_milliseconds")
    beside = "" if floor is None else f", {result['milliseconds'] / floor:.1f}x the roofline's {floor:.3f}"
    memory = "" if result["peak_mib"] is None else f", {result['peak_mib']:.0f} MiB"
    return f"{title}: {result['milliseconds']:.3f} ms{beside}{memory}"


def reason(result: Answer) -> str:
    """Why a case has no time."""
    return str(result.get("skipped") or f"failed: {result.get('error', 'no result')}")


def show(record: Answer) -> None:
    """Print tables of times, what failed, what was left out, and the goals."""
    from rich.console import Console

    # A log file is no terminal: wide enough for a table's row in one line.
    console = Console(width=None if Console().is_terminal else 160)
    results = [(Case(**r["case"]), r) for r in record.get("results", ())]
    for phase, words in PHASES.items():
        chosen = [(case, r) for case, r in results if case.phase == phase]
        for size in dict.fromkeys(case.size for case, _ in chosen):
            console.print(_times(words, size, [(c, r) for c, r in chosen if c.size == size]))
    for words in dict.fromkeys(f"{c.runs} {c.operator}: {reason(r)}" for c, r in results if "milliseconds" not in r):
        console.print(words, markup=False)
    left_out = record.get("left_out", [])
    console.print(f"{len(results)} cases, {len(left_out)} left out for lack of time")
    console.print(_goals(record.get("goals", [])))


def _times(words: str, size: tuple[int, ...], results: list[tuple[Case, Answer]]) -> Any:
    """Rows: who; columns: lengths; cells: ms and times the roofline."""
    from rich.table import Table

    batch, heads, key_dim, value_dim = size
    table = Table(title=f"{words}, ms (times the roofline), B={batch} H={heads} K={key_dim} V={value_dim}")
    lengths = sorted({case.length for case, _ in results})
    table.add_column("who")
    for length in lengths:
        table.add_column(str(length), justify="right")
    rows: dict[str, dict[int, str]] = {}
    for case, r in results:
        kind = "" if case.operator == "softmax" else f" {case.operator} {case.decay}/{case.correction}"
        rows.setdefault(case.runs + kind, {})[case.length] = _cell(r)
    for name, cells in rows.items():
        table.add_row(name, *(cells.get(length, "") for length in lengths))
    return table


def _cell(result: Answer) -> str:
    if "milliseconds" not in result:
        return "skipped" if "skipped" in result else "failed"
    floor = result.get("roofline_milliseconds")
    return f"{result['milliseconds']:.3f}" + ("" if floor is None else f" ({result['milliseconds'] / floor:.1f})")


def _goals(goals: list[Answer]) -> Any:
    from rich.table import Table

    table = Table(title="goals: our time by the other's, the worst of all sizes measured")
    for name in ("goal", "at most", "measured", "", "where"):
        table.add_column(name)
    for g in goals:
        measured = "-" if g["measured"] is None else f"{g['measured']:.2f}"
        mark = f"[{_WORDS[g['met']]}]{_MARKS[g['met']]}[/]"
        table.add_row(g["goal"], str(g["bound"]), measured, mark, g["where"] or "-")
    return table
