"""The backward kernels, in the order in which they run. Everything is recomputed from the operands.

What a chunk's queries read is taken back level by level, farthest first (``read_gradient``); what that means for the
blocks that were read is summed over their readers (``state_gradient``, ``transition_gradient``), handed down the tree
(``tree_down``, ``transition_down``; ``scan_gradient`` for the linear operator), and ends in the chunks
(``chunk_gradient``). No sum is spread over programs, so results are the same from run to run.

Readers of level m are the chunks with bit m set, numbered in their order; buffers by level have room for N // 2.
"""

from __future__ import annotations

READ_GRADIENT = '''
@triton.jit
def read_gradient(
    <<operand query>>
    #if delta
    <<operand key>>
    #end
    <<operand output_gradient>>
    <<decay>>
    <<beta>>
    <<weight>>
    #if delta and channel
    query_squares,  # [lanes, N, C, C]
    #end
    #if delta
    inverses,  # [lanes, N, C, C]
    #if weighted
    transitions,  # [2, lanes, N, K, K]
    #end
    #end
    states,  # [lanes, N, K, V]
    #if decayed and weighted and not delta
    totals,  # [2, lanes, N (, K)]
    #end
    #if delta
    readers,  # [lanes, N, C, K] or [levels, lanes, N // 2, C, K] out: effective queries as they read each level
    reader_gradients,  # [lanes, N, C, K] out
    #if weighted
    passed_gradients,  # [levels, lanes, N // 2, C, K] out: gradients of readers pulled back over that level's block
    #end
    #else
    query_gradients,  # [B, T, H, K] out: of queries as far as they read other chunks
    #if decayed and weighted
    reaches,  # [levels, lanes, N // 2 (, K)] out: log decays between a block and its reader
    reach_gradients,  # [levels, lanes, N // 2 (, K)] out: gradients of log decays over that level's block
    #end
    #end
    #if weighted
    weight_gradients,  # [B, T, H, L] out
    half,
    #end
    #if old
    old_states,  # [lanes, slots, K, V]
    old_seen,  # [rows, T, slots]
    old_slots,
    #if delta
    old_readers,  # [lanes, N, C, K] out: effective queries as they read the initial state
    #elif decayed
    old_reaches,  # [lanes, N (, K)] out
    #end
    #end
    scale,
    <<geometry>>
    lanes,
    VALUE_TILE: tl.constexpr,
):
    """Gradients of what a chunk's queries read from other chunks, with respect to query, weights and decays."""
    <<lane>>
    <<channels>>
    <<rows_of_group query>>
    <<log_decay>>
    #if delta
    <<rows_of_group key>>
    <<reader>>
    #else
    <<from_start>>
    #if channel and weighted
    decayed_query = query.to(tl.float32) * tl.exp(from_start)  # [C, K]
    #end
    #end
    gradient_base = output_gradient_ptr + row * output_gradient_row + head * output_gradient_head
    #if weighted
    <<served>>
    weight_base = weight_ptr + row * weight_row + head * weight_head
    weight_gradient_base = weight_gradients + (row * tokens * heads + head) * LEVELS
    <<readers_home head>>
    <<pull_all>>
    #if delta
    reader_gradient = tl.zeros([CHUNK, KEY_TILE], tl.float32)
    #else
    query_gradient = tl.zeros([CHUNK, KEY_TILE], tl.float32)
    #if scalar
    reach_gradient = 0.0
    #elif channel
    reach_gradient = tl.zeros([KEY_TILE], tl.float32)
    #end
    #end
    #if old
    <<old_gradient>>
    #end
    <<levels_gradient>>
    #if channel and not delta
    query_gradient *= tl.exp(from_start)
    #end
    #else
    state_base = states + (home + chunk) * KEY_DIM * VALUE_DIM
    <<state_by_output>>
    #if delta
    entry = home + chunk
    store_chunk(readers + entry * CHUNK * KEY_DIM, position, channel, reader)
    reader_gradient = seen
    #else
    <<decay_rows query_gradient seen from_start>>
    #end
    #end
    #if delta
    entry = home + chunk
    store_chunk(reader_gradients + entry * CHUNK * KEY_DIM, position, channel, reader_gradient)
    #else
    store_rows(query_gradients + (row * tokens * heads + head) * KEY_DIM, token, heads * KEY_DIM, real, channel,
               query_gradient, KEY_DIM)
    #end
'''

