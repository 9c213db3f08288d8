"""What ``llcompile bench operator --device cpu`` measures, the most important first: time may not do for all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

FAMILIES = [(decay, correction) for correction in ("none", "delta") for decay in ("none", "scalar", "channel")]
# transformers' function for a family.
PEERS = {
    ("scalar", "delta"): "torch_chunk_gated_delta_rule",
    ("scalar", "none"): "mamba2_chunk_scan",
    ("channel", "delta"): "chunk_kimi_delta_attention",
}
# Those whose code loops over tokens and chunks: Inductor unrolls that, which takes minutes.
UNROLLED = [family for family in PEERS if family[1] == "delta"]
# Those that make a mask of a chunk by a chunk by K, for each chunk: tens of seconds at 16k, in one setting only.
SLOW = [("channel", "delta")]
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
TARGET_LENGTHS = [4096, 16384, 65536]  # those that the targets speak of
PEER_LENGTHS = [4096, 16384]
STEP_CONTEXT = 1 << 17
QUICK_LENGTH = 256
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Job:
    """One thing to measure."""

    runs: str  # "llcompile", or a peer's function
    decay: str
    correction: str
    weights: bool
    backward: bool
    length: int  # of a step: the tokens before it
    device: str = "cpu"
    compiled: bool = False
    heads: int = 4
    dim: int = 64
    repeats: int = 5
    step: bool = False
    dtype: str = "float32"
    threads: int = 1
    kernels: str = "auto"  # as LLCOMPILE_KERNELS, for "llcompile"

    @property
    def title(self) -> str:
        """One line for people."""
        operator = f"{'log-linear' if self.weights else 'linear'} {self.decay}/{self.correction} ({self.kernels})"
        name = operator if self.runs == "llcompile" else f"{self.runs} ({'Inductor' if self.compiled else 'eager'})"
        phase = "step" if self.step else "fwd+bwd" if self.backward else "fwd"
        return f"{name}, {phase} at {self.length}, {self.dtype}, {self.threads} thread{'s' * (self.threads > 1)}"


# Jobs that one process measures; neighbours of the same length take turns.
Series = list[Job]
Family = tuple[str, str]
Setting = tuple[str, int]  # dtype, threads


@dataclass(frozen=True)
class Plan:
    """What was asked for; `kernels[0]` is what the targets are for, the others are measured beside it."""

    lengths: list[int]
    families: list[Family]
    settings: list[Setting]
    kernels: list[str]
    repeats: int
    device: str = "cpu"
    peers: bool = True
    quick: bool = False

    def series(self) -> list[Series]:
        """All that there is to measure, the most important first."""
        first, *others = self.settings
        central = [f for f in self.families if f in PEERS]
        rest = [f for f in self.families if f not in PEERS]
        targets = [n for n in self.lengths if n in TARGET_LENGTHS or self.quick]
        between = [n for n in self.lengths if n not in targets]
        own = self.kernels[:1]
        return [
            one
            for one in (
                *(self._sequences(f, first, targets, self.kernels) for f in central),
                self._steps(first[0]),
                *(self._compiled(*chosen) for chosen in self._to_compile([f for f in central if f not in UNROLLED])),
                *(self._sequences(f, s, targets, own) for f, s in product(central, others) if f not in SLOW),
                *(self._steps(dtype) for dtype in dict.fromkeys(dtype for dtype, _ in others) if dtype != first[0]),
                *(self._sequences(f, first, between, self.kernels) for f in central),
                *(self._sequences(f, s, targets, own) for f, s in product(central, others) if f in SLOW),
                *(self._sequences(f, first, self.lengths, own) for f in rest),
                *(self._compiled(*chosen) for chosen in self._to_compile([f for f in central if f in UNROLLED])),
                *(self._sequences(f, s, between, own) for s, f in product(others, central)),
                *(self._sequences(f, s, self.lengths, own) for s, f in product(others, rest)),
            )
            if one
        ]

    def _job(self, family: Family, setting: Setting, length: int, weights: bool = False, backward: bool = False) -> Job:
        dtype, threads = setting
        common = {"device": self.device, "repeats": self.repeats, "dtype": dtype, "threads": threads}
        return Job("llcompile", *family, weights, backward, length, **common)  # type: ignore[arg-type]

    def _ours(self, job: Job, kernels: list[str]) -> Series:
        """Linear and log-linear, in each form."""
        return [replace(job, kernels=form, weights=weights) for form in kernels for weights in (False, True)]

    def _sequences(self, family: Family, setting: Setting, lengths: list[int], kernels: list[str]) -> Series:
        found = []
        for length in lengths:
            jobs = [self._job(family, setting, length, backward=backward) for backward in (False, True)]
            found += [one for job in jobs for one in self._ours(job, kernels)]
            if self.peers and family in PEERS and (length in self._peer_lengths(family, setting) or self.quick):
                found += [replace(job, runs=PEERS[family]) for job in jobs]
        return found

    def _peer_lengths(self, family: Family, setting: Setting) -> list[int]:
        return PEER_LENGTHS[:1] if family in SLOW and setting != self.settings[0] else PEER_LENGTHS

    def _to_compile(self, families: list[Family]) -> list[tuple[Family, int, bool]]:
        """The shorter length and the forward pass first: where these are given up, the others are as well."""
        if not self.peers or self.quick:
            return []
        lengths = [n for n in PEER_LENGTHS if n in self.lengths]
        return [(f, length, backward) for length in lengths for f in families for backward in (False, True)]

    def _compiled(self, family: Family, length: int, backward: bool) -> Series:
        """A peer compiled by Inductor, and ours once more, since times are compared within a process."""
        job = self._job(family, self.settings[0], length, backward=backward)
        return [replace(job, runs=PEERS[family], compiled=True), *self._ours(job, self.kernels[:1])]

    def _steps(self, dtype: str) -> Series:
        context = QUICK_LENGTH if self.quick else STEP_CONTEXT
        jobs = [replace(self._job(f, (dtype, 1), context), step=True) for f in self.families]
        return [one for job in jobs for one in self._ours(job, self.kernels)]
