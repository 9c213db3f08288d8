"""What is measured on a GPU, and in which order: the most telling cases come first, so that a budget cuts the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from benchmarks.operator_plan import FAMILIES

Operator = Literal["log-linear", "linear", "softmax"]
Phase = Literal["forward", "both", "decode"]
Family = tuple[str, str]

OURS = "llcompile"
LENGTHS = tuple(2**n for n in range(11, 19))  # 2k .. 256k tokens
# Level weights per token, the same for all lengths as in a model: enough for the longest. Kernels, ours and FLA's, are
# made for a number of levels, so one number for all also spares compilations.
LEVELS = LENGTHS[-1].bit_length()
PHASES: dict[Phase, str] = {"forward": "fwd", "both": "fwd+bwd", "decode": "decode step"}


@dataclass(frozen=True)
class Case:
    """One thing to measure: who runs (``llcompile`` or a peer's name), which operator, on operands of which size.

    ``q, k [B, T, G, K]``, ``v [B, T, H, V]``, bf16; a decode step is one token after ``length`` tokens of context.
    """

    runs: str
    operator: Operator
    decay: str
    correction: str
    phase: Phase
    length: int
    batch: int = 1
    heads: int = 32
    key_dim: int = 128
    value_dim: int = 128
    groups: int = 32

    @property
    def family(self) -> Family:
        """Decay and correction."""
        return self.decay, self.correction

    @property
    def size(self) -> tuple[int, int, int, int]:
        """B, H, K, V."""
        return self.batch, self.heads, self.key_dim, self.value_dim

    @property
    def position(self) -> int:
        """Tokens before a decode step: about 2/3 of the length, where every other level holds something (the mean)."""
        return 2 * self.length // 3

    @property
    def title(self) -> str:
        """One line for people."""
        kind = "softmax" if self.operator == "softmax" else f"{self.operator} {self.decay}/{self.correction}"
        size = f"B={self.batch} H={self.heads} K={self.key_dim} V={self.value_dim} T={self.length}"
        return f"{self.runs}: {kind}, {PHASES[self.phase]}, {size}"


@dataclass(frozen=True)
class Runner:
    """Who may run which operator on which families: ours twice, then a row for every peer."""

    runs: str
    operator: Operator
    families: tuple[Family, ...]


@dataclass(frozen=True)
class Round:
    """Cases of like importance; the rounds' order is the order of importance."""

    about: str
    sizes: tuple[tuple[int, int, int], ...]  # B, K, V
    lengths: tuple[int, ...]
    phases: tuple[Phase, ...]
    families: tuple[Family, ...]


OWN = (Runner(OURS, "log-linear", tuple(FAMILIES)), Runner(OURS, "linear", tuple(FAMILIES)))
_KEY: tuple[Family, ...] = (("scalar", "none"), ("scalar", "delta"))
_ALL: tuple[Family, ...] = tuple(FAMILIES)
_MAIN = ((1, 128, 128),)
_SIZES = tuple(product((1, 8), (128, 64), (128, 64)))
_DECODE = (2**17, 2**14, 2**11)

ROUNDS = (
    Round("the goals at 64k", _MAIN, (2**16,), ("both", "forward"), _KEY),
    Round("a decode step after 128k", _MAIN, (2**17,), ("decode",), _KEY),
    Round("softmax attention from 4k", _MAIN, (2**12, 2**13), ("both", "forward"), _KEY[:1]),
    Round("the other families at 64k", _MAIN, (2**16,), ("both", "forward"), _ALL),
    Round("time against T", _MAIN, LENGTHS, ("both", "forward"), _KEY),
    Round("the other sizes at 64k", _SIZES, (2**16,), ("both", "forward"), _KEY),
    Round("decode, all sizes", _SIZES, _DECODE, ("decode",), _ALL),
    Round("all lengths, key families", _SIZES, LENGTHS, ("both", "forward"), _KEY),
    Round("everything", _SIZES, LENGTHS, ("both", "forward"), _ALL),
)
QUICK = (Round("a smoke test", ((1, 64, 64),), (2**11,), ("both", "forward", "decode"), _KEY),)


def plan(
    runners: Iterable[Runner],
    rounds: Iterable[Round] = ROUNDS,
    lengths: Iterable[int] | None = None,
    families: Iterable[Family] | None = None,
) -> list[Case]:
    """All cases of all rounds, each once, in order of importance; ``lengths`` and ``families`` keep some only."""
    runners, kept = list(runners), None if families is None else set(families)
    if lengths is not None:
        wanted = tuple(lengths)
        rounds = [replace(r, lengths=tuple(n for n in r.lengths if n in wanted)) for r in rounds]
    cases = (case for r in rounds for case in _cases_of(r, runners))
    return list(dict.fromkeys(c for c in cases if kept is None or c.operator == "softmax" or c.family in kept))


def _cases_of(r: Round, runners: list[Runner]) -> Iterator[Case]:
    """Side by side: whoever compares with each other runs one after the other, on the same clock."""
    for (batch, key_dim, value_dim), length, phase in product(r.sizes, r.lengths, r.phases):
        for family, runner in product(r.families, runners):
            softmax = runner.operator == "softmax"  # compares with every family and is measured once
            if softmax or family in runner.families:
                decay, correction = ("none", "none") if softmax else family
                case = Case(runner.runs, runner.operator, decay, correction, phase, length, batch)
                yield replace(case, key_dim=key_dim, value_dim=value_dim)
