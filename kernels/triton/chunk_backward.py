"""The last backward kernels: inside the chunks, where the gradients of the operands come out."""

from __future__ import annotations

CHUNK_VALUES_GRADIENT = '''
@triton.jit
def chunk_values_gradient(
    <<operand query>>
    <<operand key>>
    <<operand value>>
    <<operand output_gradient>>
    <<decay>>
    <<beta>>
    <<weight>>
    #if channel
    query_squares,  # [lanes, N, C, C]
    #end
    #if delta
    inverses,  # [lanes, N, C, C]
    #end
    #if decayed and not weighted and not delta
    states,  # [lanes, N, K, V]: at chunks' starts
    #end
    state_gradients,  # [lanes, N, K, V]: of what chunks add
    score_gradients,  # [lanes, N, C, C] out: of final scores
    writer_gradients,  # [lanes, N, C, K] out: of effective keys
    value_gradients,  # [B, T, H, V] out
    #if weighted
    weight_gradients,  # [B, T, H, L] in and out
    #end
    #if decayed and not weighted and not delta
    decay_carries,  # [lanes, N, K] out: of the chunk's decay, as a factor
    #end
    scale,
    <<geometry>>
    VALUE_TILE: tl.constexpr,
):
    """All that runs over values: gradients of values, level weights, final scores and effective keys."""
    <<lane>>
    <<channels>>
    <<rows_of_group query>>
    <<rows_of_group key>>
    <<log_decay>>
    <<decay_between>>
    <<scores query>>
    <<writer>>
    #if delta
    scores = dot(query_scores, mix)  # [C, C]
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
    score_gradient = tl.zeros([CHUNK, CHUNK], tl.float32)
    writer_gradient = tl.zeros([CHUNK, KEY_TILE], tl.float32)
    #if decayed and not weighted and not delta
    carry = tl.zeros([KEY_TILE], tl.float32)
    #end
    <<values_gradient>>
    #if weighted
    weight_gradient_base = weight_gradients + (row * tokens * heads + head) * LEVELS
    add_pair_weights_gradient(
        weight_gradient_base, token, heads * LEVELS, real, position, served, score_gradient * scores, EDGE
    )
    score_gradient *= level_weights
    #end
    score_gradient = tl.where(position[:, None] >= position[None, :], score_gradient, 0.0)
    entry = home + chunk
    store_square(score_gradients + entry * CHUNK * CHUNK, position, score_gradient)
    store_chunk(writer_gradients + entry * CHUNK * KEY_DIM, position, channel, writer_gradient)
    #if decayed and not weighted and not delta
    store_channels(decay_carries + entry * KEY_DIM, channel, carry)
    #end
'''

CHUNK_TRANSITION_GRADIENT = '''
@triton.jit
def chunk_transition_gradient(
    <<operand key>>
    <<decay>>
    <<beta>>
    inverses,  # [lanes, N, C, C]
    #if weighted
    transition_gradients,  # [2, lanes, N, K, K]
    #else
    states,  # [lanes, N, K, V]: at chunks' starts
    state_gradients,  # [lanes, N, K, V]: of what chunks add
    #end
    writer_gradients,  # [lanes, N, C, K] in and out
    head_gradients,  # [lanes, N, C, K] out: of keys with decays from the chunk's start
    #if decayed
    decay_carries,  # [lanes, N, K] out: of the chunk's decay, as a factor
    #end
    <<geometry>>
    lanes,
    VALUE_TILE: tl.constexpr,
):
    """Through the chunk's transition, decay - writer^T (decayed key), back to its factors."""
    <<lane>>
    <<channels>>
    <<rows_of_group key>>
    <<log_decay>>
    entry = home + chunk
    #if weighted
    table = (chunk % 2) * lanes * chunks + home + chunk
    gradient = load_matrix(transition_gradients + table * KEY_DIM * KEY_DIM, channel, channel)  # [K, K]
    #else
    gradient = tl.zeros([KEY_TILE, KEY_TILE], tl.float32)
    for first_value in range(0, VALUE_DIM, VALUE_TILE):
        value_column = first_value + tl.arange(0, VALUE_TILE)
        added_gradient = load_state(state_gradients + entry * KEY_DIM * VALUE_DIM, channel, value_column)
        state = load_state(states + entry * KEY_DIM * VALUE_DIM, channel, value_column)
        gradient += dot(added_gradient, tl.trans(state))
    #end
    #if decayed
    #if not weighted
    carry = tl.sum(tl.where(channel[:, None] == channel[None, :], gradient, 0.0), 1)  # [K]
    #else
    diagonal = transition_gradients + table * KEY_DIM * KEY_DIM + channel * KEY_DIM
    carry = load_channels(diagonal, channel)  # [K]
    #end
    store_channels(decay_carries + entry * KEY_DIM, channel, carry)
    #end
    gradient = gradient.to(OPERAND)  # as products take it, in half the room
    <<writer>>
    store_chunk(head_gradients + entry * CHUNK * KEY_DIM, position, channel, -dot(writer, gradient))
    <<from_start>>
    <<decay_rows decayed_key key from_start>>
    at = writer_gradients + entry * CHUNK * KEY_DIM
    writer_gradient = load_chunk(at, position, channel) - dot(decayed_key, tl.trans(gradient))
    tl.debug_barrier()
    store_chunk(at, position, channel, writer_gradient)
'''

