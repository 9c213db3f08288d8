"""Which axes of each tensor are time, as far as that can be followed from the model's inputs.

Axes count from the end, so that they survive broadcasting. A tensor of attention scores has two. An empty set means
that nothing is known; what is known is used to rule things out and never alone to name something.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import fx

from llcompile.patterns.boundary import raises
from llcompile.patterns.mechanisms.facts import Facts, Shape
from llcompile.patterns.mechanisms.vocabulary import PROJECTIONS

Axes = frozenset[int]
# What acts on the last axis.
_FEATURES = {"linear", "layer_norm", "rms_norm"}
NONE: Axes = frozenset()


class TimeAxes:
    """The time axes of a graph's tensors.

    Attributes:
        of: for each tensor.
        mixed: the nodes that sum over time with learned weights, in the graph's order.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.of: dict[fx.Node, Axes] = {}
        self.mixed: list[fx.Node] = []
        for node in facts.nodes:
            if node in facts.activations:
                axes = _root(node, facts) if node.op == "placeholder" else self._carried(node)
                rank = len(facts.shapes[node]) if node in facts.shapes else None
                self.of[node] = axes if rank is None else frozenset(a for a in axes if -rank <= a < 0)

    def known(self, node: Any) -> Axes:
        """The time axes of a node, or none."""
        return self.of.get(node, NONE)

    def _carried(self, node: fx.Node) -> Axes:
        rule = RULES.get(self.facts.names[node], _pointwise)
        try:
            return rule(self, node)
        except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:  # a spelling that no rule knows
            if isinstance(error, AttributeError) and raises():  # a typo in a rule
                raise
            return NONE


def _root(node: fx.Node, facts: Facts) -> Axes:
    """Token numbers and masks [B, T], embeddings [B, T, D]; of anything else time may be any axis."""
    value, rank = node.meta["example_value"], len(facts.shapes.get(node, ()))
    if rank == 2 and not value.is_floating_point():
        return frozenset({-1})
    return _by_use(node, facts) if rank == 3 and value.is_floating_point() else NONE


def _by_use(node: fx.Node, facts: Facts) -> Axes:
    """The axis before the features, which are what the first layer maps or normalises."""
    shape = facts.shapes[node]
    for n in facts.below(node, lambda n: facts.shapes.get(n) != shape or facts.names[n] in _FEATURES | PROJECTIONS):
        if n is not node and facts.shapes.get(_source(n)) == shape:
            if facts.names[n] in _FEATURES:
                return frozenset({-2})
            if facts.names[n] == "conv1d":
                return frozenset({-1})
    return NONE


