"""Certify: the proof. Subgraph and operator on fresh draws, at several lengths, in float64 where memory allows.

The first draw has the length of the graph, whatever it is: what only shows at that length (a window) is seen. All other
axes are cut down, where the code names no position along them. Bounds inside of the subgraph are crossed, and gradients
are compared, on draws of their own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from llcompile.kernels.choice import portable
from llcompile.patterns import reasons
from llcompile.patterns.agreement import BUDGETS, apart, difference, gradients, precision
from llcompile.patterns.boundary import NOT_SHOWN
from llcompile.patterns.records import Certificate
from llcompile.patterns.structure.classify import Rejection
from llcompile.patterns.structure.cut import Subgraph
from llcompile.patterns.structure.fit import output_of
from llcompile.patterns.structure.hypothesis import Hypothesis
from llcompile.patterns.structure.lifted import LiveIn
from llcompile.patterns.structure.pieces import expect_known, expect_pieces
from llcompile.patterns.structure.probe import Probe
from llcompile.patterns.structure.program import Value
from llcompile.patterns.structure.ranges import Range
from llcompile.patterns.structure.sizing import Sizing, small

log = logging.getLogger("llcompile")

DRAWS = 3  # at least
_LARGE = 1 << 28  # numbers in the largest tensor of a proof, above which it is done in float32


def certify(
    subgraph: Subgraph, hypothesis: Hypothesis, tried: Probe, bounds: Mapping[Value, Range]
) -> tuple[Hypothesis, Certificate]:
    """The hypothesis with its scale as it is at the graph's length, and its certificate.

    Args:
        subgraph: the subgraph.
        hypothesis: what it is supposed to be.
        tried: the probe that found the hypothesis; where that could not run at other sizes, the proof does not.
        bounds: the range of every value of the program.

    Raises:
        Rejection: a draw on which the two differ.
    """
    expect_known(subgraph)
    worst, draws, budget = 0.0, 0, _budget(hypothesis)
    sizings = _sizings(subgraph, tried)
    for number, sizing in enumerate(sizings):
        probe, theirs = _drawn(subgraph, hypothesis, (sizing, sizings[0]), tried.ranges, seed=100 + number)
        ours = output_of(probe, hypothesis)
        error = difference(theirs, ours)
        if number == 0 and error > BUDGETS["float32"]:
            hypothesis, error = _rescaled(hypothesis, theirs, ours)
        worst, draws = max(worst, error), draws + 1
        if worst > budget:
            raise Rejection(reasons.PROOF_FAILED(error=worst, length=probe.length), 3, open=True)
    probe, _ = _drawn(subgraph, hypothesis, (sizings[-1], sizings[0]), tried.ranges, seed=200)
    draws += expect_pieces(subgraph, hypothesis, probe, bounds, lambda p: _apart(p, hypothesis), budget)
    probe, _ = _drawn(subgraph, hypothesis, (sizings[-1], sizings[0]), tried.ranges, seed=300)
    if all(op.name != "detach" for op in subgraph.ops):
        _expect_gradients(probe, hypothesis)
    return hypothesis, Certificate(worst, precision(worst), draws)


def _apart(probe: Probe, hypothesis: Hypothesis) -> float | None:
    """How far the subgraph and the operator are apart; None where the subgraph has no finite result."""
    theirs = probe.outputs()
    return difference(theirs, output_of(probe, hypothesis)) if bool(torch.isfinite(theirs).all()) else None


def _expect_gradients(probe: Probe, hypothesis: Hypothesis) -> None:
    """The gradients of every live-in are the operator's, on a draw of their own.

    Raises:
        Rejection: one of them is not: the code stops it, or makes another one of it.
    """
    live_ins = [s for s, x in probe.values.items() if x.is_floating_point()]
    with torch.inference_mode(False), torch.enable_grad(), portable():
        probe.values = {s: x.clone().requires_grad_(s in live_ins) for s, x in probe.values.items()}
        leaves = [probe.values[s] for s in live_ins]
        try:
            theirs = gradients([probe.outputs()], leaves)
        except NOT_SHOWN as failure:
            log.debug("structure: %s has no backward: %s", probe.subgraph.result, failure)
            return
        ours = gradients([output_of(probe, hypothesis)], leaves)
    error = apart(theirs, ours)
    if not error <= BUDGETS["float32"]:
        raise Rejection(reasons.GRADIENTS_DIFFER(error=error), 3)


def _drawn(
    subgraph: Subgraph,
    hypothesis: Hypothesis,
    sizings: tuple[Sizing, Sizing],
    ranges: Mapping[LiveIn, Range],
    seed: int,
) -> tuple[Probe, Tensor]:
    """A draw and the subgraph's result on it, at the second sizes where the subgraph does not run at the first."""
    for sizing in sizings:
        probe = _probe(subgraph, hypothesis, sizing, ranges, seed)
        try:
            return probe, probe.outputs()
        except NOT_SHOWN as error:
            if sizing is sizings[1]:
                raise
            log.debug("structure: %s does not run at length %d: %s", subgraph.result, sizing.length, error)
    raise AssertionError("the last sizes return or raise")


