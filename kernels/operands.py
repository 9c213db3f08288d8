"""The operands of a call, and what they must look like: checks whose messages name the operand and the cure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llcompile.errors import OperandError

# What PyTorch computes in. Other floating dtypes (float8 and below) are for storage.
COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What has values that may be looked at; other kinds of tensors stand for one while something is traced.
PLAIN: set[type[Tensor]] = {Tensor, torch.nn.Parameter}


class Operands(NamedTuple):
    """The tensors of one call, shapes as in the public function.

    With `starts`, sequences lie one after another in a batch of one: each has `lengths` tokens from `starts` on.
    The ATen lowering moves them to rows first.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    level_weights: Tensor | None
    log_decay: Tensor | None = None
    decay_rate: Tensor | None = None
    beta: Tensor | None = None
    erase_query: Tensor | None = None
    erase_key: Tensor | None = None
    initial_state: Tensor | None = None
    lengths: Tensor | None = None
    starts: Tensor | None = None

    def map_tokens(self, f: Callable[[Tensor], Tensor]) -> Operands:
        """With `f` applied to each operand that has tokens `[B, T, ...]`; decays `[H]` and rates have none."""
        mapped = (t if t is None or t.dim() < 3 else f(t) for t in self[:WITH_TOKENS])
        return Operands(*mapped, *self[WITH_TOKENS:])  # type: ignore[arg-type]

    @property
    def rows(self) -> int:
        """How many sequences there are."""
        return self.v.shape[0] if self.starts is None else self.starts.shape[0]

    def with_weights_per_head(self) -> Operands:
        """With level weights `[B, T, H, L]` where heads share some."""
        return self._replace(level_weights=weights_per_head(self.level_weights, self.v))


# The operands that have gradients come first in `Operands`, and among them those that may have tokens.
DIFFERENTIABLE = Operands._fields.index("initial_state") + 1
WITH_TOKENS = DIFFERENTIABLE - 1


