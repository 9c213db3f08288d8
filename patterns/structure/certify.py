"""Certify: the proof. The part and the operator, on fresh draws, at several lengths, in float64 where memory allows.

The first draw has the length of the graph, whatever it is: what only shows at that length (a window) is seen. All other
axes are cut down, where the code names no position along them. Bounds inside of the part are crossed, and gradients are
compared, on draws of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from llcompile.patterns import reasons
from llcompile.patterns.agreement import BUDGETS, apart, gradients
from llcompile.patterns.records import Certificate
from llcompile.patterns.structure.classify import Miss
from llcompile.patterns.structure.cut import Part
from llcompile.patterns.structure.frame import Row
from llcompile.patterns.structure.lifted import Source
from llcompile.patterns.structure.pieces import expect_known, expect_pieces
from llcompile.patterns.structure.probe import Probe, difference
from llcompile.patterns.structure.program import Value
from llcompile.patterns.structure.ranges import Range
from llcompile.patterns.structure.reading import Reading
from llcompile.patterns.structure.sizing import CannotArrange, Sizing, small
from llcompile.patterns.structure.suppose import output_of

log = logging.getLogger("llcompile")

DRAWS = 3  # at least
_LARGE = 1 << 28  # numbers in the largest tensor of a proof, above which it is done in float32


def certify(part: Part, reading: Reading, tried: Probe, bounds: Mapping[Value, Range]) -> tuple[Reading, Certificate]:
    """The reading with its scale as it is at the graph's length, and its certificate.

    Args:
        part: the part.
        reading: what it is supposed to be.
        tried: the probe that the reading was found with; where that could not run at other sizes, the proof does not.
        bounds: the range of every value of the program.

    Raises:
        Miss: a draw on which the two differ.
    """
    expect_known(part)
    worst, draws, budget = 0.0, 0, _budget(reading)
    sizings = _sizings(part, tried)
    for number, sizing in enumerate(sizings):
        probe, theirs = _drawn(part, reading, (sizing, sizings[0]), tried.ranges, seed=100 + number)
        ours = output_of(probe, reading)
        error = difference(theirs, ours)
        if number == 0 and error > BUDGETS[-1][1]:
            reading, error = _rescaled(reading, probe, theirs, ours)
        worst, draws = max(worst, error), draws + 1
        if worst > budget:
            raise Miss(reasons.PROOF_FAILED(error=worst, length=probe.length), 3)
    probe, _ = _drawn(part, reading, (sizings[-1], sizings[0]), tried.ranges, seed=200)
    draws += expect_pieces(part, reading, probe, bounds, lambda p: _apart(p, reading), budget)
    probe, _ = _drawn(part, reading, (sizings[-1], sizings[0]), tried.ranges, seed=300)
    if all(op.name != "detach" for op in part.ops):
        _expect_gradients(probe, reading)
    precision = next(name for name, budget in BUDGETS if worst <= budget)
    return reading, Certificate(worst, precision, draws)


def _apart(probe: Probe, reading: Reading) -> float | None:
    """How far the part and the operator are apart; None where the part has no finite result."""
    theirs = probe.by_time(probe.run())
    return difference(theirs, output_of(probe, reading)) if bool(torch.isfinite(theirs).all()) else None


def _expect_gradients(probe: Probe, reading: Reading) -> None:
    """The gradients of every source are the operator's, on a draw of their own.

    Raises:
        Miss: one of them is not: the code stops it, or makes another one of it.
    """
    sources = [s for s, x in probe.values.items() if x.is_floating_point()]
    with torch.inference_mode(False), torch.enable_grad():
        probe.values = {s: x.clone().requires_grad_(s in sources) for s, x in probe.values.items()}
        leaves = [probe.values[s] for s in sources]
        try:
            theirs = gradients(probe.by_time(probe.run()), leaves)
        except (RuntimeError, NotImplementedError) as failure:
            log.debug("structure: %s has no backward: %s", probe.part.result, failure)
            return
        ours = gradients(output_of(probe, reading), leaves)
    error = apart(theirs, ours)
    if not error <= BUDGETS[-1][1]:
        raise Miss(reasons.GRADIENTS_DIFFER(error=error), 3)


def _drawn(
    part: Part, reading: Reading, sizings: tuple[Sizing, Sizing], ranges: Mapping[Source, Range], seed: int
) -> tuple[Probe, Tensor]:
    """A draw and the part's result on it, at the second sizes where the part does not run at the first."""
    for sizing in sizings:
        probe = _probe(part, reading, sizing, ranges, seed)
        try:
            return probe, probe.by_time(probe.run())
        except (CannotArrange, RuntimeError, IndexError, AssertionError, TypeError, ValueError) as error:
            if sizing is sizings[1]:
                raise
            log.debug("structure: %s does not run at length %d: %s", part.result, sizing.length, error)
    raise AssertionError("the last sizes return or raise")


