'''The last two backward kernels: inside the chunks, where the gradients of the operands come out.'''

from __future__ import annotations

CHUNK_GRADIENT = '''
@triton.jit
def chunk_gradient(
    <<operand query>>
    <<operand key>>
    <<operand value>>
    <<operand output_gradient>>
    <<decay>>
    <<beta>>
    <<weight>>
    #if channel
    query_squares,  # [lanes, N, C, C] in: scores; out: their gradients
    #if delta
    key_squares,  # [lanes, N, C, C] in and out
    #end
    #end
    #if delta
    inverses,  # [lanes, N, C, C]
    reader_gradients,  # [lanes, N, C, K]
    #if weighted
    transition_gradients,  # [2, lanes, N, K, K]
    #end
    #end
    #if (decayed or delta) and not weighted
    states,  # [lanes, N, K, V]: at chunks' starts
    #end
    state_gradients,  # [lanes, N, K, V]: of what chunks add
    #if decayed and weighted and not delta
    total_gradients,  # [2, lanes, N (, K)]
    #end
    query_gradients,  # [B, T, H, K] in: from other chunks (without correction); out
    key_gradients,  # [B, T, H, K] out
    value_gradients,  # [B, T, H, V] out
    #if weighted
    weight_gradients,  # [B, T, H, L] in and out
    #end
    #if decayed
    decay_gradients,  # [B, T, H (, K)] out
    #end
    #if channel
    decay_carries,  # [lanes, N, K] out: gradients of log decays at the chunks' ends
    #end
    #if delta
    beta_gradients,  # [B, T, H] out
    #end
    scale,
    <<geometry>>
    lanes,
    VALUE_TILE: tl.constexpr,
):
    """Gradients of a chunk's operands, from its own output, from what it adds to the state and does to others."""
    <<lane>>
    <<channels>>
    <<rows_of_group query>>
    <<rows_of_group key>>
    <<log_decay>>
    <<decay_between>>
    <<scores query>>
    <<from_start>>
    <<writer>>
    #if delta
    scores = dot(query_scores, mix)  # [C, C]
    <<decay_rows decayed_key key from_start>>
    decayed_key_gradient = tl.zeros([CHUNK, KEY_TILE], tl.float32)
    #else
    scores = query_scores
    #end
    #if weighted
    <<served>>
    weight_base = weight_ptr + row * weight_row + head * weight_head
    level_weights = pair_weights(weight_base, token, weight_token, real, position, served, EDGE)  # [C, C]
    weighed_scores = scores * level_weights
    #else
    weighed_scores = scores
    #end
    scores_gradient = tl.zeros([CHUNK, CHUNK], tl.float32)
    writer_gradient = tl.zeros([CHUNK, KEY_TILE], tl.float32)
    #if decayed and not weighted
    carry = tl.zeros([KEY_TILE], tl.float32)  # [K] gradient of the log decay at the chunk's end
    #end
    <<values_gradient>>
    #if weighted
    weight_gradient_base = weight_gradients + (row * tokens * heads + head) * LEVELS
    add_pair_weights_gradient(
        weight_gradient_base, token, heads * LEVELS, real, position, served, scores_gradient * scores, EDGE
    )
    scores_gradient *= level_weights
    #end
    scores_gradient = tl.where(position[:, None] >= position[None, :], scores_gradient, 0.0)
    #if delta
    <<delta_gradient>>
    #end
    <<tokens_gradient>>
'''

# All that runs over values: gradients of scores, writers and values.
VALUES_GRADIENT = """
gradient_base = output_gradient_ptr + row * output_gradient_row + head * output_gradient_head
state_at = (lane * chunks + chunk) * KEY_DIM * VALUE_DIM
for first_value in range(0, VALUE_DIM, VALUE_TILE):
    value_column = first_value + tl.arange(0, VALUE_TILE)
    <<output_gradient>>
    <<rows_of_head value>>
    added_gradient = load_state(state_gradients + state_at, channel, value_column)  # [K, V tile]
    scores_gradient += dot(output_gradient, tl.trans(value))
    written_gradient = dot(writer, added_gradient)  # [C, V tile]
    #if (decayed or delta) and not weighted
    state = load_state(states + state_at, channel, value_column)
    #end
    #if decayed and not weighted
    carry += tl.sum(state * added_gradient, 1)
    #end
    #if delta and not weighted
    corrected = value.to(tl.float32) - dot(decayed_key, state)  # values less what the state held for their keys
    writer_gradient += dot(corrected, tl.trans(added_gradient))
    decayed_key_gradient -= dot(written_gradient, tl.trans(state))
    #else
    writer_gradient += dot(value, tl.trans(added_gradient))
    #end
    value_gradient = dot(tl.trans(weighed_scores), output_gradient) + written_gradient
    store_rows(value_gradients + (row * tokens * heads + head) * VALUE_DIM, token, heads * VALUE_DIM, real,
               value_column, value_gradient, VALUE_DIM)
"""