# ``seen`` [C, K]: output gradient times the transposed state at ``state_base``.
STATE_BY_OUTPUT = """
seen = tl.zeros([CHUNK, KEY_TILE], tl.float32)
#if twice
for first_value in range(0, 2 * VALUE_TILE, VALUE_TILE):
#else
for first_value in range(0, VALUE_DIM, VALUE_TILE):
#end
    value_column = first_value + tl.arange(0, VALUE_TILE)
    <<output_gradient>>
    seen += dot(output_gradient, tl.trans(load_state(state_base, channel, value_column)))
"""

OUTPUT_GRADIENT = """
output_gradient = load_rows(gradient_base, token, output_gradient_token, real, value_column, VALUE_DIM)
output_gradient = output_gradient.to(tl.float32) * scale  # [C, V tile]
"""

# Number of this chunk among the readers of ``level``.
READER_ENTRY = """
entry = level * lanes * half + readers_home + ((chunk >> (level + 1)) << level) + (chunk & ((1 << level) - 1))
"""

# What reads each level is kept: pulled-back queries, or the decay that they are pulled over.
PULL_ALL = """
<<reach>>
#if decayed or delta
bits = chunk
for _ in range(0, bit_count(chunk)):
    <<level>>
    <<reader_entry>>
    #if delta
    store_chunk(readers + entry * CHUNK * KEY_DIM, position, channel, reader)
    #elif channel
    store_channels(reaches + entry * KEY_DIM, channel, reach)
    #else
    tl.store(reaches + entry, reach)
    #end
    <<pull>>
    bits &= bits - 1
#if old
#if delta
store_chunk(old_readers + (home + chunk) * CHUNK * KEY_DIM, position, channel, reader)
#elif channel
store_channels(old_reaches + (home + chunk) * KEY_DIM, channel, reach)
#else
tl.store(old_reaches + home + chunk, reach)
#end
#end
tl.debug_barrier()
#end
"""

# One state's share: ``seen`` is known, and ``weight``; ``reach`` or ``reader`` are those with which it was read.
SHARE = """
#if delta
weight_gradient = tl.sum(reader * seen, 1)  # [C]
reader_gradient += seen * weight[:, None]
#elif channel
seen *= tl.exp(reach)[None, :]  # [C, K] but for the decay from the chunk's start, which comes last
share = decayed_query * seen
weight_gradient = tl.sum(share, 1)  # [C]
query_gradient += seen * weight[:, None]
reach_gradient += tl.sum(share * weight[:, None], 0)  # [K]
#elif scalar
factor = tl.exp(from_start + reach)  # [C]
weight_gradient = tl.sum(query.to(tl.float32) * seen, 1) * factor  # [C]
query_gradient += seen * (factor * weight)[:, None]
reach_gradient += tl.sum(weight_gradient * weight, 0)
#else
weight_gradient = tl.sum(query.to(tl.float32) * seen, 1)  # [C]
query_gradient += seen * weight[:, None]
#end
"""

OLD_GRADIENT = """
for slot in range(0, old_slots):
    state_base = old_states + (lane * old_slots + slot) * KEY_DIM * VALUE_DIM
    <<state_by_output>>
    level_seen = tl.load(old_seen + (row * tokens + token.to(tl.int64)) * old_slots + slot, mask=real, other=0)  # [C]
    weight = tl.load(weight_base + token.to(tl.int64) * weight_token + level_seen, mask=real, other=0.0).to(tl.float32)
    <<share>>
    add_column(weight_gradient_base + level_seen, token, heads * LEVELS, real, weight_gradient)
"""

LEVELS_GRADIENT = """
bits = chunk
for _ in range(0, bit_count(chunk)):  # farthest first
    level = high_bit(bits)
    slot = ((chunk >> level) << level) - 1
    <<reader_entry>>
    state_base = states + (home + slot) * KEY_DIM * VALUE_DIM
    <<state_by_output>>
    weight = load_column(weight_base + served_level(served, EDGE + 1 + level), token, weight_token, real)  # [C]
    #if delta
    reader = load_chunk(readers + entry * CHUNK * KEY_DIM, position, channel).to(tl.float32)
    store_chunk(passed_gradients + entry * CHUNK * KEY_DIM, position, channel, reader_gradient)
    passed = load_matrix(transitions + (home + slot) * KEY_DIM * KEY_DIM, channel, channel)
    reader_gradient = dot(reader_gradient, tl.trans(passed))
    #elif channel
    reach = load_channels(reaches + entry * KEY_DIM, channel)
    store_channels(reach_gradients + entry * KEY_DIM, channel, reach_gradient)
    #elif scalar
    reach = tl.load(reaches + entry)
    tl.store(reach_gradients + entry, reach_gradient)
    #end
    <<share>>
    add_column(weight_gradient_base + served_level(served, EDGE + 1 + level), token, heads * LEVELS, real,
               weight_gradient)
    bits ^= 1 << level
"""

