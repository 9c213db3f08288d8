"""Which keys an attention sees, found by running the part of the graph that makes its weights, with all scores zero.

That part depends on positions alone, so it can be run on few of them: lengths are cut to a handful and positions are
spread by a stride instead (0, s, 2s, ...). Causality does not change then; a window of W shows as the stride from which
the token before is out of sight, however short the user's example is. What depends on data leaves things undecided.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from llcompile.patterns.mechanisms.facts import Facts, hint
from llcompile.patterns.mechanisms.vocabulary import PROJECTIONS
from llcompile.torch_internals.inputs import input_value

# Lengths above the first are cut to the second.
_LONG, _CUT = 64, 8
# Strides are tried up to this one: no window in use is longer.
_FAR = 1 << 20
# A mask is made by fewer nodes than this.
_REACH = 160
# Arguments of these are lengths; a number elsewhere may be a window and must not be cut.
_SIZED = {"arange", "ones", "zeros", "full", "empty", "expand", "view", "reshape", "repeat", "broadcast_to"}
_SIZED |= {"new_ones", "new_zeros", "new_full", "new_empty", "unflatten"}


class Undecidable(Exception):
    """The mask depends on data, or is made in a way that cannot be run here."""


class Masks:
    """Answers for one graph; what many layers share is run once for each stride."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.known: dict[tuple[int, int], dict[fx.Node, Any]] = {}
        self.answers: dict[Any, tuple[str, ...]] = {}

    def seen_by(self, node: fx.Node, scores: fx.Node, weights: fx.Node) -> tuple[str, ...]:
        """What there is to say: "bidirectional", "sliding window 64", both, or nothing."""
        try:
            if self.facts.names[node] == "flex_attention":
                return _describe(lambda stride: self._flexible(node, stride))
            return self._decided(node) if node is scores else self._run(weights, scores)
        except Exception:
            return ()

    def of_call(self, mask: Any, causal: bool) -> tuple[str, ...]:
        """What a mask says that is handed to a whole attention layer of torch, where True means out of sight."""
        if mask is None:
            return () if causal else ("bidirectional",)
        try:
            length = self.facts.shapes[mask][-1]
            if mask not in self.answers:
                self.answers[mask] = _describe(lambda s: _weights(_turned(self._value(mask, length, s)), causal))
            return self.answers[mask]
        except Exception:
            return ()

    def _decided(self, node: fx.Node) -> tuple[str, ...]:
        """The fused call: causal by its flag, by a mask, or not at all."""
        mask = _argument(node, 3, "attn_mask")
        query, key = (self.facts.shapes[_argument(node, i, n)] for i, n in ((0, "query"), (1, "key")))
        if query[-2] != key[-2] or query[-2] == 1:
            return ()
        causal = bool(_argument(node, 5, "is_causal"))
        if mask is None:
            return () if causal else ("bidirectional",)
        if mask not in self.answers:
            length = query[-2]
            self.answers[mask] = _describe(lambda stride: _weights(self._value(mask, length, stride), causal))
        return self.answers[mask]

    def _run(self, weights: fx.Node, scores: fx.Node) -> tuple[str, ...]:
        """Attention in two products: everything between them, and what that reads."""
        queries, keys = self.facts.shapes[weights][-2:]
        if queries != keys or keys == 1:
            return ()
        return _describe(lambda stride: self._value(weights, keys, stride, scores))

    def _value(self, node: fx.Node, length: int, stride: int, scores: fx.Node | None = None) -> Tensor:
        known = self.known.setdefault((length, stride), {})
        for n in _ordered(self.facts, node, known, scores):
            known[n] = self._zeros(n, length) if n is scores else self._evaluated(n, known, length, stride)
        value = known[node]
        if not isinstance(value, Tensor):
            raise Undecidable
        return value

    def _evaluated(self, node: fx.Node, known: dict[fx.Node, Any], length: int, stride: int) -> Any:
        facts, name = self.facts, self.facts.names[node]
        if node.op in ("placeholder", "get_attr"):
            return self._given(node, length)
        if name in PROJECTIONS or facts.factors(node) or node in facts.learned:
            return self._zeros(node, length)  # numbers that a mask does not depend on: biases, other scores
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
        args, kwargs = _unset_device(args), {k: v for k, v in _unset_device(kwargs).items() if k != "layout"}
        if name in _SIZED and length > _LONG:
            args, kwargs = _cut(args, length), _cut(kwargs, length)
        if name == "dropout":
            return args[0]
        if name == "arange":
            found = node.target(*args, **kwargs)  # type: ignore[operator]
            return found * stride if found.numel() == _cut(length, length) else found
        if name == "getitem" and isinstance(args[0], Tensor):
            args = (args[0], _inside(args[1], args[0], stride))
        if name == "diff" and _is_long(args[0]):  # packed sequences are told apart by positions that do not follow
            return node.target(*args, **kwargs) // stride  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _given(self, node: fx.Node, length: int) -> Any:
        """A mask of padding as if nothing was padded, learned numbers as zeros, the constants that buffers are."""
        facts = self.facts
        outer = facts.region.outer(node)
        value = outer.meta.get("example_value")
        if isinstance(value, (torch.SymInt, int)):
            return _cut(hint(value), length) if length > _LONG else hint(value)
        if not isinstance(value, Tensor):
            raise Undecidable
        if node in facts.learned:
            return self._zeros(node, length)
        if node in facts.activations:
            if value.dim() != 2 or value.is_floating_point():
                raise Undecidable
            return torch.ones(self._shape(node, length), dtype=value.dtype)
        real = input_value(outer) if node.op == "placeholder" else getattr(facts.region.module, str(node.target))
        if not isinstance(real, Tensor) or real.is_meta or length > _LONG or real.numel() > 1 << 22:
            raise Undecidable
        return real.detach().cpu()

    def _zeros(self, node: fx.Node, length: int) -> Tensor:
        if node not in self.facts.shapes:
            raise Undecidable
        return torch.zeros(self._shape(node, length), dtype=node.meta["example_value"].dtype)

    def _shape(self, node: fx.Node, length: int) -> tuple[int, ...]:
        shape = self.facts.shapes[node]
        return tuple(_cut(size, length) for size in shape) if length > _LONG else shape

    def _flexible(self, node: fx.Node, stride: int) -> Tensor:
        """`flex_attention` carries its mask as a graph of four indices."""
        block = _argument(node, 4, "block_mask")
        made = block[-1] if isinstance(block, (tuple, list)) else None
        module = getattr(self.facts.region.module, str(getattr(made, "target", "")), None)
        if not isinstance(module, torch.nn.Module):
            raise Undecidable
        zero = torch.tensor(0)
        pairs = [[module(zero, zero, torch.tensor(i), torch.tensor(j)) for j in _steps(stride)] for i in _steps(stride)]
        return torch.tensor([[float(bool(p)) for p in row] for row in pairs])


