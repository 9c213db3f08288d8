"""Attach: finds or makes the level weights of each proved mixer, and the tensor that they are computed from."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from llcompile.errors import LevelWeightsError
from llcompile.passes.candidate import CallCandidate, Candidate, GraphCandidate
from llcompile.passes.head_split import HeadSplit, expect_even, expect_fitting, head_split
from llcompile.passes.one_token import remember
from llcompile.passes.session import Session
from llcompile.passes.weight_input import Read, Role, given, is_projected, projection_input, read_by, role_of
from llcompile.patterns import reasons
from llcompile.patterns.boundary import boundary
from llcompile.patterns.mixer import MixerShape
from llcompile.torch_internals.inputs import input_value, is_handed_in_twice
from llcompile.torch_internals.owner_input import ModuleCall, call_under_way
from llcompile.torch_internals.sizes import size_hint
from llcompile.torch_internals.trace import is_resumed

# The options that say what level weights are like, by what they are about.
_OPTIONS = {"kind": "level_weights", "levels": "levels", "features": "routing_features"}
_NO_ROOM = "the header of its state, K * V numbers, has no room for a wider key sum of each level"


def attach(session: Session) -> int:
    """Gives every open candidate its level weights; returns how many were newly attached."""
    if session.settings.kind == "none":
        return 0
    for candidate in session.candidates:
        if candidate.owner is None:
            candidate.decline(reasons.NO_OWNER())
        elif candidate.open:
            _attach(session, candidate, candidate.owner)
    return len(session.attached)


def _expect_values(session: Session, candidate: Candidate, owner: nn.Module, weights: Any) -> None:
    """The level weights must be where the graph can read them, and must have values if the operands have."""
    operands = [node.meta["example_value"] for node in candidate.activations()]
    if any(t.is_meta for _, t in weights.tensors()) and not any(operand.is_meta for operand in operands):
        candidate.decline(reasons.WEIGHTS_ON_META())
    if session.marks:  # the owner's hook has handed them in
        return
    try:
        session.settings.path(owner, candidate.attribute)
    except LookupError as error:
        candidate.decline(reasons.WEIGHTS_OUT_OF_REACH(error=error))


def _attach(session: Session, candidate: Candidate, owner: nn.Module) -> None:
    settings, shape = session.settings, candidate.shape
    assert shape is not None
    weights = settings.find(owner, candidate.attribute)
    split = candidate.split = head_split(candidate.values())
    expect_even(candidate.where, split)
    if weights is not None:
        expect_fitting(f"{candidate.module or 'the model'}.{candidate.attribute}", candidate.where, weights, split)
    if weights is not None and _heads_seen(weights, split) != shape.level_heads and not _serves_all(weights, candidate):
        raise LevelWeightsError(
            f"{candidate.module}.{candidate.attribute} was made for {weights.heads} heads and an input of width "
            f"{weights.in_features}, but the mixer at {candidate.where} needs them for {shape.level_heads}. "
            "Call llcompile.revert(model) and convert it again."
        )
    role, width = _find_source(candidate, owner, weights)
    if not candidate.open:
        return
    if weights is None:
        weights = _made(session, candidate, owner, shape, width)
        if not settings.dry_run:
            settings.attach(owner, candidate.attribute, weights)
            session.attached.append((owner, candidate.attribute))
    elif session.settings.compiles:
        _expect_values(session, candidate, owner, weights)
    if not settings.dry_run:
        # What a checkpoint does not say is learned from the first graph that tells.
        weights.place = weights.place or candidate.place
        if isinstance(candidate, GraphCandidate):
            with boundary(f"the place of {candidate.where}"):
                weights.token = remember(candidate) or weights.token
        weights.role = weights.role or role
        if candidate.owner_input is not None and settings.compiles:
            weights.owner_input = candidate.owner_input
    _check_asked(session, candidate, weights)
    candidate.level_weights = weights


def _heads_seen(weights: Any, split: HeadSplit | None) -> int:
    """For how many heads of a graph's level weights are."""
    return int(weights.heads if split is not None and split.inside else weights.own_heads)


def _made(session: Session, candidate: Candidate, owner: nn.Module, shape: MixerShape, width: int | None) -> Any:
    """New level weights: of the kind that was asked for, or of what the mixer allows."""
    settings = session.settings
    features = shape.features(settings.features, settings.levels, in_states=isinstance(candidate, CallCandidate))
    wanted, remark = settings.kind, ""
    by_default = wanted == "auto"
    heads = shape.level_heads if candidate.split is None else shape.level_heads * candidate.split.seen
    if by_default:
        wanted, remark = settings.choose(heads, settings.levels, width) if width else ("static", "")
    kind, why = _possible(wanted, features, width)
    if why and "kind" in settings.asked and kind != settings.kind:
        candidate.notes.append(f"its level weights are {kind} and not {settings.kind}: {why}")
    if kind == "routed" and "features" in settings.asked and features != settings.features:
        candidate.notes.append(f"it has {features} routing features and not {settings.features}: {_NO_ROOM}")
    more = {"features": features} if kind == "routed" else {}
    if remark:
        session.remarks.append(remark)
    made: Any = settings.make(kind, heads, settings.levels, width, owner, **more)
    made.by_default = by_default
    if candidate.split is not None:
        settings.shard(made, candidate.split.mesh, candidate.split.heads)
    return made


