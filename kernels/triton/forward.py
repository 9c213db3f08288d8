"""The forward kernels, in the order in which they run.

States lie in slots: a block of chunks that others read lies in the slot of its last chunk, and so does every block that
ends there, one after the other as the tree grows. What a block does to states that pass it (the sum of its log decays,
and a matrix for the delta rule) lies in two tables: of left blocks by last chunk, of right blocks by first chunk.
"""

from __future__ import annotations

# The scores between a chunk's tokens where every channel has a decay of its own. Blocks of BLOCK tokens: between two
# blocks by a product of rows that are decayed to the start of the later one, within a block key by key.
CHUNK_SCORES = '''
@triton.jit
def chunk_scores(
    <<operand query>>
    <<operand key>>
    <<operand decay>>
    query_squares,  # [lanes, N, C, C] out: scores of queries
    #if delta
    key_squares,  # [lanes, N, C, C] out: scores of keys
    #end
    <<geometry>>
):
    """Scores of queries (and keys) with earlier keys of their chunk, decays between them included."""
    <<lane>>
    <<channels>>
    inner = tl.arange(0, BLOCK)  # [block]
    decay_base = decay_ptr + row * decay_row + head * decay_head
    query_base = query_ptr + row * query_row + group * query_head
    key_base = key_ptr + row * key_row + group * key_head
    square = (home + chunk) * CHUNK * CHUNK
    for later in range(0, CHUNK, BLOCK):
        here = first_token + later + inner  # [block] tokens
        there = (here >= row_begin) & (here < row_end)
        log_decay = load_log_decay_rows(decay_base, here, decay_token, there, channel)  # [block, K]
        decayed = tl.exp(tl.cumsum(log_decay, axis=0))
        query = load_rows(query_base, here, query_token, there, channel, KEY_DIM).to(tl.float32)
        #if delta
        key = load_rows(key_base, here, key_token, there, channel, KEY_DIM).to(tl.float32)
        #end
        between = tl.zeros([KEY_TILE], tl.float32)  # of the blocks between the two
        for back in range(0, later, BLOCK):
            earlier = later - BLOCK - back
            <<earlier_rows>>
            block = square + (later + inner)[:, None] * CHUNK + (earlier + inner)[None, :]
            tl.store(query_squares + block, dot(query * decayed, tl.trans(seen)))
            #if delta
            tl.store(key_squares + block, dot(key * decayed, tl.trans(seen)))
            #end
            between += tl.sum(other_decay, 0)
        # Within the block: the sum of what lies between grows as the key moves back.
        passed = tl.zeros([BLOCK, KEY_TILE], tl.float32)
        for back in range(0, BLOCK):
            place = BLOCK - 1 - back
            causal = inner >= place
            <<one_key>>
            factor = tl.where(causal[:, None], tl.exp(passed), 0.0) * one_key[None, :]
            column = square + (later + inner) * CHUNK + later + place
            tl.store(query_squares + column, tl.sum(query * factor, 1))
            #if delta
            tl.store(key_squares + column, tl.sum(key * factor, 1))
            #end
            passed = tl.where(causal[:, None], passed + one_decay[None, :], 0.0)
        for other in range(later + BLOCK, CHUNK, BLOCK):
            corner = square + (later + inner)[:, None] * CHUNK + (other + inner)[None, :]
            tl.store(query_squares + corner, tl.zeros([BLOCK, BLOCK], tl.float32))
            #if delta
            tl.store(key_squares + corner, tl.zeros([BLOCK, BLOCK], tl.float32))
            #end
'''

# ``seen``: keys of an earlier block, decayed until the start of the later one.
EARLIER_ROWS = """
other_token = first_token + earlier + inner
other_real = (other_token >= row_begin) & (other_token < row_end)
other_decay = load_log_decay_rows(decay_base, other_token, decay_token, other_real, channel)
after = (inner < BLOCK - 1) & (other_token + 1 >= row_begin) & (other_token + 1 < row_end)
next_decay = load_log_decay_rows(decay_base, other_token + 1, decay_token, after, channel)
decayed_to = tl.exp(tl.cumsum(next_decay, axis=0, reverse=True) + between[None, :])  # [block, K]
seen = load_rows(key_base, other_token, key_token, other_real, channel, KEY_DIM).to(tl.float32) * decayed_to
"""

