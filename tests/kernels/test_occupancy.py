"""How many programs a multiprocessor has room for."""

from __future__ import annotations

import pytest

from llcompile.kernels.triton.chips import CHIPS, Chip
from llcompile.kernels.triton.occupancy import ROOMS, programs


@pytest.mark.parametrize(
    ("chip", "warps", "registers", "kilobytes", "wanted"),
    [
        ("sm_90", 8, 168, 48, 1),  # by registers
        ("sm_90", 8, 97, 32, 2),  # 97 registers are taken as 104
        ("sm_90", 4, 168, 48, 3),
        ("sm_90", 4, 46, 0, 10),
        ("sm_90", 4, 32, 113, 2),  # by shared memory, of which each program takes 1 KB more
        ("sm_90", 4, 32, 114, 1),
        ("sm_90", 4, 32, 0, 16),  # by warps and by registers
        ("sm_90", 1, 16, 0, 32),  # by programs
        ("sm_80", 4, 32, 82, 1),
        ("sm_86", 8, 16, 0, 6),  # 48 warps
        ("gfx942", 4, 128, 0, 4),  # one warp on each of four SIMDs, with 512 registers a lane
        ("gfx942", 8, 128, 0, 2),
        ("gfx942", 4, 260, 0, 1),
        ("gfx942", 4, 64, 33, 1),
    ],
)
def test_room(chip, warps, registers, kilobytes, wanted):
    """What is scarcest decides."""
    assert programs(CHIPS[chip], warps, registers, kilobytes * 1024) == wanted


def test_every_chip_has_a_row():
    """A program that fits a chip has room at least once; of other chips nothing is said."""
    assert ROOMS.keys() == CHIPS.keys()
    for chip in CHIPS.values():
        assert programs(chip, 4, 64, chip.shared) == 1
    assert programs(Chip("sm_999", "cuda", 999, 32, 1024), 4, 64, 0) is None
