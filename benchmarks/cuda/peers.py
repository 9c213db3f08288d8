"""Who ours is compared with: one row a peer. FLA's signatures are those of version 0.6."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.cases import Case, Family, Operator, Runner
from benchmarks.cuda.operands import Tensors, make
from llcompile.errors import SpecError

Function = Callable[..., Any]


@dataclass(frozen=True)
class Peer:
    """A function of another library.

    ``call(function, x)`` runs it on operands laid out as in :mod:`.operands` and returns its output. ``step(function,
    x, case)`` returns a decode step on one token ``x`` (T = 1), ``function`` being ``step_function`` where there is
    one. ``limits(case)`` says why it cannot run a case, None if it can.
    """

    name: str
    library: str  # what `--against` may say for all peers of one library
    package: str  # whose version is written down
    module: str
    function: str
    operator: Operator
    families: tuple[Family, ...]
    call: Callable[[Function, Tensors], Tensor]
    step: Callable[[Function, Tensors, Case], Callable[[], object]]
    limits: Callable[[Case], str | None]
    step_function: str = ""
    # Whether it compiles anew for another length.
    per_length: bool = False
    # Whether a CUDA graph can hold its step: one that synchronises with the host breaks the capture.
    graph: bool = True

    @property
    def runner(self) -> Runner:
        """As the plan sees it."""
        return Runner(self.name, self.operator, self.families)

    def load(self, phase: str = "forward") -> Function:
        """The function; raises ImportError or AttributeError, and whatever else importing it raises."""
        name = self.step_function if phase == "decode" and self.step_function else self.function
        return getattr(importlib.import_module(self.module), name)  # type: ignore[no-any-return]


# -- how operands are laid out -----------------------------------------------------------------------------------------


def _log_linear(function: Function, x: Tensors) -> Tensor:
    return function(x["q"], x["k"], x["v"], x["log_decay"], x["level_weights"], scale=1.0)[0]


def _log_linear_step(function: Function, x: Tensors, case: Case) -> Callable[[], object]:
    """Its state has the open chunk's tokens in it, so only a prefill makes one."""
    with torch.no_grad():
        past = make(case, x["v"].device.type, tokens=case.position)
        operands = (past[n] for n in ("q", "k", "v", "log_decay", "level_weights"))
        state = function(*operands, scale=1.0, output_final_state=True)[1]
    token = [x[n] for n in ("q", "k", "v", "log_decay", "level_weights")]
    return lambda: function(*token, scale=1.0, initial_state=state, output_final_state=True)


def _gated(function: Function, x: Tensors) -> Tensor:
    return function(x["q"], x["k"], x["v"], g=x["log_decay"], scale=1.0, **_beta(x))[0]


def _gated_step(function: Function, x: Tensors, case: Case) -> Callable[[], object]:
    state = torch.randn(case.batch, case.heads, case.key_dim, case.value_dim, device=x["v"].device)
    options = {"g": x["log_decay"], "scale": 1.0, **_beta(x), "initial_state": state, "output_final_state": True}
    return lambda: function(x["q"], x["k"], x["v"], **options)


def _beta(x: Tensors) -> Tensors:
    return {"beta": x["beta"]} if "beta" in x else {}


def _softmax(backend: str) -> Callable[[Function, Tensors], Tensor]:
    """Heads first, as views; one backend alone, so that no other one runs in its place unseen."""

    def call(function: Function, x: Tensors) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (x[n].transpose(1, 2) for n in "qkv")
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return function(q, k, v, is_causal=True).transpose(1, 2)

    return call


def _softmax_step(backend: str) -> Callable[[Function, Tensors, Case], Callable[[], object]]:
    """One query against a cache of ``length`` keys and values."""

    def step(function: Function, x: Tensors, case: Case) -> Callable[[], object]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        past = make(case, x["v"].device.type)
        q, k, v = (t.transpose(1, 2) for t in (x["q"], past["k"], past["v"]))

        def run() -> object:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return function(q, k, v)

        return run

    return step


# -- limits ------------------------------------------------------------------------------------------------------------


def _log_linear_limits(case: Case) -> str | None:
    rules = (
        (case.length > 2**17, f"T = {case.length} is more than its 131072"),
        (case.phase != "decode" and case.length % 64 != 0, f"T = {case.length} is not a multiple of 64"),
        (case.key_dim % 64 != 0, f"K = {case.key_dim} is not a multiple of 64"),
        (case.value_dim.bit_count() != 1, f"V = {case.value_dim} is not a power of two"),
    )
    return next((words for broken, words in rules if broken), None)


def _key_limits(case: Case) -> str | None:
    return f"K = {case.key_dim} is more than its 256" if case.key_dim > 256 else None


def _same_sizes(case: Case) -> str | None:
    k, v = case.key_dim, case.value_dim
    return None if k == v else f"K = {k} and V = {v} differ, it takes one size for both"


def _no_limits(case: Case) -> str | None:
    return None


_FLA = ("fla", "fla-core")
PEERS = (
    Peer("fla-log-linear", *_FLA, "fla.ops.log_linear_attn", "chunk_log_linear_attn", "log-linear",
         (("scalar", "none"),), _log_linear, _log_linear_step, _log_linear_limits, per_length=True, graph=False),
    Peer("fla-simple-gla", *_FLA, "fla.ops.simple_gla", "chunk_simple_gla", "linear",
         (("scalar", "none"),), _gated, _gated_step, _no_limits, "fused_recurrent_simple_gla"),
    Peer("fla-gated-delta", *_FLA, "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", "linear",
         (("scalar", "delta"),), _gated, _gated_step, _key_limits, "fused_recurrent_gated_delta_rule"),
    Peer("fla-kda", *_FLA, "fla.ops.kda", "chunk_kda", "linear",
         (("channel", "delta"),), _gated, _gated_step, _key_limits, "fused_recurrent_kda"),
    Peer("sdpa-flash", "sdpa", "torch", "torch.nn.functional", "scaled_dot_product_attention", "softmax",
         (), _softmax("FLASH_ATTENTION"), _softmax_step("FLASH_ATTENTION"), _same_sizes),
    Peer("sdpa-cudnn", "sdpa", "torch", "torch.nn.functional", "scaled_dot_product_attention", "softmax",
         (), _softmax("CUDNN_ATTENTION"), _softmax_step("CUDNN_ATTENTION"), _no_limits),
)  # fmt: skip


def chosen(against: str | None, peers: Iterable[Peer] = PEERS) -> list[Peer]:
    """The peers that ``--against`` names (by name or by library, with commas between); all of them for None.

    Raises SpecError for an unknown name, with the nearest known one.
    """
    peers = list(peers)
    if against is None:
        return peers
    known = {p.name for p in peers} | {p.library for p in peers}
    wanted = {word.strip() for word in against.split(",")} - {"", "none"}
    for word in sorted(wanted - known):
        near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.0)[0]
        raise SpecError(f"--against: no peer is called {word!r}; did you mean {near!r}? Known: {_list(known)}, none")
    return [p for p in peers if wanted & {p.name, p.library}]


def peer(name: str) -> Peer:
    """The row of one peer."""
    return next(p for p in PEERS if p.name == name)


def presence(p: Peer) -> dict[str, str]:
    """Whether a peer is installed here: its version, or why it is absent."""
    try:
        p.load()
        if p.step_function:
            p.load("decode")
    except Exception as error:  # an import runs anything, and so it may raise anything
        return {"name": p.name, "absent": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"name": p.name, "version": _version(p.package)}


def _version(package: str) -> str:
    """As installed; a folder on the path alone has none to tell."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
