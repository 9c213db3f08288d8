"""Which keys an attention sees, found by running the part of the graph that makes its weights, with all scores zero.

That part depends on positions alone, so it can be run on few of them: lengths are cut to a handful and positions are
spread by a stride instead (0, s, 2s, ...). Causality does not change then; a window of W shows as the stride from which
the token before is out of sight, however short the user's example is. What depends on data leaves things undecided.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx

from llcompile.patterns.boundary import boundary
from llcompile.patterns.mechanisms.facts import Facts
from llcompile.patterns.mechanisms.vocabulary import called
from llcompile.patterns.structure.nested import mapped
from llcompile.patterns.structure.program import Op, Value

# Lengths above the first are cut to the second.
_LONG, _CUT = 64, 8
# Strides are tried up to this one: no window in use is longer.
_FAR = 1 << 20
# A mask is made by fewer values than this.
_REACH = 240
# Arguments of these are lengths; a number elsewhere may be a window and must not be cut.
_SIZED = frozenset(
    [
        "arange",
        "ones",
        "zeros",
        "full",
        "empty",
        "expand",
        "view",
        "_unsafe_view",
        "reshape",
        "repeat",
        "slice",
        "narrow",
    ]
)


class Undecidable(Exception):
    """The mask depends on data, or is made in a way that cannot be run here."""


class Masks:
    """Answers for one program; what many layers share is run once for each stride."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.known: dict[tuple[int, int], dict[Value, Any]] = {}
        self.answers: dict[Any, tuple[str, ...]] = {}

    def seen_by(self, node: fx.Node, scores: Value, weights: Value) -> tuple[str, ...]:
        """What there is to say of an attention: "bidirectional", "sliding window 64", both, or nothing.

        Args:
            node: the graph's node that names it.
            scores: the product of queries and keys.
            weights: what the values are multiplied with.
        """
        if called(node) == "flex_attention":
            return _said(lambda stride: self._flexible(node, stride))
        queries, keys = weights.shape[-2:]
        if queries != keys or keys == 1:
            return ()
        return _said(lambda stride: self._value(weights, keys, stride, scores))

    def of_layer(self, node: fx.Node) -> tuple[str, ...]:
        """What the mask says that is handed to a whole attention layer of torch, where True means out of sight."""
        causal, mask = bool(node.kwargs.get("is_causal")), self.facts.argument(node, len(node.args), "attn_mask")
        if not isinstance(mask, Value):
            return () if causal else ("bidirectional",)
        if mask not in self.answers:
            length = mask.shape[-1]
            self.answers[mask] = _said(lambda s: _weights(_turned(self._value(mask, length, s)), causal))
        return self.answers[mask]

    def _value(self, value: Value, length: int, stride: int, scores: Value | None = None) -> Tensor:
        known = self.known.setdefault((length, stride), {})
        for v in self._ordered(value, known, scores):
            known[v] = self._zeros(v, length) if v is scores else self._computed(v, known, length, stride)
        found = known[value]
        assert isinstance(found, Tensor)
        return found

    def _ordered(self, value: Value, known: dict[Value, Any], scores: Value | None) -> list[Value]:
        """What must be run for the value, in the program's order."""
        end = lambda v: v is scores or v in known or self._is_zero(v)  # noqa: E731
        found = list(self.facts.above(value, end, _REACH + 1))
        if len(found) > _REACH:
            raise Undecidable
        return sorted((v for v in found if v not in known), key=self.facts.position.__getitem__)

    def _is_zero(self, value: Value) -> bool:
        """Whether it holds numbers that a mask does not depend on: biases, other scores."""
        return value in self.facts.learned or self.facts.ends(value)

    def _computed(self, value: Value, known: dict[Value, Any], length: int, stride: int) -> Any:
        if self._is_zero(value):
            return self._zeros(value, length)
        op = value.op
        if op is None:
            return self._given(value, length)
        args, kwargs = mapped(lambda a: known[a] if isinstance(a, Value) else _on_cpu(a), (op.args, op.kwargs))
        kwargs.pop("layout", None)
        if op.name in _SIZED and length > _LONG:
            args, kwargs = mapped(lambda a: _cut(a, length), (args, kwargs))
        return self._run(op, value.index, args, kwargs, _cut(length, length), stride)

    def _run(self, op: Op, index: int, args: Any, kwargs: Any, length: int, stride: int) -> Any:
        """The operation, with positions that lie apart by the stride."""
        if op.name == "index":  # a mask of padding, read at positions
            args = (args[0], [_inside(i, size, stride) for i, size in zip(args[1], args[0].shape, strict=False)])
        if op.name == "native_dropout" and index == 0:
            return args[0]
        try:  # draws are those of a dropout that keeps everything
            result = torch.ones_like(args[0]) if op.is_random else op.target(*args, **kwargs)
        except Exception as error:  # the user's operation, at another length
            raise Undecidable from error
        result = result[index] if isinstance(result, (tuple, list)) else result
        if op.name == "arange" and result.numel() == length:
            return result * stride
        if op.name == "sub" and called(op.node) == "diff" and _is_long(result):
            return result // stride  # packed sequences are told apart by positions that do not follow
        return result

    def _given(self, value: Value, length: int) -> Tensor:
        """A mask of padding as if nothing was padded, the constants that buffers are."""
        if value in self.facts.activations:
            if len(value.shape) != 2 or value.dtype.is_floating_point:
                raise Undecidable
            return torch.ones(self._shape(value, length), dtype=value.dtype)
        data = value.data
        if data is None or data.is_meta or data.numel() > 1 << 22 or (length > _LONG and data.numel() > 1):
            raise Undecidable
        return data.detach().cpu()

    def _zeros(self, value: Value, length: int) -> Tensor:
        return torch.zeros(self._shape(value, length), dtype=value.dtype)

    def _shape(self, value: Value, length: int) -> tuple[int, ...]:
        return tuple(_cut(size, length) for size in value.shape)

    def _flexible(self, node: fx.Node, stride: int) -> Tensor:
        """`flex_attention` carries its mask as a graph of four indices."""
        block = node.args[4] if len(node.args) > 4 else node.kwargs.get("block_mask")
        made = block[-1] if isinstance(block, (tuple, list)) else None
        module = getattr(self.facts.region.module, str(getattr(made, "target", "")), None)
        if not isinstance(module, torch.nn.Module):
            raise Undecidable
        zero, steps = torch.tensor(0), [torch.tensor(i * stride) for i in range(_CUT)]
        return torch.tensor([[float(bool(module(zero, zero, i, j))) for j in steps] for i in steps])


