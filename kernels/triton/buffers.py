"""The memory that kernels read and write, an entry each. A buffer exists in a call if one of its kernels takes it."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from llcompile.kernels.triton.description import Description


class Buffer(NamedTuple):
    """What kernels hand to one another, results, and what the host makes for them (`first="given"`).

    `axes` is also the comment in the templates; "(, K)" is there where decays are per channel, and of two shapes the
    first is the linear operator's. Gradients have the operands' dtype where a kernel writes the whole of them
    ("operand if alone": if no heads share the operand, and no second kernel adds to them). `first` says what the memory
    holds when the first kernel takes it: anything, 0, or 0 where tokens may belong to no sequence. The axis "old" is 1
    where there are `old_levels`, else 0. Where a buffer would hold no number, a kernel is given `without` in its place,
    of which it reads nothing: it is of the same dtype, so the kernel is the same.
    """

    axes: str
    dtype: Literal["float32", "operand", "operand if alone", "int32"] = "float32"
    first: Literal["anything", "zero", "zero if padded", "given"] = "anything"
    without: str | None = None


BUFFERS = {
    # -- tables of the host --------------------------------------------------------------------------------------------
    "lengths": Buffer("[S]", "int32", "given"),
    "offsets": Buffer("[S]", "int32", "given"),
    "starts": Buffer("[S]", "int32", "given"),
    "first_chunks": Buffer("[S + 1]", "int32", "given"),
    "chunk_sequences": Buffer("[N]", "int32", "given"),
    "served_levels": Buffer("[S, grid_levels]", "int32", "given"),
    # -- inside chunks -------------------------------------------------------------------------------------------------
    "query_squares": Buffer("[B, H, N, C, C]"),
    "key_squares": Buffer("[B, H, N, C, C]"),
    "lost_squares": Buffer("[B, H, N, C, C]"),
    "seen_squares": Buffer("[B, H, N, C, C]"),
    "erase_squares": Buffer("[B, H, N, C, C]"),
    "final_squares": Buffer("[B, H, N, C, C]"),
    "chunk_readers": Buffer("[B, H, N, C, K]"),
    "chunk_writers": Buffer("[B, H, N, C, K]"),
    "chunk_tails": Buffer("[B, H, N, C, K]"),
    "inverses": Buffer("[B, H, N, C, C]"),
    "score_gradients": Buffer("[B, H, N, C, C]"),
    "mix_gradients": Buffer("[B, H, N, C, C]"),
    "lost_gradients": Buffer("[B, H, N, C, C]"),
    "seen_gradients": Buffer("[B, H, N, C, C]"),
    "erase_gradients": Buffer("[B, H, N, C, C]"),
    "tail_gradients": Buffer("[B, H, N, C, K]"),
    "reader_gradients": Buffer("[B, H, N, C, K]"),
    "writer_gradients": Buffer("[B, H, N, C, K]"),
    "head_gradients": Buffer("[B, H, N, C, K]"),
    "decay_carries": Buffer("[B, H, N, K]"),
    # -- between chunks ------------------------------------------------------------------------------------------------
    "states": Buffer("[B, H, N, K, V]"),
    "totals": Buffer("[2, B, H, N (, K)]"),
    "transitions": Buffer("[2, B, H, N, K, K]"),
    "readers": Buffer("[B, H, N, C, K] or [depth, B, H, N // 2, C, K]", "operand"),
    "passed_gradients": Buffer("[depth, B, H, N // 2, C, K]", "operand"),
    "reaches": Buffer("[depth, B, H, N // 2 (, K)]"),
    "reach_gradients": Buffer("[depth, B, H, N // 2 (, K)]"),
    "state_gradients": Buffer("[B, H, N, K, V]"),
    "total_gradients": Buffer("[2, B, H, N (, K)]", first="zero"),
    "transition_gradients": Buffer("[2, B, H, N, K, K]", first="zero"),
    # -- in blocks of chunks: N counts blocks --------------------------------------------------------------------------
    "low_states": Buffer("[B, H, N, LOW, K, V]", "operand"),
    "passing_states": Buffer("[B, H, N, LOW, K, V]"),
    "mixes": Buffer("[B, H, N * WALK, C, C]", "operand"),
    "far_readers": Buffer("[B, H, N * WALK, C, K]", "operand"),
    "far_states": Buffer("[B, H, N, FAR, K, V]", "operand"),
    # -- before the first token and after the last ---------------------------------------------------------------------
    "initial_states": Buffer("[S, H, K, V]", first="given"),
    "initial_gradients": Buffer("[S, H, K, V]"),
    "final_states": Buffer("[S, H, K, V]"),
    "final_gradients": Buffer("[S, H, K, V]", first="given"),
    "old_states": Buffer("[S, H, old_levels, K, V]", first="given", without="states"),
    # Levels, in fp32 as what stands for them where there are none.
    "old_seen": Buffer("[B, T, old_levels]", first="given", without="states"),
    "old_readers": Buffer("[old, B, H, N, C, K]", "operand", without="readers"),
    "old_reaches": Buffer("[old, B, H, N (, K)]", without="reaches"),
    "old_gradients": Buffer("[S, H, old_levels, K, V]"),
    "level_states": Buffer("[S, H, end_levels, K, V]", first="zero"),
    "level_gradients": Buffer("[S, H, end_levels, K, V]", first="given"),
    "carries": Buffer("[S, H, 32, K, K]"),
    # -- token by token (decays by rates); P programs share a sequence's heads -----------------------------------------
    "begin_states": Buffer("[S, H, K, V] or [S, H, 1 + L, K, V]", first="given"),
    "begin_gradients": Buffer("[S, H, K, V] or [S, H, 1 + L, K, V]", first="zero"),
    "end_states": Buffer("[S, H, K, V] or [S, H, 1 + L, K, V]"),
    "end_gradients": Buffer("[S, H, K, V] or [S, H, 1 + L, K, V]", first="given"),
    "end_flows": Buffer("[S, H, V]"),
    "flows": Buffer("[B, T, H, V]"),
    "query_parts": Buffer("[B, T, P, K]", first="zero if padded"),
    "key_parts": Buffer("[B, T, P, K]", first="zero if padded"),
    "weight_parts": Buffer("[B, T, P, L]", first="zero if padded"),
    "decay_parts": Buffer("[B, T, H, V]", first="zero if padded"),
    "rate_gradients": Buffer("[S, H, V, K]"),
    # -- results -------------------------------------------------------------------------------------------------------
    "outputs": Buffer("[B, T, H, V]", "operand", "zero if padded"),
    "query_gradients": Buffer("[B, T, H, K]", first="zero if padded"),
    "key_gradients": Buffer("[B, T, H, K]", "operand if alone", "zero if padded"),
    "erase_query_gradients": Buffer("[B, T, H, K]", first="zero if padded"),
    "erase_key_gradients": Buffer("[B, T, H, K]", first="zero if padded"),
    "value_gradients": Buffer("[B, T, H, V]", "operand", "zero if padded"),
    "weight_gradients": Buffer("[B, T, H, L]", first="zero"),
    "decay_gradients": Buffer("[B, T, H (, K)]", first="zero if padded"),
    "beta_gradients": Buffer("[B, T, H]", first="zero if padded"),
}


def dtype_of(name: str, d: Description) -> torch.dtype:
    """The dtype of a buffer."""
    kind = BUFFERS[name].dtype
    if kind == "int32":
        return torch.int32
    alone = kind == "operand if alone" and d.repeat == 1 and d.decay != "channel"
    return d.dtype if kind == "operand" or alone else torch.float32


def axes(name: str, d: Description) -> tuple[str, ...]:
    """The axes of a buffer."""
    plain, *with_levels = BUFFERS[name].axes.split(" or ")
    text = (with_levels or [plain])[0] if d.weighted else plain
    return tuple(text.strip("[]").replace(" (, K)", ", K" if d.decay == "channel" else "").split(", "))


class Forms(dict[str, tuple[tuple[str, ...], torch.dtype]]):
    """Axes and dtypes of the buffers of one description, looked up in every call."""

    def __init__(self, d: Description) -> None:
        super().__init__()
        self.d = d

    def __missing__(self, name: str) -> tuple[tuple[str, ...], torch.dtype]:
        self[name] = found = axes(name, self.d), dtype_of(name, self.d)
        return found


forms_of = lru_cache(maxsize=512)(Forms)


class Arguments(dict[str, Any]):
    """What kernels take, by the names of their parameters; a buffer is allocated when a kernel first takes it.

    `sizes` has the axes of :data:`BUFFERS` by name; `padded` says that tokens may belong to no sequence.
    """

    def __init__(self, d: Description, sizes: dict[str, int], padded: bool, device: torch.device) -> None:
        super().__init__()
        self.sizes, self.padded, self.device, self.forms = sizes, padded, device, forms_of(d)

    def __missing__(self, name: str) -> Tensor:
        buffer = BUFFERS[name]
        sizes, (names, dtype) = self.sizes, self.forms[name]
        if buffer.without is not None and not all(sizes[axis] for axis in names):
            self[name] = x = self[buffer.without]
            return x
        if buffer.first == "given":
            raise KeyError(name)
        zero = buffer.first == "zero" or (buffer.first == "zero if padded" and self.padded)
        make = torch.zeros if zero else torch.empty
        self[name] = x = make([sizes[axis] for axis in names], dtype=dtype, device=self.device)
        return x


# Of how many numbers the places of rows are multiples, wherever rows of K or V are: what Triton asks for in arguments
# before it loads several numbers at a time.
ALIGNED = 16


def operand_arguments(name: str, x: Tensor, v_shape: torch.Size) -> dict[str, Any]:
    """Arguments of an operand `[B, T, H, ...]` (`[H]` counts as the same for all tokens).

    It is copied if its rows are not dense, or are multiples of `ALIGNED` long but do not lie at such multiples.
    """
    if x.dim() == 1:
        x = x.expand(v_shape[:3])
    strides = _strides(x)
    if x.dim() == 4 and not _has_rows(x, *strides):
        x = x.clone(memory_format=torch.contiguous_format)
        strides = _strides(x)
    return dict(zip(_names(name), (x, *strides), strict=True))


@cache
def _names(name: str) -> tuple[str, str, str, str]:
    return f"{name}_ptr", f"{name}_row", f"{name}_token", f"{name}_head"


def _strides(x: Tensor) -> tuple[int, int, int]:
    """The strides of `[B, T, H, ...]`; 0, a multiple of everything, where an axis has one entry."""
    (rows, tokens, heads, *_), (row, token, head, *_) = x.shape, x.stride()
    return row if rows > 1 else 0, token if tokens > 1 else 0, head if heads > 1 else 0


def _has_rows(x: Tensor, row: int, token: int, head: int) -> bool:
    channels = x.shape[3]
    if channels > 1 and x.stride(3) != 1:
        return False
    return channels % ALIGNED != 0 or (x.data_ptr() | row | token | head) % ALIGNED == 0
