"""Tables of packed sequences: against counting by hand, and what the kernels take for granted about them."""

from __future__ import annotations

import random

import pytest
import torch

from llcompile.kernels.grid import depth
from llcompile.kernels.triton.packing import Packing, pack, packed_grid
from llcompile.kernels.varlen import spans_of_bounds, spans_of_indices, spans_of_mask

CHUNK = 4
Case = tuple[list[int], list[int] | None]


def cases() -> list[Case]:
    make = random.Random(0)
    found: list[Case] = [([0], None), ([0, 0, 5], None), ([1], [3]), ([64], None), ([3, 0, 8], [5, 9, 0])]
    for _ in range(20):
        lengths = [make.choice((0, 1, 3, 4, 5, 17, make.randrange(80))) for _ in range(make.randrange(1, 9))]
        found.append((lengths, make.choice((None, [make.randrange(200) for _ in lengths]))))
    return found


def packed(lengths: list[int], positions: list[int] | None) -> tuple[Packing, list[int]]:
    """The tables, and how many chunks each sequence has."""
    sizes = torch.tensor(lengths)
    position = None if positions is None else torch.tensor(positions)
    grid = packed_grid(sum(lengths), sizes.cumsum(0) - sizes, sizes, position, CHUNK)
    offset = [0] * len(lengths)
    if positions is not None:
        assert grid.offset is not None
        offset = grid.offset.tolist()
        # The offset keeps the position's low bits, enough of them for the whole sequence.
        for p, o, n in zip(positions, offset, lengths, strict=True):
            assert (p - o) % (1 << max(n - 1, 0).bit_length()) == 0
            assert o <= 2 * n
    return pack(grid), [max(1, -(-(n + o) // CHUNK)) for n, o in zip(lengths, offset, strict=True)]


@pytest.mark.parametrize(("lengths", "positions"), cases())
def test_tables(lengths, positions):
    """Chunks of all sequences one after another, within the room that the host reckons with."""
    found, counts = packed(lengths, positions)
    first = [sum(counts[:i]) for i in range(len(counts) + 1)]
    assert found.first_chunks.tolist() == first
    owners = [i for i, count in enumerate(counts) for _ in range(count)]
    assert found.chunks >= len(owners)
    assert found.chunks <= 3 * sum(lengths) // CHUNK + len(lengths)
    assert found.chunk_sequences.tolist() == owners + [-1] * (found.chunks - len(owners))


@pytest.mark.parametrize(("lengths", "positions"), cases())
def test_every_pair_has_one_program(lengths, positions):
    """A program looks at twice 2**level chunks from a multiple of that on, and asks whose the first one is."""
    found, counts = packed(lengths, positions)
    first, owner = found.first_chunks.tolist(), found.chunk_sequences.tolist()
    for level in range(depth(found.chunks)):
        met = []
        for window in range(0, found.chunks, 2 << level):
            if owner[window] >= 0:
                pair = (window - first[owner[window]]) >> (level + 1)
                if (pair + 1) << (level + 1) <= counts[owner[window]]:
                    met.append((owner[window], pair))
        assert met == [(i, pair) for i, count in enumerate(counts) for pair in range(count >> (level + 1))]


@pytest.mark.parametrize(("lengths", "positions"), cases())
def test_readers_have_places_of_their_own(lengths, positions):
    """Readers of a level from half of a sequence's first chunk on: none meets another's, none is out of room."""
    found, counts = packed(lengths, positions)
    first, half = found.first_chunks.tolist(), max(found.chunks // 2, 1)
    for level in range(depth(found.chunks)):
        places = [
            (first[i] >> 1) + ((chunk >> (level + 1)) << level) + (chunk & ((1 << level) - 1))
            for i, count in enumerate(counts)
            for chunk in range(count)
            if chunk >> level & 1
        ]
        assert len(set(places)) == len(places)
        assert all(place < half for place in places)


def test_nothing_waits_for_the_device():
    """Tables are made of tensors without values, so no value is ever asked for."""
    lengths, position = (torch.empty(5, dtype=torch.int64, device="meta") for _ in range(2))
    for p in (None, position):
        grid = packed_grid(1000, lengths, lengths, p, 64)
        assert pack(grid).chunk_sequences.shape == (grid.chunks,)
        assert grid.old_levels(5, lengths.device, 7)[0].shape == (1, 1000, 7)
        assert grid.true_levels(5, lengths.device).shape == (5, grid.levels)


def test_spans():
    """Bounds, indices and masks say the same in three ways."""
    assert [x.tolist() for x in spans_of_bounds(torch.tensor([0, 3, 3, 7]))] == [[0, 3, 3], [3, 0, 4]]
    indices = torch.tensor([[5, 5, 2], [2, 0, 0]])  # a row's first token always starts a sequence
    assert [x.tolist() for x in spans_of_indices(indices)] == [[0, 2, 3, 4], [2, 1, 1, 2]]
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 0]])
    assert [x.tolist() for x in spans_of_mask(mask)] == [[1, 3, 6], [2, 0, 2]]
