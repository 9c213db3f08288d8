"""The shared building blocks: small device functions, of which every generated file gets those that it calls.

Constants in capitals are defined at the top of the generated file (:mod:`.source`). Exponents are of sums of log decays
over the tokens that lie between two places, each summed on its own: never of differences, so always at most 0.
"""

from __future__ import annotations

import re

FUNCTIONS = '''
@triton.jit
def dot(a, b):
    """Product of two tiles, fp32 sums; the factors are rounded to the operands' dtype."""
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision=PRECISION)


@triton.jit
def fine_dot(a, b):
    """Product of two fp32 tiles for what is multiplied many times over: states, transitions, inverses."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def long_dot(
    a, A_ROW: tl.constexpr, A_INNER: tl.constexpr, row,
    b, B_INNER: tl.constexpr, B_COLUMN: tl.constexpr, column, COLUMNS: tl.constexpr,
):
    """Product [rows, columns] of two fp32 matrices in memory, given by their strides, whose inner side is K. Slices of
    it are all that has to be on the chip: two matrices [K, K] are more than most have room for."""
    found = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for first in range(0, KEY_DIM, SLICE):
        inner = first + tl.arange(0, SLICE)
        left = tl.load(a + row[:, None] * A_ROW + inner[None, :] * A_INNER,
                       mask=(row < KEY_DIM)[:, None] & (inner < KEY_DIM)[None, :], other=0.0)
        right = tl.load(b + inner[:, None] * B_INNER + column[None, :] * B_COLUMN,
                        mask=(inner < KEY_DIM)[:, None] & (column < COLUMNS)[None, :], other=0.0)
        found += fine_dot(left, right)
    return found


@triton.jit
def load_rows(base, token, stride, real, column, COLUMNS: tl.constexpr):
    """Rows [C, columns] of an operand; 0 at tokens and columns that are not there."""
    at = base + token.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(at, mask=real[:, None] & (column < COLUMNS)[None, :], other=0.0)


@triton.jit
def store_rows(base, token, stride, real, column, x, COLUMNS: tl.constexpr):
    """Write rows x [C, columns]."""
    at = base + token.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, x, mask=real[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def load_column(base, token, stride, real):
    """One number per token [C], fp32; 0 at tokens that are not there."""
    return tl.load(base + token.to(tl.int64) * stride, mask=real, other=0.0).to(tl.float32)


@triton.jit
def add_column(base, token, stride, real, x):
    """Add x [C] to one number per token; for sums that only this program adds to."""
    at = base + token.to(tl.int64) * stride
    tl.debug_barrier()
    seen = tl.load(at, mask=real, other=0.0)
    tl.debug_barrier()
    tl.store(at, seen + x, mask=real)


@triton.jit
def read_position(header):
    """The position that a level state's header holds (llcompile.kernels.header)."""
    #if digits
    digit = tl.arange(0, DIGITS)
    numbers = tl.floor(tl.load(header + digit) + 0.5).to(tl.int32)
    return tl.sum(numbers << (digit * DIGIT_BITS), 0)
    #else
    number = tl.floor(tl.load(header) + 0.5).to(tl.int32)
    return tl.where(number < 0, (-number - 1) >> 1, number)
    #end


@triton.jit
def position_header(position, entry):
    """What stands in the entries of a header, given by their number."""
    #if digits
    rest = position >> (tl.minimum(entry, DIGITS - 1) * DIGIT_BITS)
    digit = rest - ((rest >> DIGIT_BITS) << DIGIT_BITS)
    return tl.where(entry < DIGITS - 1, digit, tl.where(entry == DIGITS - 1, rest, 0))
    #else
    return tl.where(entry == 0, -(2 * position + 1), 0)
    #end


@triton.jit
def load_log_decays(base, token, stride, real):
    """Log decay per token [C]; a decay of 0 becomes a large finite exponent, which survives sums."""
    return tl.maximum(load_column(base, token, stride, real), LOWEST)


@triton.jit
def load_log_decay_rows(base, token, stride, real, channel):
    """Log decay per token and channel [C, K]."""
    return tl.maximum(load_rows(base, token, stride, real, channel, KEY_DIM).to(tl.float32), LOWEST)


@triton.jit
def load_square(base, position):
    """A matrix [C, C] of a chunk."""
    return tl.load(base + position[:, None] * CHUNK + position[None, :])


@triton.jit
def store_square(base, position, x):
    """Write a matrix x [C, C] of a chunk."""
    tl.store(base + position[:, None] * CHUNK + position[None, :], x)


@triton.jit
def load_chunk(base, position, channel):
    """Rows [C, K] of a chunk."""
    at = base + position[:, None] * KEY_DIM + channel[None, :]
    return tl.load(at, mask=(channel < KEY_DIM)[None, :] & (position >= 0)[:, None], other=0.0)


@triton.jit
def store_chunk(base, position, channel, x):
    """Write rows x [C, K] of a chunk."""
    at = base + position[:, None] * KEY_DIM + channel[None, :]
    tl.store(at, x, mask=(channel < KEY_DIM)[None, :] & (position >= 0)[:, None])


@triton.jit
def load_state(base, channel, value):
    """A state [K, values], or its gradient."""
    at = base + channel[:, None] * VALUE_DIM + value[None, :]
    return tl.load(at, mask=(channel < KEY_DIM)[:, None] & (value < VALUE_DIM)[None, :], other=0.0)


@triton.jit
def store_state(base, channel, value, x):
    """Write a state x [K, values]."""
    at = base + channel[:, None] * VALUE_DIM + value[None, :]
    tl.store(at, x, mask=(channel < KEY_DIM)[:, None] & (value < VALUE_DIM)[None, :])


@triton.jit
def load_matrix(base, row, column):
    """A transition's matrix [K, K], or some of its columns."""
    at = base + row[:, None] * KEY_DIM + column[None, :]
    return tl.load(at, mask=(row < KEY_DIM)[:, None] & (column < KEY_DIM)[None, :], other=0.0)


@triton.jit
def store_matrix(base, row, column, x):
    """Write a transition's matrix x [K, K], or some of its columns."""
    at = base + row[:, None] * KEY_DIM + column[None, :]
    tl.store(at, x, mask=(row < KEY_DIM)[:, None] & (column < KEY_DIM)[None, :])


@triton.jit
def load_channels(base, channel):
    """One number per channel [K]."""
    return tl.load(base + channel, mask=channel < KEY_DIM, other=0.0)


@triton.jit
def store_channels(base, channel, x):
    """Write x [K], one number per channel."""
    tl.store(base + channel, x, mask=channel < KEY_DIM)


@triton.jit
def interval_sums(x, position):
    """[C, C]: at [t, s] the sum of x [C] over s < u <= t; 0 above the diagonal."""
    later = tl.where(position[:, None] > position[None, :], x[:, None] + tl.zeros([CHUNK, CHUNK], tl.float32), 0.0)
    return tl.cumsum(later, axis=0)


@triton.jit
def interval_decays(x, position):
    """[C, C]: at [t, s] the decay of a token s <= t until t; 0 above the diagonal."""
    causal = position[:, None] >= position[None, :]
    return tl.where(causal, tl.exp(tl.where(causal, interval_sums(x, position), 0.0)), 0.0)


@triton.jit
def high_bit(x):
    """Place of the highest set bit of 0 < x < 2**24: the exponent of x as a float, which is exact."""
    return (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def bit_length(x):
    """Bits of 0 <= x < 2**24."""
    return tl.where(x > 0, high_bit(tl.maximum(x, 1)) + 1, 0)


@triton.jit
def bit_count(x):
    """Set bits of x >= 0."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F


@triton.jit
def pair_weights(base, token, stride, real, position, served, EDGE: tl.constexpr):
    """[C, C]: the weight at query t of the level at which it sees s; levels 0 .. log2 C are inside a chunk."""
    between = position[:, None] ^ position[None, :]
    weight = load_column(base + served_level(served, 0), token, stride, real)
    found = weight[:, None] + tl.zeros([CHUNK, CHUNK], tl.float32)
    for level in tl.static_range(1, EDGE + 1):
        weight = load_column(base + served_level(served, level), token, stride, real)
        found = tl.where((between >> (level - 1)) == 1, weight[:, None], found)
    return found


@triton.jit
def add_pair_weights_gradient(base, token, stride, real, position, served, x, EDGE: tl.constexpr):
    """Adjoint of pair_weights: adds the sums of x [C, C] over each level's tokens to the weights' gradient."""
    between = position[:, None] ^ position[None, :]
    add_column(base + served_level(served, 0), token, stride, real, tl.sum(tl.where(between == 0, x, 0.0), 1))
    for level in tl.static_range(1, EDGE + 1):
        part = tl.sum(tl.where((between >> (level - 1)) == 1, x, 0.0), 1)
        add_column(base + served_level(served, level), token, stride, real, part)


@triton.jit
def unit_lower_inverse(x, position):
    """(I + x)^-1 for strictly lower triangular x [C, C], by halves:
    the inverse of [[A, 0], [B, D]] is [[A^-1, 0], [-D^-1 B A^-1, D^-1]], for all blocks of one size at once."""
    row, column = position[:, None], position[None, :]
    inverse = tl.where(row == column, 1.0, 0.0) - tl.where((row ^ column) == 1, x, 0.0)
    for half in tl.static_range(1, EDGE):
        corner = tl.where(((row ^ column) >> half) == 1, x, 0.0)
        inverse -= fine_dot(inverse, fine_dot(corner, inverse))
    return inverse
'''

# Which of the user's levels serves one of the grid: rows that continue a sequence have a table (Grid.true_levels).
SERVED_LEVEL = '''
@triton.jit
def served_level(served, level):
    """Index of the level weight that serves a level; the last one serves all higher levels."""
#if continued
    return tl.load(served + level)
#else
    return tl.minimum(level, LEVELS - 1)
#end
'''


def functions() -> dict[str, str]:
    """Name to source of every device function (``served_level`` still with its conditions)."""
    pieces = re.split(r"^(?=@triton\.jit)", FUNCTIONS + SERVED_LEVEL, flags=re.MULTILINE)
    return {_name(piece): piece.strip() for piece in pieces if piece.strip()}


def _name(source: str) -> str:
    found = re.search(r"^def (\w+)", source, re.MULTILINE)
    assert found is not None
    return found.group(1)
