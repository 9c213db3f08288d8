"""The other mode: what was found in eval is looked at in training, too, and the other way about.

Code that asks for `training` may be another program there: dropout on the scores is no mixer. Level weights that act
in eval alone would never learn, so such a mixer is declined at the conversion; what acts in training alone keeps its
level weights, with a note. The look is made only where code of a converted module has read a `training` flag.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

from llcompile.checks.example import Example, LookBackend
from llcompile.checks.runs import Mixer
from llcompile.checks.verify import Verdict
from llcompile.options import Options
from llcompile.passes.session import Session
from llcompile.patterns import reasons
from llcompile.report import Report
from llcompile.weights import missed


def judge(example: Example, options: Options, mixers: Sequence[Mixer], read: Collection[int]) -> Verdict:
    """The mixers that must not be rewritten for what they are in the other mode, and notes on others.

    Args:
        example, options: as for the conversion that has just been made.
        mixers: what it has converted.
        read: ids of the modules whose `training` the traced code has read.
    """
    asking = [m for m in mixers if m.weights is not None and any(id(part) in read for part in m.owner.modules())]
    if not asking:
        return Verdict()
    mode = not next(iter(asking)).owner.training
    try:
        seen = _run(example, options, mode)
    except Exception:  # it does not run in the other mode on these inputs: nothing is known, and a call will tell
        return Verdict()
    verdict = Verdict()
    for mixer in asking:
        reason = seen.missed.get(mixer.key) if mixer.key not in seen.read else None
        if reason is not None and mode and mixer.fresh:
            verdict.blamed[mixer] = reasons.OTHER_IN_TRAINING(reason=reason)
        elif reason is not None:
            verdict.notes[mixer] = (
                f"in {missed.mode_name(mode)} it is not a mixer, and a compiled call raises: {reason}"
            )
    return verdict


class _Seen:
    """Which level weights the graphs read, and why others are not read."""

    def __init__(self) -> None:
        self.read: set[tuple[int, str]] = set()
        self.missed: dict[tuple[int, str], str] = {}

    def note(self, session: Session, _: Report) -> None:
        self.read.update((id(s.owner), s.attribute) for s in session.candidates if s.open)
        for owner, unread in missed.misses(session):
            self.missed.update(((id(owner), name), missed.why(session, owner)) for name in unread)


def _run(example: Example, options: Options, mode: bool) -> _Seen:
    """What is seen in the mode; nothing is attached."""
    seen = _Seen()
    before = [(module, module.training) for module in example.model.modules()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backend = LookBackend(options, example.names, dry_run=True, visit=seen.note)
            example.trace(backend, lambda: example.model.train(mode))
    finally:
        for module, training in before:
            module.training = training
    return seen
