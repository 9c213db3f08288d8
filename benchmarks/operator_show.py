"""What ``llcompile bench operator --device cpu`` says on the screen: times, peers, and figures beside their targets."""

from __future__ import annotations

from typing import Any

from benchmarks.operator_figures import LINE, PASSES, SETTING, TARGETS, comparisons, ours

Record = dict[str, Any]
_MARKS = {True: "[green]met[/]", False: "[red]NOT met[/]"}


def show(console: Any, record: Record) -> None:
    """Print all tables, what failed and what was left out."""
    for setting in dict.fromkeys(tuple(r["job"][name] for name in SETTING) for r in ours(record["results"])):
        console.print(_times(record, setting))
    console.print(_peers(comparisons(record["results"], record["kernels"][0])))
    for words in dict.fromkeys(f"{r['title']}: {r['error']}" for r in record["results"] if "error" in r):
        console.print(words, markup=False)
    console.print(_figures(record))
    if record["left_out"]:
        console.print(f"left out for lack of time (--minutes): {len(record['left_out'])} measurements")


def _table(title: str, names: tuple[str, ...], left: tuple[str, ...]) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for name in names:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def _operator(weights: bool) -> str:
    return "log-linear" if weights else "linear"


def _times(record: Record, setting: tuple[Any, ...]) -> Any:
    """Rows: lines; columns: lengths; steps in a column of their own."""
    results = [r for r in ours(record["results"]) if tuple(r["job"][name] for name in SETTING) == setting]
    lengths = sorted({r["job"]["length"] for r in results if not r["job"]["step"]})
    words = ("family", "operator", "kernels", "pass")
    dtype, threads = setting
    title = (
        f"time in ms (peak MiB beyond operands and results) by length, {dtype}, {threads} thread{'s' * (threads > 1)}"
    )
    table = _table(title, (*words, *map(str, lengths), "exponent"), words)
    slopes = {tuple(e[name] for name in LINE): e["exponent"] for e in record["exponents"]}
    rows: dict[tuple[Any, ...], dict[int, str]] = {}
    for r in results:
        key = (*(r["job"][name] for name in LINE), r["job"]["step"])
        rows.setdefault(key, {})[r["job"]["length"]] = f"{r['seconds'] * 1e3:.3g} ({r['peak_mib']:.0f})"
    for (decay, correction, weights, backward, kernels, *rest), cells in rows.items():
        step = f"step after {max(cells)}: {max(cells.values())}" if rest[-1] else PASSES[backward]
        slope = str(slopes.get((decay, correction, weights, backward, kernels, *rest[:-1]), ""))
        names = (f"{decay}/{correction}", _operator(weights), kernels, step)
        table.add_row(*names, *("" if rest[-1] else cells.get(n, "") for n in lengths), slope)
    table.caption = f"{record['machine']}, {record['date'][:16]}"
    return table


def _peers(rows: list[Record]) -> Any:
    words = ("peer", "form", "operator", "pass", "dtype")
    numbers = ("threads", "T", "ours ms", "peer ms", "times faster", "CPU time", "ours MiB", "peer MiB")
    table = _table("against transformers' own code, the faster of eager and Inductor", (*words, *numbers), words)
    for r in rows:
        names = (r["peer"], r["form"], _operator(r["weights"]), PASSES[r["backward"]], r["dtype"], str(r["threads"]))
        times = (f"{r['seconds'] * 1e3:.1f}", f"{r['peer_seconds'] * 1e3:.1f}")
        ratios = (f"{r['times_faster']:.2f}", f"{r['cpu_times_less']:.2f}")
        table.add_row(*names, str(r["length"]), *times, *ratios, f"{r['peak_mib']:.1f}", f"{r['peer_peak_mib']:.1f}")
    return table


def _figures(record: Record) -> Any:
    """Rows: a figure of a family and pass, the worst of those measured; columns: settings."""
    settings = list(dict.fromkeys(tuple(f[name] for name in SETTING) for f in record["figures"]))
    words = ("figure", "target", "family", "pass")
    columns = (*words, *(f"{dtype}, {threads} thr." for dtype, threads in settings))
    table = _table(f"figures of {record['kernels'][0]} kernels by their targets, the worst of each", columns, words)
    rows: dict[tuple[str, ...], dict[tuple[Any, ...], list[float]]] = {}
    for f in record["figures"]:
        phase = "step" if f.get("step") else "bwd" if f["figure"] == "backward" else PASSES[f["backward"]]
        key = (f["figure"], f"{f['decay']}/{f['correction']}", phase)
        rows.setdefault(key, {}).setdefault(tuple(f[name] for name in SETTING), []).append(f["value"])
    for name, target in TARGETS.items():
        found = {key: cells for key, cells in rows.items() if key[0] == name}
        bound = f"{'at least' if target.least else 'at most'} {target.bound:g}"
        for (_, family, phase), cells in found.items():
            worst = {s: target.worst(values) for s, values in cells.items()}
            texts = [f"{worst[s]:.2f} {_MARKS[target.met(worst[s])]}" if s in worst else "" for s in settings]
            table.add_row(target.words, bound, family, phase, *texts)
        if not found:
            table.add_row(target.words, bound, "-", "-", *(["not measured"] * bool(settings)))
        table.add_section()
    return table
