"""The driver: a graph's way through the passes.

`backend`, `exporting`, `convert`, `inspect` and the look in the other mode differ in what they make of a session.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from llcompile.errors import StrictError
from llcompile.folding import folded, grouped
from llcompile.options import Options
from llcompile.passes import pipeline
from llcompile.passes.candidate import CallCandidate, Candidate
from llcompile.passes.session import Session, Settings
from llcompile.patterns.known import capture
from llcompile.patterns.records import Converted, Declined, GraphBreak
from llcompile.report import Report
from llcompile.torch_internals.breaks import graph_break
from llcompile.torch_internals.trace import restart_trace
from llcompile.weights import attachment, default_kind, fresh, head_shards, held, withheld


def new_session(
    module: fx.GraphModule,
    options: Options,
    names: Mapping[int, str] | None = None,
    dry_run: bool = False,
    compiles: bool = False,
) -> Session:
    """A session on the graph with the front door's wishes; `names` are the modules' names in the whole model.

    Dynamo traces once more where the traced code has imported a library whose functions are known.
    """
    if capture.imported_since():
        restart_trace("a library was imported on the way, and its functions are known")
    settings = Settings(
        kind=options.level_weights,
        levels=options.levels,
        features=options.routing_features,
        choose=default_kind.choose,
        make=attachment.make,
        shard=head_shards.shard,  # type: ignore[arg-type]
        find=attachment.find,
        held=lambda owner: list(held.held(owner)),
        attach=fresh.attach if compiles else attachment.attach,
        path=held.path,
        function=attachment.function,  # type: ignore[arg-type]
        withheld=withheld.withheld,
        names=names or {},
        dry_run=dry_run,
        compiles=compiles,
        asked=options.asked,
    )
    return Session(module, settings)


def look(session: Session) -> Report:
    """Everything up to the rewrite, as a report."""
    pipeline.look(session)
    return report_of(session)


def report_of(session: Session) -> Report:
    """What the session has found, as a report."""
    broken = graph_break()
    return Report(
        converted=tuple(_converted(candidate) for candidate in distinct(session.candidates)),
        declined=(
            *(Declined.because(s.given, s.module, s.where) for s in session.candidates if s.given is not None),
            *session.refused,
        ),
        untouched=tuple(session.untouched),
        graphs=1,
        breaks=() if broken is None else (GraphBreak(*broken),),
        remarks=(
            *map(_stopped, session.stopped),
            *session.remarks,
            *(() if session.candidates else _one_token(session)),
        ),
    )


def _stopped(where: str) -> str:
    """What was not looked at."""
    return (
        f"the search for hand-written mixers ended at {where}, after as many steps as a graph of this size may take; "
        "what comes after it was not looked at. Compile its layers one by one, and please report the model"
    )


def _one_token(session: Session) -> Iterator[str]:
    """What cannot be said of modules whose example is one token."""
    named = {record.module for record in session.untouched if "convolution" not in record.kind}
    for module, where in session.unseen.items():
        if module not in named:
            place = f"{module or '(root)'}: a single token cannot show mixing ({where} runs over one position)"
            yield f"{place}: use an example with several tokens"


def distinct(candidates: list[Candidate]) -> list[Candidate]:
    """The open candidates, without further calls of a module that has been called before."""
    found: dict[Any, Candidate] = {}
    for candidate in candidates:
        if candidate.open:
            found.setdefault(
                (id(candidate.owner), candidate.attribute, candidate.where) if candidate.owner else id(candidate),
                candidate,
            )
    return list(found.values())


def give_up_opaque(session: Session) -> bool:
    """Whether the frame must be traced once more, to break the graph at declined calls that no compiler can trace."""
    called = [(s, s.given) for s in session.candidates if isinstance(s, CallCandidate) and s.captured.entry.opaque]
    # Every one of them.
    new = [capture.give_up(s.captured, s.arguments, s.owner, given) for s, given in called if given is not None]
    return any(new)


def check_strict(report: Report, options: Options) -> None:
    """Raises StrictError where `strict` was asked for and something linear-time stays as it is."""
    if not options.strict:
        return
    if report.declined:
        alike = grouped(report.declined, lambda d: (d.reason, d.where, d.code))
        lines = "\n".join(
            f"  {', '.join(folded(d.module for d in group))}: {group[0].reason} ({group[0].where}) [{group[0].code}]"
            for group in alike
        )
        raise StrictError(f"strict=True, and {len(report.declined)} linear-time mixers were not converted:\n{lines}")
    if not report.converted and not report.untouched:
        said = " ".join(report.remarks) or "Check that the example runs the layers that you mean."
        raise StrictError(f"strict=True, and nothing that mixes positions was found, of whatever kind. {said}")


def _converted(candidate: Candidate) -> Converted:
    assert candidate.cell is not None
    assert candidate.shape is not None
    assert candidate.certificate is not None
    weights = candidate.level_weights
    return Converted(
        module=candidate.module,
        family=candidate.family,
        decay=candidate.cell[0],
        correction=candidate.cell[1],
        origin=candidate.origin,
        certificate=candidate.certificate,
        parameters=0 if weights is None else sum(p.numel() for p in weights.parameters()),
        heads=candidate.shape.heads * (1 if candidate.split is None else candidate.split.seen),
        key_dim=candidate.shape.key_dim,
        value_dim=candidate.shape.value_dim,
        level_weights="none" if weights is None else weights.kind,
        weight_sets=0 if weights is None else weights.heads,
        where=candidate.where,
        notes=candidate.all_notes,
    )
