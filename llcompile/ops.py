"""Log-linear attention (arXiv 2506.04761) and per-level readouts as functions, on a sequence and on one token."""

from __future__ import annotations

import torch
from torch import Tensor

from llcompile.compact import CompactState, compact_state
from llcompile.errors import OperandError
from llcompile.kernels import in_place_operator as _in_place_operator  # noqa: F401  (registers a torch operator)
from llcompile.kernels import operands as _operands
from llcompile.kernels import operators as _operators  # noqa: F401  (registers the torch operators)
from llcompile.kernels import readout_operators as _readout_operators  # noqa: F401  (likewise)
from llcompile.kernels import readouts as _readouts
from llcompile.kernels import replay_operator as _replay_operator  # noqa: F401  (likewise)
from llcompile.kernels import routing_state as _routing_state
from llcompile.kernels.state import check_state
from llcompile.replay import ReplayState
from llcompile.torch_internals.sources import source_tag

__all__ = [
    "CompactState",
    "ReplayState",
    "compact_state",
    "level_readouts",
    "level_readouts_step",
    "loglinear_attention",
    "loglinear_attention_step",
    "loglinear_attention_step_",
]

_REVISION = source_tag()


def loglinear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    level_weights: Tensor | None,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    decay_rate: Tensor | None = None,
    erase_query: Tensor | None = None,
    erase_key: Tensor | None = None,
    routing_state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mix a sequence with (log-)linear attention.

    `o_t = scale * sum_l w[t, l] q_t^T S_t^(l)`, where `S_t^(l)` is the contribution of the tokens `s` with
    `bit_length(t XOR s) == l` to the state `S_t = decay * S_{t-1} + k_t v_t^T` (without `beta`) or
    `S_t = (I - beta k k^T) (decay * S_{t-1}) + beta k v^T` (with it), or, with an erase key of its own,
    `S_t = (diag(decay) - beta erase_key erase_query^T) S_{t-1} + k v^T`. Head `h` uses group `h // (H // G)`.

    Args:
        q: `[B, T, G, K]`; `H % G == 0`.
        k: `[B, T, G, K]`; q, k and v have one floating dtype.
        v: `[B, T, H, V]`.
        level_weights: `[B, T, H, L]`, any floating dtype; the last weight applies to all higher levels. None
            means that every weight is 1: the linear operator, at linear cost. With `[B, T, W, L]`, where W divides H,
            `H // W` neighbouring heads share their weights.
        log_decay: `[B, T, H]`, `[B, T, H, K]` or `[H]`, at most 0 (-inf empties the state), any floating dtype.
        beta: `[B, T, H]`, enables the delta rule, or multiplies the erase key if there is one.
        scale: a plain number.
        initial_state: `[B, H, K, V]` or `[B, H, 1 + L, K, V]` (see `llcompile.kernels.state`); one row per
            sequence with `cu_seqlens`.
        return_final_state: also return the state after the last token: float32, or float64 with float64 operands;
            with levels if and only if `level_weights` is given.
        cu_seqlens: `[N + 1]` bounds of N sequences packed in a batch of one.
        attention_mask: `[B, T]`, non-zero at real tokens, which must be contiguous in each row. Positions count
            from the first real token. Outputs at padding are 0, and padding does not change the state.
        decay_rate: `[H, K]`, at least 0: the log decay of a channel is that of the head times its rate. Mamba-1's
            (arXiv 2312.00752, section 3.2) selective scan is this with `log_decay = -step` and `rate = exp(A_log)`; no
            tensor `[B, T, H, K]` is needed for it.
        erase_query, erase_key: `[B, T, G, K]`, both or none, in the dtype of q: what is read from the old state, and
            where that is removed (a diagonal plus a matrix of rank one, as in RWKV-7, arXiv 2503.14456).
        routing_state: `[B, W, 8 + L * R]`, the final state of `level_readouts`, to be kept in the final state of this
            call (see `llcompile.kernels.routing_state`); needs `level_weights`.

    Returns:
        `o [B, T, H, V]` in the dtype of `v`, and the final state or None.

    Raises:
        OperandError: an operand's shape, dtype, device or value is wrong.
        StateError: `initial_state` or `routing_state` belongs to an operator of another size.
    """
    x = _operands.Operands(q, k, v, level_weights, log_decay, decay_rate, beta, erase_query, erase_key, initial_state)
    _operands.check_sequence(x, scale)
    if cu_seqlens is not None and attention_mask is not None:
        raise OperandError("cu_seqlens and attention_mask both define the sequences; pass only one of them")
    batch = v.shape[0]
    if cu_seqlens is not None:
        _operands.check_bounds(cu_seqlens, v)
        batch = cu_seqlens.shape[0] - 1
    if attention_mask is not None:
        _operands.check_mask(attention_mask, v)
    if initial_state is not None:
        levels = None if level_weights is None else level_weights.shape[-1]
        check_state(initial_state, batch, v.shape[2], q.shape[3], v.shape[3], levels)
        _operands.check_device(v, initial_state=initial_state)
    given = (*x[: _operands.DIFFERENTIABLE], float(scale), return_final_state)
    sequences = (cu_seqlens, attention_mask)
    o, state = torch.ops.llcompile.loglinear_attention.default(
        *given, *sequences, revision=_REVISION, routing_state=routing_state
    )
    return o, state if return_final_state else None


def loglinear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    level_weights: Tensor | None,
    state: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float = 1.0,
    *,
    decay_rate: Tensor | None = None,
    erase_query: Tensor | None = None,
    erase_key: Tensor | None = None,
    routing_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Process one token: `loglinear_attention` for `T = 1`, without the axis T.

    Args:
        q: `[B, G, K]`; `H % G == 0`.
        k: `[B, G, K]`; q, k and v have one floating dtype.
        v: `[B, H, V]`.
        level_weights: `[B, W, L]` or None; W divides H.
        state: `[B, H, K, V]` or `[B, H, 1 + L, K, V]`; zeros are an empty state. Not changed in place.
        log_decay: `[B, H]`, `[B, H, K]` or `[H]`.
        beta: `[B, H]`, enables the delta rule, or multiplies the erase key if there is one.
        scale: a plain number.
        decay_rate: `[H, K]`.
        erase_query, erase_key: `[B, G, K]`.
        routing_state: `[B, W, 8 + L * R]`, the new state of `level_readouts_step`, to be kept in the new state.

    Returns:
        `o [B, H, V]` in the dtype of `v`, and the new state, with levels if and only if `level_weights` is given.

    Raises:
        OperandError: an operand's shape, dtype, device or value is wrong.
        StateError: `state` or `routing_state` belongs to an operator of another size.
    """
    x = _operands.Token(q, k, v, level_weights, state, log_decay, decay_rate, beta, erase_query, erase_key, scale)
    _check_token(x)
    o, new_state = torch.ops.llcompile.loglinear_attention_step.default(
        *x[:-1], float(scale), revision=_REVISION, routing_state=routing_state
    )
    return o, new_state


