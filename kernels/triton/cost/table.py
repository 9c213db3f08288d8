"""The cost of passes as text: a Markdown table for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from llcompile.kernels.triton.cost.count import Cost, Numbers
from llcompile.kernels.triton.cost.families import STEPS

_COLUMNS = (
    "kernel", "launches", "programs", "loaded GB", "stored GB", "moved GB", "moved KB a chunk", "products GFLOP",
    "other GFLOP",
)  # fmt: skip


class _Line(NamedTuple):
    name: str
    launches: int | str
    programs: int | str
    numbers: Numbers


def lines(cost: Cost) -> Iterator[str]:
    """The table of one pass; of a step in MB, and by head in place of chunk."""
    case, step = cost.case, cost.case.operation in STEPS
    levels = "linear" if case.levels is None else f"{case.levels} levels"
    where = "after" if step else "at"
    yield (
        f"{case.family} {case.operation}, {levels}, K={case.key_dim} V={case.value_dim} B={case.batch} "
        f"H={case.heads} G={case.groups} {case.dtype}, {where} {case.length} tokens"
    )
    columns = [
        c.replace("GB", "MB").replace("GFLOP", "MFLOP").replace("chunk", "head") if step else c for c in _COLUMNS
    ]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    found = [_Line(row.kernel, row.launches, row.programs, row.numbers) for row in cost.rows]
    whole = len(cost.around.launches)
    found.append(_Line("all kernels", whole, sum(row.programs for row in cost.rows), cost.total))
    if step:
        found.append(_Line("at the worst position", whole, "", cost.most))
    for line in found:
        yield _row(line, cost.chunks, 1e6 if step else 1e9)
    around = cost.around
    yield (
        f"torch's operators around them: {around.calls} calls move {around.moved / 1e9:.3f} GB "
        f"({around.moved / cost.chunks / 1e3:.1f} KB a {'head' if step else 'chunk'}); "
        f"workspace {around.workspace / 1e9:.3f} GB, results {around.results / 1e9:.3f} GB"
    )


def _row(line: _Line, chunks: int, scale: float) -> str:
    numbers = line.numbers
    products = sum(n for name, n in numbers.items() if name.startswith("dot "))
    moved = numbers.get("read", 0) + numbers.get("written", 0)
    sizes = (numbers.get("loaded", 0) / scale, numbers.get("stored", 0) / scale, moved / scale, moved / chunks / 1e3)
    flops = (products / scale, numbers.get("pointwise", 0) / scale)
    cells = [
        line.name,
        str(line.launches),
        str(line.programs),
        *(f"{x:.2f}" for x in sizes),
        *(f"{x:.1f}" for x in flops),
    ]
    return f"| {' | '.join(cells)} |"