class Token(NamedTuple):
    """What a step takes: one token of each row, and the state before it.

    `q`, `k`, `erase_query`, `erase_key` are `[B, G, K]`, `v` `[B, H, V]`, `level_weights` `[B, W, L]` or None,
    `log_decay` `[B, H]`, `[B, H, K]` or `[H]`, `decay_rate` `[H, K]`, `beta` `[B, H]`. The state is as `state` has it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    level_weights: Tensor | None
    state: Tensor
    log_decay: Tensor | None = None
    decay_rate: Tensor | None = None
    beta: Tensor | None = None
    erase_query: Tensor | None = None
    erase_key: Tensor | None = None
    scale: float = 1.0


def weights_per_head(w: Tensor | None, v: Tensor) -> Tensor | None:
    """Level weights `[..., W, L]` as `[..., H, L]`, for values `[..., H, V]`."""
    heads = v.shape[-2]
    return w if w is None or w.shape[-2] == heads else w.repeat_interleave(heads // w.shape[-2], -2)


def check_sequence(x: Operands, scale: float) -> None:
    """Check the operands of a sequence; raises `OperandError`."""
    _check(x, scale, "BT")


def check_token(x: Token) -> None:
    """Check the operands of one decoded token; raises `OperandError`."""
    _check(x, x.scale, "B")


def _check(x: Operands | Token, scale: float, lead: str) -> None:
    tensors = {name: getattr(x, name) for name in _CHECKED}
    _check_types(**tensors)
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise OperandError(f"scale must be a plain number, got {type(scale).__name__}; multiply q by a tensor instead")
    q, k, v = x.q, x.k, x.v
    _check_rank("q", q, f"{lead}GK")
    _check_rank("k", k, f"{lead}GK")
    _check_rank("v", v, f"{lead}HV")
    if q.shape != k.shape:
        raise OperandError(f"q has shape {list(q.shape)} and k {list(k.shape)}; both must be {_axes(f'{lead}GK')}")
    if q.shape[:-2] != v.shape[:-2]:
        raise OperandError(
            f"v has shape {list(v.shape)}, whose {_axes(lead)} differ from those of q, {list(q.shape)}; "
            "all operands share batch and length"
        )
    groups, heads = q.shape[-2], v.shape[-2]
    if groups == 0 or heads % groups:
        raise OperandError(
            f"v has {heads} heads and q, k have {groups} groups; the number of heads must be a multiple of the groups "
            f"(v {list(v.shape)}, q {list(q.shape)})"
        )
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise OperandError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them to one")
    per_head = tuple(v.shape[:-1])
    _check_per_head("beta", x.beta, per_head, lead)
    _check_level_weights(x.level_weights, per_head, lead)
    _check_log_decay(x.log_decay, per_head, q.shape[-1], lead)
    _check_decay_rate(x, lead)
    _check_erase(x, lead)
    check_device(v, **{name: t for name, t in tensors.items() if name != "v"})


_CHECKED = ("q", "k", "v", "level_weights", "log_decay", "decay_rate", "beta", "erase_query", "erase_key")


def check_device(v: Tensor, **operands: Tensor | None) -> None:
    """All operands on the device of `v`."""
    for name, x in operands.items():
        if x is not None and x.device != v.device:
            raise OperandError(f"{name} is on {x.device} and v on {v.device}; move it with .to({str(v.device)!r})")


def check_bounds(cu_seqlens: Tensor, v: Tensor) -> None:
    """`cu_seqlens [N + 1]` of a packed batch of one row."""
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype.is_floating_point or cu_seqlens.shape[0] < 1:
        raise OperandError(
            f"cu_seqlens has shape {list(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; expected [N + 1] integers, "
            "0 first, then the end of each sequence"
        )
    if v.shape[0] != 1:
        raise OperandError(f"cu_seqlens needs sequences packed in a batch of one, but v has shape {list(v.shape)}")
    check_device(v, cu_seqlens=cu_seqlens)
    if can_look(cu_seqlens):
        _check_bounds(cu_seqlens.tolist(), v.shape[1])


def _check_bounds(bounds: list[int], tokens: int) -> None:
    wrong = ""
    if bounds[0] != 0:
        wrong = f"starts at {bounds[0]}, not at 0"
    elif bounds[-1] != tokens:
        wrong = f"ends at {bounds[-1]}, not at T={tokens}"
    elif sorted(bounds) != bounds:
        at = next(i for i, (a, b) in enumerate(itertools.pairwise(bounds)) if b < a)
        wrong = f"decreases from {bounds[at]} to {bounds[at + 1]} (entries {at} and {at + 1})"
    if wrong:
        raise OperandError(
            f"cu_seqlens {wrong}: it must rise from 0 to T={tokens}, 0 first, then the end of each sequence; "
            f"got {_short(bounds)}"
        )


def check_indices(seq_idx: Tensor, v: Tensor) -> None:
    """`seq_idx [B, T]`, the sequence that each token belongs to; the tokens of one sequence are neighbours."""
    if tuple(seq_idx.shape) != tuple(v.shape[:2]) or seq_idx.dtype.is_floating_point:
        raise OperandError(
            f"seq_idx has shape {list(seq_idx.shape)} and dtype {seq_idx.dtype}; expected integers "
            f"[B, T] = {list(v.shape[:2])}, the sequence that each token belongs to"
        )
    check_device(v, seq_idx=seq_idx)
    if can_look(seq_idx):
        for row, indices in enumerate(seq_idx.tolist()):
            runs = [index for index, _ in itertools.groupby(indices)]
            if len(set(runs)) != len(runs):
                again = next(index for index in runs if runs.count(index) > 1)
                raise OperandError(
                    f"seq_idx comes back to sequence {again} in row {row} after another one; got {_short(indices)}. "
                    "The tokens of a sequence must be contiguous"
                )


def check_mask(mask: Tensor, v: Tensor) -> None:
    """`attention_mask [B, T]`, real tokens contiguous in each row."""
    if tuple(mask.shape) != tuple(v.shape[:2]):
        raise OperandError(
            f"attention_mask has shape {list(mask.shape)}; expected [B, T] = {list(v.shape[:2])}, 1 at real tokens"
        )
    check_device(v, attention_mask=mask)
    if torch.compiler.is_compiling() or not mask.shape[1]:
        return
    real = (mask != 0).to(torch.int8)
    starts = (real[:, 1:] > real[:, :-1]).sum(1) + real[:, 0]
    if mask.device.type == "cuda":
        torch._assert_async((starts <= 1).all(), "attention_mask has a hole: pad on the left or on the right only")
    if can_look(mask) and bool((starts > 1).any()):
        row = int((starts > 1).nonzero()[0])
        raise OperandError(
            f"attention_mask has a hole in row {row}: it is {_short(mask[row].to(torch.int64).tolist())}, and real "
            "tokens must be contiguous in it (pad on the left or on the right only)"
        )


def can_look(x: Tensor) -> bool:
    """Whether values may be read here: not while tracing, and not where it would wait for a device."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and type(x) in PLAIN


