"""A model whose heads are split, token by token with its own cache: the logits and tokens of one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import parallelize_module
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

import llcompile
from tests.helpers import small
from tests.helpers.processes import together
from tests.helpers.split import LEVELS, OPTIONS, PLAN, Split, mesh, perturb


class Stateful(Split):
    """As `Split`, with the state of the sequence so far, of this process's heads."""

    def step(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (-1, self.size)) for f in (self.q, self.k, self.v))
        decay, beta = -0.2 * F.softplus(self.a(x)), self.b(x).sigmoid()
        run = torch_chunk_gated_delta_rule if state is None else torch_recurrent_gated_delta_rule
        o, state = run(q, k, v, decay, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
        return o, state

    def forward(self, x: Tensor, states: list[Tensor | None] | None = None) -> Tensor:
        state = None if states is None else states.pop(0)
        o, state = self.step(x, state)
        if states is not None:
            states.append(state)
        return x + self.out(o.flatten(-2).to(x.dtype))


class Serving(small.Model):
    """A model that takes and returns the states of its layers."""

    def forward(self, ids: Tensor, states: list[Tensor | None] | None = None) -> tuple[Tensor, list[Tensor | None]]:  # type: ignore[override]
        states = [None] * len(self.layers) if states is None else list(states)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, states)
        return self.head(x), states


@torch.no_grad()
def generated(model: nn.Module, prompt: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy tokens, the logits that they were taken from, and the last state of the first layer."""
    run = torch.compile(model, backend="loglinear", options=OPTIONS)
    ids, (logits, states) = prompt, run(prompt)
    seen = [logits[:, -1]]
    for _ in range(count):
        ids = torch.cat([ids, seen[-1].argmax(-1, keepdim=True)], 1)
        logits, states = run(ids[:, -1:], states)
        seen.append(logits[:, -1])
    return ids, torch.stack(seen, 1), states[0]


def decoded(rank: int) -> None:
    torch.manual_seed(0)
    model, prompt = Serving([Stateful(), Stateful()]), small.ids(length=11)
    llcompile.convert(model, prompt, verify=False)
    one = copy.deepcopy(model)
    linear = one(prompt)[0][:, -1].detach()
    perturb(one)
    ids, logits, state = generated(one, prompt, 6)
    # The same without a cache: the state of each step is that of the whole sequence.
    full = torch.compile(one, backend="loglinear", options=OPTIONS)(ids)[0].detach()
    assert small.difference(logits, full[:, 10:]) < 1e-5
    assert small.difference(linear, logits[:, 0]) > 1e-3, "level weights do not act"
    torch._dynamo.reset()
    parallelize_module(model, mesh(), {**PLAN, **LEVELS})
    perturb(model)
    same, found, own = generated(model, prompt, 6)
    assert torch.equal(same, ids)
    assert small.difference(found, logits) < 1e-5
    heads = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(heads, own.contiguous())
    assert small.difference(torch.cat(heads, 1), state) < 1e-5


@pytest.mark.slow
def test_tokens_of_one_process() -> None:
    """Each process keeps the level states of its own heads."""
    together(decoded)