CHUNK_READER_GRADIENT = '''
@triton.jit
def chunk_reader_gradient(
    <<operand query>>
    <<operand key>>
    <<decay>>
    <<beta>>
    #if channel
    query_squares,  # [lanes, N, C, C]
    #end
    inverses,  # [lanes, N, C, C]
    reader_gradients,  # [lanes, N, C, K]
    head_gradients,  # [lanes, N, C, K] in and out: of keys with decays from the chunk's start
    score_gradients,  # [lanes, N, C, C] in and out: of final scores
    query_gradients,  # [B, T, H, K] out: as far as queries read other chunks
    <<geometry>>
):
    """Through reader = decayed query - (final scores) (decayed key)."""
    <<lane>>
    <<channels>>
    <<rows_of_group key>>
    <<log_decay>>
    <<from_start>>
    entry = home + chunk
    <<decay_rows decayed_key key from_start>>
    reader_gradient = load_chunk(reader_gradients + entry * CHUNK * KEY_DIM, position, channel)  # [C, K]
    <<decay_rows query_gradient reader_gradient from_start>>
    head_base = (row * tokens * heads + head) * KEY_DIM
    store_rows(query_gradients + head_base, token, heads * KEY_DIM, real, channel, query_gradient, KEY_DIM)
    at = score_gradients + entry * CHUNK * CHUNK
    score_gradient = load_square(at, position) - dot(reader_gradient, tl.trans(decayed_key))  # [C, C]
    tl.debug_barrier()
    store_square(at, position, tl.where(position[:, None] >= position[None, :], score_gradient, 0.0))
    <<rows_of_group query>>
    <<decay_between>>
    <<scores query>>
    <<mix>>
    scores = dot(query_scores, mix)  # [C, C]
    at = head_gradients + entry * CHUNK * KEY_DIM
    head_gradient = load_chunk(at, position, channel) - dot(tl.trans(scores), reader_gradient)
    tl.debug_barrier()
    store_chunk(at, position, channel, head_gradient)
'''

CHUNK_WRITER_GRADIENT = '''
@triton.jit
def chunk_writer_gradient(
    <<operand key>>
    <<decay>>
    <<beta>>
    inverses,  # [lanes, N, C, C]
    writer_gradients,  # [lanes, N, C, K] in: of effective keys; out: of keys with decays to the chunk's end
    mix_gradients,  # [lanes, N, C, C] out
    <<geometry>>
):
    """Through writer = mix^T (key decayed to the end)."""
    <<lane>>
    <<channels>>
    <<rows_of_group key>>
    <<log_decay>>
    <<to_end>>
    entry = home + chunk
    at = writer_gradients + entry * CHUNK * KEY_DIM
    writer_gradient = load_chunk(at, position, channel)
    <<decay_rows tail_key key to_end>>
    store_square(mix_gradients + entry * CHUNK * CHUNK, position, dot(tail_key, tl.trans(writer_gradient)))
    <<mix>>
    tail_gradient = dot(mix, writer_gradient)
    tl.debug_barrier()
    store_chunk(at, position, channel, tail_gradient)
'''