def _check_types(**operands: Tensor | None) -> None:
    for name, x in operands.items():
        if x is None and name not in ("q", "k", "v"):
            continue
        if isinstance(x, Tensor) and x.dtype in COMPUTE_DTYPES:
            continue
        if not isinstance(x, Tensor):
            raise OperandError(f"{name} must be a tensor, got {type(x).__name__}")
        if not x.dtype.is_floating_point:
            raise OperandError(f"{name} has dtype {x.dtype}; expected a floating one, cast it with .float()")
        raise OperandError(
            f"{name} has dtype {x.dtype}, which is for storage only; cast it with .to(torch.bfloat16) or .float()"
        )


def _check_rank(name: str, x: Tensor, axes: str) -> None:
    if x.dim() != len(axes):
        raise OperandError(f"{name} has shape {list(x.shape)} ({x.dim()} axes); expected {_axes(axes)}")


def _check_per_head(name: str, x: Tensor | None, want: tuple[int, ...], lead: str) -> None:
    if x is not None and tuple(x.shape) != want:
        raise OperandError(f"{name} has shape {list(x.shape)}; expected {_axes(lead + 'H')} = {list(want)}")


def _check_level_weights(w: Tensor | None, want: tuple[int, ...], lead: str) -> None:
    if w is None:
        return
    fits = w.dim() == len(want) + 1 and tuple(w.shape[:-2]) == want[:-1] and w.shape[-1] and w.shape[-2]
    if not fits or want[-1] % w.shape[-2]:
        raise OperandError(
            f"level_weights has shape {list(w.shape)}; expected {_axes(lead + 'HL')} = {[*want, 'L']} with L >= 1 "
            "(None stands for weights of 1), or fewer heads W that divide H"
        )


def _check_log_decay(x: Tensor | None, want: tuple[int, ...], key_dim: int, lead: str) -> None:
    if x is None:
        return
    shapes: Sequence[tuple[int, ...]] = (want, (*want, key_dim), want[-1:])
    if tuple(x.shape) not in shapes:
        raise OperandError(
            f"log_decay has shape {list(x.shape)}; expected {_axes(lead + 'H')} = {list(want)}, "
            f"{_axes(lead + 'HK')} = {[*want, key_dim]} or [H] = {[want[-1]]}"
        )
    if torch.compiler.is_compiling() or type(x) not in PLAIN or not x.numel():
        return
    if can_look(x):
        largest = float(x.detach().amax())
        if largest > 0:
            raise OperandError(
                f"log_decay must be at most 0, its largest value is {largest:.4g}; it is the logarithm of a factor in "
                "[0, 1] (pass decay.log() if you hold the factor, -log_decay if you hold a rate)"
            )
    elif x.device.type == "cuda":
        # 0 to the power of the largest: 0 only if that is above 0, and not if it is NaN. Fewer launches than comparing.
        most = (x.detach() if x.requires_grad else x).amax()
        torch._assert_async(torch.pow(0.0, most), "log_decay must be at most 0")


def _check_decay_rate(x: Operands | Token, lead: str) -> None:
    rate, g = x.decay_rate, x.log_decay
    if rate is None:
        return
    want = (x.v.shape[-2], x.q.shape[-1])
    if tuple(rate.shape) != want:
        raise OperandError(f"decay_rate has shape {list(rate.shape)}; expected [H, K] = {list(want)}")
    if g is None or tuple(g.shape) not in (tuple(x.v.shape[:-1]), want[:1]):
        given = "absent" if g is None else f"of shape {list(g.shape)}"
        raise OperandError(
            f"decay_rate multiplies a log_decay per head, {_axes(lead + 'H')} = {list(x.v.shape[:-1])} or [H], but "
            f"log_decay is {given}; give a decay per channel as log_decay alone"
        )
    if can_look(rate) and rate.numel() and float(rate.detach().amin()) < 0:
        raise OperandError(
            f"decay_rate must be at least 0, its smallest value is {float(rate.detach().amin()):.4g}; log_decay "
            "has the sign (Mamba-1 holds A = -exp(A_log) and a step of at least 0: pass -step and exp(A_log))"
        )


def _check_erase(x: Operands | Token, lead: str) -> None:
    pair = {"erase_query": x.erase_query, "erase_key": x.erase_key}
    if all(t is None for t in pair.values()):
        return
    for name, t in pair.items():
        if t is None:
            other = next(n for n in pair if n != name)
            raise OperandError(f"{other} is given and {name} is not; an erase key needs both")
        if t.shape != x.q.shape or t.dtype != x.q.dtype:
            raise OperandError(
                f"{name} has shape {list(t.shape)} and dtype {t.dtype}; expected those of q, {_axes(lead + 'GK')} = "
                f"{list(x.q.shape)} and {x.q.dtype}"
            )


def _axes(axes: str) -> str:
    return f"[{', '.join(axes)}]"


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"{values[:6]} ... {values[-3:]}"
