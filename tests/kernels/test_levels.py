"""Level arithmetic, on numbers and on tensors."""

from __future__ import annotations

import torch

from llcompile.kernels.levels import bit_length, bucket_start, level, level_count, level_table, trailing_zeros


def test_tensors_agree_with_numbers():
    """Also beyond what a float can tell apart."""
    numbers = [*range(70), 2**31 - 1, 2**31, 2**53 - 1, 2**53, 2**62]
    tensor = torch.tensor(numbers)
    assert bit_length(tensor).tolist() == [bit_length(n) for n in numbers]
    assert trailing_zeros(tensor).tolist() == [trailing_zeros(n) for n in numbers]


def test_buckets():
    """A bucket of level l exists where bit l - 1 is set, and holds 2 ** (l - 1) tokens that end in order."""
    for t in range(200):
        seen = [level(t, s) for s in range(t + 1)]
        assert seen == sorted(seen, reverse=True)
        for lvl in range(1, 9):
            count = seen.count(lvl)
            assert count == (1 << (lvl - 1) if t >> (lvl - 1) & 1 else 0)
            if count:
                assert seen.index(lvl) == bucket_start(t, lvl)
        assert max(seen) + 1 <= level_count(t + 1)


def test_table():
    """The table is the level of every pair."""
    assert level_table(8)[5].tolist() == [level(5, s) for s in range(8)]


def test_level_count():
    """Integer arithmetic: exact next to powers of two."""
    assert [level_count(n) for n in (1, 2, 3, 4, 5, 2**40, 2**40 + 1)] == [1, 2, 3, 3, 4, 41, 42]
