"""What follows from the measurements of ``llcompile bench operator --device cpu``: growth, ratios, and targets met."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]
Figure = dict[str, Any]

# What one line of a table or picture has in common, and what a setting has.
LINE = ("decay", "correction", "weights", "backward", "kernels", "dtype", "threads")
SETTING = ("dtype", "threads")
PASSES = {False: "fwd", True: "fwd+bwd"}


@dataclass(frozen=True)
class Target:
    """A figure's words and its bound: at most, or at least."""

    words: str
    bound: float
    least: bool = False

    def met(self, value: float) -> bool:
        """Whether a figure is within the bound."""
        return value >= self.bound if self.least else value <= self.bound

    def worst(self, values: list[float]) -> float:
        """The figure that is nearest to missing it, or misses it most."""
        return min(values) if self.least else max(values)


TARGETS = {
    "faster": Target("times faster than transformers", 3.0, least=True),
    "memory": Target("peak memory by transformers'", 0.25),
    "levels at 16384": Target("log-linear by linear at 16k", 2.0),
    "levels at 65536": Target("log-linear by linear at 64k", 2.5),
    "backward": Target("backward by forward", 3.0),
    "exponent": Target("time exponent from 4k on", 1.1),
    "step": Target("step with levels by linear step after 128k", 1.5),
    "step ms": Target("ms of a step with levels after 128k", 0.15),
}
STEP_CONTEXT = 1 << 17  # the targets of steps are for this context


def figures(results: list[Result], kernels: str) -> list[Figure]:
    """Each figure of our `kernels` that has a target: what it is of, its value, the bound and whether it is met."""
    found = []
    for name, value, of in _values(results, kernels):
        target = TARGETS[name]
        found.append({"figure": name, **of, "value": round(value, 4), "bound": target.bound, "met": target.met(value)})
    return found


def _values(results: list[Result], kernels: str) -> Iterator[tuple[str, float, Figure]]:
    own = [r for r in ours(results) if r["job"]["kernels"] == kernels]
    for row in comparisons(results, kernels):
        if not row["weights"]:
            yield "faster", row["times_faster"], row
        yield "memory", row["peak_mib"] / max(row["peer_peak_mib"], 1e-9), row
    for e in exponents(own):
        yield "exponent", e["exponent"], e
    sequences = [r for r in own if not r["job"]["step"]]
    for r, base in _pairs(sequences, weights=(True, False)):
        name = f"levels at {r['job']['length']}"
        if name in TARGETS:
            yield name, r["seconds"] / base["seconds"], _of(r)
    for r, base in _pairs(sequences, backward=(True, False)):
        if r["job"]["length"] >= 4096:
            yield "backward", r["seconds"] / base["seconds"] - 1, _of(r)
    for r, base in _pairs(
        [r for r in own if r["job"]["step"] and r["job"]["length"] == STEP_CONTEXT], weights=(True, False)
    ):
        yield "step", r["seconds"] / base["seconds"], _of(r)
        yield "step ms", r["seconds"] * 1e3, _of(r)


def _of(r: Result) -> Figure:
    return {name: r["job"][name] for name in (*LINE, "length", "step")}


def _pairs(results: list[Result], **differ: tuple[bool, bool]) -> Iterator[tuple[Result, Result]]:
    """Results of one process that differ in one field."""
    ((name, (upper, lower)),) = differ.items()

    def rest(r: Result) -> tuple[Any, ...]:
        return (r["process"], *(value for key, value in r["job"].items() if key != name))

    bases = {rest(r): r for r in results if r["job"][name] == lower}
    yield from ((r, bases[rest(r)]) for r in results if r["job"][name] == upper and rest(r) in bases)


def ours(results: list[Result]) -> list[Result]:
    """Our times, each job's first: one that was measured again stands beside a compiled peer."""
    first: dict[tuple[Any, ...], Result] = {}
    for r in results:
        if r["job"]["runs"] == "llcompile" and "seconds" in r:
            first.setdefault(tuple(r["job"].items()), r)
    return list(first.values())


def exponents(results: list[Result]) -> list[Figure]:
    """Slope of log time over log length from 4k on, for every line, of wall and of CPU time."""
    lines: dict[tuple[Any, ...], list[Result]] = {}
    for r in ours(results):
        if r["job"]["length"] >= 4096 and not r["job"]["step"]:
            lines.setdefault(tuple(r["job"][name] for name in LINE), []).append(r)
    return [
        {**dict(zip(LINE, line, strict=True)), "exponent": slope(points, "seconds"),
         "cpu_exponent": slope(points, "cpu_seconds")}
        for line, points in lines.items()
        if len(points) > 1
    ]  # fmt: skip


def slope(points: list[Result], field: str) -> float:
    """The exponent of a field's growth with the length, by least squares on logarithms."""
    xs = [math.log(r["job"]["length"]) for r in points]
    ys = [math.log(max(r[field], 1e-9)) for r in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return round(above / sum((x - mean_x) ** 2 for x in xs), 3)


def comparisons(results: list[Result], kernels: str) -> list[Figure]:
    """Ours against the faster of a peer's eager and compiled forms, on the same operands.

    Times are compared within the process that measured both: the faster form is the one with the smaller ratio.
    """
    peers: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    again: dict[tuple[Any, ...], dict[int, Result]] = defaultdict(dict)  # each of our jobs, by process
    for r in results:
        if r["job"]["runs"] != "llcompile":
            peers[tuple(r["job"][name] for name in _SAME)].append(r)
        elif "seconds" in r:
            again[tuple(r["job"].items())][r["process"]] = r
    rows = (
        _comparison(own, peers[tuple(own["job"][name] for name in _SAME)], again[tuple(own["job"].items())])
        for own in ours(results)
        if own["job"]["kernels"] == kernels
    )
    return [row for row in rows if row is not None]


# What our job and its peer's have in common.
_SAME = ("decay", "correction", "backward", "length", "dtype", "threads", "step")


def _comparison(own: Result, peers: list[Result], beside: dict[int, Result]) -> Figure | None:
    timed = [(r, beside[r["process"]]) for r in peers if "seconds" in r and r["process"] in beside]
    if not timed:
        return None
    best, mine = min(timed, key=lambda pair: pair[0]["seconds"] / pair[1]["seconds"])
    return {
        "peer": best["job"]["runs"], "form": form(best), **_of(mine),
        "seconds": mine["seconds"], "peer_seconds": best["seconds"],
        "times_faster": round(best["seconds"] / mine["seconds"], 3),
        "cpu_times_less": round(best["cpu_seconds"] / max(mine["cpu_seconds"], 1e-9), 3),
        "peak_mib": own["peak_mib"], "peer_peak_mib": min(r["peak_mib"] for r, _ in timed),
        "notes": [f"{form(r)}: {r['error']}" for r in peers if "error" in r],
    }  # fmt: skip


def form(r: Result) -> str:
    """How a peer was run."""
    return "Inductor" if r["job"]["compiled"] else "eager"
