"""Convolutions over time on a shard: their first tokens read the last ones of the process before.

A causal convolution pads with zeros on the left. What the missing tokens would add to its first outputs is the
convolution of these tokens alone, since it is linear in its input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from llcompile.errors import DistributedError
from llcompile.kernels import spread, torch_operator


def _last_tokens(x: Tensor, count: int) -> Tensor:
    """The last `count` tokens of the process before, of `x [B, C, T]`; zeros where there is none."""
    if x.shape[-1] < count:
        raise DistributedError(
            f"a convolution over {count + 1} tokens reads the last {count} of each shard, and this one has "
            f"{x.shape[-1]} (input {list(x.shape)}); cut the sequence into longer shards"
        )
    over, tokens = spread.current(), x[..., x.shape[-1] - count :]
    return torch.zeros_like(tokens) if over is None else over.from_before(tokens)


def _returned(grad: Tensor) -> Tensor:
    """The gradient of this process's last tokens, which the one after it has."""
    over = spread.current()
    return torch.zeros_like(grad) if over is None else over.from_after(grad)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.length, ctx.count, ctx.spread = inputs[0].shape[-1], inputs[1], spread.current()


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    with spread.run_by(ctx.spread):
        own = torch.ops.llcompile.halo_gradient.default(grad)
    return F.pad(own, (ctx.length - ctx.count, 0)), None


torch_operator.define("halo_gradient(Tensor grad) -> Tensor", _returned, lambda grad: grad.new_empty(grad.shape))
torch_operator.define(
    "halo(Tensor x, int count) -> Tensor",
    _last_tokens,
    lambda x, count: x.new_empty((*x.shape[:-1], count)),
    _save,
    _gradient,
)


def add_halos(module: fx.GraphModule) -> int:
    """Let each causal convolution over time of a Dynamo graph read the tokens before its shard; returns their number.

    Those that are not causal are found by `local.check`, as everything else that reads other tokens.
    """
    found = [(node, reach) for node in module.graph.nodes if (reach := _reach(node))]
    for node, reach in found:
        given = _arguments(node)
        inputs = (node, given["input"], given["weight"], reach, _number(given["dilation"]), given["groups"])
        with module.graph.inserting_after(node):
            added = module.graph.call_function(_add_halo, inputs)
        added.meta.update(node.meta)
        node.replace_all_uses_with(added, lambda user, added=added: user is not added)
    module.graph.lint()
    return len(found)


def _add_halo(y: Tensor, x: Tensor, weight: Tensor, reach: int, dilation: int, groups: int) -> Tensor:
    """A convolution's output `y [B, D, T + reach]` on a shard -> what it is on the sequence."""
    halo = torch.ops.llcompile.halo.default(x, reach)  # [B, C, reach]
    first = F.conv1d(F.pad(halo, (0, reach)), weight, None, 1, 0, dilation, groups)  # [B, D, reach]
    return y + F.pad(first, (0, y.shape[-1] - reach))


_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def _arguments(node: fx.Node) -> dict[str, Any]:
    return {**_DEFAULTS, **dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}


def _reach(node: fx.Node) -> int:
    """How many tokens before its own an output reads, if it is a convolution padded for it; else 0."""
    if node.op != "call_function" or node.target is not torch.conv1d:
        return 0
    given = _arguments(node)
    value = given["weight"].meta.get("example_value")
    if value is None or _number(given["stride"]) != 1:
        return 0
    reach = (int(value.shape[-1]) - 1) * _number(given["dilation"])
    return reach if given["padding"] not in ("same", "valid") and _number(given["padding"]) == reach else 0


def _number(x: Any) -> int:
    return int(x[0] if isinstance(x, (tuple, list)) else x)
