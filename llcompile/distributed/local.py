"""Whether the rest of a graph works on each token alone, found by running it twice.

First on the example, then on the second half of its tokens moved to the front, with other numbers behind them. What
works on each token alone gives these tokens the same results in both runs. A convolution, softmax attention, a token
shift, a pool over tokens or positions that the model makes itself do not. The operator stands aside in both runs, and
halos hold the tokens that came before in the first run, as they do on two processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from llcompile.errors import DistributedError
from llcompile.kernels import spread
from llcompile.torch_internals.inputs import input_value, is_parameter, module_tensors
from llcompile.torch_internals.places import module_of, user_line
from llcompile.torch_internals.sizes import size_hint

_SHORTEST = 8  # tokens: half of them hold the longest usual convolution
_OPERATORS = ("loglinear_attention", "loglinear_attention_step")


def check(module: fx.GraphModule) -> None:
    """Raise `DistributedError` where a node of a rewritten graph reads tokens of other shards, by its place."""
    size = _tokens(module)
    if size is None:
        return
    batch, length = size
    if length < _SHORTEST:
        raise DistributedError(
            f"the first call inside of context_parallel has {length} tokens on this process, and at least {_SHORTEST} "
            "are needed to check that nothing else in the model reads tokens of other processes; start with longer ones"
        )
    inputs = [_example(node) for node in module.graph.find_nodes(op="placeholder")]
    half = length // 2
    with torch.no_grad(), spread.run_by(None):  # nothing is sent
        whole = _Run(module, half)
        whole.run(*_copied(inputs))
        moved = _Run(module, half, whole.values)
        moved.run(*_copied(_moved(module, inputs, batch, length)))
    for node in module.graph.nodes:
        a, b = whole.values.get(node), moved.values.get(node)
        if node.op != "placeholder" and _differ(a, b, batch, length):
            module_name = module_of(node.meta)[1] or "(root)"
            raise DistributedError(
                f"{module_name} reads tokens of other processes, or makes positions itself, at "
                f"{user_line(node.meta) or node.name} ({node.name}, shape {list(a.shape)}): "  # type: ignore[union-attr]
                "under context_parallel only our operator and causal nn.Conv1d do so rightly. Pass positions as an "
                "input, compute a loss that shifts labels outside of the model, or run this model on whole sequences"
            )


class _Run(fx.Interpreter):
    """One run, with the operator replaced by a sum of its operands' features at each token.

    `before` are the values of the run that had other tokens in front.
    """

    def __init__(self, module: fx.GraphModule, half: int, before: Mapping[fx.Node, Any] | None = None) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.half, self.before = half, before
        self.values: dict[fx.Node, Any] = {}
        self.node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Keep a copy: the graph may write to it later."""
        self.node = n
        result = super().run_node(n)
        self.values[n] = result.clone() if isinstance(result, Tensor) else result
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operator, halos and dropout aside."""
        name = getattr(target, "__name__", "")
        packet = getattr(target, "_overloadpacket", target)
        if str(packet).removeprefix("llcompile.") in _OPERATORS:
            return _operator(packet, args, kwargs)
        if name == "_add_halo":
            return target(*args, **kwargs) if self.before is None else self._with_halo(args)
        if "dropout" in name:
            return args[0]
        return super().call_function(target, args, kwargs)

    def _with_halo(self, args: tuple[Any, ...]) -> Tensor:
        """The convolution of the tokens that were before these in the other run."""
        y, x, weight, reach, dilation, groups = args
        assert self.node is not None
        assert self.before is not None
        earlier = self.before[self.node.args[1]][..., self.half - reach : self.half]  # type: ignore[index]
        halo = torch.nn.functional.pad(earlier.to(x.dtype), (0, reach))
        first = torch.nn.functional.conv1d(halo, weight, None, 1, 0, dilation, groups)
        return y + torch.nn.functional.pad(first, (0, y.shape[-1] - reach))


def _operator(packet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    names = [a.name for a in packet.default._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    v = given["v"]
    per_token = [t for t in given.values() if isinstance(t, Tensor) and t.dim() > 2 and t.shape[:2] == v.shape[:2]]
    mixed = torch.stack([t.float().flatten(2).mean(2) for t in per_token if t is not v]).sum(0)  # [B, T]
    o = (v.float() + mixed[..., None, None]).to(v.dtype)
    state = packet(*args, **kwargs)[1]  # what a cache is given; no token reads it here
    return o, torch.zeros_like(state)


def _tokens(module: fx.GraphModule) -> tuple[int, int] | None:
    """Batch and length of the first call of the operator."""
    for node in module.graph.nodes:
        if node.op == "call_function" and str(getattr(node.target, "_overloadpacket", node.target)) == (
            "llcompile.loglinear_attention"
        ):
            shape = node.args[2].meta["example_value"].shape
            return int(size_hint(shape[0])), int(size_hint(shape[1]))
    return None


def _example(node: fx.Node) -> Any:
    held = input_value(node)
    return size_hint(held if held is not None else node.meta["grapharg"].example)


def _moved(module: fx.GraphModule, inputs: list[Any], batch: int, length: int) -> list[Any]:
    """The inputs with their second half of tokens in front, and other numbers behind it."""
    kept = module_tensors()
    return [
        x if is_parameter(x) or id(x) in kept or not _has_tokens(x, batch, length) else _other(x, length)
        for x in inputs
    ]


def _has_tokens(x: Any, batch: int, length: int) -> bool:
    return isinstance(x, Tensor) and x.dim() >= 2 and x.shape[1] == length and x.shape[0] in (1, batch)


def _other(x: Tensor, length: int) -> Tensor:
    first, second = x[:, : length // 2], x[:, length // 2 :]
    draw = torch.randperm(first.shape[1], device=x.device)
    return torch.cat([second, first[:, draw]], 1)


def _copied(inputs: list[Any]) -> list[Any]:
    return [x.detach().clone() if isinstance(x, Tensor) and not is_parameter(x) else x for x in inputs]


def _differ(a: Any, b: Any, batch: int, length: int) -> bool:
    """Whether tokens have other results in the second run; of what has no tokens, it is not asked."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not _has_tokens(a, batch, length):
        return False
    if a.shape != b.shape or torch.equal(a, b):  # made of no input
        return False
    a, b = a[:, length // 2 :].double(), b[:, : length - length // 2].double()
    scale = a.abs().max().clamp(min=1e-30)
    return not bool(((a - b).abs() <= _tolerance(a) * scale).all() | (a.isnan() == b.isnan()).logical_not().any())


def _tolerance(x: Tensor) -> float:
    return 1e-3
