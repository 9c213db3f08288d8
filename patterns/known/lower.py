"""Lowers a known call to the operator: plain torch calls that run on tensors and write themselves on proxies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

import llcompile.kernels.operators  # noqa: F401  (registers torch.ops.llcompile)
from llcompile.patterns.known import Arguments, KnownFunction, early
from llcompile.patterns.known.arguments import is_level_state, read_call
from llcompile.patterns.known.operator_call import OperatorCall, Sequences
from llcompile.patterns.known.state_layout import OPERATOR, from_operator, to_operator
from llcompile.patterns.mixer import Mixer

# (mixer, call, sequences) -> its level weights [B, T, W, L] (or [B, W, L] for a step), or None for the linear operator;
# and the routing state that they leave, or None.
Weigh = Callable[[Mixer, OperatorCall, Sequences | None], tuple[Any, Any]]


def lower_call(entry: KnownFunction, function: Callable[..., Any], given: Mapping[str, Any], levels: int | None) -> Any:
    """What the call computes through our operator, with every level weight 1 (or none, for `levels` None)."""
    arguments = read_call(entry, function, given)
    state = arguments[entry.state]
    if state is not None and not is_level_state(state):
        levels = None
    weights = None
    if levels is not None:
        weights = ones_like_weights(entry, arguments, levels)
    return lower(entry, arguments, arguments, weights)


def ones_like_weights(entry: KnownFunction, arguments: Arguments, levels: int) -> Any:
    """Level weights of 1 for a call, [B, T, H, L] ([B, H, L] for a step)."""
    sizes = [arguments.sizes[name] for name in "BTH" if name in arguments.sizes]
    return arguments[entry.value.name].new_ones(*sizes, levels, dtype=torch.float32)


def lower(entry: KnownFunction, arguments: Arguments, example: Arguments, level_weights: Any) -> Any:
    """As `lower_weighed`, for level weights that are known: [B, T, W, L] ([B, W, L] for a step), or None."""
    return lower_weighed(entry, arguments, example, lambda mixer, call, sequences: (level_weights, None))


def lower_weighed(
    entry: KnownFunction, arguments: Arguments, example: Arguments, weigh: Weigh, mask: Any = None
) -> Any:
    """Emits level weights, the operator and what the function does around it.

    Args:
        entry: the function's entry.
        arguments: the values to compute on: tensors, or proxies.
        example: the same call on tensors (real or fake), for everything that depends on shapes.
        weigh: emits the level weights.
        mask: [B, T], non-zero at tokens that are no padding, or None.
    """
    sequences = sequences_of(entry, arguments, mask)
    call = OperatorCall(
        own_state=is_level_state(example[entry.state]),
        single=_is_single_token(example) and sequences is None,
        wants_state=entry.wants_state(example),
        state_axes=entry.state_axes(example.values) or OPERATOR,
    )
    mixer = entry.bind(arguments)
    level_weights, routing_state = weigh(mixer, call, sequences)
    output, state = call_operator(mixer, level_weights, replace(call, routing_state=routing_state), sequences)
    if entry.writes_state is not None:
        arguments[entry.writes_state].copy_(state)
    return entry.result(arguments, output, state)


def sequences_of(entry: KnownFunction, arguments: Arguments, mask: Any) -> Sequences | None:
    """How the call packs or pads its sequences; None where each fills its row. Bounds say more than indices."""
    bounds, indices = entry.packed_by(arguments, "bounds"), entry.packed_by(arguments, "indices")
    if bounds is not None:
        return Sequences(cu_seqlens=bounds)
    if indices is not None:
        return Sequences(seq_idx=indices)
    return None if mask is None else Sequences(attention_mask=mask)


def _is_single_token(example: Arguments) -> bool:
    """Whether the call is a decoding step: one token, known to be one without a guard."""
    length = example.sizes.get("T", 1)
    return isinstance(length, int) and length == 1


def call_operator(
    mixer: Mixer, level_weights: Any, call: OperatorCall, sequences: Sequences | None = None
) -> tuple[Any, Any]:
    """One call of `llcompile::loglinear_attention` or of its step; the output and the final state."""
    state = mixer.initial_state
    if state is not None and not call.own_state:
        state = to_operator(state.float(), call.state_axes)
    output, final = apply(replace(mixer, initial_state=state), level_weights, call, sequences)
    if not call.wants_state:
        return output, None
    return output, from_operator(final, call.state_axes) if level_weights is None else final


def apply(mixer: Mixer, level_weights: Any, call: OperatorCall, sequences: Sequences | None = None) -> tuple[Any, Any]:
    """As `call_operator`, with states as the operator has them; whatever final state comes out."""
    if mixer.early:
        return early.call(mixer, level_weights, call, sequences, apply)
    state = mixer.initial_state
    if state is not None and call.single:
        return _call_step(mixer, level_weights, state, call.routing_state)
    operands = (mixer.query, mixer.key, mixer.value, level_weights, *mixer.transition())
    s = sequences
    where = () if s is None else (s.cu_seqlens, s.attention_mask, s.seq_idx)
    more = _routing(call.routing_state)
    result = torch.ops.llcompile.loglinear_attention(*operands, state, mixer.scale, call.wants_state, *where, **more)
    return result[0], result[1]


def _call_step(mixer: Mixer, level_weights: Any, state: Any, routing_state: Any) -> tuple[Any, Any]:
    step = torch.ops.llcompile.loglinear_attention_step
    operands = [mixer.query, mixer.key, mixer.value, level_weights, *mixer.transition()]
    if not mixer.step:  # rates have no axis of time
        operands = [x if x is None or x is mixer.decay_rate else x.squeeze(1) for x in operands]
    result = step(*operands[:4], state, *operands[4:], mixer.scale, **_routing(routing_state))
    return result[0] if mixer.step else result[0].unsqueeze(1), result[1]


def _routing(state: Any) -> dict[str, Any]:
    return {} if state is None else {"routing_state": state}