STATE_GRADIENT = '''
@triton.jit
def state_gradient(
    #if not delta
    <<operand query>>
    #end
    <<operand output_gradient>>
    #if not delta
    <<decay>>
    #end
    <<weight>>
    #if delta
    readers,  # [lanes, N, C, K] or [levels, lanes, N // 2, C, K]
    #end
    #if weighted and decayed and not delta
    reaches,  # [levels, lanes, N // 2 (, K)]
    reach_gradients,  # [levels, lanes, N // 2 (, K)]
    total_gradients,  # [2, lanes, N (, K)] out: of left blocks
    #end
    state_gradients,  # [lanes, N, K, V] out
    #if weighted
    half,
    #end
    scale,
    <<geometry>>
    lanes,
    VALUE_TILE: tl.constexpr,
):
    """Gradients of block states (of the states at chunks' starts for the linear operator), from all their readers."""
    <<program>>
    slot = chunk
    <<channels>>
    <<value_tile>>
    gradient_base = output_gradient_ptr + row * output_gradient_row + head * output_gradient_head
    gradient = tl.zeros([KEY_TILE, VALUE_TILE], tl.float32)
    #if weighted
    <<served>>
    weight_base = weight_ptr + row * weight_row + head * weight_head
    <<row_chunks>>
    <<readers_home head>>
    # The block in slot s is read by the chunks behind it, as many as it has itself (or as there are).
    level = high_bit((slot + 1) & -(slot + 1))
    readers_here = tl.minimum(1 << level, row_chunks - 1 - slot)
    #if decayed and not delta
    #if channel
    total_gradient = tl.zeros([KEY_TILE], tl.float32)
    #else
    total_gradient = 0.0
    #end
    #end
    for number in range(0, readers_here):
        chunk = slot + 1 + number
        entry = level * lanes * half + readers_home + ((chunk >> (level + 1)) << level) + number
        <<one_reader>>
        gradient += dot(tl.trans(reader), output_gradient * weight[:, None])
    #if decayed and not delta
    if tl.program_id(1) == 0:
        #if channel
        store_channels(total_gradients + (home + slot) * KEY_DIM, channel, total_gradient)
        #else
        tl.store(total_gradients + home + slot, total_gradient)
        #end
    #end
    #else
    entry = home + chunk
    <<one_reader>>
    #if scalar and not delta
    gradient += dot(tl.trans(reader), output_gradient * weight[:, None])
    #else
    gradient += dot(tl.trans(reader), output_gradient)
    #end
    #end
    store_state(state_gradients + (home + slot) * KEY_DIM * VALUE_DIM, channel, value_column, gradient)
'''

# ``reader``, ``output_gradient`` and ``weight`` of one chunk, as it reads at ``entry``.
ONE_READER = """
<<place>>
<<output_gradient>>
#if weighted
weight = load_column(weight_base + served_level(served, EDGE + 1 + level), token, weight_token, real)  # [C]
#end
#if delta
reader = load_chunk(readers + entry * CHUNK * KEY_DIM, position, channel)  # [C, K]
#else
<<rows_of_group query>>
<<log_decay>>
<<from_start>>
#if channel and weighted
reach = load_channels(reaches + entry * KEY_DIM, channel)
reader = query.to(tl.float32) * tl.exp(from_start) * tl.exp(reach)[None, :]
total_gradient += load_channels(reach_gradients + entry * KEY_DIM, channel)
#elif channel
reader = query.to(tl.float32) * tl.exp(from_start)
#elif scalar and weighted
reader = query
weight *= tl.exp(from_start + tl.load(reaches + entry))
total_gradient += tl.load(reach_gradients + entry)
#elif scalar
reader = query
weight = tl.exp(from_start)
#else
reader = query
#end
#end
"""

