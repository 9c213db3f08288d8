"""Compile generated kernels for chips that need not be there, and read off what they take.

``python -m llcompile.kernels.triton.check`` prints a table: registers, shared memory, spilled bytes and matrix
instructions of every kernel of a representative set of descriptions.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from .description import Description
from .launch import module_of
from .source import kernel_names
from .tuning import tuning

# Chip: backend, architecture, threads of a warp, bytes of shared memory that one program may have.
CHIPS: dict[str, tuple[str, Any, int, int]] = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
# What a matrix instruction looks like in the compiler's last text form.
_MATRIX = {
    "cuda": re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b"),
    "hip": re.compile(r"\bv_(mfma|smfmac)_\w+"),
}
_FLOATS = ("scale",)


@dataclasses.dataclass(frozen=True)
class Report:
    """What one kernel takes on one chip."""

    chip: str
    description: Description
    kernel: str
    registers: int
    shared: int
    spilled: int
    matrix: str

    def row(self) -> str:
        """A line of the table."""
        d = self.description
        kind = f"{d.decay}/{d.correction}/{'log-linear' if d.weighted else 'linear'}"
        size = f"K={d.key_dim} V={d.value_dim} {d.dtype_name}"
        return (
            f"{self.chip:7} {kind:26} {size:24} {self.kernel:22} {self.registers:5} {self.shared:8} "
            f"{self.spilled:6}  {self.matrix}"
        )


HEADING = f"{'chip':7} {'family':26} {'size':24} {'kernel':22} {'regs':>5} {'shared':>8} {'spills':>6}  matrix"


def reports(d: Description, chip: str, kernels: tuple[str, ...] | None = None) -> Iterator[Report]:
    """Compile the kernels of ``d`` for ``chip``."""
    module = module_of(d)
    for name in kernels or kernel_names(d):
        yield compile_kernel(d, module, name, chip)


def compile_kernel(d: Description, module: Any, name: str, chip: str) -> Report:
    """Compile one kernel; raises what Triton raises if it cannot be compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, warp, _ = CHIPS[chip]
    kernel, chosen = getattr(module, name), tuning(name, d)
    signature = {n: _type(n, d) for n in kernel.arg_names}
    constants = {"VALUE_TILE": chosen.value_tile}
    signature |= dict.fromkeys(constants.keys() & signature.keys(), "constexpr")
    constants = {n: value for n, value in constants.items() if n in signature}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if _divisible(n, signature[n])}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget(backend, arch, warp),
        options={"num_warps": chosen.warps, "num_stages": chosen.stages},
    )
    text = compiled.asm["ptx" if backend == "cuda" else "amdgcn"]
    registers, spilled = _usage(compiled, backend)
    found = sorted(set(_MATRIX[backend].findall(text)))
    return Report(chip, d, name, registers, compiled.metadata.shared, spilled, " ".join(found))


def _type(name: str, d: Description) -> str:
    operand = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[d.dtype_name]
    if name in _FLOATS:
        return "fp32"
    if name in _OPERANDS:
        return operand
    if name in _TABLES:
        return "*i32"
    return "i32" if name in _NUMBERS or name.endswith(_STRIDES) else "*fp32"


# Parameters by type; every other pointer is fp32 and every other number an int.
_OPERANDS = {
    *("query_ptr", "key_ptr", "value_ptr", "output_gradient_ptr", "outputs"),
    *("readers", "passed_gradients", "old_readers"),
}
_TABLES = {"lengths", "offsets", "served_levels", "old_seen", "starts", "first_chunks", "chunk_sequences"}
_NUMBERS = {
    *("heads", "tokens", "chunks", "lanes", "pairs", "level", "half"),
    *("grid_levels", "old_slots", "level_states_count"),
}
_STRIDES = ("_row", "_token", "_head")


def _divisible(name: str, kind: str) -> bool:
    """Pointers, and strides of operands whose last axis is K or V, as they are in practice."""
    return kind.startswith("*") or name in {
        f"{operand}_{stride}"
        for operand in ("query", "key", "value", "output_gradient")
        for stride in ("row", "token", "head")
    }


def _usage(compiled: Any, backend: str) -> tuple[int, int]:
    """Registers per thread and spilled bytes."""
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = int(_number(r"\.vgpr_count:\s+(\d+)", text))
        return registers, 4 * int(_number(r"\.vgpr_spill_count:\s+(\d+)", text))
    listing = _resources(compiled.asm["cubin"])
    # On NVIDIA's chips the stack of a kernel without arrays of its own is what was spilled.
    return int(_number(r"REG:(\d+)", listing)), int(_number(r"STACK:(\d+)", listing))


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1) if found else "-1"


def _resources(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([_cuobjdump(), "--dump-resource-usage", str(path)], capture_output=True, text=True).stdout


@lru_cache(maxsize=1)
def _cuobjdump() -> str:
    """The program that comes with Triton."""
    import triton

    inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(inside) if inside.exists() else shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError("cuobjdump comes with Triton and is not there")
    return found


def representative() -> Iterator[Description]:
    """Descriptions that together use every kernel and block."""
    for key_dim, value_dim in ((64, 64), (128, 128)):
        for levels in (16, None):
            for decay in ("none", "scalar", "channel"):
                for correction in ("none", "delta"):
                    yield Description(decay, correction, key_dim, value_dim, levels=levels)  # type: ignore[arg-type]
    for decay, correction in (("scalar", "none"), ("channel", "none"), ("none", "delta"), ("scalar", "delta")):
        yield Description(decay, correction, 64, 64, 2, levels=16, initial_state="level", final_state=True, padded=True)  # type: ignore[arg-type]


def main() -> None:
    """Print the table; chips may be named as arguments."""
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("kernels cannot be compiled while TRITON_INTERPRET is set")
    print(HEADING)
    for d in representative():
        for chip in sys.argv[1:] or CHIPS:
            for report in reports(d, chip):
                print(report.row(), flush=True)


if __name__ == "__main__":
    main()