CHUNK_DELTA_GRADIENT = '''
@triton.jit
def chunk_delta_gradient(
    #if not channel
    <<operand query>>
    <<operand key>>
    <<decay>>
    #end
    <<beta>>
    #if channel
    query_squares,  # [lanes, N, C, C]
    #end
    key_squares,  # [lanes, N, C, C] in: scores (decay per channel); out: their gradients
    inverses,  # [lanes, N, C, C]
    mix_gradients,  # [lanes, N, C, C]
    score_gradients,  # [lanes, N, C, C] in: of final scores; out: of plain ones
    beta_gradients,  # [B, T, H] out
    <<geometry>>
):
    """Through the UT transform: from final scores and the mix to plain scores and beta."""
    <<lane>>
    #if not channel
    <<channels>>
    <<rows_of_group query>>
    <<rows_of_group key>>
    <<log_decay>>
    <<decay_between>>
    #end
    entry = home + chunk
    # final scores = query_scores mix
    <<scores query>>
    <<mix>>
    at = score_gradients + entry * CHUNK * CHUNK
    score_gradient = load_square(at, position)  # [C, C]
    mix_gradient = load_square(mix_gradients + entry * CHUNK * CHUNK, position)
    mix_gradient += dot(tl.trans(query_scores), score_gradient)  # [C, C]
    score_gradient = dot(score_gradient, tl.trans(mix))
    tl.debug_barrier()
    store_square(at, position, tl.where(position[:, None] >= position[None, :], score_gradient, 0.0))
    # mix = (I + strict_tril(beta key_scores))^-1 beta
    lower_gradient = fine_dot(tl.trans(inverse), mix_gradient * beta[None, :])
    strict = position[:, None] > position[None, :]
    lower_gradient = tl.where(strict, -fine_dot(lower_gradient, tl.trans(inverse)), 0.0)
    <<scores key>>
    beta_gradient = tl.sum(mix_gradient * inverse, 0) + tl.sum(lower_gradient * key_scores, 1)  # [C]
    tl.store(beta_gradients + (row * tokens * heads + head) + token.to(tl.int64) * heads, beta_gradient, mask=real)
    #if channel
    tl.debug_barrier()
    #end
    store_square(key_squares + entry * CHUNK * CHUNK, position, lower_gradient * beta[:, None])
'''

CHUNK_GRADIENT = '''
@triton.jit
def chunk_gradient(
    #if not channel
    <<operand query>>
    #end
    <<operand key>>
    <<decay>>
    #if delta
    #if not channel
    key_squares,  # [lanes, N, C, C]: gradients of keys' scores
    #end
    head_gradients,  # [lanes, N, C, K]: of keys with decays from the chunk's start
    #end
    #if not channel
    score_gradients,  # [lanes, N, C, C]: of queries' scores
    #end
    writer_gradients,  # [lanes, N, C, K]: of keys with decays to the chunk's end
    #if decayed and weighted and not delta
    total_gradients,  # [2, lanes, N (, K)]
    #end
    #if decayed and (channel or delta or not weighted)
    decay_carries,  # [lanes, N, K] in: of the chunk's decay, as a factor; out: of the log decay at the chunk's end
    #end
    #if not channel
    query_gradients,  # [B, T, H, K] in: as far as queries read other chunks; out
    #end
    key_gradients,  # [B, T, H, K] out
    #if decayed
    decay_gradients,  # [B, T, H (, K)] out
    #end
    <<geometry>>
    lanes,
):
    """Gradients of queries, keys and decays. That of a log decay is what passes over its token: what later queries
    take less what earlier keys give."""
    <<lane>>
    <<channels>>
    entry = home + chunk
    head_base = (row * tokens * heads + head) * KEY_DIM
    <<rows_of_group key>>
    <<log_decay>>
    #if channel
    <<decay_parts>>
    store_channels(decay_carries + entry * KEY_DIM, channel, carry)
    store_rows(decay_gradients + head_base, token, heads * KEY_DIM, real, channel, taken, KEY_DIM)
    #else
    <<near_gradient>>
    <<decay_parts>>
    #end
    #if scalar
    decay_gradient = tl.cumsum(taken, axis=0, reverse=True) + carry  # [C]
    decay_at = decay_gradients + (row * tokens * heads + head) + token.to(tl.int64) * heads
    tl.store(decay_at, decay_gradient, mask=real)
    #end
    store_rows(key_gradients + head_base, token, heads * KEY_DIM, real, channel, key_gradient, KEY_DIM)
'''

