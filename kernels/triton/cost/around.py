"""What torch does around the kernels: bytes that its operators move, and the memory that is allocated, both exact.

Counted on `meta` tensors, which have shapes and no memory, so at any length. Launches are listed and not run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llcompile.kernels.triton import autotune
from llcompile.kernels.triton.launch import Launch

# Operators that only make memory, or only say how it is looked at.
_FREE = ("aten.empty", "aten.new_empty", "aten.detach", "aten.lift_fresh")
# Operators that fill a tensor like their input, of which they read nothing.
_FILLS = tuple(f"aten.{kind}" for kind in ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"))


class Planned(NamedTuple):
    """A launch that would have been run: its kernel, its programs, and its value tiles."""

    kernel: str
    programs: int
    tiles: int


@dataclass
class Around:
    """One pass: its launches in order, calls of torch's operators that move something and their bytes, and memory.

    `peak` is the most bytes that were allocated at a time beyond the operands, `results` those that are returned.
    """

    launches: list[Planned]
    calls: int
    moved: int
    peak: int
    results: int

    @property
    def workspace(self) -> int:
        """Bytes that a pass needs beside its operands and results."""
        return self.peak - self.results


def around(run: Callable[[], object], see: Callable[[Launch], None] | None = None) -> Around:
    """Carry out `run` without its launches, each of which is shown to `see`; its operands must be on `meta`."""
    launches: list[Planned] = []

    def note(launch: Launch) -> None:
        tiles = launch._grid(launch.kernel.default)[1]
        launches.append(Planned(launch.kernel.name, launch.programs, tiles))
        if see is not None:
            see(launch)

    with autotune.handed_to(note), _Watch() as watch:
        results = run()
    kept = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in _tensors(results)}
    return Around(launches, watch.calls, watch.moved, watch.peak, sum(kept.values()))


class _Watch(TorchDispatchMode):
    """Sees every operator: what it reads and writes, and what memory comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.moved = self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        inputs = list(_tensors((args, dict(kwargs or {}))))
        known = {x.untyped_storage()._cdata for x in inputs}
        self._known |= known  # operands, too
        found = func(*args, **(kwargs or {}))
        outputs = list(_tensors(found))
        for x in outputs:
            self._appeared(x)
        view = bool(outputs) and not func._schema.is_mutable and all(_at(x) in known for x in outputs)
        if not view and not str(func).startswith(_FREE):
            self.calls += 1
            read = [] if str(func).startswith(_FILLS) else inputs
            self.moved += sum(map(_bytes, read)) + sum(map(_bytes, outputs))
        return found

    def _appeared(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._went, key, size)

    def _went(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _at(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _tensors(tree: object) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor))


def _bytes(x: Tensor) -> int:
    """Distinct bytes of what `x` shows: axes that are expanded count once."""
    return int(_product(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.element_size())


def _product(sizes: Iterable[int]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found
