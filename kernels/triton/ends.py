"""Kernels for states before the first and after the last token of rows of the log-linear operator.

The end of a row is one more reader of the tree. A level's state at the end is ``P S``: the block's state S, carried by
everything behind the block, P. The linear operator needs none of this: its scan starts and ends with these states.
"""

from __future__ import annotations

FINAL_STATE = '''
@triton.jit
def final_state(
    <<operand key>>
    <<operand value>>
    <<decay>>
    <<beta>>
    #if delta
    inverses,  # [lanes, N, C, C]
    transitions,  # [2, lanes, N, K, K]
    #end
    states,  # [lanes, N, K, V]
    #if decayed and not delta
    totals,  # [2, lanes, N (, K)]
    #end
    #if old
    old_states,  # [lanes, slots, K, V]
    old_slots,
    #end
    level_states,  # [lanes, levels of the grid and slots of the initial state, K, V] out, 0 before
    level_states_count,
    <<geometry>>
    lanes,
    VALUE_TILE: tl.constexpr,
):
    """The states of all levels at the last token of each row."""
    lane = tl.program_id(0).to(tl.int64)
    <<channels>>
    <<value_tile>>
    <<last_chunk>>
    <<rows_of_group key>>
    <<log_decay>>
    <<writer>>
    <<rows_of_head value>>
    out = level_states + lane * level_states_count * KEY_DIM * VALUE_DIM
    for inside in tl.static_range(0, EDGE + 1):
        bucket = (position <= last) & (bit_length(position ^ last) == inside)
        state = dot(tl.trans(tl.where(bucket[:, None], writer, 0.0)), value)
        store_state(out + inside * KEY_DIM * VALUE_DIM, channel, value_column, state)
    <<carry_of_chunk>>
    bits = chunk
    for _ in range(0, bit_count(chunk)):
        <<level>>
        state = load_state(states + (home + slot) * KEY_DIM * VALUE_DIM, channel, value_column)
        <<carried>>
        store_state(out + (EDGE + 1 + level) * KEY_DIM * VALUE_DIM, channel, value_column, state)
        <<carry_on>>
        bits &= bits - 1
    #if old
    for slot in range(0, old_slots):
        state = load_state(old_states + (lane * old_slots + slot) * KEY_DIM * VALUE_DIM, channel, value_column)
        <<carried>>
        at = out + (level_states_count - old_slots + slot) * KEY_DIM * VALUE_DIM
        store_state(at, channel, value_column, state)
    #end
'''

LAST_CHUNK = """
<<row>>
<<home_of_row>>
#if padded or packed
end = tl.load(lengths + sequence)
#else
end = tokens
#end
#if continued
end += tl.load(offsets + sequence)
#end
chunk = tl.maximum(end - 1, 0) // CHUNK  # of the row's last token
last = tl.maximum(end - 1, 0) % CHUNK
<<place>>
"""

# ``carry``: what happens to a state between a block's end and the row's end, its own chunk first.
CARRY_OF_CHUNK = """
#if decayed or delta
own = (chunk % 2) * lanes * chunks + home + chunk
#end
#if delta
carry = load_matrix(transitions + own * KEY_DIM * KEY_DIM, channel, channel)  # [K, K]
#elif channel
carry = load_channels(totals + own * KEY_DIM, channel)  # [K]
#elif scalar
carry = tl.load(totals + own)
#end
"""

CARRY_ON = """
#if delta
passed = load_matrix(transitions + (home + slot) * KEY_DIM * KEY_DIM, channel, channel)
carry = fine_dot(carry, passed)
#elif channel
carry += load_channels(totals + (home + slot) * KEY_DIM, channel)
#elif scalar
carry += tl.load(totals + home + slot)
#end
"""

CARRIED = """
#if delta
state = fine_dot(carry, state)
#elif channel
state *= tl.exp(carry)[:, None]
#elif scalar
state *= tl.exp(carry)
#end
"""

