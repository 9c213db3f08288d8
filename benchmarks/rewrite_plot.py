"""The picture of ``llcompile bench rewrite``: time and peak memory against length, before and after the rewrite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.rewrite import FORMS

# Field of a result, label of the axis, factor.
_PANELS = (("seconds", "ms, forward and backward", 1e3), ("peak_mib", "peak memory, MiB", 1.0))


def holds(result: dict[str, Any]) -> bool:
    """Whether this is a measurement of a hand-written mixer."""
    return result.get("job", {}).get("form") in FORMS and "seconds" in result


def draw(record: dict[str, Any], out: Path) -> None:
    """Write the picture of the first decay in the file, forward and backward."""
    import matplotlib
    from matplotlib.figure import Figure

    timed = [r for r in record["results"] if holds(r) and r["job"]["backward"]]
    timed = [r for r in timed if r["job"]["decay"] == timed[0]["job"]["decay"]]
    # Text stays text and ids do not change from run to run, so that an .svg can be read in a diff.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llcompile", "font.size": 9}):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        for axis, (field, label, factor) in zip(figure.subplots(1, 2), _PANELS, strict=True):
            for form, name in FORMS.items():
                points = [r for r in timed if r["job"]["form"] == form]
                if points:
                    lengths, values = [r["job"]["length"] for r in points], [r[field] * factor for r in points]
                    axis.plot(lengths, values, marker="o", markersize=3, label=name)
            axis.set_xscale("log", base=2)
            axis.set(yscale="log", xlabel="tokens", ylabel=label)
            axis.grid(alpha=0.3)
            axis.legend(frameon=False)
        job = timed[0]["job"]
        threads = f"{job['threads']} thread" + "s" * (job["threads"] != 1) if job["threads"] else "all threads"
        figure.suptitle(f"CPU, {threads}, {job['heads']} heads of {job['dim']}, {record['date'][:10]}", fontsize=9)
        figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)
