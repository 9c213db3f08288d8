"""States for storage: what holds something only, in as few bits as an error allows, with that error measured."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from llcompile.errors import OperandError, StateError
from llcompile.kernels import state as _state
from llcompile.kernels.header import DIGITS

# Bits of each form, fewest first: integers with a scale for each channel of the key, float16 with one for each level.
_FORMS = (torch.int8, torch.float16, torch.float32)


@dataclass(frozen=True)
class Part:
    """Levels that are kept in one dtype.

    Args:
        places: `[N, 2]` int64: row and level of each.
        values: `[N, H, K, V]`.
        scales: `[N, H, K, 1]` or `[N, H, 1, 1]` float32, by which the values are multiplied.
    """

    places: Tensor
    values: Tensor
    scales: Tensor


@dataclass(frozen=True)
class CompactState:
    """A state as `compact_state` makes it. All in it are plain tensors and numbers.

    Args:
        shape: of the state.
        headers: `[B, H, n]` float32, the entries of the headers up to the last one that is used; n is 0 for a linear
            state.
        parts: the levels, by dtype.
        error: the largest error of any row and head: the norm of the difference of all levels, relative to the norm of
            all levels.
        errors: `[B, L]` float32: the same for each level, relative to the norm of all levels.
    """

    shape: tuple[int, ...]
    headers: Tensor
    parts: tuple[Part, ...]
    error: float
    errors: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors but `errors`."""
        return self.headers.nbytes + sum(getattr(p, f.name).nbytes for p in self.parts for f in fields(p))

    def restore(self) -> Tensor:
        """The state, float32: what follows from it differs from what follows from the original by `error`."""
        batch, heads, *_, key_dim, value_dim = self.shape
        levels = self.shape[2] - 1 if len(self.shape) == 5 else 1
        states = self.headers.new_zeros(batch, levels, heads, key_dim, value_dim)
        for part in self.parts:
            states[part.places[:, 0], part.places[:, 1]] = part.values.float() * part.scales
        if len(self.shape) == 4:
            return states[:, 0]
        header = torch.nn.functional.pad(self.headers, (0, key_dim * value_dim - self.headers.shape[2]))
        return torch.cat([header.unflatten(2, (key_dim, value_dim))[:, :, None], states.transpose(1, 2)], 2)

    def to_dict(self) -> dict[str, Any]:
        """Tensors, numbers and lists alone, for `torch.save` and back with `weights_only=True`."""
        parts = [vars(part) for part in self.parts]
        return {**vars(self), "shape": list(self.shape), "parts": parts}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> CompactState:
        """What `to_dict` made.

        Raises:
            StateError: it is something else.
        """
        try:
            parts = tuple(Part(**part) for part in d["parts"])
            return cls(**{**d, "shape": tuple(d["shape"]), "parts": parts})
        except (TypeError, KeyError) as error:
            found = sorted(d) if isinstance(d, dict) else type(d).__name__
            raise StateError(
                f"not a compact state, but {found} ({error}); pass what CompactState.to_dict returned"
            ) from error