# One token of the block: its key, and its decay, which lies between it and later ones only for keys before it.
ONE_KEY = """
one_token = first_token + later + place + channel * 0  # [K]
one_real = (one_token >= row_begin) & (one_token < row_end) & (channel < KEY_DIM)
one_at = one_token.to(tl.int64)
one_key = tl.load(key_base + one_at * key_token + channel, mask=one_real, other=0.0).to(tl.float32)  # [K]
one_decay = tl.load(decay_base + one_at * decay_token + channel, mask=one_real, other=0.0).to(tl.float32)
one_decay = tl.maximum(one_decay, LOWEST)
"""

CHUNK_INVERSE = '''
@triton.jit
def chunk_inverse(
    <<operand key>>
    <<decay>>
    <<beta>>
    #if channel
    key_squares,  # [lanes, N, C, C]
    #end
    inverses,  # [lanes, N, C, C] out
    <<geometry>>
):
    """The heart of the UT transform (arXiv 2406.06484): (I + strict_tril(beta K K^T))^-1, decays inside the product."""
    <<lane>>
    <<channels>>
    <<rows_of_group key>>
    <<log_decay>>
    <<decay_between>>
    <<scores key>>
    <<beta_column>>
    lower = tl.where(position[:, None] > position[None, :], key_scores * beta[:, None], 0.0)
    store_square(inverses + (home + chunk) * CHUNK * CHUNK, position, unit_lower_inverse(lower, position))
'''

CHUNK_STATE = '''
@triton.jit
def chunk_state(
    <<operand key>>
    <<operand value>>
    <<decay>>
    <<beta>>
    #if delta
    inverses,  # [lanes, N, C, C]
    transitions,  # [2, lanes, N, K, K] out
    #end
    states,  # [lanes, N, K, V] out
    #if decayed
    totals,  # [2, lanes, N] or [2, lanes, N, K] out
    #end
    <<geometry>>
    lanes,
    VALUE_TILE: tl.constexpr,
):
    """What each chunk adds to the state, and what it does to a state that passes it."""
    <<lane>>
    <<channels>>
    <<value_tile>>
    <<rows_of_group key>>
    <<log_decay>>
    <<writer>>
    <<rows_of_head value>>
    store_state(
        states + (home + chunk) * KEY_DIM * VALUE_DIM, channel, value_column, dot(tl.trans(writer), value)
    )
    #if decayed or delta
    # A table of left blocks by last chunk and one of right blocks by first chunk.
    entry = (chunk % 2) * lanes * chunks + home + chunk
    #end
    #if decayed
    total = tl.sum(log_decay, 0)
    #end
    #if scalar
    tl.store(totals + entry, total)
    #elif channel
    store_channels(totals + entry * KEY_DIM, channel, total)
    #end
    #if delta
    if tl.program_id(1) == 0:
        <<from_start>>
        <<decay_rows decayed_key key from_start>>
        transition = dot(tl.trans(writer), decayed_key)  # [K, K]
        #if weighted
        <<own_decay>>
        transition = tl.where(channel[:, None] == channel[None, :], own_decay, 0.0) - transition
        #end
        store_matrix(transitions + entry * KEY_DIM * KEY_DIM, channel, channel, transition)
    #end
'''

OWN_DECAY = """
#if scalar
own_decay = tl.exp(total)
#elif channel
own_decay = tl.exp(total)[:, None]
#else
own_decay = 1.0
#end
"""

