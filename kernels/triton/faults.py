"""Known faults of Triton and of ptxas that could make these kernels wrong, a row each, with who found them.

A fault that shows only now and then, such as a race, can pass any test: kernels are refused. One that is compiled into
a kernel shows whenever that kernel runs: the test of the very kernels that a call takes (`acceptance`) sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

from llcompile.kernels.triton.toolchain import Toolchain, Version, text


class Fault(NamedTuple):
    """One fault: on which chips, from which Triton (or ptxas) on and before which it is there.

    `action` says what follows: kernels are refused, or their test is repeated more often. `cure` names what has it not.
    """

    what: str
    chips: Callable[[Toolchain], bool]
    tool: Literal["triton", "ptxas"]
    since: Version
    before: Version
    action: Literal["refuse", "repeat"]
    cure: str
    sources: tuple[str, ...]

    def holds(self, found: Toolchain) -> bool:
        """Whether `found` has it."""
        tool: Version | None = getattr(found, self.tool)
        return self.chips(found) and tool is not None and self.since <= tool < self.before

    def __str__(self) -> str:
        return f"{self.what} ({', '.join(self.sources)}; {self.cure})"


def _hopper(found: Toolchain) -> bool:
    return found.chip.arch == 90


def _blackwell(found: Toolchain) -> bool:
    """With tensor memory: sm_100 and its kin, not sm_120, whose matrix instructions are those of older chips."""
    return isinstance(found.chip.arch, int) and 100 <= found.chip.arch < 120


_TRITON, _FLA = "https://github.com/triton-lang/triton", "https://github.com/fla-org/flash-linear-attention"

FAULTS: tuple[Fault, ...] = (
    Fault(
        "products in a loop race with 4 and 8 warps, so that results differ from run to run",
        *(_blackwell, "triton", (0,), (3, 8), "refuse", "install Triton 3.8 or later"),
        sources=(f"{_TRITON}/issues/10590", f"{_TRITON}/issues/9871", f"{_FLA}/pull/1229"),
    ),
    Fault(
        "products of a transposed product are wrong at some tile widths",
        *(_hopper, "triton", (3, 4), (3, 7, 1), "repeat", "fixed in Triton 3.7.1"),
        sources=(f"{_FLA}/pull/826", f"{_FLA}/pull/983"),
    ),
    Fault(
        "products with narrow tiles read beyond shared memory or are wrong",
        *(_hopper, "triton", (3, 6), (3, 8), "repeat", "fixed in Triton 3.8"),
        sources=(f"{_TRITON}/issues/11366", f"{_FLA}/pull/988"),
    ),
    Fault(
        "some kernels are assembled to wrong code",
        *(_hopper, "ptxas", (12, 8), (13, 1), "repeat", "fixed in ptxas 13.1"),
        sources=(f"{_FLA}/pull/1262",),
    ),
    Fault(
        "registers that a product still reads are reused",
        *(_hopper, "ptxas", (12,), (13, 3), "repeat", "fixed in ptxas 13.3"),
        sources=(f"{_TRITON}/pull/11781",),
    ),
)


def known(found: Toolchain) -> Iterator[Fault]:
    """The faults that `found` has."""
    return (fault for fault in FAULTS if fault.holds(found))


@lru_cache(maxsize=64)  # every call asks
def refusal(found: Toolchain) -> str | None:
    """Why kernels must not run with `found`, however well they do in a test; None if there is no such reason."""
    fault = next((fault for fault in known(found) if fault.action == "refuse"), None)
    return None if fault is None else f"with Triton {text(found.triton)} on {found.chip.name} {fault}"


def repeats(found: Toolchain) -> int:
    """How many times a test of kernels runs; whatever differs from run to run is wrong as well."""
    return 8 if any(fault.action == "repeat" for fault in known(found)) else 2