def _steps(stride: int) -> list[int]:
    return [i * stride for i in range(_CUT)]


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _ordered(facts: Facts, node: fx.Node, known: dict[fx.Node, Any], scores: fx.Node | None) -> list[fx.Node]:
    """What must be run for the node, in the graph's order."""
    pending, found = [node], {node}
    while pending:
        current = pending.pop()
        known_zero = current in facts.learned or facts.names[current] in PROJECTIONS or facts.factors(current)
        if current is scores or known_zero:
            continue
        for n in facts.inputs[current]:
            if n not in known and n not in found:
                found.add(n)
                pending.append(n)
        if len(found) > _REACH:
            raise Undecidable
    return sorted(found, key=facts.position.__getitem__)


def _cut(value: Any, length: int) -> Any:
    """The value with each length in it cut."""
    if isinstance(value, (tuple, list, torch.Size)):
        return tuple(_cut(v, length) for v in value)
    if isinstance(value, dict):
        return {k: _cut(v, length) for k, v in value.items()}
    same = isinstance(value, int) and not isinstance(value, bool) and value == length
    return _CUT if same and length > _LONG else value


def _unset_device(value: Any) -> Any:
    """On the CPU, wherever the model is."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, dict):
        return {k: _unset_device(v) for k, v in value.items()}
    return type(value)(_unset_device(v) for v in value) if type(value) in (tuple, list) else value


def _inside(index: Any, source: Tensor, stride: int) -> Any:
    """Positions as an index into a mask of padding: without the stride, by which they would lie outside."""
    if not isinstance(index, tuple):
        return index
    return tuple((i // stride).clamp(0, source.shape[d] - 1) if _is_long(i) else i for d, i in enumerate(index))


def _is_long(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool


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
    if width == length or not torch.equal(seen.tril(), band):
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
