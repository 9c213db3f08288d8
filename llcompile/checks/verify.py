"""The end of a conversion: what will run is run, and compared with the model's own output and gradients.

The model goes through the backend on the example inputs, in its own training mode and the caller's grad mode, with an
inner compiler that changes nothing. Level weights of 1 must give what the model gives; level weights off 1 must
change it, and must have gradients. What does not pass costs the mixers that are to blame, never the run.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from llcompile.checks.acting import acting
from llcompile.checks.compare import leaves
from llcompile.checks.example import Example
from llcompile.checks.runs import Mixer, Runs, Unverified, first_line, kept_values
from llcompile.options import Options
from llcompile.patterns.reasons import GivenReason
from llcompile.patterns.records import Declined, ModelCertificate
from llcompile.report import Report

_ALONE = 6  # groups of mixers that are tried by themselves before all are declined


@dataclass
class Verdict:
    """What the run showed: the certificate, or why there is none, and the mixers that must not be rewritten."""

    certificate: ModelCertificate | None = None
    unverified: str = ""
    blamed: dict[Mixer, GivenReason] = field(default_factory=dict)
    notes: dict[Mixer, str] = field(default_factory=dict)


def judged(report: Report, verdict: Verdict) -> Report:
    """The report with the mixers that are to blame among the declined, and the notes."""
    blamed = [(m.module, m.where, given) for m, given in verdict.blamed.items()]
    notes = {(m.module, m.where): note for m, note in verdict.notes.items()}
    kept, declined = [], list(report.declined)
    for record in report.converted:
        found = next((b for b in blamed if b[:2] == (record.module, record.where)), None)
        if found is None:
            note = notes.get((record.module, record.where))
            kept.append(record if note is None else replace(record, notes=(*record.notes, note)))
            continue
        blamed.remove(found)
        declined.append(Declined.because(found[2], record.module, record.where))
    return replace(report, converted=tuple(kept), declined=tuple(declined))


def verify(example: Example, options: Options, mixers: Sequence[Mixer]) -> Verdict:
    """Runs the converted model; never raises for what it finds, nor for reasons of its own."""
    start = time.perf_counter()
    reason = _no_values(example)
    if reason or not mixers:
        return Verdict(unverified=reason)
    with warnings.catch_warnings(), _identity(mixers):
        warnings.simplefilter("ignore")
        try:
            verdict = _judge(Runs(example, options, mixers))
        except Unverified as reason_:
            return Verdict(unverified=str(reason_))
        except Exception as error:  # nothing is counted as verified, and the conversion goes on
            return Verdict(unverified=first_line(error))
    if verdict.certificate is not None:
        seconds = time.perf_counter() - start
        verdict.certificate = replace(verdict.certificate, seconds=round(seconds, 3))
    return verdict


def _judge(runs: Runs) -> Verdict:
    """Compares, and takes mixers out until what is left agrees."""
    runs.reference()
    blamed: dict[Mixer, GivenReason] = {}
    error, gradient_error, reason = runs.compare(runs.mixers)
    if reason is not None:
        blamed = _to_blame(runs, reason)
        left = [m for m in runs.mixers if m not in blamed]
        try:
            error, gradient_error, reason = runs.compare(left)
        except Unverified as unverified:  # those that were found remain to blame
            return Verdict(unverified=str(unverified), blamed=blamed)
        if reason is not None:  # only together, or the search was cut short
            blamed.update(dict.fromkeys(left, reason))
            return Verdict(unverified="nothing is left to verify", blamed=blamed)
        if not left:
            return Verdict(blamed=blamed)
    left = [m for m in runs.mixers if m not in blamed]
    weighted, idle, notes = acting(runs, left)
    blamed.update(idle)
    names = tuple(m.module for m in weighted)
    certificate = ModelCertificate(error, gradient_error, names, str(runs.dtype).removeprefix("torch."), 0.0)
    return Verdict(certificate, "", blamed, notes)


def _to_blame(runs: Runs, reason: GivenReason) -> dict[Mixer, GivenReason]:
    """The mixers whose rewrite makes the difference; those that stand in the same line of code are one."""
    _, _, without = runs.compare([])
    if without is not None:
        problem = f"even compiled without a rewrite, the model does not reproduce its own output: {without.text}"
        raise Unverified(problem)
    groups: dict[Any, list[Mixer]] = {}
    for mixer in runs.mixers:
        groups.setdefault((type(mixer.owner), mixer.attribute, mixer.where), []).append(mixer)
    if len(groups) == 1 or len(groups) > _ALONE:
        return dict.fromkeys(runs.mixers, reason)
    blamed: dict[Mixer, GivenReason] = {}
    for group in groups.values():
        _, _, alone = runs.compare(group)
        if alone is not None:
            blamed.update(dict.fromkeys(group, alone))
    return blamed or dict.fromkeys(runs.mixers, reason)


def _no_values(example: Example) -> str:
    model = example.model
    tensors = [*model.parameters(), *model.buffers(), *leaves((example.args, example.kwargs))]
    return "the model is on the device meta, so it has no values" if any(t.is_meta for t in tensors) else ""


@contextmanager
def _identity(mixers: Sequence[Mixer]) -> Iterator[None]:
    """Level weights that were trained before stand at 1 for the comparison."""
    held = [m.weights for m in mixers if not m.fresh]
    with kept_values([t for weights in held if weights is not None for _, t in weights.tensors()]):
        for weights in held:
            if weights is not None:
                weights.set_to_one()
        yield
