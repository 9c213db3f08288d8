"""Mamba-1's selective scan as the libraries spell it: channels as heads of width one, that share a query and a key.

`u` and `dt` are [B, H, T] (a single step has no T), A is [H, K], B and C are [B, K, T] or [B, G, K, T]. The log decay
of a channel is dt A: the operator takes -dt and the rates -A, so that no tensor has the axes of time and of the states.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from llcompile.patterns.known.entry import Arguments, Tensor
from llcompile.patterns.mixer import Mixer


def selective_scan(a: Arguments, value: str, dt: Any) -> Mixer:
    """The scan; dt [B, H, T] as it discretises with."""
    tokens = lambda x: x.transpose(1, 2)  # noqa: E731
    return _selective(a, tokens(a[value]), tokens(dt), _grouped(a, "C"), _grouped(a, "B"))


def selective_step(a: Arguments, value: str, dt: Any, state: str) -> Mixer:
    """Its single step; dt [B, H] as it discretises with."""
    one = lambda name: a[name] if a.ranks[name] == 3 else a[name].unsqueeze(1)  # noqa: E731
    return _selective(a, a[value], dt, one("C"), one("B"), initial_state=a[state], step=True)


def _grouped(a: Arguments, name: str) -> Any:
    """B or C as [B, T, G, K]."""
    x = a[name]
    return x.permute(0, 3, 1, 2) if a.ranks[name] == 4 else x.transpose(1, 2).unsqueeze(2)


def _selective(a: Arguments, u: Any, dt: Any, query: Any, key: Any, **more: Any) -> Mixer:
    dt = dt.float()
    return Mixer(
        decay="channel",
        correction="none",
        query=query.float(),
        key=key.float(),
        value=(u.float() * dt).unsqueeze(-1),
        log_decay=-dt,
        decay_rate=-a["A"].float(),
        **more,
    )


def time_step(a: Arguments, dt: str, bias: str, softplus: str, dtype: torch.dtype | None = None) -> Any:
    """dt + bias, softplus; in its own dtype unless another one is given."""
    step = a[dt] if dtype is None else a[dt].to(dtype)
    if a[bias] is not None:
        own = a[bias].to(dtype or a.dtypes[dt])
        step = step + (own.unsqueeze(-1) if a.ranks[dt] == 3 else own)
    return F.softplus(step) if a[softplus] else step


def by_channel(output: Any, step: bool) -> Any:
    """The operator's output [B, T, H, 1] (or [B, H, 1]) in the layout of u."""
    output = output.squeeze(-1)
    return output if step else output.transpose(1, 2)


def scan_tensors(value: str, dt: str) -> tuple[Tensor, ...]:
    """The tensors of the scan, by the names of its values and steps."""
    return (
        Tensor(value, "B H T"),
        # Positive also without softplus: a negative step would let the state grow.
        Tensor(dt, "B H T", "step"),
        Tensor("A", "H K", "negative"),
        Tensor("B", "B K T|B G K T"),
        Tensor("C", "B K T|B G K T"),
        Tensor("D", "H"),
        Tensor("z", "B H T"),
        Tensor("delta_bias", "H", "step_bias"),
    )


def is_complex(a: Arguments) -> str | None:
    """Why a call with complex states is not covered, or None."""
    return "has a complex A, and the states of a mixer are real" if a.dtypes["A"].is_complex else None