FINAL_STATE_GRADIENT = '''
@triton.jit
def final_state_gradient(
    #if delta
    transitions,  # [2, lanes, N, K, K]
    carries,  # [lanes, levels + 1, K, K]: room for the transitions between blocks and the row's end
    transition_gradients,  # [2, lanes, N, K, K] in and out
    #end
    #if decayed and not delta
    totals,  # [2, lanes, N (, K)]
    total_gradients,  # [2, lanes, N (, K)] in and out
    #end
    states,  # [lanes, N, K, V]
    state_gradients,  # [lanes, N, K, V] in and out
    #if old
    old_states,  # [lanes, slots, K, V]
    old_gradients,  # [lanes, slots, K, V] in and out
    old_slots,
    #end
    level_gradients,  # [lanes, levels of the grid and slots of the initial state, K, V]
    level_states_count,
    <<geometry>>
    lanes,
    VALUE_TILE: tl.constexpr,
):
    """Reverse of final_state as far as it reads other chunks: one program a row and head."""
    lane = tl.program_id(0).to(tl.int64)
    <<channels>>
    <<last_chunk>>
    gradient_base = level_gradients + lane * level_states_count * KEY_DIM * VALUE_DIM
    <<carry_of_chunk>>
    #if delta
    # What is multiplied is in memory: three matrices [K, K] at a time are more than chips have room for.
    carry_base = carries + lane * 32 * KEY_DIM * KEY_DIM
    carry_gradient_at = carry_base + 31 * KEY_DIM * KEY_DIM
    carry_at = carry_base
    store_matrix(carry_at, channel, channel, carry)
    bits = chunk
    for _ in range(0, bit_count(chunk)):
        passed_at = transitions + (home + bits - 1) * KEY_DIM * KEY_DIM
        tl.debug_barrier()
        longer = long_dot(carry_at, KEY_DIM, 1, channel, passed_at, KEY_DIM, 1, channel, KEY_DIM)
        carry_at += KEY_DIM * KEY_DIM
        store_matrix(carry_at, channel, channel, longer)
        bits &= bits - 1
    tl.debug_barrier()
    carry_gradient = tl.zeros([KEY_TILE, KEY_TILE], tl.float32)
    #else
    bits = chunk
    for _ in range(0, bit_count(chunk)):
        slot = bits - 1
        <<carry_on>>
        bits &= bits - 1
    #if channel
    carry_gradient = tl.zeros([KEY_TILE], tl.float32)
    #elif scalar
    carry_gradient = 0.0
    #end
    #end
    #if old
    for slot in range(0, old_slots):
        gradient_at = gradient_base + (level_states_count - old_slots + slot) * KEY_DIM * VALUE_DIM
        state_at = old_states + (lane * old_slots + slot) * KEY_DIM * VALUE_DIM
        out_at = old_gradients + (lane * old_slots + slot) * KEY_DIM * VALUE_DIM
        <<carried_gradient>>
    #end
    bits = chunk
    for _ in range(0, bit_count(chunk)):  # farthest first: the carry grows shorter
        level = high_bit(bits)
        slot = ((chunk >> level) << level) - 1
        at = home + slot
        #if delta
        left_at = transition_gradients + at * KEY_DIM * KEY_DIM
        passed_at = transitions + at * KEY_DIM * KEY_DIM
        carry_at -= KEY_DIM * KEY_DIM
        store_matrix(carry_gradient_at, channel, channel, carry_gradient)
        tl.debug_barrier()
        passed_gradient = long_dot(carry_at, 1, KEY_DIM, channel, carry_gradient_at, KEY_DIM, 1, channel, KEY_DIM)
        passed_gradient += load_matrix(left_at, channel, channel)
        carry_gradient = long_dot(carry_gradient_at, KEY_DIM, 1, channel, passed_at, 1, KEY_DIM, channel, KEY_DIM)
        tl.debug_barrier()
        store_matrix(left_at, channel, channel, passed_gradient)
        #elif channel
        <<shorter_channels>>
        #elif scalar
        <<shorter>>
        #end
        gradient_at = gradient_base + (EDGE + 1 + level) * KEY_DIM * VALUE_DIM
        state_at = states + at * KEY_DIM * VALUE_DIM
        out_at = state_gradients + at * KEY_DIM * VALUE_DIM
        <<carried_gradient>>
        bits ^= 1 << level
    #if delta
    own_at = transition_gradients + own * KEY_DIM * KEY_DIM
    own_gradient = load_matrix(own_at, channel, channel) + carry_gradient
    tl.debug_barrier()
    store_matrix(own_at, channel, channel, own_gradient)
    #elif channel
    own_gradient = load_channels(total_gradients + own * KEY_DIM, channel) + carry_gradient
    tl.debug_barrier()
    store_channels(total_gradients + own * KEY_DIM, channel, own_gradient)
    #elif scalar
    tl.store(total_gradients + own, tl.load(total_gradients + own) + carry_gradient)
    #end
'''

