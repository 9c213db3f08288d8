"""Transforms: how code may hold a decay, each as a function to the log decay, with its inverse for the draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from llcompile.patterns.structure.ranges import Range


@dataclass(frozen=True)
class Transform:
    """One way to hold a decay.

    Args:
        name: how a person would call it.
        log_decay: z -> log decay, in torch calls that run on tensors and proxies.
        inverse: log decay -> z.
        fits: whether a range of z makes sense.
    """

    name: str
    log_decay: Callable[[Any], Any]
    inverse: Callable[[torch.Tensor], torch.Tensor]
    fits: Callable[[Range], bool]


# Smaller than any float32 decay that is not zero: log(0) is minus infinity, and its differences are not numbers.
_TINY = 1e-37


def _log(z: Any) -> Any:
    return torch.log(torch.clamp_min(z, _TINY))


def _log_complement(z: Any) -> Any:
    return torch.log(torch.clamp_min(1.0 - z, _TINY))


_UNIT = lambda r: r[0] >= -1e-6 and r[1] <= 1 + 1e-6  # noqa: E731
_NOT_UNIT = lambda r: not _UNIT(r)  # noqa: E731

TRANSFORMS: tuple[Transform, ...] = (
    # S = exp(g) S + ...: the decay is held as its logarithm.
    Transform("log decay", lambda z: z, lambda g: g, lambda r: r[0] < 0),
    # S = a S + ...
    Transform("decay", _log, torch.exp, lambda r: r[0] >= -1e-6),
    # S = (1 - f) S + ...: a forget gate.
    Transform("forget gate", _log_complement, lambda g: 1 - torch.exp(g), _UNIT),
    # exp(-z), z positive: a rate.
    Transform("rate", lambda z: -z, lambda g: -g, lambda r: r[1] > 1e-6),
    # The gate's logit, where sigmoid stands inside of the loop.
    Transform("logit", F.logsigmoid, lambda g: -torch.log(torch.expm1(-g)), _NOT_UNIT),
    # softplus inside.
    Transform("rate's logit", lambda z: -F.softplus(z), lambda g: torch.log(torch.expm1(-g)), _NOT_UNIT),
    # A rate held as its logarithm: A = -exp(A_log).
    Transform("log rate", lambda z: -torch.exp(z), lambda g: torch.log(-g), _NOT_UNIT),
)
