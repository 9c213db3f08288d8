"""States for storage: what holds something only, in as few bits as an error allows, with that error measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llcompile import few_bits
from llcompile.errors import OperandError, StateError
from llcompile.kernels import state as _state
from llcompile.kernels.header import DIGITS

_WHOLE = 32  # bits of a float32, which loses nothing
_FORMS = (0, *few_bits.BITS, _WHOLE)
_HALVINGS = 24  # of the interval in which the loss allowed to each bucket is sought


@dataclass(frozen=True)
class Part:
    """Buckets, each of one head, that are kept in as many bits.

    Args:
        places: `[N]` int32: where each of them is in `[B, H, L]`.
        values: `[N, bytes]` uint8 as `few_bits.pack` makes them; with 32 bits `[N, K, V]` float32.
        scales, rows: as `few_bits.scales_of`; empty with 32 bits.
        bits: of each number.

    In what earlier versions wrote `places` is `[N, 2]`, row and level of buckets of all heads, `values` `[N, H, K, V]`
    and `scales` what they are multiplied by.
    """

    places: Tensor
    values: Tensor
    scales: Tensor
    rows: Tensor | None = None
    bits: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.places, self.values, self.scales, self.rows) if t is not None)

    def put(self, states: Tensor) -> None:
        """Put its numbers into levels `[B, H, L, K, V]`, which are changed in place."""
        if self.rows is None or self.bits is None:
            states[self.places[:, 0], :, self.places[:, 1]] = self.values.float() * self.scales
            return
        numbers = self.values
        if self.bits != _WHOLE:
            integers = few_bits.unpack(self.values, self.bits, *states.shape[3:])
            numbers = few_bits.restored(integers, few_bits.row_scales(self.scales, self.rows), self.bits)
        states.view(-1, *states.shape[3:])[self.places.long()] = numbers


@dataclass(frozen=True)
class CompactState:
    """A state as `compact_state` makes it. All in it are plain tensors and numbers.

    Args:
        shape: of the state.
        headers: `[B, H, n]` float32, the entries of the headers up to the last one that is used; n is 0 for a linear
            state.
        parts: the buckets, by their bits.
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
        return self.headers.nbytes + sum(part.nbytes for part in self.parts)

    def restore(self) -> Tensor:
        """The state, float32: what follows from it differs from what follows from the original by `error`."""
        batch, heads, *_, key_dim, value_dim = self.shape
        levels = self.shape[2] - 1 if len(self.shape) == 5 else 1
        states = self.headers.new_zeros(batch, heads, levels, key_dim, value_dim)
        for part in self.parts:
            part.put(states)
        if len(self.shape) == 4:
            return states[:, :, 0]
        header = torch.nn.functional.pad(self.headers, (0, key_dim * value_dim - self.headers.shape[2]))
        return torch.cat([header.unflatten(2, (key_dim, value_dim))[:, :, None], states], 2)

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
    position: at most `log2 T`, half as many on average, and one where T is a power of two. For each head, each is kept
    in integers of 2 to 16 bits with a scale for each channel of the key, or in float32, or, where it is small enough,
    not at all: in as few bits as `tolerance` allows to all of them together.

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
    levels = _merged(state.detach())  # [B, H, L, K, V]
    headers = state.new_zeros(*state.shape[:2], 0, dtype=torch.float32)
    if _state.is_level_state(state):
        entries = state.detach()[:, :, 0].flatten(2).float()
        used = entries.flatten(0, 1).ne(0).any(0).nonzero()
        headers = entries[:, :, : max(DIGITS, int(used.max()) + 1 if used.numel() else 0)].clone()
    places = levels.flatten(3).ne(0).any(3).flatten().nonzero()[:, 0]  # [N]
    held = levels.flatten(0, 2)[places]  # [N, K, V]
    scales, rows = few_bits.scales_of(held)
    bits = _bits(held, few_bits.row_scales(scales, rows), places // levels.shape[2], tolerance)
    parts = []
    for form in _FORMS[1:]:
        here = bits == form
        if bool(here.any()):
            parts.append(_part(places[here], held[here], scales[here], rows[here], form))
    return _measured(CompactState(tuple(state.shape), headers, tuple(parts), 0.0, headers.new_zeros(0)), levels)


def _part(places: Tensor, held: Tensor, scales: Tensor, rows: Tensor, bits: int) -> Part:
    places = places.to(torch.int32)
    if bits == _WHOLE:
        return Part(places, held, scales[:0], rows[:0], bits)
    integers = few_bits.rounded(held, few_bits.row_scales(scales, rows), bits)
    return Part(places, few_bits.pack(integers, bits), scales, rows, bits)


def _bits(held: Tensor, rows: Tensor, head: Tensor, tolerance: float) -> Tensor:
    """How many bits `[N]` each bucket `held [N, K, V]` of a row's head `head [N]` is kept in.

    The same loss is allowed to all buckets of a head, the largest with which they stay within the tolerance together:
    for numbers that are spread alike this takes the fewest bits, and a small bucket takes fewer than a large one.
    """
    lost = torch.stack([_norm(_in_form(held, rows, form) - held, (1, 2)).square() for form in _FORMS], 1)  # [N, F]
    heads = int(head.max()) + 1 if len(head) else 0

    def of_heads(x: Tensor) -> Tensor:
        return x.new_zeros(heads).index_add_(0, head, x)

    # Of what restoring rounds once more, a little is left.
    bound = (tolerance * (1 - 1e-6)) ** 2 * of_heads(_norm(held, (1, 2)).square())  # [heads]
    least, most = bound / of_heads(torch.ones_like(lost[:, 0])).clamp(min=1), bound  # of the loss allowed to each
    for _ in range(_HALVINGS):
        middle = (least * most).sqrt()
        fits = of_heads(_loss(lost, _cheapest(lost, middle[head]))) <= bound
        least, most = torch.where(fits, middle, least), torch.where(fits, most, middle)
    return torch.tensor(_FORMS, device=held.device)[_cheapest(lost, least[head])]


def _cheapest(lost: Tensor, allowed: Tensor) -> Tensor:
    """The first form with which no more is lost; the last one loses nothing."""
    return (lost <= allowed[:, None]).to(torch.uint8).argmax(1)


def _loss(lost: Tensor, form: Tensor) -> Tensor:
    return lost.gather(1, form[:, None])[:, 0]


def _in_form(x: Tensor, rows: Tensor, bits: int) -> Tensor:
    """What is left of numbers `[N, K, V]` in so many bits; of a bucket of 0 bits nothing."""
    if bits in (0, _WHOLE):
        return x * (bits > 0)
    return few_bits.restored(few_bits.rounded(x, rows, bits), rows, bits)


def _check(state: Tensor) -> None:
    _state.check_kind(state)
    if state.dtype == torch.float64:
        raise StateError(f"state {list(state.shape)} is float64, and a compact one is float32; pass state.float()")
    _state.check_positions(state, 0, "state")
    if not bool(state.isfinite().all()):
        raise StateError(f"state {list(state.shape)} is not finite, so that no error can be kept; do not store it")


def _merged(state: Tensor) -> Tensor:
    """The levels `[B, H, L, K, V]` with those merged that the next token would merge; float32."""
    if not _state.is_level_state(state):
        return state.float()[:, :, None]
    levels, position = _state.unpack_state(state.float())
    return _state.merge(levels, position)


def _measured(compact: CompactState, levels: Tensor) -> CompactState:
    """With the error of what it restores against `levels [B, H, L, K, V]`."""
    found, norms = compact.restore(), _norm(levels, (2, 3, 4))
    ours = found[:, :, 1:] if found.dim() == 5 else found[:, :, None]
    lost = _norm(ours - levels, (3, 4)) / norms.clamp(min=torch.finfo(torch.float64).tiny)[:, :, None]  # [B, H, L]
    error = float(_norm(lost, (2,)).max()) if lost.numel() else 0.0
    errors = lost.amax(1).float() if lost.numel() else lost.new_zeros(lost.shape[::2], dtype=torch.float32)
    return CompactState(compact.shape, compact.headers, compact.parts, error, errors)


def _norm(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """In float64: squares of float32 numbers may be too large or too small for float32."""
    return torch.linalg.vector_norm(x, dim=axes, dtype=torch.float64)
