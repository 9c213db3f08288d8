"""Early reads: mixers whose queries read the state before their own token changes it, by the operator on moved queries.

o_t = scale * q_t^T S_{t-1} is what the operator gives at token t - 1 for the query of token t. Tokens keep their
positions, so that a state is the same as that of any other mixer: the query of token t, with the level weights of
token t, reads the levels as token t - 1 left them, which is level 0. At the first token it reads the state that came
in, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from llcompile.patterns.known.operator_call import OperatorCall, Sequences
from llcompile.patterns.mixer import Mixer

CallOperator = Callable[[Mixer, Any, OperatorCall, Sequences | None], tuple[Any, Any]]


def call(
    mixer: Mixer, level_weights: Any, call: OperatorCall, sequences: Sequences | None, operator: CallOperator
) -> tuple[Any, Any]:
    """The output and the final state of a mixer that reads early; `operator` calls the operator for any other."""
    plain = replace(mixer, early=False)
    if call.single:
        output, final = operator(plain, level_weights, call, sequences)
        return _of_a_token(mixer, level_weights, call, output), final
    moved = None if level_weights is None else level_weights.roll(-1, 1)
    output, final = operator(replace(plain, query=mixer.query.roll(-1, 1)), moved, call, sequences)

    def first(rows: Rows) -> Any:
        return _read(mixer, None if level_weights is None else rows(level_weights), call, rows(mixer.query))

    return moved_back(output, sequences, None if mixer.initial_state is None else first), final


Rows = Callable[[Any], Any]  # [B, T, ...] -> [N, ...], at the first token of each sequence


def moved_back(output: Any, sequences: Sequences | None, first: Callable[[Rows], Any] | None) -> Any:
    """What queries that were moved by one token read [B, T, ...], at the tokens that they belong to.

    Args:
        output: at the tokens before these.
        sequences: where they are.
        first: what the first token of each sequence reads [N, ...]; None: zeros.
    """
    if sequences is not None and sequences.cu_seqlens is not None:
        return _at_starts(output, sequences.cu_seqlens, first)
    start = torch.zeros_like(output[:, :1])
    if first is not None:
        start = first(lambda x: x[:, 0]).type_as(output).unsqueeze(1)
    return torch.cat([start, output[:, :-1]], dim=1)


def _of_a_token(mixer: Mixer, level_weights: Any, call: OperatorCall, output: Any) -> Any:
    """What a single token reads, of the shape of `output`."""
    if mixer.initial_state is None:
        return torch.zeros_like(output)
    if mixer.step:
        return _read(mixer, level_weights, call, mixer.query).type_as(output)
    weights = None if level_weights is None else level_weights[:, 0]
    return _read(mixer, weights, call, mixer.query[:, 0]).type_as(output).unsqueeze(1)


def _at_starts(output: Any, cu_seqlens: Any, first: Callable[[Rows], Any] | None) -> Any:
    """As `moved_back`, of packed sequences [1, T, N, M]."""
    output = output.roll(1, 1)
    starts, positions = cu_seqlens[:-1].long(), torch.ones_like(output[0, :, 0, 0]).long().cumsum(0) - 1
    # Of sequences without tokens, which start where the next one does or behind the end, none is the last to start.
    row = (starts.unsqueeze(0) <= positions.unsqueeze(1)).sum(1) - 1  # [T]
    here = starts[row] == positions
    begun = torch.zeros_like(output)
    if first is not None:
        at = torch.minimum(starts, positions[-1:])  # [N]
        begun = first(lambda x: x[0][at]).type_as(output)[row].unsqueeze(0)
    return torch.where(here[None, :, None, None], begun, output)


def _read(mixer: Mixer, weights: Any, call: OperatorCall, query: Any) -> Any:
    """What queries [B, H, K] with level weights [B, H, L] read from the state that came in, [B, H, V]."""
    state = mixer.initial_state
    if call.own_state:
        state = (state[:, :, 1:].float() * weights.float()[..., None, None]).sum(2)
    elif weights is not None:
        state = state * weights.type_as(state)[..., -1, None, None]
    return mixer.scale * (query.type_as(state).unsqueeze(-1) * state).sum(-2)
