"""Collect: what there is to see of the mixers of one graph, from the session that decided about them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from llcompile.driver import distinct
from llcompile.look import code, mixer_operands
from llcompile.look.drawing import draw
from llcompile.look.level_table import level_table
from llcompile.look.mixer_look import MixerLook
from llcompile.look.operator_call import call_in, weight_nodes
from llcompile.look.source_lines import excerpt
from llcompile.passes import pipeline
from llcompile.passes.candidate import Candidate, GraphCandidate
from llcompile.passes.rewrite_call import original
from llcompile.passes.session import Session
from llcompile.patterns.records import Declined
from llcompile.torch_internals.places import module_of


@dataclass(frozen=True)
class _Draft:
    """A mixer whose graph has been seen before the rewrite."""

    look: MixerLook
    candidate: Candidate | None
    position: int
    titles: Mapping[fx.Node, str] = field(default_factory=dict)


def collect(session: Session) -> tuple[list[MixerLook], Callable[..., Any]]:
    """The mixers that the session's report names, before and after; and the model's own code, to be run as it is.

    The session's graph is rewritten as it would be for a compilation, and then serves nobody.
    """
    drafts = _drafts(session)
    own_code = original(session)
    pipeline.change(session)
    return [_after(draft) for draft in drafts], own_code.forward


def without_graph(record: Declined) -> MixerLook:
    """A mixer that was declined while the model was traced, so that no graph has it."""
    return MixerLook(
        module=record.module,
        fate="declined",
        where=record.where,
        origin="function",
        reason=record.reason,
        hint=record.hint,
        code=record.code,
        source=excerpt(record.where),
    )


def _drafts(session: Session) -> list[_Draft]:
    order = {node: i for i, node in enumerate(n for region in session.regions for n in region.graph.nodes)}
    shown = [*distinct(session.candidates), *(candidate for candidate in session.candidates if not candidate.open)]
    drafts = [_of_candidate(session, candidate, order) for candidate in shown]
    drafts.extend(_of_near_miss(session, record, order) for record in session.refused)
    return sorted(drafts, key=lambda draft: draft.position)


def _of_candidate(session: Session, candidate: Candidate, order: dict[fx.Node, int]) -> _Draft:
    inside = region_nodes(candidate)
    nodes = sorted((n for n in inside if n in order), key=order.__getitem__)
    before = code.steps(nodes, candidate.module)
    operands = mixer_operands.operands(candidate)
    weights = candidate.level_weights
    fresh = candidate.owner is None or session.settings.find(candidate.owner, candidate.attribute) is None
    look = MixerLook(
        module=candidate.module,
        fate="converted" if candidate.open else "declined",
        where=candidate.where,
        family=candidate.family,
        decay=candidate.cell[0] if candidate.cell else None,
        correction=candidate.cell[1] if candidate.cell else None,
        origin=candidate.origin,
        reason=candidate.reason,
        hint="" if candidate.given is None else candidate.given.hint,
        code="" if candidate.given is None else candidate.given.code,
        certificate=candidate.certificate,
        level_weights="none" if weights is None else weights.kind,
        parameters=0 if weights is None else sum(p.numel() for p in weights.parameters()),
        operands=tuple(operand for operand, _ in operands),
        before="\n".join([*(operand.text for operand, _ in operands), code.text(before)]),
        source=excerpt(candidate.where, (step.where for step in before)),
        notes=candidate.all_notes,
        drawing_before=draw(nodes, candidate.module, titles=_titles(operands)),
        table=None if weights is None else level_table(weights, fresh),
    )
    return _Draft(look, candidate, order.get(candidate.node, 0), _titles(operands))


def _titles(operands: list[mixer_operands.Read]) -> dict[fx.Node, str]:
    """What the boxes of operands are called. One tensor may be several: queries and keys, say."""
    titles: dict[fx.Node, list[str]] = {}
    for operand, node in operands:
        if node is not None:
            titles.setdefault(node, []).append(operand.title)
    return {node: ", ".join(dict.fromkeys(names)) for node, names in titles.items()}


def _of_near_miss(session: Session, record: Declined, order: dict[fx.Node, int]) -> _Draft:
    inside = session.missed_nodes.get(record, frozenset())
    nodes = sorted((n for n in inside if n in order), key=order.__getitem__)
    if not nodes:
        return _Draft(without_graph(record), None, len(order))
    before = code.steps(nodes, record.module)
    look = replace(
        without_graph(record),
        origin="graph",
        before=code.text(before),
        source=excerpt(record.where, (step.where for step in before)),
        drawing_before=draw(nodes, record.module),
    )
    return _Draft(look, None, order[nodes[-1]])


def _after(draft: _Draft) -> MixerLook:
    if draft.candidate is None or not draft.candidate.open:
        return draft.look
    candidate = draft.candidate
    written = set(candidate.written)
    nodes = [n for n in candidate.region.graph.nodes if n in written and (n.users or n.is_impure())]
    after = code.text(code.steps(nodes, candidate.module))
    folded = dict.fromkeys(weight_nodes(nodes), "level weights")
    drawing = draw(nodes, candidate.module, folded, draft.titles)
    return replace(draft.look, after=after, call=call_in(nodes), drawing_after=drawing)


def region_nodes(candidate: Candidate) -> set[fx.Node]:
    """The nodes of the graph that the operator takes the place of."""
    if not isinstance(candidate, GraphCandidate):
        return {candidate.node, *(user for user in candidate.node.users if user.target is operator.getitem)}
    module, _ = module_of(candidate.node.meta)
    nodes: set[fx.Node] = set()
    for found in candidate.group:
        alike = {op: [op.node] for op in found.ops}
        for node, value in found.program.results.items():
            if value.op in alike:
                alike[value.op].append(node)
        # Nodes that compute the same are one operation, wherever they stand: the mixer's own are meant.
        for same in alike.values():
            nodes.update([n for n in same if module_of(n.meta)[0] == module] or same[:1])
    return nodes
