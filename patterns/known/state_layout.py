"""State layout: a known function's own linear states, by their axes, as the operator's [B, H, K, V] and back."""

from __future__ import annotations

from typing import Any

# The operator's own.
OPERATOR = ("B", "H", "K", "V")


def to_operator(state: Any, axes: tuple[str, ...]) -> Any:
    """A state with the given axes as [B, H, K, V]; one without a value axis has values of width one."""
    if axes[-1] == "V":
        return state
    return state.transpose(-1, -2) if axes[-2] == "V" else state.unsqueeze(-1)


def from_operator(state: Any, axes: tuple[str, ...]) -> Any:
    """A state [B, H, K, V] with the given axes."""
    if axes[-1] == "V":
        return state
    return state.transpose(-1, -2) if axes[-2] == "V" else state.squeeze(-1)