TRANSITION_GRADIENT = '''
@triton.jit
def transition_gradient(
    readers,  # [levels, lanes, N // 2, C, K]
    passed_gradients,  # [levels, lanes, N // 2, C, K]
    transition_gradients,  # [2, lanes, N, K, K] out: of left blocks
    half,
    <<tables>>
    chunks, lanes,
):
    """Gradients of left blocks' transitions, from all queries that were pulled back over them."""
    slot = tl.program_id(0) % chunks
    lane = (tl.program_id(0) // chunks).to(tl.int64)
    #if packed
    <<sequence_of lane slot>>
    #else
    home = lane * chunks
    #end
    <<row_chunks>>
    <<readers_home lane>>
    <<channels>>
    position = tl.arange(0, CHUNK)
    level = high_bit((slot + 1) & -(slot + 1))
    gradient = tl.zeros([KEY_TILE, KEY_TILE], tl.float32)
    for number in range(0, tl.minimum(1 << level, row_chunks - 1 - slot)):
        chunk = slot + 1 + number
        entry = level * lanes * half + readers_home + ((chunk >> (level + 1)) << level) + number
        reader = load_chunk(readers + entry * CHUNK * KEY_DIM, position, channel)
        passed = load_chunk(passed_gradients + entry * CHUNK * KEY_DIM, position, channel)
        gradient += dot(tl.trans(reader), passed)
    store_matrix(transition_gradients + (home + slot) * KEY_DIM * KEY_DIM, channel, channel, gradient)
'''

TREE_DOWN = '''
@triton.jit
def tree_down(
    #if decayed and not delta
    states,  # [lanes, N, K, V]: of left blocks
    totals,  # [2, lanes, N (, K)]
    total_gradients,  # [2, lanes, N (, K)] in and out
    #end
    #if delta
    transitions,  # [2, lanes, N, K, K]
    #end
    state_gradients,  # [lanes, N, K, V] in and out
    <<tables>>
    chunks, lanes, pairs, level,
    VALUE_TILE: tl.constexpr,
):
    """Reverse of tree_up for states and log decays. The right block's state gradient is the joined one's, in place."""
    pair = tl.program_id(0) % pairs
    lane = (tl.program_id(0) // pairs).to(tl.int64)
    <<channels>>
    <<family>>
    #if scalar and not delta
    factor = tl.exp(tl.load(totals + right))
    #elif channel and not delta
    factor = tl.exp(load_channels(totals + right * KEY_DIM, channel))[:, None]
    #end
    #if decayed and not delta
    total_gradient = tl.zeros([KEY_TILE], tl.float32)
    #end
    for first_value in range(0, VALUE_DIM, VALUE_TILE):
        value_column = first_value + tl.arange(0, VALUE_TILE)
        #if delta
        right_transition = transitions + right * KEY_DIM * KEY_DIM
        above = state_gradients + joined * KEY_DIM * VALUE_DIM
        gradient = long_dot(right_transition, 1, KEY_DIM, channel, above, VALUE_DIM, 1, value_column, VALUE_DIM)
        #else
        gradient = load_state(state_gradients + joined * KEY_DIM * VALUE_DIM, channel, value_column)
        #end
        #if decayed and not delta
        gradient *= factor
        left_state = load_state(states + left * KEY_DIM * VALUE_DIM, channel, value_column)
        total_gradient += tl.sum(gradient * left_state, 1)
        #end
        left_at = state_gradients + left * KEY_DIM * VALUE_DIM
        store_state(left_at, channel, value_column, load_state(left_at, channel, value_column) + gradient)
    #if channel and not delta
    above = load_channels(total_gradients + joined_entry * KEY_DIM, channel)
    store_channels(total_gradients + right * KEY_DIM, channel,
                   above + total_gradient + load_channels(total_gradients + right * KEY_DIM, channel))
    store_channels(total_gradients + left * KEY_DIM, channel,
                   above + load_channels(total_gradients + left * KEY_DIM, channel))
    #elif scalar and not delta
    above = tl.load(total_gradients + joined_entry)
    tl.store(total_gradients + right, above + tl.sum(total_gradient, 0) + tl.load(total_gradients + right))
    tl.store(total_gradients + left, above + tl.load(total_gradients + left))
    #end
'''

