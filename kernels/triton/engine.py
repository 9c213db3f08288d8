"""The operator's passes on Triton kernels, as :mod:`..engine` has them on ATen."""

from __future__ import annotations

from torch import Tensor

from llcompile.kernels.operands import Operands
from llcompile.kernels.triton.call import Call


def forward(x: Operands, scale: float, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """Output ``[B, T, H, V]`` and final state (an empty tensor when not asked for)."""
    call = Call(x, scale, return_final_state)
    if call.empty:
        return x.v.new_zeros(x.v.shape), call.unchanged_state() if return_final_state else call.no_state()
    states(call)
    o = call.buffer("outputs", *x.v.shape, dtype=x.v.dtype)
    if x.lengths is not None:
        o.zero_()
    call.launch_chunks("output", tiled=True)
    return o, final_state(call) if return_final_state else call.no_state()


def states(call: Call) -> None:
    """Phases 1 and 2: all states that anything reads."""
    chunk_stage(call)
    if call.d.weighted:
        tree(call)
    else:
        scan(call)


def final_state(call: Call) -> Tensor:
    """The state after each row's last token."""
    if not call.d.weighted:
        state: Tensor = call.values["final_states"]
        return state
    count = call.grid.levels + call.values.get("old_slots", 0)
    found = call.zeros("level_states", call.lanes, count, call.key_dim, call.value_dim)
    call.launch("final_state", call.lanes, tiled=True, level_states_count=count)
    return call._final(found)


def chunk_stage(call: Call) -> None:
    """Phase 1: what each chunk adds to the state and does to one that passes it."""
    d, lanes, chunks = call.d, call.chunk_lanes, call.chunks
    if d.decay == "channel":
        call.chunk_buffer("query_squares", d.chunk, d.chunk)
        if d.delta:
            call.chunk_buffer("key_squares", d.chunk, d.chunk)
        call.launch_chunks("chunk_scores")
    if d.delta:
        call.chunk_buffer("inverses", d.chunk, d.chunk)
        call.launch_chunks("chunk_inverse")
        call.buffer("transitions", 2, lanes, chunks, d.key_dim, d.key_dim)
    if d.decay != "none":
        call.buffer("totals", 2, lanes, chunks, *((d.key_dim,) if d.decay == "channel" else ()))
    call.chunk_buffer("states", d.key_dim, d.value_dim)
    call.launch_chunks("chunk_state", tiled=True)


def tree(call: Call) -> None:
    """Phase 2, log-linear: blocks pair up, level by level."""
    for level in range(call.depth - 1):
        call.launch_pairs("tree_up", level, tiled=True)


def scan(call: Call) -> None:
    """Phase 2, linear: one state, chunk after chunk."""
    if call.d.final_state:
        call.buffer("final_states", call.batch, call.heads, call.key_dim, call.value_dim)
    call.launch("state_scan", call.lanes, tiled=True)


def backward(x: Operands, scale: float, grad_o: Tensor, grad_state: Tensor | None) -> list[Tensor | None]:
    """Gradients of the first seven operands; None where there is no operand, or no gradient."""
    call = Call(x, scale, grad_state is not None)
    if call.empty:
        if grad_state is None or x.initial_state is None or x.v.shape[0] == 0:
            return [None] * 7
        return [None] * 6 + [call.unchanged_state_grad(grad_state)]
    call.operand("output_gradient", grad_o)
    states(call)
    _add_gradient_buffers(call)
    reads_gradient(call)
    if call.d.weighted:
        tree_gradient(call, grad_state)
    else:
        scan_gradient(call, grad_state)
    chunk_gradients(call)
    return _operand_gradients(call, grad_state)


def _add_gradient_buffers(call: Call) -> None:
    d, (batch, tokens, heads, _) = call.d, call.x.v.shape
    make = call.buffer if call.x.lengths is None else call.zeros
    make("query_gradients", batch, tokens, heads, d.key_dim)
    make("key_gradients", batch, tokens, heads, d.key_dim)
    make("value_gradients", batch, tokens, heads, d.value_dim)
    if d.levels is not None:
        call.zeros("weight_gradients", batch, tokens, heads, d.levels)
    if d.decay != "none":
        make("decay_gradients", batch, tokens, heads, *((d.key_dim,) if d.decay == "channel" else ()))
    if d.delta:
        make("beta_gradients", batch, tokens, heads)


def reads_gradient(call: Call) -> None:
    """What queries read from other chunks: gradients of queries, of level weights, and of what was read."""
    d, lanes, chunks = call.d, call.chunk_lanes, call.chunks
    by_reader: tuple[int, ...] = (lanes, chunks)
    if d.weighted:
        half = max(chunks // 2, 1)
        call.values["half"] = half
        by_reader = (max(call.depth, 1), lanes, half)
    if d.delta:
        call.buffer("readers", *by_reader, d.chunk, d.key_dim, dtype=call.x.q.dtype)
        call.chunk_buffer("reader_gradients", d.chunk, d.key_dim)
        if d.weighted:
            call.buffer("passed_gradients", *by_reader, d.chunk, d.key_dim, dtype=call.x.q.dtype)
    elif d.decay != "none" and d.weighted:
        per_channel = (d.key_dim,) if d.decay == "channel" else ()
        call.buffer("reaches", *by_reader, *per_channel)
        call.buffer("reach_gradients", *by_reader, *per_channel)
    if "old_slots" in call.values:
        if d.delta:
            call.chunk_buffer("old_readers", d.chunk, d.key_dim, dtype=call.x.q.dtype)
        elif d.decay != "none":
            call.chunk_buffer("old_reaches", *((d.key_dim,) if d.decay == "channel" else ()))
    call.launch_chunks("read_gradient")
    if d.weighted and d.decay != "none" and not d.delta:
        call.zeros("total_gradients", *call.values["totals"].shape)
    call.chunk_buffer("state_gradients", d.key_dim, d.value_dim)
    call.launch_chunks("state_gradient", tiled=True)


def tree_gradient(call: Call, grad_state: Tensor | None) -> None:
    """Down the tree: gradients of what each chunk adds to the state and does to one that passes it."""
    d, lanes = call.d, call.lanes
    if d.delta:
        call.zeros("transition_gradients", *call.values["transitions"].shape)
        call.launch_chunks("transition_gradient")
    slots = call.values.get("old_slots", 0)
    if slots:
        call.buffer("old_gradients", lanes, slots, d.key_dim, d.value_dim)
        call.launch("old_state_gradient", lanes * slots, tiled=True)
    if grad_state is not None:
        call.values["level_gradients"] = call._final_grad(call.with_tokens(grad_state)).contiguous()
        call.values["level_states_count"] = call.grid.levels + slots
        if d.delta:
            call.buffer("carries", lanes, 32, d.key_dim, d.key_dim)
        call.launch("final_state_gradient", lanes)
    for level in reversed(range(call.depth - 1)):
        if d.delta:
            call.launch_pairs("transition_down", level)
        call.launch_pairs("tree_down", level)


def scan_gradient(call: Call, grad_state: Tensor | None) -> None:
    """Back along the linear operator's states."""
    if grad_state is not None:
        call.values["final_gradients"] = grad_state.float().contiguous()
    if call.d.initial_state != "none":
        call.buffer("initial_gradients", call.batch, call.heads, call.key_dim, call.value_dim)
    call.launch("scan_gradient", call.lanes, tiled=True)


def chunk_gradients(call: Call) -> None:
    """Inside the chunks, where the gradients of the operands come out."""
    d = call.d
    call.chunk_buffer("score_gradients", d.chunk, d.chunk)
    call.chunk_buffer("writer_gradients", d.chunk, d.key_dim)
    if d.delta:
        call.chunk_buffer("head_gradients", d.chunk, d.key_dim)
        if d.decay != "channel":
            call.chunk_buffer("key_squares", d.chunk, d.chunk)
    if d.decay != "none":
        call.chunk_buffer("decay_carries", d.key_dim)
    call.launch_chunks("chunk_values_gradient")
    if d.weighted and d.final_state:
        call.launch("final_chunk_gradient", call.lanes)
    if d.delta:
        call.launch_chunks("chunk_transition_gradient")
        call.launch_chunks("chunk_reader_gradient")
        call.chunk_buffer("mix_gradients", d.chunk, d.chunk)
        call.launch_chunks("chunk_writer_gradient")
        call.launch_chunks("chunk_delta_gradient")
    call.launch_chunks("chunk_gradient")
    if d.decay == "channel":
        call.launch_chunks("chunk_scores_gradient")


def _operand_gradients(call: Call, grad_state: Tensor | None) -> list[Tensor | None]:
    """The buffers as gradients of the operands: heads of a group summed, a decay per head summed over tokens."""
    found = call.values
    q, k = (found[name].unflatten(2, (-1, call.d.repeat)).sum(3) for name in ("query_gradients", "key_gradients"))
    g = found.get("decay_gradients")
    if g is not None and call.x.log_decay is not None and call.x.log_decay.dim() == 1:
        g = g.sum((0, 1))
    state = _initial_gradient(call, grad_state)
    return [q, k, found["value_gradients"], found.get("weight_gradients"), g, found.get("beta_gradients"), state]


def _initial_gradient(call: Call, grad_state: Tensor | None) -> Tensor | None:
    """Gradient of the initial state in its own kind; rows without tokens hand the final state's on."""
    s = call.x.initial_state
    if s is None:
        return None
    if not call.d.weighted:
        d: Tensor = call.values["initial_gradients"]
        return call._old_grad(d.flatten(0, 1)[:, None])
    d = call._old_grad(call.values["old_gradients"])
    if grad_state is not None and call.x.lengths is not None:
        d = d + call.unchanged_state_grad(grad_state - call.with_tokens(grad_state))
    return d