# One level of the tree: two neighbouring blocks become one.
TREE_UP = '''
@triton.jit
def tree_up(
    states,  # [lanes, N, K, V] in and out
    #if decayed
    totals,  # [2, lanes, N (, K)] in and out
    #end
    #if delta
    transitions,  # [2, lanes, N, K, K] in and out
    #end
    <<tables>>
    chunks, lanes, pairs, level,
    VALUE_TILE: tl.constexpr,
):
    """right, left -> one block: P = P_right P_left, X = P_right X_left + X_right."""
    pair = tl.program_id(0) % pairs
    lane = (tl.program_id(0) // pairs).to(tl.int64)
    <<channels>>
    <<value_tile>>
    <<family>>
    #if delta
    right_transition = transitions + right * KEY_DIM * KEY_DIM
    left_state = states + left * KEY_DIM * VALUE_DIM
    joined_state = long_dot(right_transition, KEY_DIM, 1, channel, left_state, VALUE_DIM, 1, value_column, VALUE_DIM)
    joined_state += load_state(states + joined * KEY_DIM * VALUE_DIM, channel, value_column)
    #else
    left_state = load_state(states + left * KEY_DIM * VALUE_DIM, channel, value_column)
    joined_state = load_state(states + joined * KEY_DIM * VALUE_DIM, channel, value_column)
    #if scalar
    joined_state += tl.exp(tl.load(totals + right)) * left_state
    #elif channel
    joined_state += tl.exp(load_channels(totals + right * KEY_DIM, channel))[:, None] * left_state
    #else
    joined_state += left_state
    #end
    #end
    store_state(states + joined * KEY_DIM * VALUE_DIM, channel, value_column, joined_state)
    #if decayed or delta
    if tl.program_id(1) == 0:
        #if scalar
        tl.store(totals + joined_entry, tl.load(totals + left) + tl.load(totals + right))
        #elif channel
        total = load_channels(totals + left * KEY_DIM, channel) + load_channels(totals + right * KEY_DIM, channel)
        store_channels(totals + joined_entry * KEY_DIM, channel, total)
        #end
        #if delta
        left_transition = transitions + left * KEY_DIM * KEY_DIM
        both = long_dot(right_transition, KEY_DIM, 1, channel, left_transition, KEY_DIM, 1, channel, KEY_DIM)
        store_matrix(transitions + joined_entry * KEY_DIM * KEY_DIM, channel, channel, both)
        #end
    #end
'''

# Where a pair of blocks of 2**level chunks and the block that they make are. Left blocks lie by last chunk, right ones
# by first chunk; the joined block's state is in the right one's slot.
FAMILY = """
#if packed
# Of twice 2**level chunks in a row one at most ends a pair, and it is of the first one's sequence.
window = pair << (level + 1)
<<sequence_of lane window>>
pair = window >> (level + 1)
if ((pair + 1) << (level + 1)) > tl.load(first_chunks + sequence + 1) - first_chunk:
    return
#else
home = lane * chunks
#end
first = pair << (level + 1)  # first chunk of both
left = home + first + (1 << level) - 1
joined = left + (1 << level)  # slot of the joined state, which holds the right one's
#if decayed or delta
right = lanes * chunks + home + first + (1 << level)
joined_entry = joined
if pair % 2 == 1:
    joined_entry = lanes * chunks + home + first
#end
"""

STATE_SCAN = '''
@triton.jit
def state_scan(
    states,  # [lanes, N, K, V] in: what chunks add; out: states at their starts
    #if decayed
    totals,  # [2, lanes, N (, K)]
    #end
    #if delta
    transitions,  # [2, lanes, N, K, K]: what chunks take away
    #end
    #if started
    initial_states,  # [lanes, K, V]
    #end
    #if final
    final_states,  # [lanes, K, V] out
    #end
    <<scan_tables>>
    chunks, lanes,
    VALUE_TILE: tl.constexpr,
):
    """The linear operator's states, chunk after chunk."""
    <<scanned_row>>
    <<channels>>
    <<value_tile>>
    #if started
    state = load_state(initial_states + lane * KEY_DIM * VALUE_DIM, channel, value_column)
    #else
    state = tl.zeros([KEY_TILE, VALUE_TILE], tl.float32)
    #end
    for chunk in range(0, row_chunks):
        at = states + (home + chunk) * KEY_DIM * VALUE_DIM
        added = load_state(at, channel, value_column)
        tl.debug_barrier()
        store_state(at, channel, value_column, state)
        #if decayed or delta
        entry = (chunk % 2) * lanes * chunks + home + chunk
        #end
        #if delta
        taken = load_matrix(transitions + entry * KEY_DIM * KEY_DIM, channel, channel)
        added -= fine_dot(taken, state)
        #end
        #if scalar
        state = tl.exp(tl.load(totals + entry)) * state + added
        #elif channel
        state = tl.exp(load_channels(totals + entry * KEY_DIM, channel))[:, None] * state + added
        #else
        state += added
        #end
    #if final
    store_state(final_states + lane * KEY_DIM * VALUE_DIM, channel, value_column, state)
    #end
'''

