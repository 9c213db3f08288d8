"""Names: a mixer's level weights by where it stands in the user's code: the same in every mode, length and frame.

Level weights belong to a place and not to an order in a graph: a mixer that only trains, a graph break between two of
them or a short sequence must not hand one mixer's weights to another.
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from llcompile.passes.candidate import Candidate
from llcompile.passes.session import Session
from llcompile.patterns import reasons
from llcompile.patterns.graph.walk import walk
from llcompile.torch_internals.inputs import input_value, is_parameter
from llcompile.torch_internals.places import is_forward_of, place_of, user_frames
from llcompile.torch_internals.trace import is_resumed


@dataclass(frozen=True)
class CodePlace:
    """Where a mixer stands.

    Args:
        lines: (function, line within it) from the owner's forward inwards; a frame after a graph break may know the
            last of them only.
        operands: names, below the owner, of the parameters that its operands are projected with; fewer where a graph
            break stands between.
        number: which of the mixers with these lines and operands it is, in one call of the owner.
    """

    lines: tuple[tuple[str, int], ...]
    operands: frozenset[str]
    number: int = 0

    @property
    def functions(self) -> tuple[str, ...]:
        """The lines' functions."""
        return tuple(function for function, _ in self.lines)


def names(session: Session) -> int:
    """Finds each candidate's place and the name of its level weights; returns how many have some."""
    calls: dict[Any, list[Candidate]] = {}
    for candidate in session.candidates:
        # A module that is called twice has one mixer: each call is named by itself.
        calls.setdefault((id(candidate.owner), *place_of(candidate.node)), []).append(candidate)
    known: dict[nn.Module | None, dict[str, Any]] = {}
    for candidates in calls.values():
        owner = candidates[0].owner
        if owner not in known:
            held = [] if owner is None else session.settings.held(owner)
            known[owner] = {n: _as_now(w.place, owner) for n, w in held}
        _name(candidates, _places(candidates), known[owner], after_break=is_resumed())
    return sum(candidate.owner is not None for candidate in session.candidates)


def _as_now(place: CodePlace | None, owner: nn.Module | None) -> CodePlace | None:
    """A place by those of its operands that still have their names: adapters and parametrisations give others."""
    if place is None or owner is None:
        return place
    return replace(place, operands=place.operands.intersection(_own_parameters(owner).values()))


def _places(candidates: list[Candidate]) -> list[CodePlace]:
    """Gives each candidate its place, and returns the places."""
    seen: Counter[Any] = Counter()
    places = []
    for candidate in candidates:
        lines, operands = code_lines(candidate.node.meta, candidate.owner), _operands(candidate)
        candidate.place = CodePlace(lines, operands, seen[lines, operands])
        places.append(candidate.place)
        seen[lines, operands] += 1
    return places


def _name(
    candidates: list[Candidate], places: list[CodePlace], held: dict[str, CodePlace | None], after_break: bool
) -> None:
    """Gives each candidate the name of the level weights of its place, or a free one; `held` says which there are."""
    known = {name: place for name, place in held.items() if place is not None}
    pending = list(zip(candidates, places, strict=True))
    for rule in (*_RULES, _within) if after_break else _RULES:
        for candidate, own in list(pending):
            fits = [name for name, place in known.items() if rule(place, own)]
            if len(fits) > 1:
                candidate.decline(reasons.AMBIGUOUS_WEIGHTS())
            if fits:
                pending.remove((candidate, own))
                candidate.attribute = fits[0]
            if len(fits) == 1:
                del known[fits[0]]
    for candidate, own in pending if after_break else ():
        # New level weights would take the place of trained ones.
        if any(_may_be(place, own) for place in known.values()):
            candidate.decline(reasons.AMBIGUOUS_WEIGHTS())
    unplaced = [name for name, place in held.items() if place is None]
    if len(unplaced) > len(pending) > 0:
        for candidate, _ in pending:
            candidate.decline(reasons.AMBIGUOUS_CHECKPOINT())
    free = (name for name in _names() if name not in held)
    for candidate, own in pending:
        candidate.attribute = unplaced.pop(0) if unplaced else next(free)
        held[candidate.attribute] = own


def _names() -> Iterator[str]:
    yield "loglinear"
    number = 2
    while True:
        yield f"loglinear_{number}"
        number += 1


