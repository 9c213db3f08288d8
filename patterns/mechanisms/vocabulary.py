"""What the operations of a Dynamo graph are called: one name for each, however the user spelled it."""

from __future__ import annotations

from typing import Any

from torch import fx

# In-place operators of Python, which are not told apart from the others.
_INPLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv", "imatmul": "matmul"}
_SYNONYMS = {
    "subtract": "sub",
    "multiply": "mul",
    "true_divide": "div",
    "truediv": "div",
    "divide": "div",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "special_softmax": "softmax",
    "safe_softmax": "softmax",
    "special_expit": "sigmoid",
}

# Two factors with a sum over an axis that they share.
PRODUCTS = frozenset({"matmul", "bmm", "mm", "mv", "einsum", "baddbmm", "addmm", "addbmm", "tensordot", "inner", "dot"})
# A projection: where a walk that looks for one mechanism would get into the next one.
PROJECTIONS = frozenset({"linear", "conv1d", "conv2d", "embedding", "addmm", "bilinear"})
CONVOLUTIONS = frozenset({"conv1d"})
SOFTMAX = frozenset({"softmax"})
SIGMOIDS = frozenset({"sigmoid"})
EXPONENTIALS = frozenset({"exp", "exp2"})
# Copies of the same numbers along an axis.
SPREADING = frozenset({"expand", "expand_as", "repeat", "repeat_interleave", "broadcast_to", "tile"})
READS = frozenset({"getitem", "select", "narrow", "slice"})
# Only the first argument's numbers are taken; of these, not even those.
SHAPED = frozenset({"expand_as", "view_as", "reshape_as", "type_as", "to"})
MADE = frozenset(f"{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn"))
MADE |= frozenset(f"new_{kind}" for kind in ("zeros", "ones", "full", "empty", "tensor")) | {"size"}

_names: dict[Any, str] = {}


def operation(node: fx.Node) -> str:
    """The plain name of what a call node does ("add" for `+=`, `torch.add` and `x.add_`), or "" for other nodes."""
    if node.op == "call_method":
        return _plain(str(node.target))
    if node.op != "call_function":
        return ""
    name = _names.get(node.target)
    if name is None:
        target: Any = node.target
        packet = getattr(target, "_overloadpacket", target)
        name = _names[target] = _plain(str(getattr(packet, "__name__", None) or packet))
    return name


def _plain(name: str) -> str:
    name = name.strip("_")
    name = _INPLACE.get(name, name)
    return _SYNONYMS.get(name, name)