# Through the delta rule: from gradients of final scores, readers and writers to those of plain scores and of keys.
DELTA_GRADIENT = """
entry = lane * chunks + chunk
reader_base = reader_gradients + entry * CHUNK * KEY_DIM
reader_gradient = load_rows(reader_base, position, KEY_DIM, position >= 0, channel, KEY_DIM)  # [C, K]
scores_gradient -= dot(reader_gradient, tl.trans(decayed_key))
decayed_key_gradient -= dot(tl.trans(scores), reader_gradient)
#if weighted
entry = ((chunk % 2) * lanes + lane) * chunks + chunk
transition_gradient = load_matrix(transition_gradients + entry * KEY_DIM * KEY_DIM, channel, channel)  # [K, K]
writer_gradient -= dot(decayed_key, tl.trans(transition_gradient))
decayed_key_gradient -= dot(writer, transition_gradient)
#if decayed
carry = tl.sum(tl.where(channel[:, None] == channel[None, :], transition_gradient, 0.0), 1)  # [K]
#end
#end
mix_gradient = dot(tl.trans(query_scores), scores_gradient) + dot(tail_key, tl.trans(writer_gradient))  # [C, C]
tail_key_gradient = dot(mix, writer_gradient)  # [C, K]
causal = position[:, None] >= position[None, :]
scores_gradient = tl.where(causal, dot(scores_gradient, tl.trans(mix)), 0.0)  # of query_scores
<<scores key>>
strict = position[:, None] > position[None, :]
lower_gradient = fine_dot(tl.trans(inverse), mix_gradient * beta[None, :])
lower_gradient = tl.where(strict, -fine_dot(lower_gradient, tl.trans(inverse)), 0.0)
beta_gradient = tl.sum(mix_gradient * inverse, 0) + tl.sum(lower_gradient * key_scores, 1)  # [C]
beta_at = beta_gradients + (row * tokens * heads + head) + token.to(tl.int64) * heads
tl.store(beta_at, beta_gradient, mask=real)
key_scores_gradient = lower_gradient * beta[:, None]  # [C, C]
"""

# What is left: plain scores, and keys and queries with decays from the chunk's start and to its end. The gradient of a
# log decay is what passes over its token: what later queries take less what earlier keys give.
TOKENS_GRADIENT = """
head_base = (row * tokens * heads + head) * KEY_DIM
#if not delta
tail_key_gradient = writer_gradient
query_gradient = load_rows(query_gradients + head_base, token, heads * KEY_DIM, real, channel, KEY_DIM)
#else
<<decay_rows query_gradient reader_gradient from_start>>
<<decay_rows key_gradient decayed_key_gradient from_start>>
#end
<<decay_rows tail_gradient tail_key_gradient to_end>>
#if decayed
tail_share = key.to(tl.float32) * tail_gradient  # [C, K]
<<carry>>
#end
#if decayed and delta
taken = key.to(tl.float32) * key_gradient - tail_share  # [C, K]
#elif decayed
taken = -tail_share
#end
#if delta
key_gradient += tail_gradient
#else
key_gradient = tail_gradient
#end
#if channel
square = (lane * chunks + chunk) * CHUNK * CHUNK
tl.debug_barrier()
store_square(query_squares + square, position, scores_gradient)
#if delta
store_square(key_squares + square, position, key_scores_gradient)
#end
store_channels(decay_carries + (lane * chunks + chunk) * KEY_DIM, channel, carry)
store_rows(decay_gradients + head_base, token, heads * KEY_DIM, real, channel, taken, KEY_DIM)
#else
<<near_gradient>>
#end
store_rows(query_gradients + head_base, token, heads * KEY_DIM, real, channel, query_gradient, KEY_DIM)
store_rows(key_gradients + head_base, token, heads * KEY_DIM, real, channel, key_gradient, KEY_DIM)
"""

