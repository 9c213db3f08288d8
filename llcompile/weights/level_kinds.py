"""The kinds of level weights: one pure function and one row of tensors each.

A kind is a function `w = f(x, *tensors)` made of plain torch calls, without a branch on data or shapes, so that the
same definition runs eagerly, under Inductor, and on `fx.Proxy` objects when a pass writes it into a graph.

Every function is exactly 1.0 at its starting tensors, bit for bit, whoever compiles it. That is why none of them is
written as `softplus(z) / softplus(0)`: compilers evaluate softplus differently (log1p of exp, a vector library, a
folded constant), and two values of softplus(0) that differ by one bit already make 0.99999994. `elu`, `expm1`
and `log1p` are 0 at 0 in every implementation, and 1 + 0 is 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import llcompile.kernels.readout_operators  # noqa: F401  (registers torch.ops.llcompile)
from llcompile.errors import LevelWeightsError

HIDDEN = 64  # width of a hidden layer where none is given

LevelFunction = Callable[..., Tensor]
# (query [B, T, W, R], key [B, T, W, R], levels L) -> [B, T, W, L]: each query times the sum of the keys in each bucket.
Readouts = Callable[[Tensor, Tensor, int], Tensor]


class Sizes(NamedTuple):
    """The numbers that fix every shape of a kind; 0 where a kind has no use for one."""

    heads: int
    levels: int
    in_features: int = 0
    hidden: int = 0
    features: int = 0

    @property
    def outputs(self) -> int:
        """How many weights one position has: heads * levels."""
        return self.heads * self.levels


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a kind: its shape, and the value it starts from (None: random, as in `nn.Linear`).

    Its first axis goes over heads, each with all of its rows, if it is one `by_heads`.
    """

    name: str
    shape: Callable[[Sizes], tuple[int, ...]]
    start: float | Callable[[Sizes], Sequence[float]] | None = 0.0
    learned: bool = True
    by_heads: bool = True