def loglinear_attention_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    level_weights: Tensor | None,
    state: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float = 1.0,
    *,
    decay_rate: Tensor | None = None,
    erase_query: Tensor | None = None,
    erase_key: Tensor | None = None,
    routing_state: Tensor | None = None,
) -> Tensor:
    """Process one token as `loglinear_attention_step`, and write the new state in place of the old one.

    Levels that the position says are empty are not read, and what does not change is not written. For inference: there
    is no gradient.

    Args:
        q, k, v, level_weights, log_decay, beta, scale, decay_rate, erase_query, erase_key: as there.
        state: `[B, H, 1 + L, K, V]` with level weights, else `[B, H, K, V]`; changed. It is fastest in float32 and
            contiguous.
        routing_state: written into the headers of `state`. Without it, what stands there beside the position stays.

    Returns:
        `o [B, H, V]` in the dtype of `v`.

    Raises:
        OperandError: an operand's shape, dtype, device or value is wrong.
        StateError: `state` or `routing_state` belongs to an operator of another size, or `state` is of the other kind.
        DerivativeError: an operand requires a gradient.
    """
    x = _operands.Token(q, k, v, level_weights, state, log_decay, decay_rate, beta, erase_query, erase_key, scale)
    _check_token(x)
    o = torch.ops.llcompile.loglinear_attention_step_.default(
        *x[:-1], float(scale), revision=_REVISION, routing_state=routing_state
    )
    assert isinstance(o, Tensor)
    return o


