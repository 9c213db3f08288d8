"""Rewrite a token: weighs what a mixer gives for a single token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from llcompile.passes.emit import kept, level_weights, sets, weight_inputs, writing
from llcompile.passes.one_token import TokenCandidate, TokenPart
from llcompile.passes.session import Session
from llcompile.patterns.structure.axes import Axis, Dim
from llcompile.patterns.structure.sizing import arrange


def write_token(session: Session, candidate: TokenCandidate, inputs: dict[tuple[int, str], fx.Node]) -> None:
    """Multiplies the output of each of its parts by the weights of level 0."""
    effects, tensors = candidate.region.effects, weight_inputs(session, candidate, inputs)
    if candidate.level_weights is None:
        return
    read = kept(candidate)
    for part in candidate.parts:
        output, dtype = part.output, part.output.meta["example_value"].dtype
        with writing(candidate, output.next, like=output) as as_proxy:
            weights = level_weights(
                session,
                candidate,
                tensors,
                lambda x: as_proxy(read.get(x, x)),
                lambda: _empty(part, as_proxy(output)),  # noqa: B023
                dtype,
            )
            result = _weigh(part, as_proxy(output), weights, sets(candidate))
        nodes = list(output.graph.nodes)
        for user in [user for user in output.users if user not in candidate.written]:
            user.replace_input_with(output, result.node)
        old, fresh = effects.shows(output), effects.new()
        effects.rename(nodes[nodes.index(result.node) + 1 :], old, fresh)
        effects.place(result.node, fresh, like=output)


def _weigh(part: TokenPart, output: fx.Proxy, weights: Any, sets: int) -> Any:
    """The output times the weights of level 0 (w [B, 1, W, L], of W sets)."""
    place = part.place
    heads = math.prod(part.sizes[id(dim)] for dim in place.heads)
    weights = weights if sets == heads else weights.repeat_interleave(heads // sets, 2)
    first = weights[..., 0].unsqueeze(-1).to(part.output.meta["example_value"].dtype)
    groups: list[Axis] = [place.batch, (), place.heads, ()]
    return output * arrange(first, groups, place.axes, _size_of(part, output))


def _empty(part: TokenPart, output: fx.Proxy) -> fx.Proxy:
    """A tensor [B, 1, 1]."""
    size = _size_of(part, output)
    return output.new_zeros((next((size(dim) for dim in part.place.batch), 1), 1, 1))


def _size_of(part: TokenPart, output: fx.Proxy) -> Callable[[Dim], Any]:
    """The size of a dim; the batch's is read off the output, where it may vary."""
    axes, batch, shape = part.place.axes, part.place.batch, part.output.meta["example_value"].shape
    alone = [(position, axis[0]) for position, axis in enumerate(axes) if len(axis) == 1 and axis[0] in batch]
    varying = {id(dim): output.size(position) for position, dim in alone if isinstance(shape[position], torch.SymInt)}
    return lambda dim: varying.get(id(dim), part.sizes[id(dim)])