TRANSITION_DOWN = '''
@triton.jit
def transition_down(
    states,  # [lanes, N, K, V]: of left blocks
    state_gradients,  # [lanes, N, K, V]
    transitions,  # [2, lanes, N, K, K]
    transition_gradients,  # [2, lanes, N, K, K] in and out
    <<tables>>
    chunks, lanes, pairs, level,
    VALUE_TILE: tl.constexpr,
):
    """Reverse of tree_up for transitions."""
    pair = tl.program_id(0) % pairs
    lane = (tl.program_id(0) // pairs).to(tl.int64)
    <<channels>>
    <<family>>
    above = transition_gradients + joined_entry * KEY_DIM * KEY_DIM
    left_transition = transitions + left * KEY_DIM * KEY_DIM
    gradient = long_dot(above, KEY_DIM, 1, channel, left_transition, 1, KEY_DIM, channel, KEY_DIM)
    for first_value in range(0, VALUE_DIM, VALUE_TILE):
        value_column = first_value + tl.arange(0, VALUE_TILE)
        joined_gradient = load_state(state_gradients + joined * KEY_DIM * VALUE_DIM, channel, value_column)
        left_state = load_state(states + left * KEY_DIM * VALUE_DIM, channel, value_column)
        gradient += fine_dot(joined_gradient, tl.trans(left_state))
    right_at = transition_gradients + right * KEY_DIM * KEY_DIM
    store_matrix(right_at, channel, channel, gradient + load_matrix(right_at, channel, channel))
    right_transition = transitions + right * KEY_DIM * KEY_DIM
    left_at = transition_gradients + left * KEY_DIM * KEY_DIM
    gradient = long_dot(right_transition, 1, KEY_DIM, channel, above, KEY_DIM, 1, channel, KEY_DIM)
    store_matrix(left_at, channel, channel, gradient + load_matrix(left_at, channel, channel))
'''

SCAN_GRADIENT = '''
@triton.jit
def scan_gradient(
    #if decayed
    totals,  # [2, lanes, N (, K)]
    #end
    #if delta
    transitions,  # [2, lanes, N, K, K]: what chunks take away
    #end
    state_gradients,  # [lanes, N, K, V] in: of states at chunks' starts, from their readers; out: of what chunks add
    #if final
    final_gradients,  # [lanes, K, V]
    #end
    #if started
    initial_gradients,  # [lanes, K, V] out
    #end
    <<scan_tables>>
    chunks, lanes,
    VALUE_TILE: tl.constexpr,
):
    """Reverse of state_scan."""
    <<scanned_row>>
    <<channels>>
    <<value_tile>>
    #if final
    gradient = load_state(final_gradients + lane * KEY_DIM * VALUE_DIM, channel, value_column)
    #else
    gradient = tl.zeros([KEY_TILE, VALUE_TILE], tl.float32)
    #end
    for back in range(0, row_chunks):
        chunk = row_chunks - 1 - back
        at = state_gradients + (home + chunk) * KEY_DIM * VALUE_DIM
        read = load_state(at, channel, value_column)
        tl.debug_barrier()
        store_state(at, channel, value_column, gradient)
        #if decayed or delta
        entry = (chunk % 2) * lanes * chunks + home + chunk
        #end
        #if delta
        taken = load_matrix(transitions + entry * KEY_DIM * KEY_DIM, channel, channel)
        read -= fine_dot(tl.trans(taken), gradient)
        #end
        #if scalar
        gradient = tl.exp(tl.load(totals + entry)) * gradient + read
        #elif channel
        gradient = tl.exp(load_channels(totals + entry * KEY_DIM, channel))[:, None] * gradient + read
        #else
        gradient += read
        #end
    #if started
    store_state(initial_gradients + lane * KEY_DIM * VALUE_DIM, channel, value_column, gradient)
    #end
'''

BACKWARD_BLOCKS = {
    "state_by_output": STATE_BY_OUTPUT,
    "output_gradient": OUTPUT_GRADIENT,
    "reader_entry": READER_ENTRY,
    "pull_all": PULL_ALL,
    "share": SHARE,
    "old_gradient": OLD_GRADIENT,
    "levels_gradient": LEVELS_GRADIENT,
    "one_reader": ONE_READER,
}
BACKWARD = {
    "read_gradient": READ_GRADIENT,
    "state_gradient": STATE_GRADIENT,
    "transition_gradient": TRANSITION_GRADIENT,
    "tree_down": TREE_DOWN,
    "transition_down": TRANSITION_DOWN,
    "scan_gradient": SCAN_GRADIENT,
}
