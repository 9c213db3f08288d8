"""Wrong operands: each a clear error that names the operand."""

from __future__ import annotations

import pytest
import torch

from llcompile.errors import OperandError, StateError
from llcompile.ops import loglinear_attention, loglinear_attention_step
from tests.kernels.kernel_cases import operands


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(2, 9, 5).double()}, OperandError, "q has shape"),
        ({"k": torch.zeros(2, 9, 2, 4).double()}, OperandError, "k \\[2, 9, 2, 4\\]"),
        ({"v": torch.zeros(2, 8, 4, 3).double()}, OperandError, "v has shape"),
        ({"v": torch.zeros(2, 9, 3, 3).double()}, OperandError, "multiple of the groups"),
        ({"v": torch.zeros(2, 9, 4, 3)}, OperandError, "share a dtype"),
        ({"q": torch.zeros(2, 9, 2, 5).long()}, OperandError, "q has dtype"),
        (
            {n: torch.zeros(2, 9, 4, 3).to(torch.float8_e5m2) for n in "qkv"},
            OperandError,
            "q has dtype .*for storage only",
        ),
        ({"level_weights": torch.zeros(2, 9, 4, 5).to(torch.float8_e4m3fn)}, OperandError, "level_weights has dtype"),
        ({"level_weights": torch.zeros(2, 9, 3, 5)}, OperandError, "level_weights has shape"),
        ({"level_weights": 1.0}, OperandError, "level_weights must be a tensor"),
        ({"log_decay": torch.zeros(2, 9, 4, 2)}, OperandError, "log_decay has shape"),
        ({"log_decay": torch.full((2, 9, 4), 0.5)}, OperandError, "log_decay must be at most 0"),
        ({"beta": torch.zeros(2, 9)}, OperandError, "beta has shape"),
        ({"beta": torch.zeros(2, 9, 4, device="meta")}, OperandError, "beta is on meta"),
        ({"decay_rate": torch.zeros(4, 3)}, OperandError, "decay_rate has shape"),
        ({"decay_rate": torch.full((4, 5), -1.0)}, OperandError, "decay_rate must be at least 0"),
        ({"decay_rate": torch.ones(4, 5), "log_decay": None}, OperandError, "log_decay is absent"),
        ({"erase_key": torch.zeros(2, 9, 2, 5).double()}, OperandError, "erase_key is given and erase_query is not"),
        (
            {n: torch.zeros(2, 9, 4, 5).double() for n in ("erase_query", "erase_key")},
            OperandError,
            "erase_query has shape",
        ),
        ({"scale": torch.ones(())}, OperandError, "scale must be a plain number"),
        ({"initial_state": torch.zeros(2, 4, 3, 5)}, StateError, "another operator"),
        ({"initial_state": torch.zeros(2, 4, 7, 5, 3)}, StateError, "6 levels"),
        ({"initial_state": torch.zeros(2, 4)}, StateError, "initial_state has shape"),
        ({"attention_mask": torch.tensor([[1, 0, 1] * 3] * 2)}, OperandError, "hole in row 0"),
        ({"attention_mask": torch.ones(2, 8)}, OperandError, "attention_mask has shape"),
        ({"cu_seqlens": torch.tensor([0, 9])}, OperandError, "batch of one"),
    ],
)
def test_sequence(change, error, words):
    """One wrong operand at a time."""
    with pytest.raises(error, match=words):
        loglinear_attention(**{**operands(9), **change})


def test_bounds():
    """Bounds that do not cover the packed row."""
    with pytest.raises(OperandError, match="must rise from 0 to T=9"):
        loglinear_attention(**operands(9, batch=1), cu_seqlens=torch.tensor([0, 5]))


def test_step():
    """The step names its operands, too."""
    x = operands(1)
    token = {n: t if t is None else t[:, 0] for n, t in x.items() if n != "initial_state"}
    with pytest.raises(StateError, match="state has shape"):
        loglinear_attention_step(**token, state=torch.zeros(2, 4, 5, 5))
    with pytest.raises(OperandError, match="state must be a tensor"):
        loglinear_attention_step(**token, state=None)
