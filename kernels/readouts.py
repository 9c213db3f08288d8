"""What per-level readouts take, and what that must look like (see `readout_reference` for their meaning)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llcompile.errors import OperandError
from llcompile.kernels import routing_state
from llcompile.kernels.description import ReadoutDescription
from llcompile.kernels.operands import COMPUTE_DTYPES, check_device
from llcompile.kernels.state import state_dtype
from llcompile.kernels.varlen import flat, spans_of


class Readouts(NamedTuple):
    """One call: `query` and `key` `[B, T, W, R]`, `levels` L, and a routing state `[B, W, 8 + L * R]` or None.

    With `starts`, sequences lie one after another in a batch of one: each has `lengths` tokens from `starts` on.
    """

    query: Tensor
    key: Tensor
    levels: int
    initial_state: Tensor | None = None
    lengths: Tensor | None = None
    starts: Tensor | None = None

    @property
    def rows(self) -> int:
        """How many sequences there are."""
        return self.query.shape[0] if self.starts is None else self.starts.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """What sums are computed in, and the readouts and states come out in: float32, or float64 for float64."""
        return state_dtype(self.query.dtype)

    @property
    def position(self) -> Tensor | None:
        """Tokens absorbed before, `[B]`; None stands for 0."""
        return None if self.initial_state is None else routing_state.unpack(self.initial_state, self.levels)[1]


class ReadoutToken(NamedTuple):
    """One token of each row: `query` and `key` `[B, W, R]`, and the state before it.

    That is a routing state, or a mixer's level state `[B, H, 1 + L, K, V]` that holds one.
    """

    query: Tensor
    key: Tensor
    state: Tensor
    levels: int

    @property
    def dtype(self) -> torch.dtype:
        """As that of `Readouts`."""
        return state_dtype(self.query.dtype)


def describe(x: Readouts | ReadoutToken) -> ReadoutDescription:
    """The description of one call, or of a step."""
    return ReadoutDescription(x.levels, x.query.shape[-1], x.query.dtype)


def in_place(x: Readouts, cu_seqlens: Tensor | None, attention_mask: Tensor | None, seq_idx: Tensor | None) -> Readouts:
    """The operands of rows as they are; of sequences where they lie, in a batch of one (`varlen.in_place`)."""
    spans = spans_of(x.query, cu_seqlens, attention_mask, seq_idx)
    if spans is None:
        return x
    return x._replace(query=flat(x.query), key=flat(x.key), lengths=spans.lengths, starts=spans.starts)


def check_operands(query: Any, key: Any, levels: Any, axes: str) -> None:
    """Check a query and a key of `axes`, such as "BTWR"; raises `OperandError`."""
    want = f"[{', '.join(axes)}]"
    for name, x in (("query", query), ("key", key)):
        if not isinstance(x, Tensor):
            raise OperandError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != len(axes):
            raise OperandError(f"{name} has shape {list(x.shape)} ({x.dim()} axes); expected {want}")
        if x.dtype not in COMPUTE_DTYPES:
            raise OperandError(f"{name} has dtype {x.dtype}; expected a floating one, cast it with .float()")
    if query.shape != key.shape or query.dtype != key.dtype:
        raise OperandError(
            f"query has shape {list(query.shape)} and dtype {query.dtype}, key {list(key.shape)} and {key.dtype}; "
            f"both must be {want} of one dtype"
        )
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 1:
        raise OperandError(f"levels must be a whole number of at least 1, got {levels!r}")
    check_device(query, key=key)