# All that runs over values: gradients of scores, writers and values.
VALUES_GRADIENT = """
gradient_base = output_gradient_ptr + row * output_gradient_row + head * output_gradient_head
state_at = (home + chunk) * KEY_DIM * VALUE_DIM
for first_value in range(0, VALUE_DIM, VALUE_TILE):
    value_column = first_value + tl.arange(0, VALUE_TILE)
    <<output_gradient>>
    <<rows_of_head value>>
    added_gradient = load_state(state_gradients + state_at, channel, value_column)  # [K, V tile]
    score_gradient += dot(output_gradient, tl.trans(value))
    written_gradient = dot(writer, added_gradient)  # [C, V tile]
    #if decayed and not weighted and not delta
    state = load_state(states + state_at, channel, value_column)
    carry += tl.sum(state * added_gradient, 1)
    #end
    writer_gradient += dot(value, tl.trans(added_gradient))
    value_gradient = dot(tl.trans(weighed_scores), output_gradient) + written_gradient
    store_rows(value_gradients + (row * tokens * heads + head) * VALUE_DIM, token, heads * VALUE_DIM, real,
               value_column, value_gradient, VALUE_DIM)
"""

# Through the delta rule: from gradients of final scores, readers and writers to those of plain scores and of keys.
# Keys with decays to the chunk's end and from its start; ``taken``: what passes over each token.
DECAY_PARTS = """
<<to_end>>
writer_gradient = load_chunk(writer_gradients + entry * CHUNK * KEY_DIM, position, channel)
<<decay_rows tail_gradient writer_gradient to_end>>
#if channel
key_gradient = tail_gradient
tail_share = key.to(tl.float32) * tail_gradient  # [C, K]
taken = -tail_share
#else
key_gradient += tail_gradient
#end
#if scalar
tail_share = tl.sum(key.to(tl.float32) * tail_gradient, 1)  # [C]
taken -= tail_share
#end
#if decayed
<<carry>>
#end
#if delta
<<from_start>>
head_gradient = load_chunk(head_gradients + entry * CHUNK * KEY_DIM, position, channel)
<<decay_rows head_part head_gradient from_start>>
key_gradient += head_part
#if channel
taken += key.to(tl.float32) * head_part
#elif scalar
taken += tl.sum(key.to(tl.float32) * head_part, 1)
#end
#end
"""

# Gradient of the log decay at the chunk's end.
CARRY = """
#if weighted and channel and not delta
carry = load_channels(total_gradients + ((chunk % 2) * lanes * chunks + home + chunk) * KEY_DIM, channel)
carry += tl.sum(tail_share, 0)
#elif weighted and not delta
carry = tl.load(total_gradients + (chunk % 2) * lanes * chunks + home + chunk) + tl.sum(tail_share, 0)
#else
carry = load_channels(decay_carries + entry * KEY_DIM, channel)  # [K]
#if channel
carry = carry * tl.exp(tl.sum(log_decay, 0)) + tl.sum(tail_share, 0)
#else
carry = tl.sum(carry, 0) * tl.exp(tl.sum(log_decay, 0)) + tl.sum(tail_share, 0)
#end
#end
"""