# The carry without the block at ``at``, summed anew: a difference would not be exact.
SHORTER = """
passed_gradient = tl.load(total_gradients + at) + carry_gradient
tl.store(total_gradients + at, passed_gradient)
carry = tl.load(totals + own)
nearer = chunk & ((1 << level) - 1)
for _ in range(0, bit_count(nearer)):
    carry += tl.load(totals + home + (((chunk >> level) << level) | nearer) - 1)
    nearer &= nearer - 1
"""

SHORTER_CHANNELS = """
passed_gradient = load_channels(total_gradients + at * KEY_DIM, channel) + carry_gradient
tl.debug_barrier()
store_channels(total_gradients + at * KEY_DIM, channel, passed_gradient)
carry = load_channels(totals + own * KEY_DIM, channel)
nearer = chunk & ((1 << level) - 1)
for _ in range(0, bit_count(nearer)):
    near_at = home + (((chunk >> level) << level) | nearer) - 1
    carry += load_channels(totals + near_at * KEY_DIM, channel)
    nearer &= nearer - 1
"""

# Adds to the gradient at ``out_at`` and to ``carry_gradient``, for a state that was carried to the row's end.
CARRIED_GRADIENT = """
for first_value in range(0, VALUE_DIM, VALUE_TILE):
    value_column = first_value + tl.arange(0, VALUE_TILE)
    state = load_state(state_at, channel, value_column)
    gradient = load_state(gradient_at, channel, value_column)
    #if delta
    carry_gradient += fine_dot(gradient, tl.trans(state))
    gradient = long_dot(carry_at, 1, KEY_DIM, channel, gradient_at, VALUE_DIM, 1, value_column, VALUE_DIM)
    #elif channel
    gradient *= tl.exp(carry)[:, None]
    carry_gradient += tl.sum(state * gradient, 1)
    #elif scalar
    gradient *= tl.exp(carry)
    carry_gradient += tl.sum(tl.sum(state * gradient, 1), 0)
    #end
    gradient += load_state(out_at, channel, value_column)
    tl.debug_barrier()
    store_state(out_at, channel, value_column, gradient)
"""

FINAL_CHUNK_GRADIENT = '''
@triton.jit
def final_chunk_gradient(
    <<operand key>>
    <<operand value>>
    <<decay>>
    <<beta>>
    #if delta
    inverses,  # [lanes, N, C, C]
    #end
    level_gradients,  # [lanes, levels of the grid and slots of the initial state, K, V]
    level_states_count,
    writer_gradients,  # [lanes, N, C, K] in and out
    value_gradients,  # [B, T, H, V] in and out
    <<geometry>>
    VALUE_TILE: tl.constexpr,
):
    """Reverse of final_state inside the last chunk."""
    lane = tl.program_id(0).to(tl.int64)
    <<channels>>
    <<last_chunk>>
    <<rows_of_group key>>
    <<log_decay>>
    <<writer>>
    gradient_base = level_gradients + lane * level_states_count * KEY_DIM * VALUE_DIM
    writer_gradient = tl.zeros([CHUNK, KEY_TILE], tl.float32)
    for first_value in range(0, VALUE_DIM, VALUE_TILE):
        value_column = first_value + tl.arange(0, VALUE_TILE)
        <<rows_of_head value>>
        value_gradient = tl.zeros([CHUNK, VALUE_TILE], tl.float32)
        for level in range(0, EDGE + 1):
            bucket = ((position <= last) & (bit_length(position ^ last) == level))[:, None]
            gradient = load_state(gradient_base + level * KEY_DIM * VALUE_DIM, channel, value_column)
            writer_gradient += tl.where(bucket, dot(value, tl.trans(gradient)), 0.0)
            value_gradient += tl.where(bucket, dot(writer, gradient), 0.0)
        value_at = value_gradients + (row * tokens * heads + head) * VALUE_DIM
        value_gradient += load_rows(value_at, token, heads * VALUE_DIM, real, value_column, VALUE_DIM)
        tl.debug_barrier()
        store_rows(value_at, token, heads * VALUE_DIM, real, value_column, value_gradient, VALUE_DIM)
    at = writer_gradients + (home + chunk) * CHUNK * KEY_DIM
    writer_gradient += load_chunk(at, position, channel)
    tl.debug_barrier()
    store_chunk(at, position, channel, writer_gradient)
'''