def _source(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _pointwise(axes: TimeAxes, node: fx.Node) -> Axes:
    """Axes that an operand has, of the same size in the result."""
    shape = axes.facts.shapes.get(node)
    if shape is None:
        return frozenset().union(*(axes.known(n) for n in node.all_input_nodes))
    found: set[int] = set()
    for operand in node.all_input_nodes:
        given = axes.facts.shapes.get(operand, ())
        found.update(a for a in axes.known(operand) if len(shape) >= -a <= len(given) and shape[a] == given[a])
    return frozenset(found)


def _first(axes: TimeAxes, node: fx.Node) -> Axes:
    return axes.known(node.args[0])


def _embedding(axes: TimeAxes, node: fx.Node) -> Axes:
    return frozenset(a - 1 for a in axes.known(node.args[0]))


def _linear(axes: TimeAxes, node: fx.Node) -> Axes:
    given = axes.known(node.args[0])
    if -1 in given and node.args[1] in axes.facts.learned:
        axes.mixed.append(node)
    return given - {-1}


def _matmul(axes: TimeAxes, node: fx.Node) -> Axes:
    left, right = (n for n in node.args[-2:])
    rows, columns = axes.known(left), axes.known(right)
    weighs = (-1 in rows and right in axes.facts.learned) or (-2 in columns and left in axes.facts.learned)
    if weighs:
        axes.mixed.append(node)
    batch = {a for a in rows | columns if a < -2}
    return frozenset(batch | (rows & {-2}) | (columns & {-1}))


def _einsum(axes: TimeAxes, node: fx.Node) -> Axes:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    inputs, output = str(equation).replace(" ", "").split("->")
    labels = inputs.split(",")
    one = sum(n in axes.facts.activations for n in operands) == 1  # else the weights depend on the data, too
    time = {term[a] for term, n in zip(labels, operands, strict=True) for a in axes.known(n)}
    for term, operand in zip(labels, operands, strict=True):
        if one and operand in axes.facts.learned and any(label in time and label not in output for label in term):
            axes.mixed.append(node)
    return frozenset(output.index(label) - len(output) for label in time if label in output)


def _permuted(order: Callable[[fx.Node, int], list[int]]) -> Callable[[TimeAxes, fx.Node], Axes]:
    """For operations that reorder axes; `order` gives the old axis that stands at each new place."""

    def rule(axes: TimeAxes, node: fx.Node) -> Axes:
        rank = len(axes.facts.shapes[node.args[0]])  # type: ignore[index]
        given = {a % rank for a in axes.known(node.args[0])}
        return frozenset(new - rank for new, old in enumerate(order(node, rank)) if old in given)

    return rule


def _transposed(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    names = {**node.kwargs}
    first = int(names.get("dim0", node.args[1] if len(node.args) > 1 else 0))  # type: ignore[arg-type]
    second = int(names.get("dim1", node.args[2] if len(node.args) > 2 else 1))  # type: ignore[arg-type]
    order[first], order[second] = order[second], order[first]
    return order


def _order(node: fx.Node, rank: int) -> list[int]:
    given = node.kwargs.get("dims", node.args[1:])
    given = given[0] if isinstance(given, (list, tuple)) and len(given) == 1 and rank > 1 else given
    return [int(a) % rank for a in given]  # type: ignore[union-attr, arg-type, misc]


def _moved(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    order.insert(int(node.args[2]) % rank, order.pop(int(node.args[1]) % rank))  # type: ignore[arg-type]
    return order


def _reshaped(axes: TimeAxes, node: fx.Node) -> Axes:
    """An axis stays where as many numbers lie before it and it is as long."""
    before, after = axes.facts.shapes[node.args[0]], axes.facts.shapes[node]  # type: ignore[index]
    places = {(lead, size): i for i, (lead, size) in enumerate(zip(_leads(after), after, strict=True)) if size != 1}
    rank, leads = len(before), _leads(before)
    found = (places.get((leads[a + rank], before[a])) for a in axes.known(node.args[0]))
    return frozenset(i - len(after) for i in found if i is not None)


def _leads(shape: Shape) -> list[int]:
    return list(accumulate(shape, mul, initial=1))[:-1]


def _getitem(axes: TimeAxes, node: fx.Node) -> Axes:
    source, index = node.args
    if source not in axes.facts.shapes:  # an item of a tuple
        return axes.known(source)
    rank, old = len(axes.facts.shapes[source]), 0  # type: ignore[index]
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, (fx.Node, list)) and _is_tensor(i) for i in index):
        return NONE
    taken = sum(i is not None and i is not Ellipsis for i in index)
    places: list[int | None] = []
    for i in (*index, Ellipsis) if Ellipsis not in index else index:
        if i is None:
            places.append(None)
        elif i is Ellipsis:
            places.extend(range(old, old + rank - taken))
            old += rank - taken
        else:
            if isinstance(i, slice):
                places.append(old)
            old += 1
    given = {a % rank for a in axes.known(source)}
    return frozenset(new - len(places) for new, place in enumerate(places) if place in given)


def _is_tensor(index: Any) -> bool:
    return isinstance(index, list) or isinstance(index.meta.get("example_value"), torch.Tensor)


def _attribute(axes: TimeAxes, node: fx.Node) -> Axes:
    """`x.T` and `x.mT`: the last two axes change places."""
    if node.args[1] not in ("T", "mT"):
        return NONE
    return frozenset({-1: -2, -2: -1}.get(a, a) for a in axes.known(node.args[0]))


def _dim(node: fx.Node, default: Any = None, position: int = 1) -> Any:
    return node.kwargs.get("dim", node.args[position] if len(node.args) > position else default)


def _unsqueezed(axes: TimeAxes, node: fx.Node) -> Axes:
    rank = len(axes.facts.shapes[node])
    new = int(_dim(node)) % rank - rank
    return frozenset(a - 1 if a <= new else a for a in axes.known(node.args[0]))


def _reduced(axes: TimeAxes, node: fx.Node) -> Axes:
    """Sums, means and the like; also squeeze and select, which take an axis away."""
    source = node.args[0]
    rank, dim = len(axes.facts.shapes[source]), _dim(node)  # type: ignore[index]
    if dim is None:
        return NONE
    gone = {int(d) % rank for d in (dim if isinstance(dim, (list, tuple)) else (dim,))}
    if len(axes.facts.shapes[node]) == rank:  # keepdim, or nothing to squeeze
        return frozenset(a for a in axes.known(source) if a % rank not in gone)
    kept = [i for i in range(rank) if i not in gone]
    given = {a % rank for a in axes.known(source)}
    return frozenset(new - len(kept) for new, old in enumerate(kept) if old in given)


def _unbound(axes: TimeAxes, node: fx.Node) -> Axes:
    rank, dim = len(axes.facts.shapes[node.args[0]]), int(_dim(node, 0))  # type: ignore[index]
    gone = dim % rank - rank
    return frozenset(a + 1 if a < gone else a for a in axes.known(node.args[0]) if a != gone)


def _divided(axes: TimeAxes, node: fx.Node) -> Axes:
    rank = len(axes.facts.shapes[node.args[0]])  # type: ignore[index]
    position = 2 if axes.facts.names[node] in ("chunk", "split", "tensor_split") else 1
    return axes.known(node.args[0]) - {int(_dim(node, 0, position)) % rank - rank}


def _stacked(axes: TimeAxes, node: fx.Node) -> Axes:
    rank = len(axes.facts.shapes[node])
    new = int(_dim(node, 0)) % rank - rank
    return frozenset(a - 1 if a <= new else a for n in node.all_input_nodes for a in axes.known(n))


def _concatenated(axes: TimeAxes, node: fx.Node) -> Axes:
    return frozenset().union(*(axes.known(n) for n in node.all_input_nodes))


def _attended(axes: TimeAxes, node: fx.Node) -> Axes:
    return axes.known(node.args[0]) if node.args else axes.known(node.kwargs.get("query"))


def _convolved(axes: TimeAxes, node: fx.Node) -> Axes:
    """A kernel of one number along what is not time sums over the channels, as a linear map does."""
    source = node.args[0] if node.args else node.kwargs["input"]
    weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    given = axes.known(source)
    if -2 in given and axes.facts.shapes[weight][-1] == 1:  # type: ignore[index]
        axes.mixed.append(node)
    return given & {-1}


def _unknown(axes: TimeAxes, node: fx.Node) -> Axes:
    return NONE


# Results of which the shape does not tell where the axes went.
_SOLVERS = ("linalg_solve_triangular", "linalg_solve", "linalg_inv", "inverse", "triangular_solve")
_CHOICES = ("gather", "topk", "index_select", "take_along_dim", "scatter", "sort", "cdist", "outer", "unfold")
_REDUCTIONS = ("sum", "mean", "amax", "amin", "logsumexp", "prod", "norm", "var", "std", "any", "all", "argmax")

# What each operation does to the axes; all others are pointwise, or keep their axes as if they were.
RULES: dict[str, Callable[[TimeAxes, fx.Node], Axes]] = {
    "linear": _linear,
    "embedding": _embedding,
    **dict.fromkeys(("matmul", "bmm", "mm", "baddbmm", "addmm"), _matmul),
    "einsum": _einsum,
    "conv1d": _convolved,
    **dict.fromkeys(("scaled_dot_product_attention", "flex_attention"), _attended),
    "transpose": _permuted(_transposed),
    "t": _permuted(lambda node, rank: [1, 0]),
    "permute": _permuted(_order),
    "movedim": _permuted(_moved),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten"), _reshaped),
    "getitem": _getitem,
    "getattr": _attribute,
    "unsqueeze": _unsqueezed,
    **dict.fromkeys((*_REDUCTIONS, "squeeze", "select"), _reduced),
    **dict.fromkeys((*_SOLVERS, *_CHOICES), _unknown),
    "unbind": _unbound,
    **dict.fromkeys(("chunk", "split", "tensor_split"), _divided),
    "stack": _stacked,
    "cat": _concatenated,
    **dict.fromkeys(("pad", "softmax", "cumsum", "flip", "roll", "to", "contiguous", "layer_norm", "dropout"), _first),
}
