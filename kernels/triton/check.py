"""Compile generated kernels for chips that need not be there, and read off what they take (`matrix` in bulk)."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from llcompile.kernels import description
from llcompile.kernels.description import ReadoutDescription
from llcompile.kernels.triton import occupancy, readout_source
from llcompile.kernels.triton.buffers import BUFFERS, dtype_of
from llcompile.kernels.triton.chips import CHIPS, Chip
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.launch import module_of
from llcompile.kernels.triton.schedule import kernel_names
from llcompile.kernels.triton.source import kernel_text
from llcompile.kernels.triton.tuning import Tuning, tuning

# What a matrix instruction looks like in the compiler's last text form.
_MATRIX = {
    "cuda": re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b"),
    "hip": re.compile(r"\bv_(mfma|smfmac)_\w+"),
}
# An asynchronous copy to shared memory, as software pipelining makes them: LDGSTS in SASS, or TMA; AMD's loads to LDS.
_COPY = {
    "cuda": re.compile(r"\bcp\.async\.(?:c[ag]|bulk\.(?:tensor|shared))"),
    "hip": re.compile(r"\b(?:buffer|global)_load_\w+.*\blds\b|\bglobal_load_lds_\w+"),
}
_POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}
# Operands that are fp32 whatever the others' dtype is, as models have them.
_FINE = ("decay_ptr", "rate_ptr")


@dataclasses.dataclass(frozen=True)
class Report:
    """What one kernel takes on one chip: registers per thread, bytes of shared memory, columns of tensor memory
    (Blackwell), bytes spilled per thread, and the matrix instructions that it uses.

    `products` and `copies` are the matrix instructions and asynchronous copies in its code; None in results that were
    kept before they were counted.
    """

    chip: str
    description: Description
    kernel: str
    launch: Tuning
    registers: int
    shared: int
    tensor_memory: int
    spilled: int
    matrix: str
    products: int | None = None
    copies: int | None = None

    @property
    def programs(self) -> int | None:
        """Programs that a multiprocessor has room for at a time; None of a chip that is not known."""
        return occupancy.programs(CHIPS[self.chip], self.launch.warps, self.registers, self.shared)

    def fits(self) -> bool:
        """Whether the chip has what one program takes."""
        return self.shared <= CHIPS[self.chip].shared and self.tensor_memory <= TENSOR_MEMORY

    def row(self) -> str:
        """A line of the table."""
        d = self.description
        kind = f"{d.decay}/{d.correction}/{'log-linear' if d.weighted else 'linear'}"
        size = f"K={d.key_dim} V={d.value_dim} {d.dtype_name}"
        launch = f"{self.launch.value_tile}/{self.launch.warps}/{self.launch.stages}"
        return (
            f"{self.chip:7} {kind:26} {size:24} {self.kernel:25} {launch:>7} {self.registers:5} {self.shared:8} "
            f"{self.spilled:6} {_text(self.programs):>8} {_text(self.products):>8} {_text(self.copies):>6}  "
            f"{self.matrix}"
        )


def _text(number: int | None) -> str:
    return "-" if number is None else str(number)


HEADING = (
    f"{'chip':7} {'family':26} {'size':24} {'kernel':25} {'launch':>7} {'regs':>5} {'shared':>8} {'spills':>6} "
    f"{'programs':>8} {'products':>8} {'copies':>6}  matrix"
)
# Columns of Blackwell's tensor memory.
TENSOR_MEMORY = 512


def reports(d: description.Description, chip: str, kernels: tuple[str, ...] | None = None) -> Iterator[Report]:
    """Compile the kernels of `d` for `chip`."""
    found = Description.of(d)
    for name in kernels or kernel_names(found):
        yield compile_kernel(found, name, CHIPS[chip])


def compile_kernel(d: Description, name: str, chip: Chip, launch: Tuning | None = None) -> Report:
    """Compile one kernel, with `launch` instead of its own parameters; raises what Triton raises if it cannot."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    d = d.on(chip)
    launch = launch or tuning(name, d, chip)
    kernel = getattr(module_of(d), name)
    signature, constants, aligned = signature_of(d, name, chip, launch)
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in aligned}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget(chip.backend, chip.arch, chip.warp),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    text = compiled.asm["ptx" if chip.backend == "cuda" else "amdgcn"]
    registers, spilled = _usage(compiled, chip.backend)
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    products, copies = (len(kind[chip.backend].findall(text)) for kind in (_MATRIX, _COPY))
    found = " ".join(sorted(set(_MATRIX[chip.backend].findall(text))))
    shared = compiled.metadata.shared
    return Report(chip.name, d, name, launch, registers, shared, columns, spilled, found, products, copies)


def signature_of(
    d: Description, name: str, chip: Chip, launch: Tuning
) -> tuple[dict[str, str], dict[str, int], set[str]]:
    """What Triton knows of a kernel's arguments in any launch: types, constants, and which are multiples of 16."""
    kernel = getattr(module_of(d.on(chip)), name)
    constants = {"VALUE_TILE": launch.value_tile} if "VALUE_TILE" in kernel.arg_names else {}
    signature = {n: "constexpr" if n in constants else _type(n, d) for n in kernel.arg_names}
    return signature, constants, {*kernel.arg_names} - {"scale", *kernel.do_not_specialize, *constants}


def compile_readouts(d: ReadoutDescription, chip: Chip, rows: bool = False) -> dict[str, tuple[int, int, int]]:
    """Registers per thread, spilled bytes, and bytes of shared memory of each kernel of per-level readouts.

    With `rows` for rows of one length that start at position 0, else for packed sequences that continue.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    operand, module, found = _POINTERS[str(d.dtype).removeprefix("torch.")], readout_source.module_of(d), {}
    for name, warps in readout_source.KERNELS.items():
        kernel = getattr(module, name)
        kinds = {"starts": "*i64", "lengths": "*i64"}
        kinds |= dict.fromkeys(("query_ptr", "key_ptr", "query_gradients", "key_gradients"), operand)
        kinds |= dict.fromkeys(("nodes", "node_gradients", "gradients", "outputs", "old_states", "states"), "*fp32")
        absent = {n: None for n in kernel.arg_names if rows and n in ("starts", "lengths", "old_states")}
        absent = {} if name == "readouts_step" else absent
        kinds |= dict.fromkeys(absent, "constexpr")
        signature = {n: kinds.get(n, "i32") for n in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=absent)
        compiled = triton.compile(
            source, target=GPUTarget(chip.backend, chip.arch, chip.warp), options={"num_warps": warps}
        )
        found[name] = (*_usage(compiled, chip.backend), compiled.metadata.shared)
    return found


def key_of(d: Description, name: str, chip: Chip) -> str:
    """What is the same for kernels that compile to the same thing: their text, their types, chip and launch."""
    d = d.on(chip)
    used = (chip.name, tuning(name, d, chip), d.dtype_name, kernel_text(d, name))
    return hashlib.sha256(repr(used).encode()).hexdigest()[:16]


def _type(name: str, d: Description) -> str:
    """The type of a parameter in Triton's words."""
    if name in BUFFERS:
        return _POINTERS[str(dtype_of(name, d)).removeprefix("torch.")]
    if name.endswith("_ptr"):
        return _POINTERS["float32" if name in _FINE else d.dtype_name]
    return "fp32" if name == "scale" else "i32"


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
        raise FileNotFoundError("cuobjdump, which comes with Triton, was not found")
    return found