def _ends(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Whether one is the end of the other: a frame after a graph break starts further inside."""
    count = min(len(first), len(second))
    return count > 0 and first[-count:] == second[-count:]


def _overlap(first: CodePlace, second: CodePlace) -> bool:
    return first.operands <= second.operands or second.operands <= first.operands


def _may_be(first: CodePlace, second: CodePlace) -> bool:
    return _overlap(first, second) and _ends(first.functions, second.functions)


def _within(first: CodePlace, second: CodePlace) -> bool:
    """After a break Dynamo gives a call of several lines another of its lines; what operands there are must tell."""
    return bool(first.operands and second.operands) and first.number == second.number and _may_be(first, second)


# The nearest first. Where lines differ (the last operation of a loop stands elsewhere at another length), the operands
# must tell; where a break hides the operands, the lines must.
_RULES: tuple[Callable[[CodePlace, CodePlace], bool], ...] = (
    lambda a, b: a == b,
    lambda a, b: bool(a.operands) and a.operands == b.operands and a.number == b.number and _ends(a.lines, b.lines),
    lambda a, b: (
        bool(a.operands) and a.operands == b.operands and a.number == b.number and _ends(a.functions, b.functions)
    ),
    lambda a, b: _overlap(a, b) and a.number == b.number and _ends(a.lines, b.lines),
)


def has_run(session: Session, owner: nn.Module, place: Any) -> bool:
    """Whether the code of a mixer's place ran in this frame, with one of its parameters, whatever was found in it."""
    lines = place.lines if isinstance(place, CodePlace) else ()
    now = _as_now(place, owner) if lines else None
    read = {id(input_value(node)) for node in session.graph.nodes if node.op == "placeholder"}
    if (
        now is not None
        and now.operands
        and not any(name in now.operands for tensor, name in _own_parameters(owner).items() if tensor in read)
    ):
        return False
    stacks = dict.fromkeys(n.meta.get("stack_trace") for region in session.regions for n in region.graph.nodes)
    return bool(lines) and any(code_lines({"stack_trace": stack}, owner) == lines for stack in stacks if stack)


def code_lines(meta: Mapping[str, Any], owner: nn.Module | None) -> tuple[tuple[str, int], ...]:
    """(function, line within it) of the user's code that made a node, from the owner's forward inwards."""
    frames = user_frames(meta)
    start = _start(frames, owner)
    return tuple(_definition(f["file"], int(f["line"]), f["function"]) for f in frames[start:])


def _start(frames: list[dict[str, str]], owner: nn.Module | None) -> int:
    """The last frame that is the owner's forward; 0 where the trace began inside of it."""
    if owner is None:
        return 0
    inside = (i for i, frame in enumerate(frames) if is_forward_of(owner, frame))
    return max(inside, default=0)


def _definition(file: str, line: int, function: str) -> tuple[str, int]:
    """The innermost function around a line, and the line within it; a comment above the function moves neither."""
    found = [span for span in _definitions(file, len(linecache.getlines(file))) if span[0] <= line <= span[1]]
    if not found:
        return function, line
    start, _, name = max(found)
    return name, line - start


@functools.lru_cache(maxsize=64)
def _definitions(file: str, length: int) -> list[tuple[int, int, str]]:
    """(first line, last line, qualified name) of each function of a file; `length` in lines tells versions apart."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return []
    return list(_walk(tree, ""))


def _walk(node: ast.AST, prefix: str) -> Iterator[tuple[int, int, str]]:
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{prefix}.{child.name}" if prefix else child.name
            if not isinstance(child, ast.ClassDef):
                yield child.lineno, child.end_lineno or child.lineno, name
        yield from _walk(child, name)


def _operands(candidate: Candidate) -> frozenset[str]:
    """The owner's parameters that the operands are made with, the nearest on each way."""
    if candidate.owner is None:
        return frozenset()
    names = _own_parameters(candidate.owner)

    def parameters(node: fx.Node) -> list[Any]:
        return [held for n in node.all_input_nodes if is_parameter(held := _held(candidate, n))]

    above = walk(candidate.activations(), lambda node: () if parameters(node) else node.all_input_nodes)
    return frozenset(names[id(held)] for node in above for held in parameters(node) if id(held) in names)


def _own_parameters(owner: nn.Module) -> dict[int, str]:
    """Names of the parameters below a module by their id, without level weights."""
    return {id(parameter): name for name, parameter in owner.named_parameters() if ".loglinear" not in f".{name}"}


def _held(candidate: Candidate, node: fx.Node) -> Any:
    outer = candidate.region.outer(node) if node.op == "placeholder" else node
    return input_value(outer) if outer.op == "placeholder" else None
