"""Pieces of kernels that are the same in several of them: who a program is, what it reads, what its decays are."""

from __future__ import annotations

BLOCKS = {
    # -- parameters ----------------------------------------------------------------------------------------------------
    # An operand [B, T, heads or groups, ...] and its strides; the last axis is dense.
    "operand": "$1_ptr, $1_row, $1_token, $1_head,",
    "decay": """
#if decayed
<<operand decay>>
#end
""",
    "beta": """
#if delta
<<operand beta>>
#end
""",
    "weight": """
#if weighted
<<operand weight>>
#end
#if continued
served_levels, grid_levels,
#end
""",
    "geometry": """
#if continued
offsets,
#end
#if padded or packed
lengths,
#end
#if packed
starts,
#end
<<tables>>
heads, tokens, chunks,
""",
    "tables": """
#if packed
first_chunks, chunk_sequences,
#end
""",
    # -- who a program is ----------------------------------------------------------------------------------------------
    "lane": """
<<program>>
<<place>>
""",
    # Its chunk; ``home``: where its row's chunks begin in buffers that have an entry a chunk.
    "program": """
chunk = tl.program_id(0) % chunks
#if packed
head = (tl.program_id(0) // chunks).to(tl.int64)
<<sequence_of head chunk>>
lane = sequence * heads + head
row = 0  # of the operands, where sequences lie one after another
<<group>>
#else
lane = (tl.program_id(0) // chunks).to(tl.int64)  # row * H + head
<<row>>
home = lane * chunks
#end
""",
    "row": """
#if packed
sequence, head = lane // heads, lane % heads
row = 0  # of the operands, where sequences lie one after another
#else
row, head = lane // heads, lane % heads
#if padded or continued
sequence = row
#end
#end
<<group>>
""",
    "group": """
#if grouped
group = head // REPEAT
#else
group = head
#end
""",
    # The sequence that has chunk ``$2`` of all, which then counts within the sequence.
    "sequence_of": """
sequence = tl.load(chunk_sequences + $2)  # -1 behind the last one
if sequence < 0:
    return
first_chunk = tl.load(first_chunks + sequence)
$2 -= first_chunk
home = $1 * chunks + first_chunk
""",
    # The same for programs that have a whole row, whose chunks are ``row_chunks``.
    "home_of_row": """
#if packed
home = head * chunks + tl.load(first_chunks + sequence)
#else
home = lane * chunks
#end
""",
    "row_chunks": """
#if packed
row_chunks = tl.load(first_chunks + sequence + 1) - tl.load(first_chunks + sequence)
#else
row_chunks = chunks
#end
""",
    # Where the row's readers of a level begin in buffers by level.
    "readers_home": """
#if packed
readers_home = $1 * half + (first_chunk >> 1)
#else
readers_home = lane * half
#end
""",
    # ``token`` counts in the row of the operands; the sequence there is ``row_begin <= token < row_end``.
    "place": """
#if packed
row_begin = tl.load(starts + sequence)
row_end = row_begin + tl.load(lengths + sequence)
#elif padded
row_begin, row_end = 0, tl.load(lengths + sequence)
#else
row_begin, row_end = 0, tokens
#end
first_token = row_begin + chunk * CHUNK
#if continued
first_token -= tl.load(offsets + sequence)
#end
position = tl.arange(0, CHUNK)  # [C] in the chunk
token = first_token + position  # [C]
real = (token >= row_begin) & (token < row_end)  # [C]
""",
    # -- what it reads -------------------------------------------------------------------------------------------------
    # Rows of an operand that belongs to heads, or to groups of them.
    "rows_of_group": """
$1 = load_rows($1_ptr + row * $1_row + group * $1_head, token, $1_token, real, channel, KEY_DIM)  # [C, K]
""",
    "rows_of_head": """
$1_base = $1_ptr + row * $1_row + head * $1_head
$1 = load_rows($1_base, token, $1_token, real, value_column, VALUE_DIM)  # [C, V tile]
""",
    "channels": "channel = tl.arange(0, KEY_TILE)  # [K]",
    "value_tile": "value_column = tl.program_id(1) * VALUE_TILE + tl.arange(0, VALUE_TILE)  # [V tile]",
    "served": """
#if continued
served = served_levels + sequence * grid_levels
#else
served = 0
#end
""",
    # -- decays --------------------------------------------------------------------------------------------------------
    # ``log_decay``: of each token. ``from_start``: from the chunk's start until and with each token.
    "log_decay": """
#if decayed
decay_base = decay_ptr + row * decay_row + head * decay_head
#end
#if scalar
log_decay = load_log_decays(decay_base, token, decay_token, real)  # [C]
#elif channel
log_decay = load_log_decay_rows(decay_base, token, decay_token, real, channel)  # [C, K]
#end
""",
    "from_start": """
#if decayed
from_start = tl.cumsum(log_decay, axis=0)  # [C] or [C, K]
#end
""",
    # ``to_end``: from after each token until the chunk's end, summed over the tokens after it.
    "to_end": """
#if decayed
after = (position < CHUNK - 1) & (token + 1 >= row_begin) & (token + 1 < row_end)
#end
#if scalar
to_end = tl.cumsum(load_log_decays(decay_base, token + 1, decay_token, after), axis=0, reverse=True)  # [C]
#elif channel
to_end = tl.cumsum(load_log_decay_rows(decay_base, token + 1, decay_token, after, channel), axis=0, reverse=True)
#end
""",
    # ``decayed``: rows of an operand times the decay of a stretch.
    "decay_rows": """
#if scalar
$1 = $2.to(tl.float32) * tl.exp($3)[:, None]
#elif channel
$1 = $2.to(tl.float32) * tl.exp($3)
#else
$1 = $2
#end
""",
    # -- scores --------------------------------------------------------------------------------------------------------
    # ``$1_scores`` [C, C]: of rows with keys, decays between them included, 0 above the diagonal.
    "scores": """
#if channel
$1_scores = load_square($1_squares + (home + chunk) * CHUNK * CHUNK, position)
#elif scalar
$1_scores = dot($1, tl.trans(key)) * decay_between
#else
$1_scores = tl.where(position[:, None] >= position[None, :], dot($1, tl.trans(key)), 0.0)
#end
""",
    "decay_between": """
#if scalar
decay_between = interval_decays(log_decay, position)  # [C, C]
#end
""",
    # ``reader`` [C, K]: the effective queries, which read a state at the chunk's start; ``scores``: the final ones.
    "reader": """
<<decay_between>>
<<scores query>>
<<from_start>>
#if delta
<<mix>>
scores = dot(query_scores, mix)  # [C, C]
<<decay_rows decayed_key key from_start>>
<<decay_rows decayed_query query from_start>>
reader = decayed_query.to(tl.float32) - dot(scores, decayed_key)  # [C, K]
#else
scores = query_scores
#if channel
decayed_query = query.to(tl.float32) * tl.exp(from_start)  # [C, K]
#end
#end
""",
    # ``writer`` [C, K]: the effective keys, which write values into the state at the chunk's end.
    "writer": """
<<to_end>>
#if delta
<<mix>>
<<decay_rows tail_key key to_end>>
writer = dot(tl.trans(mix), tail_key)  # [C, K]
#else
<<decay_rows writer key to_end>>
#end
""",
    # ``mix`` [C, C]: what turns a chunk's values into what the delta rule writes for them.
    "beta_column": "beta = load_column(beta_ptr + row * beta_row + head * beta_head, token, beta_token, real)  # [C]",
    "mix": """
<<beta_column>>
inverse = load_square(inverses + (home + chunk) * CHUNK * CHUNK, position)  # [C, C]
mix = inverse * beta[None, :]
""",
    # -- the tree ------------------------------------------------------------------------------------------------------
    # ``bits`` holds the chunk's index with the bits of lower levels cleared: the block that it reads ends there.
    "level": """
level = high_bit(bits & -bits)
slot = bits - 1  # last chunk of the block
""",
}