def _budget(hypothesis: Hypothesis) -> float:
    """The largest error that is rounding: code may hold float32 numbers. A fitted epsilon must be exact."""
    return BUDGETS["float32" if hypothesis.normaliser is None else "float64"]


def _sizings(subgraph: Subgraph, tried: Probe) -> list[Sizing]:
    """The graph's own length first (the scale is that of it), then others where the code allows them."""
    analysis = tried.sizing.analysis
    if not tried.sizing.sizes:
        return [tried.sizing] * DRAWS
    own = small(analysis, subgraph, keep_time=True)
    found = [own]
    for variant in (1, 2):
        other = small(analysis, subgraph, keep_time=False, variant=variant)
        if other.length != own.length:
            found.append(other)
    return found + [own] * (DRAWS - len(found))


def _rescaled(hypothesis: Hypothesis, theirs: Tensor, ours: Tensor) -> tuple[Hypothesis, float]:
    """A scale that hangs on the length (a mean, say) is that of the graph's."""
    plain = [s for s, how in hypothesis.post if how == "plus"]
    if (
        hypothesis.own is not None
        or plain
        or hypothesis.normaliser is not None
        or hypothesis.first is not None
        or hypothesis.skip is not None
    ):
        return hypothesis, difference(theirs, ours)
    factor = float((theirs * ours).sum() / (ours * ours).sum().clamp_min(1e-300))
    return hypothesis.scaled(hypothesis.scale * factor), difference(theirs, ours * factor)


def _probe(
    subgraph: Subgraph, hypothesis: Hypothesis, sizing: Sizing, ranges: Mapping[LiveIn, Range], seed: int
) -> Probe:
    """A draw of which every operand is as in a real model, so that the far past still counts at any length."""
    largest = max((math.prod(sizing.shape(v)) for op in subgraph.ops for v in op.outputs), default=0)
    dtype = torch.float32 if largest > _LARGE else torch.float64
    probe = Probe(subgraph, hypothesis.layouts, hypothesis.result, sizing, ranges, seed, dtype)
    if hypothesis.decay is not None and hypothesis.transform is not None:
        z = torch.randn(probe.shape(hypothesis.decay), generator=probe.generator, dtype=torch.float64)
        log_decay = -(4.0 / probe.length) * (0.2 + torch.nn.functional.softplus(z))
        probe.values[hypothesis.decay] = hypothesis.transform.inverse(log_decay / hypothesis.rate).to(dtype)
    # Keys of norm 1/2 to 1: with longer ones a delta rule diverges. Of 1/4 to 1/2 where two others are multiplied.
    shortened = {hypothesis.key: 1.0} if hypothesis.family[1] == "delta" else {}
    erased = dict.fromkeys((*hypothesis.erase_query, *hypothesis.erase_key), 0.5)
    for live_in, most in {**shortened, **erased}.items():
        key = probe.values[live_in].double()
        axes = enumerate(hypothesis.layouts[live_in])
        dims = [i for i, axis in axes if not {*axis}.isdisjoint(hypothesis.axes.key)]
        if dims:
            norm = key.square().sum(dims, keepdim=True).sqrt()
            probe.values[live_in] = (key / norm * most * (0.5 + 0.5 * torch.sigmoid(norm))).to(dtype)
    return probe