# Scores within the chunk, where decays do not depend on the channel: keys are looked at, and look (delta rule).
NEAR_GRADIENT = """
<<rows_of_group query>>
<<decay_between>>
score_gradient = load_square(score_gradients + entry * CHUNK * CHUNK, position)
#if scalar
score_gradient *= decay_between
#end
query_gradient = load_rows(query_gradients + head_base, token, heads * KEY_DIM, real, channel, KEY_DIM)
query_gradient += dot(score_gradient, key)
#if scalar
taken = tl.sum(query.to(tl.float32) * query_gradient, 1)  # [C]
#end
tl.debug_barrier()
store_rows(query_gradients + head_base, token, heads * KEY_DIM, real, channel, query_gradient, KEY_DIM)
key_gradient = dot(tl.trans(score_gradient), query)
#if delta
key_score_gradient = load_square(key_squares + entry * CHUNK * CHUNK, position)
#if scalar
key_score_gradient *= decay_between
#end
key_gradient += dot(tl.trans(key_score_gradient), key)
#end
#if scalar
taken -= tl.sum(key.to(tl.float32) * key_gradient, 1)
#end
#if delta
looking = dot(key_score_gradient, key)
#if scalar
taken += tl.sum(key.to(tl.float32) * looking, 1)
#end
key_gradient += looking
#end
"""

CHUNK_SCORES_GRADIENT = '''
@triton.jit
def chunk_scores_gradient(
    <<operand query>>
    <<operand key>>
    <<operand decay>>
    score_gradients,  # [lanes, N, C, C]: gradients of queries' scores
    #if delta
    key_squares,  # [lanes, N, C, C]: the same of keys
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
    square = (home + chunk) * CHUNK * CHUNK
    carry = load_channels(decay_carries + (home + chunk) * KEY_DIM, channel)  # [K]
    for step in range(0, CHUNK, BLOCK):
        begin = CHUNK - BLOCK - step
        here = first_token + begin + inner  # [block] tokens
        there = (here >= row_begin) & (here < row_end)
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
            rows_gradient += dot(tl.load(score_gradients + block), seen)
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
            column_gradient += dot(tl.trans(tl.load(score_gradients + corner)), far_query * far_decay)
            #if delta
            column_gradient += dot(tl.trans(tl.load(key_squares + corner)), far_key * far_decay)
            #end
            between += tl.sum(far_log, 0)
        after_here = (inner < BLOCK - 1) & (here + 1 >= row_begin) & (here + 1 < row_end)
        to_block_end = load_log_decay_rows(decay_base, here + 1, decay_token, after_here, channel)
        column_gradient *= tl.exp(tl.cumsum(to_block_end, axis=0, reverse=True))
        passed = tl.zeros([BLOCK, KEY_TILE], tl.float32)
        for back in range(0, BLOCK):
            place = BLOCK - 1 - back
            causal = inner >= place
            <<one_key_here>>
            factor = tl.where(causal[:, None], tl.exp(passed), 0.0)  # [block, K]
            column = square + (begin + inner) * CHUNK + begin + place
            gradient = tl.load(score_gradients + column)[:, None] * factor
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
far = first_token + later + inner  # [block] tokens
far_real = (far >= row_begin) & (far < row_end)
far_log = load_log_decay_rows(decay_base, far, decay_token, far_real, channel)
far_decay = tl.exp(tl.cumsum(far_log, axis=0) + between[None, :])  # [block, K]
far_query = load_rows(query_base, far, query_token, far_real, channel, KEY_DIM).to(tl.float32)
#if delta
far_key = load_rows(key_base, far, key_token, far_real, channel, KEY_DIM).to(tl.float32)
#end
"""

CHUNK_BACKWARD_BLOCKS = {
    "values_gradient": VALUES_GRADIENT,
    "decay_parts": DECAY_PARTS,
    "carry": CARRY,
    "near_gradient": NEAR_GRADIENT,
    "one_key_here": ONE_KEY_HERE,
    "later_rows": LATER_ROWS,
}
CHUNK_BACKWARD = {
    "chunk_values_gradient": CHUNK_VALUES_GRADIENT,
    "chunk_transition_gradient": CHUNK_TRANSITION_GRADIENT,
    "chunk_reader_gradient": CHUNK_READER_GRADIENT,
    "chunk_writer_gradient": CHUNK_WRITER_GRADIENT,
    "chunk_delta_gradient": CHUNK_DELTA_GRADIENT,
    "chunk_gradient": CHUNK_GRADIENT,
    "chunk_scores_gradient": CHUNK_SCORES_GRADIENT,
}