def _cut(argument: Any, length: int) -> Any:
    """The length cut; any other argument as it is."""
    same = isinstance(argument, int) and not isinstance(argument, bool) and argument == length
    return _CUT if same and length > _LONG else argument


def _on_cpu(argument: Any) -> Any:
    """On the CPU, wherever the model is."""
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def _inside(index: Any, size: int, stride: int) -> Any:
    """Positions as an index into a mask of padding: without the stride, by which they would lie outside."""
    return (index // stride).clamp(0, size - 1) if _is_long(index) else index


def _is_long(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def _said(weights: Any) -> tuple[str, ...]:
    """What is said of weights; nothing where they cannot be had."""
    said: tuple[str, ...] = ()
    with boundary("a mask"), suppress(Undecidable):
        said = _describe(weights)
    return said


def _turned(mask: Tensor) -> Tensor:
    return mask if mask.is_floating_point() else ~mask


def _weights(mask: Tensor, causal: bool) -> Tensor:
    """The weights of the fused call at scores of zero."""
    bias = mask if mask.is_floating_point() else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    if causal:
        bias = bias + torch.full(bias.shape[-2:], -torch.inf).triu(1)
    return bias.softmax(-1)


def _describe(weights: Any) -> tuple[str, ...]:
    """What the weights say; `weights(stride)` has queries and keys as its last axes."""
    near, far = (_rows(weights(stride)) for stride in (1, _FAR))
    ones = torch.ones_like(near, dtype=torch.bool)
    causal = bool((near > 0).triu(1).sum() == 0)
    if not causal and not bool((near > 0)[0, 1]):
        return ()
    side = () if causal else ("bidirectional",)
    window = _band(near > 0)
    if window is None:
        if torch.equal(far > 0, ones.tril() if causal else ones):
            return side
        window = _window(lambda stride: _rows(weights(stride)), causal)
    if window is None:
        return ()
    return (*side, f"sliding window {window}" if causal else f"sliding window of {window} to each side")


def _band(seen: Tensor) -> int | None:
    """The window, where the example is longer than it: how far back the last token sees, if all others see as far."""
    length = len(seen)
    width = int(seen[-1].sum())
    band = torch.ones_like(seen).tril() & ~torch.ones_like(seen).tril(-width)
    if width in (0, length) or not torch.equal(seen.tril(), band):
        return None
    if not bool(seen.triu(1).any()):
        return width
    return width - 1 if torch.equal(seen, seen.T) else None


def _rows(weights: Tensor) -> Tensor:
    return weights.reshape(-1, *weights.shape[-2:])[0].float()


def _window(rows: Any, causal: bool) -> int | None:
    """The first stride at which the neighbour is out of sight, if all neighbours are, and as a step."""
    low, high = 0, _FAR  # in sight, out of sight
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if rows(middle)[1, 0] > 0 else (low, middle)
    at, beyond = rows(low) if low else None, rows(high)
    if bool(beyond.diagonal(-1).any()):
        return None  # not every token loses its neighbour there: blocks, or a first token that all see
    # Weights that fall off with the distance end in zero, too, and are no window.
    if at is None or not bool((at.diagonal(-1) > 0.99 * at.diagonal()[1:]).all()):
        return None
    return high if causal else low