OLD_STATE_GRADIENT = '''
@triton.jit
def old_state_gradient(
    #if not delta
    <<operand query>>
    #end
    <<operand output_gradient>>
    #if not delta
    <<decay>>
    #end
    <<weight>>
    #if delta
    old_readers,  # [lanes, N, C, K]
    #elif decayed
    old_reaches,  # [lanes, N (, K)]
    #end
    old_seen,  # [rows, T, slots]
    old_gradients,  # [lanes, slots, K, V] out
    old_slots,
    scale,
    <<geometry>>
    VALUE_TILE: tl.constexpr,
):
    """Gradients of the initial state's levels, from all queries of the row."""
    slot = tl.program_id(0) % old_slots
    lane = (tl.program_id(0) // old_slots).to(tl.int64)
    <<row>>
    <<home_of_row>>
    <<row_chunks>>
    <<channels>>
    <<value_tile>>
    gradient_base = output_gradient_ptr + row * output_gradient_row + head * output_gradient_head
    weight_base = weight_ptr + row * weight_row + head * weight_head
    gradient = tl.zeros([KEY_TILE, VALUE_TILE], tl.float32)
    for chunk in range(0, row_chunks):
        entry = home + chunk
        <<place>>
        <<output_gradient>>
        level_seen = tl.load(old_seen + (row * tokens + token.to(tl.int64)) * old_slots + slot, mask=real, other=0)
        weight_at = weight_base + token.to(tl.int64) * weight_token + level_seen
        weight = tl.load(weight_at, mask=real, other=0.0).to(tl.float32)  # [C]
        #if delta
        reader = load_chunk(old_readers + entry * CHUNK * KEY_DIM, position, channel)
        #else
        <<rows_of_group query>>
        <<log_decay>>
        <<from_start>>
        #if channel
        reach = load_channels(old_reaches + entry * KEY_DIM, channel)[None, :]
        reader = query.to(tl.float32) * tl.exp(from_start + reach)
        #else
        reader = query
        #end
        #if scalar
        weight *= tl.exp(from_start + tl.load(old_reaches + entry))
        #end
        #end
        gradient += dot(tl.trans(reader), output_gradient * weight[:, None])
    at = old_gradients + (lane * old_slots + slot) * KEY_DIM * VALUE_DIM
    store_state(at, channel, value_column, gradient)
'''

END_BLOCKS = {
    "last_chunk": LAST_CHUNK,
    "carry_of_chunk": CARRY_OF_CHUNK,
    "carry_on": CARRY_ON,
    "carried": CARRIED,
    "shorter": SHORTER,
    "shorter_channels": SHORTER_CHANNELS,
    "carried_gradient": CARRIED_GRADIENT,
}
ENDS = {
    "final_state": FINAL_STATE,
    "final_state_gradient": FINAL_STATE_GRADIENT,
    "final_chunk_gradient": FINAL_CHUNK_GRADIENT,
    "old_state_gradient": OLD_STATE_GRADIENT,
}
