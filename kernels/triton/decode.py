"""The kernel of one decoded token: one launch for all levels, the position read on the device."""

from __future__ import annotations

DECODE = '''
@triton.jit
def decode(
    query_ptr, query_row, query_head,
    key_ptr, key_row, key_head,
    value_ptr, value_row, value_head,
    #if decayed
    decay_ptr, decay_row, decay_head,
    #end
    #if delta
    beta_ptr, beta_row, beta_head,
    #end
    #if weighted
    weight_ptr, weight_row, weight_head,
    #end
    old_states,  # [lanes, K, V] or [lanes, 1 + L, K, V], slot 0 the header with the position
    states,  # the same, out
    outputs,  # [B, H, V] out
    scale, heads,
    VALUE_TILE: tl.constexpr,
):
    """Merge, transition, write and read of one token (the decode rule of arXiv 2506.04761)."""
    lane = tl.program_id(0).to(tl.int64)
    <<row>>
    <<channels>>
    <<value_tile>>
    real = channel < KEY_DIM
    query = tl.load(query_ptr + row * query_row + group * query_head + channel, mask=real, other=0.0).to(tl.float32)
    key = tl.load(key_ptr + row * key_row + group * key_head + channel, mask=real, other=0.0).to(tl.float32)
    value_at = value_ptr + row * value_row + head * value_head + value_column
    value = tl.load(value_at, mask=value_column < VALUE_DIM, other=0.0).to(tl.float32)
    #if channel
    decay_at = decay_ptr + row * decay_row + head * decay_head + channel
    decay = tl.exp(tl.load(decay_at, mask=real, other=0.0).to(tl.float32))[:, None]
    #elif scalar
    decay = tl.exp(tl.load(decay_ptr + row * decay_row + head * decay_head).to(tl.float32))
    #end
    write = key[:, None] * value[None, :]  # [K, V tile]
    #if delta
    beta = tl.load(beta_ptr + row * beta_row + head * beta_head).to(tl.float32)
    write *= beta
    #end
    #if weighted
    base = lane * (1 + LEVELS) * KEY_DIM * VALUE_DIM
    position = read_position(old_states + base)
    # The level that fills up: everything below it empties into it. At position 0 nothing moves.
    filling = 0
    if position > 0:
        filling = tl.minimum(high_bit(position & -position) + 1, LEVELS - 1)
    header = position_header(position + 1, channel[:, None] * VALUE_DIM + value_column[None, :])
    store_state(states + base, channel, value_column, header.to(tl.float32))
    out = tl.zeros([VALUE_TILE], tl.float32)
    merged = tl.zeros([KEY_TILE, VALUE_TILE], tl.float32)
    for level in range(0, LEVELS):
        at = base + (1 + level) * KEY_DIM * VALUE_DIM
        state = load_state(old_states + at, channel, value_column)
        merged += state
        state = tl.where(level < filling, 0.0, tl.where(level == filling, merged, state))
        <<transition>>
        state += tl.where(level == 0, 1.0, 0.0) * write
        store_state(states + at, channel, value_column, state)
        weight = tl.load(weight_ptr + row * weight_row + head * weight_head + level).to(tl.float32)
        out += weight * tl.sum(query[:, None] * state, 0)
    #else
    base = lane * KEY_DIM * VALUE_DIM
    state = load_state(old_states + base, channel, value_column)
    <<transition>>
    state += write
    store_state(states + base, channel, value_column, state)
    out = tl.sum(query[:, None] * state, 0)  # [V tile]
    #end
    tl.store(outputs + lane * VALUE_DIM + value_column, out * scale, mask=value_column < VALUE_DIM)
'''

# One token's decay, then its correction.
TRANSITION = """
#if decayed
state *= decay
#end
#if delta
seen = tl.sum(key[:, None] * state, 0)  # [V tile]
state -= key[:, None] * (beta * seen)[None, :]
#end
"""

DECODE_BLOCKS = {"transition": TRANSITION}
DECODES = {"decode": DECODE}
