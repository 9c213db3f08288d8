"""A state that can be rolled back: the last tokens' operands in a small ring, the state itself written once a chunk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llcompile.errors import DerivativeError, OperandError, StateError
from llcompile.kernels import operands as _operands
from llcompile.kernels.header import DIGITS
from llcompile.kernels.operands import Operands
from llcompile.kernels.replay import Base, first_base, next_base
from llcompile.kernels.state import check_kind, check_state, in_levels, is_level_state, state_dtype
from llcompile.torch_internals.sources import source_tag

_REVISION = source_tag()


class _Ring(NamedTuple):
    """What later tokens need of earlier ones: `[B, 2, C, ...]` each, a half for each of two neighbouring chunks."""

    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    erase_query: Tensor | None
    erase_key: Tensor | None

    def map(self, f: Callable[[Tensor], Tensor]) -> _Ring:
        return _Ring(*(None if t is None else f(t) for t in self))  # type: ignore[arg-type]


class ReplayState:
    """The state of one mixer, with the operands of the last tokens beside it, so that tokens can be taken back.

    The state proper is written once every `chunk` tokens. What came since lies in a ring, and is replayed when a token
    is read: `step` reads the state and does not write it, and `rollback` moves a pointer. With the same tokens
    absorbed, the tensors are the same bit for bit, however many tokens were absorbed in one call, and whatever was
    rolled back in between.

    For inference: `step` has no gradient. A ring holds `2 * chunk` tokens; `nbytes` says what all of it takes.
    """

    def __init__(self, state: Tensor, window: int = 8, chunk: int = 64) -> None:
        """Start from a state.

        Args:
            state: `[B, H, K, V]` or `[B, H, 1 + L, K, V]`, as the operators return it; zeros are an empty state. It is
                copied.
            window: how many tokens of one call can always be rolled back. For `window` tokens after each chunk the
                state of the chunk before is kept, too.
            chunk: after how many tokens the state is written; at least `window`.

        Raises:
            OperandError: `window` and `chunk` do not fit together.
            StateError: `state` is not a state, or keeps key sums of level readouts, which cannot be rolled back here.
        """
        if not 0 <= window <= chunk or chunk < 1:
            raise OperandError(f"window is {window} and chunk {chunk}; expected 0 <= window <= chunk and chunk >= 1")
        check_kind(state)
        if _keeps_readouts(state):
            raise StateError(
                f"state {list(state.shape)} keeps key sums of level readouts in its header, which a ReplayState cannot "
                "roll back; decode with loglinear_attention_step and level_readouts_step"
            )
        self.window, self.chunk = window, chunk
        self._base = Base(state.detach().clone())
        self._previous: Base | None = None  # of the chunk before
        self._ring: _Ring | None = None
        self._rate: Tensor | None = None
        self._kinds: dict[str, tuple[tuple[int, ...], torch.dtype] | None] = {}  # of the first call's operands
        self._half = 0  # of the ring: the chunk that is being filled
        self._count = 0  # tokens in it
        self._chunks = 0  # that have been folded into the base
        self._first = chunk  # tokens of the first one: others begin at multiples of their length, where few levels are

    @property
    def absorbed(self) -> int:
        """How many tokens have been absorbed since the state was given."""
        return sum(map(self._length, range(self._chunks))) + self._count

    @property
    def depth(self) -> int:
        """How many tokens can be rolled back now."""
        return self._count + (0 if self._previous is None else self._length(self._chunks - 1))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are held."""
        held = [*self._base, *(self._previous or ()), *(self._ring or ())]
        return sum(t.nbytes for t in held if isinstance(t, Tensor))

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        level_weights: Tensor | None,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
        scale: float = 1.0,
        *,
        decay_rate: Tensor | None = None,
        erase_query: Tensor | None = None,
        erase_key: Tensor | None = None,
    ) -> Tensor:
        """Absorb T tokens, one or several drafts, and read each of them out.

        Args:
            q, k, v, level_weights, log_decay, beta, scale, erase_query, erase_key: as for `loglinear_attention`, with
                the axis T. Every call must give the same ones, with the same sizes and dtypes.
            decay_rate: `[H, K]`, the same tensor in every call.

        Returns:
            `o [B, T, H, V]` in the dtype of `v`.

        Raises:
            OperandError: an operand is wrong, or differs in kind from those of the call before.
            StateError: the state belongs to an operator of another size, or counts no further.
            DerivativeError: an operand requires a gradient.
        """
        x = Operands(q, k, v, level_weights, log_decay, decay_rate, beta, erase_query, erase_key)
        _operands.check_sequence(x, scale)
        _refuse_gradients(x)
        if log_decay is not None and log_decay.dim() == 1:
            x = x._replace(log_decay=log_decay.expand(v.shape[:-1]))
        self._fit(x)
        parts: list[Tensor] = []
        start = 0
        while start < v.shape[1] or not parts:
            stop = min(start + self._length(self._chunks) - self._count, v.shape[1])
            parts.append(self._absorb(x.map_tokens(lambda t: t[:, start:stop]), float(scale)))  # noqa: B023
            start = stop
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def rollback(self, k: int) -> None:
        """Take the last `k` tokens back: what follows is bit for bit what it would be without them.

        Raises:
            StateError: more than `depth` tokens.
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= self.depth:
            raise StateError(
                f"cannot roll back {k} tokens: {self.depth} of the {self.absorbed} absorbed tokens are in the ring "
                f"(window={self.window}, chunk={self.chunk}); roll back fewer, use a larger window, or keep a fork()"
            )
        if k > self._count:
            assert self._previous is not None
            self._base, self._previous = self._previous, None
            self._half, self._chunks = 1 - self._half, self._chunks - 1
            self._count += self._length(self._chunks)
        self._count -= k

    def state(self) -> Tensor:
        """The state with all tokens in it, as the operators take it; a new tensor.

        From the first call on, and after each whole chunk, those levels are merged in it that the next token sees as
        one, which changes nothing then.
        """
        return self._folded(self._count, merged=False) if self._count else self._base.state.clone()

    def fork(self) -> ReplayState:
        """A copy that goes its own way. The state is shared, since it is never written to; the ring is copied."""
        other = copy.copy(self)
        if self._ring is not None:
            other._ring = self._ring.map(Tensor.clone)
        return other

    # -- inside ----------------------------------------------------------------------------------------------------

    def _fit(self, x: Operands) -> None:
        """Make the ring at the first call; compare the operands of later ones with it."""
        kinds = {name: _kind(t) for name, t in zip(Operands._fields[1:], x[1:], strict=True)}
        if self._ring is None:
            levels = None if x.level_weights is None else x.level_weights.shape[-1]
            state = self._base.state
            check_state(state, x.v.shape[0], x.v.shape[2], x.q.shape[3], x.v.shape[3], levels, "state")
            _operands.check_device(x.v, state=state)
            self._base = first_base(in_levels(state.to(state_dtype(x.v.dtype)), levels).contiguous())
            self._first = self.chunk - (self._base.positions[0] % self.chunk if self._base.positions else 0)
            room = (x.v.shape[0], 2, self.chunk)
            self._ring = _of_ring(x).map(lambda t: t.new_empty(*room, *t.shape[2:]))
            self._kinds, self._rate = kinds, x.decay_rate
        for name, kind in kinds.items():
            if kind != self._kinds[name]:
                raise OperandError(
                    f"{name} is {_said(kind)} in this call and was {_said(self._kinds[name])} before; a ReplayState "
                    "holds the tokens of one mixer: give the same operands in each call, or make a new one from state()"
                )
        if self._rate is not x.decay_rate and _operands.can_look(x.v) and not torch.equal(self._rate, x.decay_rate):  # type: ignore[arg-type]
            raise OperandError(
                f"decay_rate {list(x.decay_rate.shape)} differs from that of the calls before, by which the tokens in "  # type: ignore[union-attr]
                "the ring decay; make a new ReplayState from state()"
            )

    def _absorb(self, x: Operands, scale: float) -> Tensor:
        """Absorb tokens that fit into the chunk, and read them out."""
        assert self._ring is not None
        first, tokens = self._count, x.v.shape[1]
        for buffer, given in zip(self._ring, _of_ring(x), strict=True):
            if buffer is not None and given is not None:
                buffer[:, self._half, first : first + tokens].copy_(given)
        o, count = self._read(x, scale), self._count + tokens
        if count == self._length(self._chunks):
            after = next_base(self._base, self._folded(count, merged=True), count)
            self._previous, self._base = self._base, after
            self._half, self._chunks, count = 1 - self._half, self._chunks + 1, 0
        self._count = count
        if self._count >= self.window:
            self._previous = None
        return o

    def _read(self, x: Operands, scale: float) -> Tensor:
        """What the tokens of `x`, which lie in the ring already, read of the state and of the ring."""
        ring = self._tokens(self._count + x.v.shape[1])
        with torch.no_grad():
            o = torch.ops.llcompile.loglinear_attention_replay.default(
                *self._operands(x.q, x.level_weights, ring),
                self._base.state,
                self._base.occupied,
                scale,
                revision=_REVISION,
            )
        assert isinstance(o, Tensor)
        return o

    def _folded(self, tokens: int, merged: bool) -> Tensor:
        """The state after the first `tokens` of the ring's half; `merged`: with the levels that the next token sees."""
        ring = self._tokens(tokens)
        decay, beta, erase_query, erase_key = ring[2:]
        with torch.no_grad():
            state = torch.ops.llcompile.loglinear_attention_fold.default(
                *(ring.k, ring.v, decay, self._rate, beta, erase_query, erase_key),
                *(self._base.state, self._base.occupied, merged),
                revision=_REVISION,
            )
        assert isinstance(state, Tensor)
        return state

    def _length(self, chunk: int) -> int:
        """Tokens of a chunk, by its number."""
        return self.chunk if chunk else self._first

    def _tokens(self, count: int) -> _Ring:
        """The first tokens of the ring's half."""
        assert self._ring is not None
        return self._ring.map(lambda t: t[:, self._half, :count])

    def _operands(self, q: Tensor, level_weights: Tensor | None, ring: _Ring) -> tuple[Tensor | None, ...]:
        decay, beta, erase_query, erase_key = ring[2:]
        return q, ring.k, ring.v, level_weights, decay, self._rate, beta, erase_query, erase_key


def _of_ring(x: Operands) -> _Ring:
    return _Ring(x.k, x.v, x.log_decay, x.beta, x.erase_query, x.erase_key)


def _kind(x: Tensor | None) -> tuple[tuple[int, ...], torch.dtype] | None:
    """What must be the same in every call, of an operand `[B, T, ...]` or of a rate `[H, K]`."""
    return None if x is None else ((*x.shape[:1], *x.shape[2 if x.dim() > 2 else 1 :]), x.dtype)


def _said(kind: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "absent" if kind is None else f"{list(kind[0])} without T, {kind[1]}"


def _keeps_readouts(state: Tensor) -> bool:
    return is_level_state(state) and bool(state[:, :, 0].flatten(2)[:, :, DIGITS:].any())


def _refuse_gradients(x: Operands) -> None:
    if not torch.is_grad_enabled():
        return
    for name, t in zip(Operands._fields, x, strict=True):
        if t is not None and t.requires_grad:
            raise DerivativeError(
                f"{name} {list(t.shape)} requires a gradient, and a ReplayState has none; decode under "
                "torch.no_grad(), or train with loglinear_attention"
            )
