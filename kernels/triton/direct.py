"""Launches of compiled kernels without Triton's own look-up, which takes longer than all else that a launch asks of
the host.

Triton looks a compiled kernel up by what it knows of each argument: its type and, of a pointer or a number that it
specialises on, whether it is 1 or a multiple of 16; for AMD's chips also whether 32 bits reach all of the memory behind
a pointer. `Kinds` is at least as fine, so launches of one kind have one compiled kernel. The first goes through Triton,
and what that returns is kept; later ones run it in the public way, `compiled[grid](*arguments)`. What else Triton looks
at in each launch does not change for generated code: the module's constants, and the settings of its compiler.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

from llcompile.kernels.triton.buffers import BUFFERS
from llcompile.kernels.triton.description import BACKEND
from llcompile.kernels.triton.limits import interpreted

# What Triton compiles a kernel anew for, besides 1: multiples of this.
_MULTIPLE = 16
_WORD = 32
# Bytes that Triton's backend for AMD lets offsets of 32 bits reach.
_REACH = (1 << (_WORD - 1)) - 1


class Kinds:
    """Says of what kind the arguments of a kernel are. There are few kinds, whatever lengths and strides are."""

    def __init__(
        self,
        parameters: Sequence[str],
        plain: Collection[str],
        buffers: Collection[str] = BUFFERS,
        measured: bool = BACKEND == "hip",
    ) -> None:
        """`parameters` are the kernel's, `plain` those of which Triton looks at the type alone.

        A parameter whose name is one of `buffers` or ends in `_ptr` is a pointer, and any other a number. `measured`:
        Triton looks at the size of the memory behind a pointer.
        """
        self._measured = measured
        pointers = [i for i, name in enumerate(parameters) if name.endswith("_ptr") or name in buffers]
        numbers = [i for i, name in enumerate(parameters) if i not in pointers and name != "scale"]
        self._first = pointers[0]  # always there; those that may be None come late
        self._pointers, self._plain_pointers = _parted(pointers, parameters, plain)
        self._numbers, self._plain_numbers = _parted(numbers, parameters, plain)

    def of(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """The kind of `arguments`, of which all tensors are on one device."""
        types: list[Any] = [arguments[self._first].device]
        multiples = sizes = 0
        for i in self._pointers:
            x = arguments[i]
            if x is None:
                types.append(None)
            else:
                types.append(x.dtype)
                multiples |= x.data_ptr()
        if self._measured:
            given = (arguments[i] for i in self._pointers)
            types += (x is not None and x.untyped_storage().nbytes() > _REACH for x in given)
        for i in self._plain_pointers:
            x = arguments[i]
            types.append(None if x is None else x.dtype)
        for i in self._numbers:
            sizes |= arguments[i]
        multiples |= sizes
        for i in self._plain_numbers:
            sizes |= arguments[i]
        if multiples % _MULTIPLE == 0 and 0 <= sizes < 1 << (_WORD - 1):  # as nearly always
            return tuple(types)
        addresses = (0 if arguments[i] is None else arguments[i].data_ptr() % _MULTIPLE for i in self._pointers)
        values = ((x == 1, x % _MULTIPLE == 0) for x in (arguments[i] for i in self._numbers))
        words = (arguments[i].bit_length() // _WORD for i in (*self._numbers, *self._plain_numbers))
        return (*types, *addresses, *values, *words)


class Code:
    """Triton's function of a kernel, and what is compiled of it: both depend on the kernel's text alone."""

    def __init__(self, function: Any, buffers: Collection[str] = BUFFERS) -> None:
        """`buffers` are those of its parameters that are pointers, as in `Kinds`."""
        self.function = function
        found = tuple(inspect.signature(function.fn).parameters)
        self.tiled = "VALUE_TILE" in found
        self.parameters = tuple(n for n in found if n != "VALUE_TILE")
        self.kinds = Kinds(self.parameters, getattr(function, "do_not_specialize", ()), buffers)
        # By launch parameters and kind of arguments. Triton's interpreter compiles nothing.
        self.compiled: dict[tuple[Any, ...], Any] | None = None if interpreted() else {}

    def run(
        self, grid: tuple[int, int, int], arguments: Sequence[Any], chosen: Hashable, options: Mapping[str, int]
    ) -> None:
        """Launch it with `options`, of which `chosen` is another way to say them, to look up by."""
        if self.compiled is None:
            self.function[grid](*arguments, **options)
            return
        kind = (chosen, *self.kinds.of(arguments))
        found = self.compiled.get(kind)
        if found is None:
            made = self.function[grid](*arguments, **options)
            # Inside of `triton.AsyncCompileMode` it is a promise, which the launch has waited for.
            self.compiled[kind] = made.result() if hasattr(made, "result") else made
        elif self.tiled:
            found[grid](*arguments, options["VALUE_TILE"])
        else:
            found[grid](*arguments)


def _parted(chosen: list[int], parameters: Sequence[str], plain: Collection[str]) -> tuple[list[int], list[int]]:
    """Those that are specialised on, and the others."""
    special = [i for i in chosen if parameters[i] not in plain]
    return special, [i for i in chosen if i not in special]