def _budget(reading: Reading) -> float:
    """The largest error that is rounding: code may hold float32 numbers. A fitted epsilon must be exact."""
    return BUDGETS[-1][1] if reading.normaliser is None else BUDGETS[0][1]


def _sizings(part: Part, tried: Probe) -> list[Sizing]:
    """The graph's own length first (the scale is that of it), then others where the code allows them."""
    times = tried.sizing.times
    if not tried.sizing.sizes:
        return [tried.sizing] * DRAWS
    own = small(times, part, keep_time=True)
    found = [own]
    for variant in (1, 2):
        other = small(times, part, keep_time=False, variant=variant)
        if other.length != own.length:
            found.append(other)
    return found + [own] * (DRAWS - len(found))


def _rescaled(reading: Reading, probe: Probe, theirs: Tensor, ours: Tensor) -> tuple[Reading, float]:
    """A scale that hangs on the length (a mean, say) is that of the graph's."""
    plain = [s for s, how in reading.post if how == "plus"]
    if plain or reading.normaliser is not None or reading.first is not None or reading.skip is not None:
        return reading, difference(theirs, ours)
    factor = float((theirs * ours).sum() / (ours * ours).sum().clamp_min(1e-300))
    return reading.scaled(reading.scale * factor), difference(theirs, ours * factor)


def _probe(part: Part, reading: Reading, sizing: Sizing, ranges: Mapping[Source, Range], seed: int) -> Probe:
    """A draw of which every operand is as in a real model, so that the far past still counts at any length."""
    largest = max((_count(sizing, v) for op in part.ops for v in op.outputs), default=0)
    dtype = torch.float32 if largest > _LARGE else torch.float64
    rows: Mapping[Source, tuple[Row, ...]] = reading.rows
    probe = Probe(part, rows, reading.result, sizing, ranges, seed, dtype)
    if reading.decay is not None and reading.transform is not None:
        z = torch.randn(probe.shape(reading.decay), generator=probe.generator, dtype=torch.float64)
        log_decay = -(4.0 / probe.length) * (0.2 + torch.nn.functional.softplus(z))
        probe.values[reading.decay] = reading.transform.inverse(log_decay / reading.rate).to(dtype)
    if reading.family[1] == "delta":
        # Keys of norm 1/2 to 1: with longer ones a delta rule diverges.
        key = probe.values[reading.key].double()
        held = {id(a) for a in reading.axes.key}
        dims = [i for i, row in enumerate(rows[reading.key]) if any(id(a) in held for a in row)]
        norm = key.square().sum(dims, keepdim=True).sqrt()
        probe.values[reading.key] = (key / norm * (0.5 + 0.5 * torch.sigmoid(norm))).to(dtype)
    return probe


def _count(sizing: Sizing, value: object) -> int:
    made = 1
    for n in sizing.shape(value):  # type: ignore[arg-type]
        made *= n
    return made