OUTPUT = '''
@triton.jit
def output(
    <<operand query>>
    <<operand key>>
    <<operand value>>
    <<decay>>
    <<beta>>
    <<weight>>
    #if channel
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
    #if old
    old_states,  # [lanes, slots, K, V]: initial state, levels merged for the first token
    old_seen,  # [rows, T, slots]: level at which each token sees each of them
    old_slots,
    #end
    outputs,  # [B, T, H, V] out, dense
    scale,
    <<geometry>>
    VALUE_TILE: tl.constexpr,
):
    """Everything that a chunk's queries read, from tokens of the same chunk and from all levels, in one pass."""
    <<lane>>
    <<channels>>
    <<value_tile>>
    <<rows_of_group query>>
    <<rows_of_group key>>
    <<log_decay>>
    <<reader>>
    <<rows_of_head value>>
    #if weighted
    <<served>>
    weight_base = weight_ptr + row * weight_row + head * weight_head
    out = dot(scores * pair_weights(weight_base, token, weight_token, real, position, served, EDGE), value)  # [C, V]
    #else
    out = dot(scores, value)  # [C, V]
    #end
    #if weighted
    <<read_levels>>
    #if old
    <<read_old>>
    #end
    #else
    state = load_state(states + (home + chunk) * KEY_DIM * VALUE_DIM, channel, value_column)  # [K, V]
    <<far_reader>>
    #if scalar and not delta
    out += dot(far_reader, state) * tl.exp(from_start)[:, None]
    #else
    out += dot(far_reader, state)
    #end
    #end
    store_rows(outputs + (row * tokens * heads + head) * VALUE_DIM, token, heads * VALUE_DIM, real, value_column,
               out * scale, VALUE_DIM)
'''

# Queries as they read beyond the chunk: what is pulled back from block to block is the decay, or the query itself.
FAR_READER = """
#if delta
far_reader = reader
#elif channel and weighted
far_reader = decayed_query * tl.exp(reach)[None, :]
#elif channel
far_reader = decayed_query
#else
far_reader = query
#end
"""

# Everything between the block that is read and the chunk: nothing yet.
REACH = """
#if scalar and not delta
reach = 0.0
#elif channel and not delta
reach = tl.zeros([KEY_TILE], tl.float32)  # [K]
#end
"""

READ_LEVELS = """
<<reach>>
bits = chunk
for _ in range(0, bit_count(chunk)):  # one block for each set bit, nearest first
    <<level>>
    state = load_state(states + (home + slot) * KEY_DIM * VALUE_DIM, channel, value_column)  # [K, V]
    weight = load_column(weight_base + served_level(served, EDGE + 1 + level), token, weight_token, real)  # [C]
    <<far_reader>>
    #if scalar and not delta
    weight *= tl.exp(from_start + reach)
    #end
    out += dot(far_reader, state) * weight[:, None]
    <<pull>>
    bits &= bits - 1
"""

# Back over the block that was read.
PULL = """
#if delta
passed = load_matrix(transitions + (home + slot) * KEY_DIM * KEY_DIM, channel, channel)
reader = dot(reader, passed)  # [C, K]
#elif channel
reach += load_channels(totals + (home + slot) * KEY_DIM, channel)
#elif scalar
reach += tl.load(totals + home + slot)
#end
"""

READ_OLD = """
<<far_reader>>
for slot in range(0, old_slots):
    state = load_state(old_states + (lane * old_slots + slot) * KEY_DIM * VALUE_DIM, channel, value_column)  # [K, V]
    seen = tl.load(old_seen + (row * tokens + token.to(tl.int64)) * old_slots + slot, mask=real, other=0)  # [C]
    weight = tl.load(weight_base + token.to(tl.int64) * weight_token + seen, mask=real, other=0.0).to(tl.float32)
    #if scalar and not delta
    weight *= tl.exp(from_start + reach)
    #end
    out += dot(far_reader, state) * weight[:, None]
"""

# A scan's program has a row and head.
SCANNED_ROW = """
lane = tl.program_id(0).to(tl.int64)
#if packed
<<row>>
#end
<<home_of_row>>
<<row_chunks>>
"""

SCAN_TABLES = """
<<tables>>
#if packed
heads,
#end
"""

FORWARD_BLOCKS = {
    "scanned_row": SCANNED_ROW,
    "scan_tables": SCAN_TABLES,
    "earlier_rows": EARLIER_ROWS,
    "one_key": ONE_KEY,
    "own_decay": OWN_DECAY,
    "family": FAMILY,
    "far_reader": FAR_READER,
    "reach": REACH,
    "read_levels": READ_LEVELS,
    "pull": PULL,
    "read_old": READ_OLD,
}
FORWARD = {
    "chunk_scores": CHUNK_SCORES,
    "chunk_inverse": CHUNK_INVERSE,
    "chunk_state": CHUNK_STATE,
    "tree_up": TREE_UP,
    "state_scan": STATE_SCAN,
    "output": OUTPUT,
}
