"""What launches move and compute, counted in Triton's interpreter: every address that a mask lets through.

Hooks in the interpreter see each load, store, product and elementwise operation of each program with its real shapes
and addresses. Two numbers for memory: what instructions ask for, and what is distinct within a pass, which is what
DRAM has to move if a cache holds what the programs of a pass share. What a pass is depends on the order of programs.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

from llcompile.kernels.triton.schedule import KERNELS

Grid = tuple[int, ...]
# From a kernel's name, its grid and a program in it to the pass that the program belongs to.
PassOf = Callable[[str, Grid, Grid], Hashable]
# Bytes that instructions ask for, and distinct ones.
MEMORY = {"load": ("loaded", "read"), "store": ("stored", "written")}
# Elementwise operations that are no arithmetic, by identity: what stands in their place in a call may have no hash.
_COMPARISONS = {id(f) for f in (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)}


@dataclass
class Counted:
    """One launch: the kernel's name, its grid, and its numbers by name: bytes, and FLOPs of products and others."""

    kernel: str
    grid: Grid
    numbers: Counter[str] = field(default_factory=Counter)


class Tape:
    """Counts of one launch while it runs."""

    def __init__(self, counted: Counted, tensors: list[torch.Tensor], pass_of: PassOf) -> None:
        self.counted, self.pass_of = counted, pass_of
        self.program: Grid = (0, 0, 0)
        spans = sorted({_span(x) for x in tensors if x.numel()})
        self.begins, self.ends = np.array([s[0] for s in spans]), np.array([s[1] for s in spans])
        self.seen: dict[Hashable, np.ndarray] = {}

    def memory(self, kind: str, addresses: np.ndarray, width: int) -> None:
        """Count a load or store of `width` bytes at each of `addresses`."""
        if not addresses.size:
            return
        asked, distinct = MEMORY[kind]
        numbers = self.counted.numbers
        numbers[asked] += int(addresses.size) * width
        place = int(np.searchsorted(self.begins, addresses.min(), side="right")) - 1
        if place < 0 or int(addresses.max()) >= self.ends[place]:
            raise IndexError(f"{self.counted.kernel} touches memory outside of its arguments: a mask is wrong")
        key = (self.pass_of(self.counted.kernel, self.counted.grid, self.program), kind, place, width)
        if key not in self.seen:
            self.seen[key] = np.zeros(-(-(self.ends[place] - self.begins[place]) // width), dtype=bool)
        seen, index = self.seen[key], (addresses - self.begins[place]) // width
        before = np.count_nonzero(seen)
        seen[index] = True
        numbers[distinct] += int(np.count_nonzero(seen) - before) * width


def _span(x: torch.Tensor) -> tuple[int, int]:
    storage = x.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


@contextlib.contextmanager
def counting(pass_of: PassOf) -> Iterator[list[Counted]]:
    """Count the launches of this process while the context lasts, in a list that grows as they run."""
    from triton.runtime import interpreter

    found: list[Counted] = []
    tapes: list[Tape] = []
    with contextlib.ExitStack() as stack:
        for name, hook in _hooks(tapes).items():
            original = getattr(interpreter.InterpreterBuilder, name)
            stack.enter_context(mock.patch.object(interpreter.InterpreterBuilder, name, hook(original)))
        for cls in (interpreter.ReduceOps, interpreter.ScanOps):
            stack.enter_context(mock.patch.object(cls, "apply_impl", _reducing(cls.apply_impl, tapes)))
        launching = _launching(interpreter.GridExecutor.__call__, found, tapes, pass_of)
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", launching))
        yield found


def _launching(plain: Any, found: list[Counted], tapes: list[Tape], pass_of: PassOf) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        counted = Counted(self.fn.__name__, ())
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        found.append(counted)
        tapes.append(Tape(counted, tensors, pass_of))
        try:
            plain(self, *args, **kwargs)
        finally:
            tapes.pop()

    return call


def _hooks(tapes: list[Tape]) -> dict[str, Callable[[Any], Any]]:
    """Replacements of the builder's methods, each a function of the plain one."""

    def grid(plain: Any) -> Any:
        def set_grid_dim(self: Any, *size: int) -> None:
            tapes[-1].counted.grid = size
            plain(self, *size)

        return set_grid_dim

    def program(plain: Any) -> Any:
        def set_grid_idx(self: Any, *index: int) -> None:
            tapes[-1].program = index
            plain(self, *index)

        return set_grid_idx

    def load(plain: Any) -> Any:
        def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            _memory(tapes[-1], "load", ptrs, mask)
            return plain(self, ptrs, mask, *rest)

        return create_masked_load

    def store(plain: Any) -> Any:
        def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            _memory(tapes[-1], "store", ptrs, mask)
            return plain(self, ptrs, value, mask, *rest)

        return create_masked_store

    def atomic(plain: Any) -> Any:
        def create_atomic_rmw(self: Any, rmw: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
            for kind in MEMORY:
                _memory(tapes[-1], kind, ptr, mask)
            return plain(self, rmw, ptr, val, mask, *rest)

        return create_atomic_rmw

    def dot(plain: Any) -> Any:
        def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
            *lead, rows, inner = a.data.shape
            kind = _kind(a.dtype.scalar, rest[1])
            tapes[-1].counted.numbers[f"dot {kind}"] += 2 * math.prod(lead) * rows * inner * b.data.shape[-1]
            return plain(self, a, b, *rest)

        return create_dot

    def elementwise(plain: Any) -> Any:
        def operation(self: Any, *args: Any) -> Any:
            found = plain(self, *args)
            if found.dtype.scalar.is_floating() and id(args[-1]) not in _COMPARISONS:
                tapes[-1].counted.numbers["pointwise"] += found.data.size
            return found

        return operation

    methods = {"set_grid_dim": grid, "set_grid_idx": program, "create_masked_load": load, "create_masked_store": store}
    methods |= {"create_dot": dot, "create_atomic_rmw": atomic}
    return methods | dict.fromkeys(("binary_op", "unary_op", "create_fma", "create_rsqrt"), elementwise)


def _memory(tape: Tape, kind: str, ptrs: Any, mask: Any) -> None:
    addresses, kept = np.broadcast_arrays(ptrs.data, mask.data.astype(bool))
    width = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
    tape.memory(kind, addresses[kept].astype(np.int64), width)


def _kind(dtype: Any, precision: Any) -> str:
    """What a product is by its operands: fp32 ones by the instruction that Triton is asked for."""
    name = str(dtype)
    if name != "fp32":
        return name
    text = str(precision).rsplit(".", 1)[-1].lower()
    return "tf32" if text == "tf32" else "tf32x3" if text == "tf32x3" else "fp32"


def _reducing(plain: Any, tapes: list[Tape]) -> Any:
    def apply_impl(self: Any, given: Any) -> Any:
        if tapes and given[0].dtype.is_floating():
            tapes[-1].counted.numbers["pointwise"] += given[0].handle.data.size
        return plain(self, given)

    return apply_impl


def one_sequence(heads: int) -> PassOf:
    """Passes of our kernels: a head each, and a value tile where all programs of one run before those of the next."""

    def pass_of(kernel: str, grid: Grid, program: Grid) -> Hashable:
        if KERNELS[kernel].fast_tiles:
            started = program[1] * grid[0] + program[0]
            return started // grid[1] * heads // grid[0]
        return program[0] * heads // grid[0], program[1]

    return pass_of