CARRY = """
#if weighted and channel and not delta
carry = load_channels(total_gradients + (((chunk % 2) * lanes + lane) * chunks + chunk) * KEY_DIM, channel)
carry += tl.sum(tail_share, 0)
#elif weighted and not delta
carry = tl.load(total_gradients + ((chunk % 2) * lanes + lane) * chunks + chunk) + tl.sum(tl.sum(tail_share, 1), 0)
#elif channel
carry = carry * tl.exp(tl.sum(log_decay, 0)) + tl.sum(tail_share, 0)  # [K]
#else
carry = tl.sum(carry, 0) * tl.exp(tl.sum(log_decay, 0)) + tl.sum(tl.sum(tail_share, 1), 0)
#end
"""

NEAR_GRADIENT = """
#if scalar
scores_gradient *= decay_between
#end
query_gradient += dot(scores_gradient, key)
column_gradient = dot(tl.trans(scores_gradient), query)  # of keys that are looked at
#if delta
#if scalar
key_scores_gradient *= decay_between
#end
row_gradient = dot(key_scores_gradient, key)  # of keys that look
column_gradient += dot(tl.trans(key_scores_gradient), key)
key_gradient += row_gradient + column_gradient
#else
key_gradient += column_gradient
#end
#if scalar
taken += query.to(tl.float32) * query_gradient - key.to(tl.float32) * column_gradient
#if delta
taken += key.to(tl.float32) * row_gradient
#end
decay_gradient = tl.cumsum(tl.sum(taken, 1), axis=0, reverse=True) + carry  # [C]
decay_at = decay_gradients + (row * tokens * heads + head) + token.to(tl.int64) * heads
tl.store(decay_at, decay_gradient, mask=real)
#end
"""

