"""How many programs of a kernel a multiprocessor (compute unit) has room for at a time."""

from __future__ import annotations

from typing import NamedTuple

from llcompile.kernels.triton.chips import Chip

_KB = 1024


class Room(NamedTuple):
    """What one multiprocessor has: registers of 32 bits, bytes of shared memory, warps, programs.

    A warp takes registers in multiples of `granule`; each program takes `reserved` bytes besides its own. Where
    `quarters` is set, warps and registers are those of four parts, and a program's warps are spread over them.
    """

    registers: int
    shared: int
    warps: int
    programs: int
    granule: int = 256
    reserved: int = _KB
    quarters: bool = False


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD's ISA guides of CDNA 3 and CDNA 4:
# 512 vector registers for each of 64 lanes of a wave slot's SIMD, at most 8 waves there, 4 SIMDs.
_AMD = Room(4 * 512 * 64, 64 * _KB, 32, 32, granule=8 * 64, reserved=0, quarters=True)
ROOMS = {
    "sm_80": Room(65_536, 164 * _KB, 64, 32),
    "sm_86": Room(65_536, 100 * _KB, 48, 16),
    "sm_89": Room(65_536, 100 * _KB, 48, 24),
    "sm_90": Room(65_536, 228 * _KB, 64, 32),
    "sm_100": Room(65_536, 228 * _KB, 64, 32),
    "sm_120": Room(65_536, 100 * _KB, 48, 24),
    "gfx942": _AMD,
    "gfx950": _AMD._replace(shared=160 * _KB),
}


def programs(chip: Chip, warps: int, registers: int, shared: int) -> int | None:
    """Programs of `warps` warps that fit at a time, each thread with `registers`; None of a chip that is not known."""
    room = ROOMS.get(chip.name)
    if room is None:
        return None
    each = -(-registers * chip.warp // room.granule) * room.granule
    if room.quarters:
        by_registers = room.registers // 4 // max(each, 1) // -(-warps // 4)
    else:
        by_registers = room.registers // max(each * warps, 1)
    by_shared = room.shared // max(shared + room.reserved, 1)
    return min(room.programs, room.warps // warps, by_registers, by_shared)
