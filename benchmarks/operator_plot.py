"""The picture of ``llcompile bench operator --device cpu``: time against length, a column a family, a row a pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.operator_figures import PASSES, SETTING, form, ours
from benchmarks.operator_plan import PEERS

Result = dict[str, Any]
# A colour for each operator; a style for whose code it is.
_COLOURS = {False: "tab:blue", True: "tab:orange"}
_STYLES = ("-", "--", "-.", ":")
_PEERS = {"eager": "s", "Inductor": "^"}


def holds(result: Result) -> bool:
    """Whether this is a time of the command on a CPU."""
    return {"runs", "kernels", "step"} <= set(result.get("job", {})) and "seconds" in result


def picture(record: dict[str, Any], out: Path) -> str:
    """Draw if that can be done; returns what to say about it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "; no plot, which needs matplotlib: pip install 'llcompile[plot]'"
    if not any(holds(r) and not r["job"]["step"] for r in record["results"]):
        return ""
    draw(record, out)
    return f" and {out}"


def draw(record: dict[str, Any], out: Path) -> None:
    """Write the picture of the families that have a peer, in the first dtype and number of threads."""
    import matplotlib
    from matplotlib.figure import Figure

    timed = [r for r in record["results"] if holds(r) and not r["job"]["step"]]
    dtype, threads = setting = tuple(timed[0]["job"][name] for name in SETTING)
    timed = [r for r in timed if tuple(r["job"][name] for name in SETTING) == setting]
    measured = dict.fromkeys((r["job"]["decay"], r["job"]["correction"]) for r in timed)
    families = [family for family in PEERS if family in measured] or list(measured)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llcompile", "font.size": 9}):
        figure = Figure(figsize=(3.4 * len(families) + 0.6, 6), layout="constrained")
        grid = figure.subplots(len(PASSES), len(families), squeeze=False, sharex=True)
        for row, backward in zip(grid, PASSES, strict=True):
            for axis, family in zip(row, families, strict=True):
                of = [r for r in timed if r["job"]["backward"] == backward]
                _panel(
                    axis, [r for r in of if (r["job"]["decay"], r["job"]["correction"]) == family], record["kernels"]
                )
                axis.set_title(f"{'/'.join(family)}, {PASSES[backward]}", fontsize=9)
        lines = {line.get_label(): line for axis in grid.flat for line in axis.get_lines()}
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=3, fontsize=8, handlelength=3)
        for axis in grid[-1]:
            axis.set_xlabel("tokens")
        for row in grid:
            row[0].set_ylabel("ms")
        job = timed[0]["job"]
        of_what = f"{job['heads']} heads of {job['dim']}, {dtype}, {threads} thread{'s' * (threads > 1)}"
        figure.suptitle(f"{record.get('cpu', 'CPU')}: {of_what}, {record['date'][:10]}", fontsize=9)
        figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)


def _panel(axis: Any, results: list[Result], kernels: list[str]) -> None:
    """Ours by operator and kernels; a peer's forms, one marker each."""
    mine = ours(results)
    for number, name in enumerate(kernels):
        for weights, colour in _COLOURS.items():
            words = f"{'log-linear' if weights else 'linear'}, {name}"
            points = [r for r in mine if r["job"]["kernels"] == name and r["job"]["weights"] == weights]
            _line(axis, points, words, linestyle=_STYLES[number % len(_STYLES)], color=colour, marker="o")
    for name, marker in _PEERS.items():
        points = [r for r in results if r["job"]["runs"] != "llcompile" and form(r) == name]
        _line(axis, points, f"transformers, {name}", linestyle=":", color="black", marker=marker)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(alpha=0.3)


def _line(axis: Any, results: list[Result], label: str, **style: Any) -> None:
    points = sorted((r["job"]["length"], r["seconds"] * 1e3) for r in results)
    if points:
        axis.plot(*zip(*points, strict=True), markersize=3, label=label, **style)