def _possible(kind: str, features: int, width: int | None) -> tuple[str, str]:
    """The kind that a mixer's level weights can have where `kind` is wanted, and what forbids more."""
    if not width:
        return "static", "its operands have no common input [B, T, D]"
    if kind == "routed" and not features:
        return "linear", _NO_ROOM
    return kind, ""


def _serves_all(weights: Any, candidate: Candidate) -> bool:
    """Whether level weights of one head are those of all: heads that share queries and keys are one where the code
    reads them so, and several where it copies them (a chunk loop at a length of one chunk)."""
    return isinstance(candidate, GraphCandidate) and weights.own_heads == 1


def _check_asked(session: Session, candidate: Candidate, weights: Any) -> None:
    """What was asked for must not contradict level weights that are there, unless the mixer allows no other kind."""
    asked = {name: value for name, value in session.settings.asked.items() if getattr(weights, name) != value}
    assert candidate.shape is not None
    fed = candidate.weight_input is not None or candidate.owner_input is not None
    wanted, in_states = session.settings.features, isinstance(candidate, CallCandidate)
    features = candidate.shape.features(wanted, weights.levels, in_states)
    possible, _ = _possible(session.settings.kind, features, weights.in_features or fed)
    if weights.kind == possible:
        asked.pop("kind", None)
    if weights.kind != "routed" or weights.features == features:
        asked.pop("features", None)
    if asked:
        said = " and ".join(f"{_OPTIONS[name]}={value!r}" for name, value in asked.items())
        raise LevelWeightsError(
            f"options set {said}, but {candidate.module or 'the model'}.{candidate.attribute} already has level "
            f"weights of kind {weights.kind!r} with {weights.levels} levels. Leave the option out to use them; "
            "or call llcompile.revert(model), which deletes them, trained values included, and convert the model again."
        )


def _find_source(candidate: Candidate, owner: nn.Module, weights: Any) -> tuple[Role | None, int | None]:
    """Finds what the level weights read, in the graph or among the owner's arguments: its role and its width.

    Declines the candidate where level weights are there, or would be, and cannot be fed.
    """
    role = None if weights is None else weights.role
    call = call_under_way(owner)
    read = read_by(candidate)
    node = projection_input(candidate, read)
    cut = _is_cut_off(candidate, call, read)
    if node is not None and not _is_wide(weights) and is_handed_in_twice(candidate.region.outer(node)):
        return None, None  # another call may hand in another tensor for each operand
    if weights is not None and not _is_wide(weights):
        candidate.weight_input = node
        return None, None
    if node is not None and (not cut or is_projected(node)):
        found = role_of(candidate, owner, node)
        width = _width(node)
        if weights is None or (width == weights.in_features and (role is None or role.fits(found, cut))):
            candidate.weight_input = node
            return found, width
    elif node is None and not cut and weights is None:
        return None, None  # no tensor is what all operands come from
    if call is not None and cut and (role is None or role.own):
        tensor = call.sequence(*map(size_hint, candidate.rows_and_tokens))
        if tensor is not None and (weights is None or tensor.shape[-1] == weights.in_features):
            candidate.owner_input = tensor
            return Role(True, frozenset()), int(tensor.shape[-1])
    candidate.decline(reasons.CUT_OFF_INPUT() if cut else reasons.OTHER_INPUT())
    return None, None


def _is_wide(weights: Any) -> bool:
    """Whether there are level weights that read an input."""
    return weights is not None and weights.in_features is not None


def _is_cut_off(candidate: Candidate, call: ModuleCall | None, read: Read) -> bool:
    """Whether the graph begins behind a break inside of the owner's forward: the operands come from what is handed in
    and is no argument of the owner."""
    inputs = [input_value(candidate.region.outer(node)) for node in given(candidate, read)]
    if call is not None:
        return any(not call.holds(value) for value in inputs)
    return is_resumed() and bool(inputs) and not _is_called(candidate)


def _is_called(candidate: Candidate) -> bool:
    """Whether the owner's call is a part of this graph."""
    return any(
        key.split("@")[0] == str(id(candidate.owner)) for key in candidate.node.meta.get("nn_module_stack") or {}
    )


def _width(node: fx.Node) -> int:
    return int(node.meta["example_value"].shape[-1])