def _check_token(x: _operands.Token) -> None:
    _operands.check_token(x)
    levels = None if x.level_weights is None else x.level_weights.shape[-1]
    if not isinstance(x.state, Tensor):
        raise OperandError(f"state must be a tensor, got {type(x.state).__name__}; zeros are an empty state")
    check_state(x.state, x.v.shape[0], x.v.shape[1], x.q.shape[2], x.v.shape[2], levels, "state")
    _operands.check_device(x.v, state=x.state)


def level_readouts(
    query: Tensor,
    key: Tensor,
    levels: int,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Score what each level holds: `readouts[t, l] = <query_t, sum of key_s>`, over the tokens `s` of level `l` at `t`.

    The buckets are those of log-linear attention (arXiv 2506.04761), so that a level weight can depend on the content
    of its bucket, as a segment's weight does in Memory Caching (arXiv 2602.24281). O(T log T) work, and no memory per
    pair of tokens.

    Args:
        query: `[B, T, W, R]`, for W sets of level weights and a small R.
        key: `[B, T, W, R]`, in the dtype of `query`.
        levels: L; the last level also holds everything that belongs higher.
        initial_state: `[B, W, 8 + L * R]`, the position and the sums of each level (see
            `llcompile.kernels.routing_state`); one row per sequence with `cu_seqlens`.
        return_final_state: also return the state after the last token.
        cu_seqlens: `[N + 1]` bounds of N sequences packed in a batch of one.
        attention_mask: `[B, T]`, as for `loglinear_attention`. Readouts at padding are 0.

    Returns:
        readouts `[B, T, W, L]` and the final state or None, both float32, or float64 with float64 operands.

    Raises:
        OperandError: an operand's shape, dtype, device or value is wrong.
        StateError: `initial_state` belongs to an operator of another size.
    """
    _readouts.check_operands(query, key, levels, "BTWR")
    if cu_seqlens is not None and attention_mask is not None:
        raise OperandError("cu_seqlens and attention_mask both define the sequences; pass only one of them")
    batch = query.shape[0]
    if cu_seqlens is not None:
        _operands.check_bounds(cu_seqlens, query)
        batch = cu_seqlens.shape[0] - 1
    if attention_mask is not None:
        _operands.check_mask(attention_mask, query)
    if initial_state is not None:
        _routing_state.check(initial_state, batch, query.shape[2], levels, query.shape[3])
        _operands.check_device(query, initial_state=initial_state)
    given = (query, key, levels, initial_state, cu_seqlens, attention_mask)
    readouts, state = torch.ops.llcompile.level_readouts.default(
        *given, return_final_state=return_final_state, revision=_REVISION
    )
    return readouts, state if return_final_state else None


def level_readouts_step(query: Tensor, key: Tensor, state: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Process one token: `level_readouts` for `T = 1`, without the axis T.

    Args:
        query: `[B, W, R]`.
        key: `[B, W, R]`, in the dtype of `query`.
        state: `[B, W, 8 + L * R]`, or a mixer's level state `[B, H, 1 + L, K, V]` in whose headers it is kept; zeros
            are an empty state. Not changed in place.
        levels: L.

    Returns:
        readouts `[B, W, L]` and the new state `[B, W, 8 + L * R]`, both float32, or float64 with float64 operands. The
        latter is `routing_state` of `loglinear_attention_step`, which keeps it in the mixer's new state.

    Raises:
        OperandError: an operand's shape, dtype, device or value is wrong.
        StateError: `state` belongs to an operator of another size.
    """
    _readouts.check_operands(query, key, levels, "BWR")
    if not isinstance(state, Tensor):
        raise OperandError(f"state must be a tensor, got {type(state).__name__}; zeros are an empty state")
    _routing_state.check_either(state, query.shape[0], query.shape[1], levels, query.shape[2], "state")
    _operands.check_device(query, state=state)
    readouts, new_state = torch.ops.llcompile.level_readouts_step.default(query, key, state, levels, revision=_REVISION)
    return readouts, new_state
