"""Model cost: the mixers of a model together, beside the matrix products of everything else in it.

What is elsewhere is counted by `torch.utils.flop_counter` on the shapes of the traced graphs, one product at a time, so
that nothing is run. Equal products are counted once and added as often as they occur.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from llcompile.look.collect import region_nodes
from llcompile.look.cost import MixerCost
from llcompile.passes.session import Session
from llcompile.passes.weight_input import is_constant_input
from llcompile.patterns.known.capture import captured_function
from llcompile.torch_internals.inputs import fake_mode_of
from llcompile.torch_internals.sizes import size_hint

_PRODUCTS = re.compile(
    r"linear$|conv\d|conv_|convolution|matmul|mm$|mv$|^dot$|einsum|tensordot|^inner$|dot_product_attention|^multi_head"
)
Operations = dict[str, int]


@dataclass(frozen=True)
class Elsewhere:
    """Operations of matrix products outside of converted mixers, in the example's forward pass.

    Args:
        parameters: of products with a tensor that the model holds: they grow with the number of tokens.
        activations: of products of two activations, as in softmax attention: how they grow depends on the code.
        unknown: products that torch has no count for, and that are in neither number.
    """

    parameters: int = 0
    activations: int = 0
    unknown: tuple[str, ...] = ()

    def __add__(self, other: Elsewhere) -> Elsewhere:
        unknown = tuple(dict.fromkeys((*self.unknown, *other.unknown)))
        return Elsewhere(self.parameters + other.parameters, self.activations + other.activations, unknown)


@dataclass(frozen=True)
class ModelCost:
    """What a forward pass of the model costs, before and after.

    Args:
        elsewhere: the matrix products outside of the mixers, at the example's length.
        mixers: the converted mixers.
    """

    elsewhere: Elsewhere
    mixers: tuple[MixerCost, ...]

    def at(self, length: int | None = None) -> dict[str, Operations]:
        """The sums over all mixers, linear and log-linear, and "elsewhere", the products with parameters.

        Args:
            length: tokens per sequence; the example's, if none is given.
        """
        found = {form: Counter[str]() for form in ("linear", "loglinear")}
        equal = Counter((m.linear, m.loglinear, tuple(m.values.items())) for m in self.mixers)
        for (linear, loglinear, values), count in equal.items():
            sizes = {**dict(values), "T": length or dict(values)["T"]}
            for form, cost in (("linear", linear), ("loglinear", loglinear)):
                found[form].update({name: count * number for name, number in cost.at(sizes).items()})
        parameters = self.elsewhere.parameters
        if length is not None:
            parameters = parameters * length // self.length
        return {"elsewhere": {"operations": parameters}, **{form: dict(sums) for form, sums in found.items()}}

    @property
    def length(self) -> int:
        """The example's tokens per sequence."""
        return max((m.values["T"] for m in self.mixers), default=1)


def elsewhere(session: Session) -> Elsewhere:
    """Counts one graph, as the look has left it and before the rewrite."""
    inside = set().union(*(region_nodes(candidate) for candidate in session.candidates if candidate.open))
    counter, held, found = _Counter(fake_mode_of(session.graph)), set[fx.Node](), Elsewhere()
    for region in session.regions:  # a body comes after the graph that calls it
        for node in region.graph.nodes:
            if _is_held(node, region.outer(node), held):
                held.add(node)
            elif node in inside:
                continue
            elif (declined := captured_function(node.target)) is not None:
                found += Elsewhere(unknown=(declined.entry.function,))
            elif _is_product(node):
                found += counter.count(node, any(operand in held for operand in node.all_input_nodes))
    return found


def _is_held(node: fx.Node, outer: fx.Node, held: set[fx.Node]) -> bool:
    """Whether the model alone decides a tensor: a parameter, a buffer, or what is computed from these."""
    if node.op == "placeholder":
        return outer in held if outer is not node else is_constant_input(node)
    parents = node.all_input_nodes
    return node.op == "get_attr" or (bool(parents) and all(parent in held for parent in parents))


def _is_product(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return _PRODUCTS.search(name.removesuffix(".default").strip("_")) is not None


class _Counter:
    """Counts the operations of single nodes; `mode` is the fake mode of their example values."""

    def __init__(self, mode: Any) -> None:
        self._mode = mode
        self._known: dict[str, int] = {}

    def count(self, node: fx.Node, by_parameter: bool) -> Elsewhere:
        """One node's operations; a product without a count is named."""
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["example_value"])  # type: ignore[misc]
        key = f"{node.target} {tree_map(_shown, (args, kwargs))}"
        if key not in self._known:
            self._known[key] = self._operations(node, args, kwargs)
        number = self._known[key]
        if not number:
            return Elsewhere(unknown=(str(getattr(node.target, "__name__", node.target)),))
        return Elsewhere(parameters=number) if by_parameter else Elsewhere(activations=number)

    def _operations(self, node: fx.Node, args: Any, kwargs: Any) -> int:
        with self._mode, torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_MORE) as counter:
            try:
                if node.op == "call_method":
                    getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    node.target(*args, **kwargs)  # type: ignore[operator]
            except Exception:  # whatever an operator of another library raises on shapes alone
                return 0
        return int(size_hint(counter.get_total_flops()) or 0)


def _shown(value: Any) -> Any:
    return (value.dtype, *value.shape) if isinstance(value, torch.Tensor) else value


def _attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """q [..., S, K], k [..., T, K], v [..., T, V]."""
    return 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _grouped(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """a [M, K] or [E, M, K], b [E, K, N]: each row meets one matrix."""
    return 2 * prod(a) * b[-1]


# What torch's own table lacks.
_MORE = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._grouped_mm: _grouped,
}
