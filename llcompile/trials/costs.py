"""Costs: what the mixers' states weigh and what a decoded token takes, linear and log-linear.

Measured on the operator, with the sizes of the converted mixers and after as many tokens as the longest held-out
sequence has; the rest of the model is the same in all arms.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llcompile.kernels.routing_state import room
from llcompile.ops import level_readouts_step, loglinear_attention, loglinear_attention_step
from llcompile.patterns.mixer import FEATURES
from llcompile.patterns.records import Converted
from llcompile.report import Report

_CALLS = 30
_LONGEST = 4096  # tokens before the measured one, at most


@dataclass(frozen=True)
class Cost:
    """Of all converted mixers, for one sequence: bytes of their states, and milliseconds for a decoded token."""

    state_bytes: int
    token_ms: float


def costs(report: Report, levels: int, length: int, device: str) -> tuple[Cost, Cost, Cost]:
    """Linear, log-linear, and log-linear with routed level weights, which read the buckets first."""
    kinds = Counter(_sizes(mixer) for mixer in report.converted)
    tokens = min(length, _LONGEST)
    found = []
    for count, routed in ((None, False), (levels, False), (levels, True)):
        parts = [(number, _of_one(sizes, count, routed, tokens, device)) for sizes, number in kinds.items()]
        found.append(Cost(sum(n * c.state_bytes for n, c in parts), sum(n * c.token_ms for n, c in parts)))
    return found[0], found[1], found[2]


def _sizes(mixer: Converted) -> tuple[str, str, int, int, int, int]:
    sets = mixer.weight_sets or mixer.heads
    return mixer.decay, mixer.correction, mixer.heads, mixer.key_dim, mixer.value_dim, sets


@torch.no_grad()
def _of_one(
    sizes: tuple[str, str, int, int, int, int], levels: int | None, routed: bool, tokens: int, device: str
) -> Cost:
    operands = _operands(sizes, levels, tokens, device)
    _, state = loglinear_attention(**operands, return_final_state=True)
    if state is None:
        raise AssertionError("a final state was asked for")
    lasting = ("decay_rate", "scale")
    token: dict[str, Any] = {k: v if k in lasting or v is None else v[:, -1] for k, v in operands.items()}
    routing = _routing(sizes, levels, device) if routed and levels is not None else None
    times = []
    for _ in range(_CALLS):
        _wait(device)
        began = time.perf_counter()
        if routing is not None and levels is not None:
            token["routing_state"] = level_readouts_step(*routing, state, levels)[1]
        loglinear_attention_step(state=state, **token)
        _wait(device)
        times.append(time.perf_counter() - began)
    return Cost(state.numel() * state.element_size(), 1e3 * median(times))


def _routing(sizes: tuple[str, str, int, int, int, int], levels: int, device: str) -> tuple[Tensor, Tensor] | None:
    """A query and a key of routed level weights [1, W, R]; None where the state has no room for any."""
    _, _, heads, key, value, sets = sizes
    features = min(FEATURES, room(heads, sets, key, value) // levels)
    return (
        (torch.rand(1, sets, features, device=device), torch.rand(1, sets, features, device=device))
        if features
        else None
    )


def _operands(
    sizes: tuple[str, str, int, int, int, int], levels: int | None, tokens: int, device: str
) -> dict[str, Any]:
    decay, correction, heads, key, value, sets = sizes

    def random(*shape: int) -> Tensor:
        return torch.randn(1, tokens, *shape, device=device)

    q, k = (F.normalize(random(heads, key), dim=-1) for _ in range(2))
    found: dict[str, Any] = {"q": q, "k": k, "v": random(heads, value)}
    found["level_weights"] = None if levels is None else torch.ones(1, tokens, sets, levels, device=device)
    if decay != "none":
        found["log_decay"] = F.logsigmoid(random(heads, key) if decay == "channel" else random(heads)) * 0.1
    if decay == "rate":
        found["decay_rate"] = torch.ones(heads, key, device=device)
    if correction != "none":
        found["beta"] = random(heads).sigmoid()
    if correction == "erase":
        found["erase_query"], found["erase_key"] = k, k
    return found


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
