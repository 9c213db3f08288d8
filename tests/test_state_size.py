"""The sizes of states that a look shows: against tensors of those sizes, and the level arithmetic."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import llcompile
from llcompile.kernels.levels import level_table
from llcompile.look.state_size import LENGTHS, as_table, mean_occupied, state_sizes
from llcompile.ops import loglinear_attention
from tests.kernels.kernel_cases import operands


@pytest.mark.parametrize("levels", [1, 2, 3, 5, 9, 12])
@pytest.mark.parametrize("tokens", [1, 2, 8, 64])
def test_the_mean_is_that_of_the_level_table(tokens, levels):
    """Levels that the queries see, counted one by one."""
    table = level_table(tokens).clamp(max=levels - 1).tolist()
    counts = [len(set(row[: t + 1])) for t, row in enumerate(table)]
    assert mean_occupied(tokens, levels) == pytest.approx(sum(counts) / tokens)


def test_levels_that_hold_nothing_are_zeros():
    """What counts as occupied is what a state really holds."""
    for tokens in (1, 2, 6, 8, 13):
        x = operands(tokens, "token", True, 6, dtype=torch.float32)
        state = loglinear_attention(**x, return_final_state=True)[1]
        assert state is not None
        held = {i for i in range(6) if state[:, :, 1 + i].any()}
        assert held == set(level_table(tokens)[tokens - 1, :tokens].tolist())


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(1, 2)).tril() @ v


def test_a_look_shows_them(fresh_dynamo):
    """One head of K = V = 16: at 128k tokens, 17 levels (the default) and what attention would keep."""
    look = llcompile.inspect(nn.Sequential(Mixer(), Mixer()), torch.randn(1, 20, 16))
    assert len(look.converted) == 2
    last = look.state_sizes[-1]
    state = 2 * 16 * 16 * 4
    assert last.tokens == LENGTHS[-1] == 2**17
    assert (last.linear, last.loglinear, last.most) == (state, 18 * state, 17 * state)
    assert last.occupied == round(state * mean_occupied(2**17, 17))
    assert last.keys_and_values == 2 * 2**17 * (16 + 16) * 4
    assert "131,072" in str(look)
    assert "33.6 MB" in str(look)
    assert json.loads(json.dumps(look.to_dict()["state_sizes"]))[-1]["linear"] == state


def test_nothing_converted_shows_none(fresh_dynamo):
    look = llcompile.inspect(nn.Linear(4, 4), torch.randn(1, 3, 4))
    assert look.state_sizes == ()
    assert "kept per sequence" not in str(look)
    assert as_table(state_sizes(())).row_count == 0