@dataclass(frozen=True)
class LevelKind:
    """One row of the table of kinds.

    `function(x, *tensors, sizes=, dtype=)` returns w [B, T, H, L], and takes `readouts=` where it `reads_buckets`;
    `is_one(*tensors, sizes=)` returns a boolean 0-d tensor, true only where those tensors make w exactly 1 for every
    finite x. `code` stands in checkpoints, so it never changes its meaning.
    """

    name: str
    code: int
    needs_input: bool
    tensors: tuple[TensorRow, ...]
    function: LevelFunction
    is_one: Callable[..., Tensor]
    needs_hidden: bool = False
    reads_buckets: bool = False


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which level weights are computed for operands of these dtypes: float32, or float64 if one is.

    Not torch's promotion, which knows none of the float8 dtypes that weights are stored in.
    """
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _project(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    # The last cast is for autocast, which hands linear's result back in its own low dtype.
    return F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)).to(dtype)


def _positive(z: Tensor) -> Tensor:
    """1 + elu(z): positive, 1 at z = 0 with slope 1 there, and straight above 0 so that large weights stay cheap.

    Comes last: where the result is a view, Inductor of torch 2.13 cannot keep it for a backward pass at any length
    ("cannot determine truth value of Relational").
    """
    return 1.0 + F.elu(z)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, *, sizes: Sizes, dtype: torch.dtype) -> Tensor:
    z = _project(x, weight, bias, dtype)
    return _positive(z.unflatten(-1, (sizes.heads, sizes.levels)))


def _static(x: Tensor, logits: Tensor, *, sizes: Sizes, dtype: torch.dtype) -> Tensor:
    # x only lends its first two sizes. size() and not shape: it is what Dynamo writes for a dynamic size, too.
    return _positive(logits.to(dtype)).expand(x.size(0), x.size(1), -1, -1)


def _mlp(
    x: Tensor, weight_in: Tensor, bias_in: Tensor, weight: Tensor, bias: Tensor, *, sizes: Sizes, dtype: torch.dtype
) -> Tensor:
    hidden = F.silu(_project(x, weight_in, bias_in, dtype))
    z = _project(hidden, weight, bias, dtype)
    return _positive(z.unflatten(-1, (sizes.heads, sizes.levels)))


def _softplus_above_ln2(z: Tensor) -> Tensor:
    """softplus(z) - ln 2, exactly 0 with slope 1/2 at z = 0, for any z."""
    half = 0.5 * z
    size = half.abs()
    # half + size is relu(z), but with the slope 1/2 at 0 that softplus has there.
    return (half + size) + torch.log1p(0.5 * torch.expm1(-2.0 * size))


def _paper(
    x: Tensor, weight: Tensor, bias: Tensor, level_scale: Tensor, gain: Tensor, *, sizes: Sizes, dtype: torch.dtype
) -> Tensor:
    projected = _project(x, weight, bias, dtype).unflatten(-1, (sizes.heads, sizes.levels))
    z = level_scale.to(dtype) * projected
    return gain.to(dtype) * (1.0 + _softplus_above_ln2(z) * (1.0 / math.log(2.0)))


def paper_gain(key_dim: int | None = None) -> float:
    """The `gain` that makes kind "paper" compute softplus(z) (None), or softplus(z) / scale with scale = K^-1/2.

    The official gated delta code scales q before it normalises q, so its scale has no effect and its weights are
    those of an operator with scale 1; ours keeps the mixer's own scale, hence the division.
    """
    return math.log(2.0) * (1.0 if key_dim is None else math.sqrt(key_dim))


def whole_rows(query: Tensor, key: Tensor, levels: int) -> Tensor:
    """The readouts of rows that start at position 0 and have no padding."""
    return torch.ops.llcompile.level_readouts(query, key, levels, None, None, None, None, False)[0]  # type: ignore[no-any-return]


# Of a routing feature: products of two, summed over all tokens there can be, stay finite, and so 0 times them is 0.
_LARGEST = 1e12


def _routed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    query: Tensor,
    key: Tensor,
    gain: Tensor,
    damping: Tensor,
    *,
    sizes: Sizes,
    dtype: torch.dtype,
    readouts: Readouts,
) -> Tensor:
    by_set = (sizes.heads, -1)
    # Never negative, so that a bucket's sum only grows by what it holds (a count, as in a sketch).
    asked, held = (F.linear(x.to(dtype), t.to(dtype)).to(dtype).clamp(0.0, _LARGEST) for t in (query, key))
    asked, held = asked.unflatten(-1, by_set), held.unflatten(-1, by_set)
    scores = readouts(asked, held, sizes.levels)
    z = _project(x, weight, bias, dtype).unflatten(-1, by_set)
    return _positive(z + gain.to(dtype) * damping.to(dtype) * scores)


def _routed_damping(sizes: Sizes) -> list[float]:
    """What the scores of each level are multiplied by: 1 / sqrt(R), as in attention."""
    return [sizes.features**-0.5] * sizes.levels


def _all_zero(*tensors: Tensor) -> Tensor:
    return ~torch.stack([tensor.any() for tensor in tensors]).any()


def _linear_is_one(weight: Tensor, bias: Tensor, *, sizes: Sizes) -> Tensor:
    return _all_zero(weight, bias)


def _static_is_one(logits: Tensor, *, sizes: Sizes) -> Tensor:
    return _all_zero(logits)


def _mlp_is_one(weight_in: Tensor, bias_in: Tensor, weight: Tensor, bias: Tensor, *, sizes: Sizes) -> Tensor:
    return _all_zero(weight, bias)


def _paper_is_one(weight: Tensor, bias: Tensor, level_scale: Tensor, gain: Tensor, *, sizes: Sizes) -> Tensor:
    # A level is silent when its scale is 0, or when nothing is projected into it. NaN is neither.
    projected = (weight != 0).any(-1) | (bias != 0)
    silent = (~projected | (level_scale.flatten() == 0)).all() & torch.isfinite(level_scale).all()
    return silent & (gain == 1)


def _routed_is_one(
    weight: Tensor, bias: Tensor, query: Tensor, key: Tensor, gain: Tensor, damping: Tensor, *, sizes: Sizes
) -> Tensor:
    # A product of the three is 0 where one of them is, unless another is not finite.
    factors = (query, key, gain, damping)
    silent = ~torch.stack([factor.any() for factor in factors]).all()
    finite = torch.stack([torch.isfinite(factor).all() for factor in factors]).all()
    return _all_zero(weight, bias) & silent & finite


def _outputs_by_inputs(sizes: Sizes) -> tuple[int, ...]:
    return sizes.outputs, sizes.in_features


def _outputs(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.outputs,)


def _features_by_inputs(sizes: Sizes) -> tuple[int, ...]:
    return sizes.heads * sizes.features, sizes.in_features


def _heads_by_levels(sizes: Sizes) -> tuple[int, ...]:
    return sizes.heads, sizes.levels


_WEIGHT = TensorRow("weight", _outputs_by_inputs)
_BIAS = TensorRow("bias", _outputs)

KINDS: dict[str, LevelKind] = {
    kind.name: kind
    for kind in (
        LevelKind("linear", 1, True, (_WEIGHT, _BIAS), _linear, _linear_is_one),
        LevelKind("static", 2, False, (TensorRow("logits", _heads_by_levels),), _static, _static_is_one),
        LevelKind(
            "mlp",
            3,
            True,
            (
                TensorRow("weight_in", lambda sizes: (sizes.hidden, sizes.in_features), start=None, by_heads=False),
                TensorRow("bias_in", lambda sizes: (sizes.hidden,), by_heads=False),
                TensorRow("weight", lambda sizes: (sizes.outputs, sizes.hidden)),
                _BIAS,
            ),
            _mlp,
            _mlp_is_one,
            needs_hidden=True,
        ),
        LevelKind(
            "paper",
            4,
            True,
            (
                _WEIGHT,
                _BIAS,
                TensorRow("level_scale", _heads_by_levels, start=1.0),
                TensorRow("gain", lambda sizes: (), start=1.0, learned=False, by_heads=False),
            ),
            _paper,
            _paper_is_one,
        ),
        LevelKind(
            "routed",
            5,
            True,
            (
                _WEIGHT,
                _BIAS,
                # Drawn from one stream, and so equal at the start: a score is then large where the bucket holds what
                # looks like the token, from the first step on. w is 1 because `gain` is 0; until the first step has
                # changed that, these two have no gradient.
                TensorRow("query", _features_by_inputs, start=None),
                TensorRow("key", _features_by_inputs, start=None),
                TensorRow("gain", _heads_by_levels),
                TensorRow("damping", lambda sizes: (sizes.levels,), _routed_damping, learned=False, by_heads=False),
            ),
            _routed,
            _routed_is_one,
            reads_buckets=True,
        ),
    )
}


def find_kind(name: str) -> LevelKind:
    """The row of a kind; LevelWeightsError for an unknown name."""
    if name not in KINDS:
        raise LevelWeightsError(f"unknown kind of level weights {name!r}; the kinds are {', '.join(KINDS)}")
    return KINDS[name]


def level_weights_function(
    kind: str,
    heads: int,
    levels: int,
    dtype: torch.dtype = torch.float32,
    readouts: Readouts = whole_rows,
) -> LevelFunction:
    """The pure function `f(x, *tensors) -> w` of a kind, the tensors in the order of `LevelWeights.tensors()`.

    x is [B, T, D] (kind "static": any tensor that starts with [B, T]), w is [B, T, heads, levels] in `dtype`, which
    should be `compute_dtype(x.dtype, *(t.dtype for t in tensors))`. Kind "routed" calls `readouts` for what its queries
    read in each bucket. Runs on tensors as on `fx.Proxy` objects.

    Raises LevelWeightsError for an unknown kind.
    """
    found = find_kind(kind)
    more = {"readouts": readouts} if found.reads_buckets else {}
    return functools.partial(found.function, sizes=Sizes(heads, levels), dtype=dtype, **more)