def compact_state(state: Tensor, tolerance: float = 1e-3) -> CompactState:
    """Make a state small for storage, such as a cache of prefixes.

    The next token merges levels anyway, and that is done here, so that what is kept is one bucket for each bit of the
    position: at most `log2 T`, half as many on average, and one where T is a power of two. Each is kept in the fewest
    bits (int8, float16, float32) with which all of them together stay within `tolerance`.

    Args:
        state: `[B, H, K, V]` or `[B, H, 1 + L, K, V]`, as the operators return it.
        tolerance: bound of `error`, relative; 0 keeps every number. The level weights are not known here: where a level
            weighs w times as much as the others, its part in the error does, too.

    Returns:
        The compact state, with the error that was measured, by restoring it.

    Raises:
        OperandError: `tolerance` is not a number of at least 0.
        StateError: `state` is none, is float64 (which would be rounded), or is not finite.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not tolerance >= 0:
        raise OperandError(f"tolerance must be a number of at least 0, got {tolerance!r}")
    _check(state)
    levels = _merged(state.detach())  # [B, L, H, K, V]
    headers = state.new_zeros(*state.shape[:2], 0, dtype=torch.float32)
    if _state.is_level_state(state):
        entries = state.detach()[:, :, 0].flatten(2).float()
        used = entries.flatten(0, 1).ne(0).any(0).nonzero()
        headers = entries[:, :, : max(DIGITS, int(used.max()) + 1 if used.numel() else 0)].clone()
    places = levels.flatten(2).ne(0).any(2).nonzero()  # [N, 2]
    held = levels[places[:, 0], places[:, 1]]  # [N, H, K, V]
    norms = _norm(levels, (1, 3, 4))  # [B, H] of all levels
    buckets = torch.zeros(len(levels), dtype=torch.int64, device=state.device).index_add_(
        0, places[:, 0], torch.ones_like(places[:, 0])
    )
    allowed = tolerance * norms[places[:, 0]] / buckets[places[:, 0], None].sqrt()  # [N, H]
    parts, left = [], torch.ones(len(places), dtype=torch.bool, device=state.device)
    for dtype in _FORMS:
        values, scales = _in_form(held, dtype)
        lost = _norm(values.float() * scales - held, (2, 3))  # [N, H]
        chosen = left & (lost <= allowed).all(1)
        if bool(chosen.any()):
            parts.append(Part(places[chosen], values[chosen], scales[chosen]))
        left = left & ~chosen
    return _measured(CompactState(tuple(state.shape), headers, tuple(parts), 0.0, headers.new_zeros(0)), levels, norms)


def _check(state: Tensor) -> None:
    _state.check_kind(state)
    if state.dtype == torch.float64:
        raise StateError(f"state {list(state.shape)} is float64, and a compact one is float32; pass state.float()")
    _state.check_positions(state, 0, "state")
    if not bool(state.isfinite().all()):
        raise StateError(f"state {list(state.shape)} is not finite, so that no error can be kept; do not store it")


def _merged(state: Tensor) -> Tensor:
    """The levels `[B, L, H, K, V]` with those merged that the next token would merge; float32."""
    if not _state.is_level_state(state):
        return state.float()[:, None]
    levels, position = _state.unpack_state(state.float())
    return _state.merge(levels, position).transpose(1, 2)


def _in_form(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers `[N, H, K, V]` in `dtype`, and the scales to multiply them by."""
    if dtype == torch.int8:
        scales = x.abs().amax(3, keepdim=True) / 127
        return (x / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().to(dtype), scales
    largest = x.abs().amax((2, 3), keepdim=True)
    if dtype == torch.float16:  # a power of two, which rounds nothing; the largest number becomes less than 2 ** 15
        exponent = (torch.frexp(largest).exponent - 15).clamp(min=-100)  # the scale's inverse must be finite
        return torch.ldexp(x, -exponent).to(dtype), torch.ldexp(torch.ones_like(largest), exponent)
    return x, torch.ones_like(largest)


def _measured(compact: CompactState, levels: Tensor, norms: Tensor) -> CompactState:
    """With the error of what it restores against `levels [B, L, H, K, V]`."""
    found = compact.restore()
    ours = found[:, :, 1:].transpose(1, 2) if found.dim() == 5 else found[:, None]
    lost = _norm(ours - levels, (3, 4)) / norms.clamp(min=torch.finfo(torch.float64).tiny)[:, None]  # [B, L, H]
    error = float(_norm(lost, (1,)).max()) if lost.numel() else 0.0
    errors = lost.amax(2).float() if lost.numel() else lost.new_zeros(lost.shape[:2], dtype=torch.float32)
    return CompactState(compact.shape, compact.headers, compact.parts, error, errors)


def _norm(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """In float64: squares of float32 numbers may be too large or too small for float32."""
    return torch.linalg.vector_norm(x, dim=axes, dtype=torch.float64)
