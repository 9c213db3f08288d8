"""What the operations of a program are called, sorted by what they mean for a mechanism."""

from __future__ import annotations

from typing import Any

from torch import fx

from llcompile.patterns.structure.follow import WEIGHTED
from llcompile.patterns.structure.moves import SHAPES

# Two factors, the last two operands, with a sum over an axis that they share.
PRODUCTS = WEIGHTED - {"convolution", "embedding"} | {"dot"}
# Where a weight may be one of the factors.
WEIGHTS = PRODUCTS | {"convolution", "embedding"}
SOFTMAX = frozenset({"_softmax", "softmax", "_safe_softmax"})
EXPONENTIALS = frozenset({"exp", "exp2"})
# Copies of the same numbers along an axis.
SPREADING = frozenset({"expand", "repeat"})
# A part of a tensor.
READS = frozenset({"select", "slice", "unbind", "split", "split_with_sizes", "unsafe_split"})
# Parts of tensors, moved and joined.
MOVES = SHAPES | READS | {"cat", "stack", "roll", "flip", "constant_pad_nd"}
# Attention as one call.
FUSED = frozenset({"scaled_dot_product_attention", "flex_attention"})


def called(node: fx.Node) -> str:
    """The plain name of what a node of Dynamo's graph calls ("add" for `x.add_`), "" for other nodes."""
    if node.op == "call_method":
        return str(node.target).strip("_")
    if node.op != "call_function":
        return ""
    target: Any = getattr(node.target, "_overloadpacket", node.target)
    return str(getattr(target, "__name__", None) or target).strip("_")
