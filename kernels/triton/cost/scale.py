"""From counts at a few small lengths to the count at any: formulas that are found and checked exactly, or refused.

Programs of one kernel do the same work but for how many blocks they read, and that is the bits of their chunk's number.
So each number of a launch is an integer combination of few features of its grid. The combination is solved for from
some of the small launches and has to give every one of them to the byte; where none does, there is an error and no
estimate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from llcompile.errors import KernelError

# Chunks of the lengths that are counted (tokens with decays by rates), and blocks where a call goes in blocks. In them
# no feature is a combination of others: one of 16 blocks reads four others.
SAMPLES, BLOCK_SAMPLES = (2, 3, 4, 5, 6), (1, 2, 3, 4, 8, 16)
# More samples than unknowns, at least: these are predictions that are checked.
_CHECKS = 2
_MOST = 3


class Shape(NamedTuple):
    """What a launch's numbers depend on: its programs for one head, and the chunks of the whole sequence."""

    programs: int
    chunks: int


_Features = dict[str, Callable[[Shape], int]]
# The features, simplest first.
_COMMON: _Features = {
    "programs": lambda s: s.programs,
    "1": lambda s: 1,
    "chunks": lambda s: s.chunks,
    "reads": lambda s: sum(i.bit_count() for i in range(s.chunks)),  # blocks that all chunks read
    "blocks": lambda s: s.chunks.bit_count(),  # whole blocks of the sequence
}
FEATURES: _Features = {
    **_COMMON,
    "last reads": lambda s: (s.chunks - 1).bit_count(),
}  # blocks that the last chunk reads
BLOCK_FEATURES: _Features = {
    **_COMMON,
    "after others": lambda s: sum(i.bit_count() > 1 for i in range(s.chunks)),  # chunks that read several blocks
    "passes": lambda s: sum(math.comb(i.bit_count(), 2) for i in range(s.chunks)),  # over others on the way
}


class Formula(NamedTuple):
    """An integer for each feature in it."""

    terms: dict[str, int]

    def at(self, shape: Shape) -> int:
        """The number that a launch of `shape` has."""
        return sum(factor * {**FEATURES, **BLOCK_FEATURES}[name](shape) for name, factor in self.terms.items())


def formula(name: str, samples: Iterable[tuple[Shape, int]], features: _Features = FEATURES) -> Formula:
    """The simplest formula in `features` that gives all samples of number `name` of a kernel.

    Raises:
        KernelError: there is none.
    """
    known = dict.fromkeys(samples)
    shapes, values = [shape for shape, _ in known], [value for _, value in known]
    if len(set(shapes)) == len(shapes):  # one shape has one value, or nothing holds
        for size, names in ((n, c) for n in range(1, _MOST + 1) for c in itertools.combinations(features, n)):
            rows = [[features[feature](shape) for feature in names] for shape in shapes]
            found = _solved(rows, values)
            if found is not None and (len(shapes) >= size + _CHECKS or size == 1):
                return Formula(dict(zip(names, found, strict=True)))
    counted = sorted({shape.chunks for shape in shapes})
    raise KernelError(
        f"{name}: counts at {', '.join(map(str, counted))} chunks follow no formula ({values}), so there is none for "
        f"other lengths; count a length of at most {max(counted)} chunks"
    )


def _solved(rows: list[list[int]], values: list[int]) -> list[int] | None:
    """Integers that solve all equations, if they are determined and there are any."""
    table = np.array(rows, dtype=float)
    if np.linalg.matrix_rank(table) < table.shape[1]:
        return None
    found = [round(x) for x in np.linalg.lstsq(table, np.array(values, dtype=float), rcond=None)[0]]
    exact = all(
        sum(a * b for a, b in zip(row, found, strict=True)) == value for row, value in zip(rows, values, strict=True)
    )
    return found if exact else None
