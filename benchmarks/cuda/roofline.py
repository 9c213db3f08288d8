"""How fast a case could be: bytes and operations it cannot do without over what a chip does.

Bytes are those of the operands, each input read once and each result written once: states may stay on the chip.
Operations are those of matrix products, a multiplication and an addition counting 2, in chunks of 64 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cuda.cases import Case

CHUNK = 64
_BF16, _FP32 = 2, 4
# Products of the gradient by products of the forward pass: two for each. Softmax attention keeps no scores and makes
# them again (its usual count). What is made again elsewhere could have been saved, so a floor does not count it.
_WITH_BACKWARD = {"log-linear": 3.0, "linear": 3.0, "softmax": 3.5}


@dataclass(frozen=True)
class Count:
    """What a case needs: ``bytes`` through device memory, ``operations`` of matrix products."""

    bytes: float
    operations: float

    def milliseconds(self, bandwidth: float, rate: float) -> float:
        """The floor on a chip that moves ``bandwidth`` bytes/s (read + written) and does ``rate`` operations/s."""
        return 1e3 * max(self.bytes / bandwidth, self.operations / rate)


def count(case: Case) -> Count:
    """Bytes and operations of one case."""
    if case.phase == "decode":
        return _decode(case)
    tokens = case.batch * case.length
    read, written = tokens * _read(case), tokens * case.heads * case.value_dim * _BF16
    operations = tokens * case.heads * _OPERATIONS[case.operator](case)
    if case.phase == "forward":
        return Count(read + written, operations)
    # Inputs are read by both passes and have gradients of their size; the output is written, its gradient read.
    return Count(3 * read + 2 * written, operations * _WITH_BACKWARD[case.operator])


def levels(tokens: int) -> int:
    """Levels that ``tokens`` tokens have: ceil(log2 T) + 1."""
    return max(tokens - 1, 0).bit_length() + 1


def mean_blocks(tokens: int) -> float:
    """Blocks of earlier chunks that a chunk reads: the mean number of set bits of a chunk's index."""
    chunks = -(-tokens // CHUNK)
    return sum(index.bit_count() for index in range(chunks)) / chunks


def _read(case: Case) -> int:
    """Bytes of one token's operands."""
    per_head = case.value_dim * _BF16
    if case.operator != "softmax":
        per_head += {"none": 0, "scalar": 1, "channel": case.key_dim}[case.decay] * _FP32
        per_head += _BF16 * (case.correction == "delta")
    if case.operator == "log-linear":
        per_head += levels(case.length) * _BF16
    return 2 * case.groups * case.key_dim * _BF16 + case.heads * per_head


def _softmax(case: Case) -> float:
    """Scores and values, half of the pairs being in the future."""
    return case.length * (case.key_dim + case.value_dim)


def _linear(case: Case) -> float:
    """Per token and head: scores and values inside the chunk, a state written and a state read."""
    k, v = case.key_dim, case.value_dim
    operations = 2.0 * CHUNK * (k + v) + 4 * k * v
    if case.correction == "delta":
        # Scores of keys, a triangular inverse, its products W and U, and W times the state.
        operations += 2 * CHUNK * k + 2 * CHUNK**2 / 3 + 2 * CHUNK * (k + v) + 2 * k * v
    return operations


def _log_linear(case: Case) -> float:
    """As linear, and on top a read of every block (DESIGN.md counts the linear operator's own read, too)."""
    k, v, blocks = case.key_dim, case.value_dim, mean_blocks(case.length)
    operations = _linear(case) + 2 * k * v * blocks
    if case.correction == "delta":
        # Effective queries; then the cheaper of a tree of transitions with queries pulled back block by block, and of
        # scans level by level, where every level that holds something is carried through every chunk.
        tree = 2 * k * k + 2 * k * k * (k + v) / CHUNK + 2 * k * k * blocks
        scans = 4 * k * v * blocks
        operations += 2 * CHUNK * k + min(tree, scans)
    return operations


def _decode(case: Case) -> Count:
    """A step reads and writes every state that holds something (fp32), softmax attention its whole cache."""
    heads, k, v = case.batch * case.heads, case.key_dim, case.value_dim
    token = case.batch * (_read(case) + case.heads * v * _BF16)
    if case.operator == "softmax":
        cache = case.length * (k + v)
        return Count(token + heads * cache * _BF16, 2.0 * heads * cache)
    states = 1 + (case.position.bit_count() if case.operator == "log-linear" else 0)
    return Count(token + 2.0 * heads * states * k * v * _FP32, 6.0 * heads * states * k * v)


_OPERATIONS = {"log-linear": _log_linear, "linear": _linear, "softmax": _softmax}