CHUNK_SCORES_GRADIENT = '''
@triton.jit
def chunk_scores_gradient(
    <<operand query>>
    <<operand key>>
    <<operand decay>>
    query_squares,  # [lanes, N, C, C]: gradients of chunk_scores' results
    #if delta
    key_squares,  # [lanes, N, C, C]
    #end
    decay_carries,  # [lanes, N, K]
    query_gradients,  # [B, T, H, K] in and out, as the next two
    key_gradients,
    decay_gradients,
    <<geometry>>
):
    """Reverse of chunk_scores, and the gradient of the log decays."""
    <<lane>>
    <<channels>>
    inner = tl.arange(0, BLOCK)  # [block]
    decay_base = decay_ptr + row * decay_row + head * decay_head
    query_base = query_ptr + row * query_row + group * query_head
    key_base = key_ptr + row * key_row + group * key_head
    head_base = (row * tokens * heads + head) * KEY_DIM
    square = (lane * chunks + chunk) * CHUNK * CHUNK
    first = chunk * CHUNK
    #if continued
    first -= tl.load(offsets + row)
    #end
    carry = load_channels(decay_carries + (lane * chunks + chunk) * KEY_DIM, channel)  # [K]
    for step in range(0, CHUNK, BLOCK):
        begin = CHUNK - BLOCK - step
        here = first + begin + inner  # [block] tokens
        there = (here >= 0) & (here < length)
        log_decay = load_log_decay_rows(decay_base, here, decay_token, there, channel)  # [block, K]
        query = load_rows(query_base, here, query_token, there, channel, KEY_DIM).to(tl.float32)
        key = load_rows(key_base, here, key_token, there, channel, KEY_DIM).to(tl.float32)
        rows_gradient = tl.zeros([BLOCK, KEY_TILE], tl.float32)  # of queries
        #if delta
        looking_gradient = tl.zeros([BLOCK, KEY_TILE], tl.float32)  # of keys that look
        #end
        column_gradient = tl.zeros([BLOCK, KEY_TILE], tl.float32)  # of keys that are looked at
        between = tl.zeros([KEY_TILE], tl.float32)
        for back in range(0, begin, BLOCK):
            earlier = begin - BLOCK - back
            <<earlier_rows>>
            block = square + (begin + inner)[:, None] * CHUNK + (earlier + inner)[None, :]
            rows_gradient += dot(tl.load(query_squares + block), seen)
            #if delta
            looking_gradient += dot(tl.load(key_squares + block), seen)
            #end
            between += tl.sum(other_decay, 0)
        from_begin = tl.exp(tl.cumsum(log_decay, axis=0))
        rows_gradient *= from_begin
        #if delta
        looking_gradient *= from_begin
        #end
        between = tl.zeros([KEY_TILE], tl.float32)
        for later in range(begin + BLOCK, CHUNK, BLOCK):
            <<later_rows>>
            corner = square + (later + inner)[:, None] * CHUNK + (begin + inner)[None, :]
            column_gradient += dot(tl.trans(tl.load(query_squares + corner)), far_query * far_decay)
            #if delta
            column_gradient += dot(tl.trans(tl.load(key_squares + corner)), far_key * far_decay)
            #end
            between += tl.sum(far_log, 0)
        after_here = (inner < BLOCK - 1) & (here >= -1) & (here + 1 < length)
        to_block_end = load_log_decay_rows(decay_base, here + 1, decay_token, after_here, channel)
        column_gradient *= tl.exp(tl.cumsum(to_block_end, axis=0, reverse=True))
        passed = tl.zeros([BLOCK, KEY_TILE], tl.float32)
        for back in range(0, BLOCK):
            place = BLOCK - 1 - back
            causal = inner >= place
            <<one_key_here>>
            factor = tl.where(causal[:, None], tl.exp(passed), 0.0)  # [block, K]
            column = square + (begin + inner) * CHUNK + begin + place
            gradient = tl.load(query_squares + column)[:, None] * factor
            rows_gradient += gradient * one_key[None, :]
            one_gradient = tl.sum(gradient * query, 0)  # [K]
            #if delta
            gradient = tl.load(key_squares + column)[:, None] * factor
            looking_gradient += gradient * one_key[None, :]
            one_gradient += tl.sum(gradient * key, 0)
            #end
            column_gradient += tl.where(inner == place, 1.0, 0.0)[:, None] * one_gradient[None, :]
            passed = tl.where(causal[:, None], passed + one_decay[None, :], 0.0)
        query_gradient = load_rows(query_gradients + head_base, here, heads * KEY_DIM, there, channel, KEY_DIM)
        query_gradient += rows_gradient
        key_gradient = load_rows(key_gradients + head_base, here, heads * KEY_DIM, there, channel, KEY_DIM)
        taken = load_rows(decay_gradients + head_base, here, heads * KEY_DIM, there, channel, KEY_DIM)
        key_gradient += column_gradient
        taken += query * query_gradient - key * column_gradient
        #if delta
        key_gradient += looking_gradient
        taken += key * looking_gradient
        #end
        decay_gradient = tl.cumsum(taken, axis=0, reverse=True) + carry[None, :]
        carry += tl.sum(taken, 0)
        tl.debug_barrier()
        store_rows(query_gradients + head_base, here, heads * KEY_DIM, there, channel, query_gradient, KEY_DIM)
        store_rows(key_gradients + head_base, here, heads * KEY_DIM, there, channel, key_gradient, KEY_DIM)
        store_rows(decay_gradients + head_base, here, heads * KEY_DIM, there, channel, decay_gradient, KEY_DIM)
'''

# ``one_key`` and ``one_decay`` of a token of the block at ``begin``.
ONE_KEY_HERE = """
later = begin
<<one_key>>
"""

# Queries (and keys) of a later block, and their decays from the end of this block.
LATER_ROWS = """
far = first + later + inner  # [block] tokens
far_real = (far >= 0) & (far < length)
far_log = load_log_decay_rows(decay_base, far, decay_token, far_real, channel)
far_decay = tl.exp(tl.cumsum(far_log, axis=0) + between[None, :])  # [block, K]
far_query = load_rows(query_base, far, query_token, far_real, channel, KEY_DIM).to(tl.float32)
#if delta
far_key = load_rows(key_base, far, key_token, far_real, channel, KEY_DIM).to(tl.float32)
#end
"""

CHUNK_BACKWARD_BLOCKS = {
    "values_gradient": VALUES_GRADIENT,
    "delta_gradient": DELTA_GRADIENT,
    "tokens_gradient": TOKENS_GRADIENT,
    "carry": CARRY,
    "near_gradient": NEAR_GRADIENT,
    "one_key_here": ONE_KEY_HERE,
    "later_rows": LATER_ROWS,
}
CHUNK_BACKWARD = {
    "chunk_gradient": CHUNK_GRADIENT,
    "chunk_scores_gradient": CHUNK_SCORES_GRADIENT,
}
