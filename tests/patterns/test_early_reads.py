"""Mixers that read the state before their own token changes it, against the recurrence, read one step early."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llcompile.kernels import routing_state
from llcompile.kernels.reference import recurrence_step
from llcompile.patterns.known.lower import call_operator
from llcompile.patterns.known.operator_call import OperatorCall, Sequences
from llcompile.patterns.known.routing import Routing
from llcompile.patterns.mixer import Mixer, MixerShape
from tests.helpers.small import difference

HEADS, WIDTH, LEVELS = 2, 4, 6


def mixer(length: int, batch: int = 1, seed: int = 0, **more: Any) -> Mixer:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(batch, length, HEADS, *shape, generator=generator)  # noqa: E731
    q, k, v, g = draw(WIDTH), draw(WIDTH), draw(3), -draw(WIDTH).abs()
    return Mixer("channel", "none", q, k, v, log_decay=g, scale=0.5, early=True, **more)


def weights(length: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, length, HEADS, LEVELS, generator=torch.Generator().manual_seed(1))


def expected(m: Mixer, w: Tensor | None) -> Tensor:
    """One row after the other, one token after the other: read, then write."""
    rows = []
    for row in range(m.value.shape[0]):
        levels = 1 if w is None else w.shape[-1]
        states, outputs = torch.zeros(HEADS, levels, WIDTH, 3).double(), []
        for t in range(m.value.shape[1]):
            factors = torch.ones(HEADS, 1).double() if w is None else w[row, t].double()
            outputs.append(0.5 * torch.einsum("hl,hk,hlkv->hv", factors, m.query[row, t].double(), states))
            k, v, a = m.key[row, t].double(), m.value[row, t].double(), m.log_decay[row, t].double().exp()
            states = recurrence_step(states, t, k, v, a, None, None, None)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def cut(m: Mixer, part: slice, **more: Any) -> Mixer:
    tensors = {name: getattr(m, name)[:, part] for name in ("query", "key", "value", "log_decay")}
    return replace(m, **tensors, **more)


@pytest.mark.parametrize("weighted", [True, False])
def test_it_is_the_recurrence_read_one_step_early(weighted: bool) -> None:
    m, w = mixer(21, batch=2), weights(21, 2) if weighted else None
    output, _ = call_operator(m, w, OperatorCall())
    assert difference(expected(m, w), output.double()) < 1e-5


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("prefilled", [0, 1, 8, 13])
def test_decoding_goes_on_where_the_prefill_ended(prefilled: int, weighted: bool) -> None:
    m, w = mixer(21), weights(21) if weighted else None
    part = lambda a, b: None if w is None else w[:, a:b]  # noqa: E731
    outputs, state = [], None
    if prefilled:
        first = cut(m, slice(prefilled))
        output, state = call_operator(first, part(0, prefilled), OperatorCall(wants_state=True))
        outputs.append(output)
    for t in range(prefilled, 21):
        token = cut(m, slice(t, t + 1), initial_state=state)
        call = OperatorCall(own_state=weighted and state is not None, single=True, wants_state=True)
        output, state = call_operator(token, part(t, t + 1), call)
        outputs.append(output)
    assert difference(expected(m, w), torch.cat(outputs, 1).double()) < 1e-5


def test_a_second_prefill_goes_on_too() -> None:
    m, w = mixer(21), weights(21)
    _, state = call_operator(cut(m, slice(9)), w[:, :9], OperatorCall(wants_state=True))
    rest = cut(m, slice(9, 21), initial_state=state)
    output, _ = call_operator(rest, w[:, 9:], OperatorCall(own_state=True))
    assert difference(expected(m, w)[:, 9:], output.double()) < 1e-5


def test_packed_sequences_are_apart() -> None:
    m, w = mixer(21), weights(21)
    bounds = torch.tensor([0, 0, 5, 6, 6, 21, 21])
    output, _ = call_operator(m, w, OperatorCall(), Sequences(cu_seqlens=bounds))
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        part = slice(start, end)
        if start < end:
            alone = expected(cut(m, part), w[:, part])
            torch.testing.assert_close(output[:, part].double(), alone, atol=1e-5, rtol=1e-4)


def test_packed_sequences_have_states_of_their_own() -> None:
    m, w = mixer(12), weights(12)
    bounds = torch.tensor([0, 5, 5, 12])
    _, states = call_operator(m, w, OperatorCall(wants_state=True), Sequences(cu_seqlens=bounds))
    later = replace(mixer(12, seed=2), initial_state=states)
    call = OperatorCall(own_state=True, wants_state=True)
    output, _ = call_operator(later, w, call, Sequences(cu_seqlens=bounds))
    for number, part in enumerate((slice(0, 5), slice(5, 5), slice(5, 12))):
        alone = cut(later, part, initial_state=states[number : number + 1])
        if part.start < part.stop:
            separate, _ = call_operator(alone, w[:, part], OperatorCall(own_state=True))
            assert difference(separate.double(), output[:, part].double()) < 1e-5


@pytest.mark.parametrize("left", [True, False])
def test_padded_rows(left: bool) -> None:
    m, w = mixer(12), weights(12)
    mask = torch.ones(1, 12)
    mask[:, slice(3) if left else slice(9, 12)] = 0
    real = slice(3, 12) if left else slice(9)
    output, _ = call_operator(m, w, OperatorCall(), Sequences(attention_mask=mask))
    assert difference(expected(cut(m, real), w[:, real]), output[:, real].double()) < 1e-5


def test_gradients_reach_every_operand() -> None:
    m, w = mixer(13), weights(13).requires_grad_()
    given = [x.requires_grad_() for x in (m.query, m.key, m.value, m.log_decay)]
    theirs = torch.autograd.grad(expected(m, w).square().sum(), [*given, w])
    output, _ = call_operator(m, w, OperatorCall())
    ours = torch.autograd.grad(output.square().sum(), [*given, w])
    assert all(difference(a.double(), b.double()) < 1e-4 for a, b in zip(theirs, ours, strict=True))


def routing(m: Mixer, call: OperatorCall, sequences: Sequences | None = None) -> Routing:
    return Routing(m, call, sequences, MixerShape(HEADS, HEADS, 8, 8), sets=HEADS, features=3)


def read_early(query: Tensor, key: Tensor) -> Tensor:
    """[T, W, L]: what each query reads of the keys before it, in the buckets of the token before it."""
    out = torch.zeros(*query.shape[:2], LEVELS)
    for t in range(1, query.shape[0]):
        for s in range(t):
            out[t, :, ((t - 1) ^ s).bit_length()] += (query[t] * key[s]).sum(-1)
    return out


def test_routed_level_weights_read_what_the_mixer_reads() -> None:
    """At once, packed, and token by token through the header of a level state; in a later prefill, too."""
    query, key = (torch.randn(2, 21, HEADS, 3) for _ in range(2))
    expected = torch.stack([read_early(q, k) for q, k in zip(query, key, strict=True)])
    m, goes_on = mixer(21, batch=2), OperatorCall(own_state=True, single=True, wants_state=True)
    assert difference(routing(m, OperatorCall()).readouts(query, key, LEVELS), expected) < 1e-5
    for sizes in ((9, *[1] * 5, 7), (1, 1, 19)):
        state, outputs = None, []
        for q, k in zip(query.split(sizes, 1), key.split(sizes, 1), strict=True):
            call = replace(goes_on, own_state=state is not None, single=q.shape[1] == 1)
            one = routing(replace(m, initial_state=state), call)
            outputs.append(one.readouts(q, k, LEVELS))
            state = torch.zeros(2, HEADS, 1 + LEVELS, 8, 8)
            state[:, :, 0, 0] = one.final[:, :, :8]  # the mixer's own position
            routing_state.write(state, one.final)
        assert difference(torch.cat(outputs, 1), expected) < 1e-5
    bounds = torch.tensor([0, 5, 5, 21])
    packed = routing(m, OperatorCall(), Sequences(cu_seqlens=bounds)).readouts(query[:1], key[:1], LEVELS)
    alone = [read_early(query[0, a:b], key[0, a:b]) for a, b in ((0, 5), (5, 21))]
    assert difference(packed[0], torch.cat(alone)) < 1e-5
