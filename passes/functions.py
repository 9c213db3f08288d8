"""Functions: a mixer inside of an autograd.Function becomes plain code, if the backward is its forward's gradient.

With gradients Dynamo makes one higher-order call of such a Function, with a graph for each direction; without gradients
it traces the forward into the program. Level weights must act in both. So the forward is written into the program where
the backward agrees with autograd on random numbers; where it does not (it scales or stops a gradient), the mixer is
declined.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from llcompile.passes.session import Session
from llcompile.patterns import reasons
from llcompile.patterns.agreement import BUDGETS, apart, gradients, undisturbed
from llcompile.patterns.graph.regions import Region
from llcompile.patterns.graph.run import run
from llcompile.patterns.records import Declined
from llcompile.patterns.structure.find import find
from llcompile.patterns.structure.nested import leaves, mapped
from llcompile.torch_internals.places import module_of, user_line
from llcompile.torch_internals.sizes import size_hint

_BUDGET = BUDGETS["float32 constants"]
_DRAWS = 2
_MODES = ("_set_grad_enabled",)


def functions(session: Session) -> int:
    """Writes every autograd.Function that holds a mixer into the program; returns how many there were."""
    calls = [(region, node) for region in session.regions for node in region.graph.nodes if _is_function(node)]
    written = [_write(session, region, node) for region, node in calls]
    if any(written):
        gone = {node for (_, node), done in zip(calls, written, strict=True) if done}
        session.regions = [region for region in session.regions if region.call not in gone]
        session.given = frozenset(node for region in session.regions for node in region.graph.nodes)
    return sum(written)


def _is_function(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "autograd_function_apply"


def _write(session: Session, region: Region, node: fx.Node) -> bool:
    """Puts the forward in the place of one call; False where it is to stay."""
    bodies = [_body(region, argument) for argument in node.args[:2]]
    operands = [argument for argument in node.args[2:] if isinstance(argument, fx.Node)]
    if None in bodies or len(operands) < len(node.args) - 2 or node.kwargs.get("non_differentiable_idx"):
        return False
    forward, backward = bodies
    if not find(Region(_without_modes(forward))).found:
        return False
    if not _is_gradient(forward, backward, operands):
        key, path = module_of(node.meta)
        record = Declined.because(reasons.OWN_BACKWARD(), session.name(key, path), user_line(node.meta))
        session.refused.append(record)
        return False
    return _inline(region, node, forward, operands)


def _body(region: Region, argument: Any) -> Any:
    held = getattr(region.module, str(argument.target), None) if getattr(argument, "op", "") == "get_attr" else None
    return held if isinstance(held, fx.GraphModule) else None


def _without_modes(body: fx.GraphModule) -> fx.GraphModule:
    """The body as it will be written: Dynamo stops gradients in it, because they are the backward's."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in body.graph.nodes:
        if not _is_mode(node):
            made[node] = graph.node_copy(node, lambda n: made[n])
    return fx.GraphModule(body, graph)


def _inline(region: Region, node: fx.Node, forward: fx.GraphModule, operands: list[fx.Node]) -> bool:
    if any(n.op in ("get_attr", "call_module") for n in forward.graph.nodes):
        return False
    made: dict[fx.Node, fx.Node] = dict(zip(forward.graph.find_nodes(op="placeholder"), operands, strict=True))
    with region.graph.inserting_before(node):
        for inner in forward.graph.nodes:
            if inner.op in ("placeholder", "output") or _is_mode(inner):
                continue
            copy = made[inner] = region.graph.node_copy(inner, lambda n: made[n])
            for key in ("nn_module_stack", "source_fn_stack"):
                if key in node.meta:
                    copy.meta.setdefault(key, node.meta[key])
    outputs = fx.map_arg(_results(forward)[0], lambda n: made[n])
    for user in list(node.users):
        assert user.target is operator.getitem, f"{user.format_node()} reads the results of a Function whole"
        user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index,arg-type]
        region.graph.erase_node(user)
    region.graph.erase_node(node)
    return True


def _results(body: fx.GraphModule) -> Any:
    """What the forward returns: its outputs, and what it saves for the backward."""
    (output,) = body.graph.find_nodes(op="output")
    return output.args[0]


def _is_mode(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") in _MODES


def _is_gradient(forward: fx.GraphModule, backward: fx.GraphModule, operands: list[fx.Node]) -> bool:
    """Whether the backward is the gradient of the forward, on random numbers in float64."""
    try:
        with undisturbed(), torch.enable_grad():
            agrees = torch._dynamo.disable(_agrees)
            return all(agrees(forward, backward, operands, seed) for seed in range(_DRAWS))
    except Exception:  # whatever does not run by itself is not proved
        return False


def _agrees(forward: fx.GraphModule, backward: fx.GraphModule, operands: list[fx.Node], seed: int) -> bool:
    values = _draws(operands, torch.Generator().manual_seed(seed))
    given = [values[node] for node in operands]
    bases = [x for node, x in values.items() if isinstance(x, Tensor) and x.is_leaf and x.requires_grad]
    theirs = _Applied.apply(_runner(forward), _runner(backward), *given)  # type: ignore[no-untyped-call]
    ours = _runner(forward)(*given)[0]
    pairs = [(x, y) for x, y in zip(theirs, ours, strict=True) if isinstance(y, Tensor) and y.requires_grad]
    applied, written = [x for x, _ in pairs], [y for _, y in pairs]
    slopes = apart(gradients(applied, bases), gradients(written, bases), slight=0.0)
    return bool(pairs) and max(apart(applied, written, slight=0.0), slopes) <= _BUDGET


class _Applied(torch.autograd.Function):
    """The Function as it was traced."""

    @staticmethod
    def forward(ctx: Any, ahead: Callable[..., Any], back: Callable[..., Any], *operands: Any) -> Any:
        outputs, saved = ahead(*operands)
        ctx.back, ctx.kept = back, saved
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        found = ctx.back(*gradients, *ctx.kept)
        return None, None, *(found if isinstance(found, (tuple, list)) else (found,))


def _draws(operands: Iterable[fx.Node], generator: torch.Generator) -> dict[fx.Node, Any]:
    """Numbers for the operands; what is a view of another one, say, is computed from that."""
    nodes = list(operands)
    values: dict[fx.Node, Any] = {}
    for node in sorted(set(nodes)):
        computed = node.op in ("call_function", "call_method") and bool(node.all_input_nodes)
        if computed and all(n in values for n in node.all_input_nodes):
            values[node] = _call(node, values)
        else:
            values[node] = _draw(node.meta["example_value"], generator)
    return values


def _draw(example: Any, generator: torch.Generator) -> Any:
    if not isinstance(example, Tensor):
        return size_hint(example)
    shape = [int(size_hint(n)) for n in example.shape]
    if not example.is_floating_point():
        return torch.randint(0, 2, shape, generator=generator).to(example.dtype)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def _runner(body: fx.GraphModule) -> Callable[..., Any]:
    """The body as a function of its operands in float64, in the caller's grad mode."""

    def body_of(*operands: Any) -> Any:
        values: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
        for node in body.graph.nodes:
            if node.op in ("call_function", "call_method") and not _is_mode(node):
                values[node] = _call(node, values)
        return fx.map_arg(_results(body), lambda n: values[n])

    return body_of


def _call(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])  # type: ignore[misc]
    args, kwargs = mapped(_wide, (args, kwargs))
    if any(isinstance(a, torch.device) and a.type != "cpu" for a in leaves((args, kwargs))):
        raise NotImplementedError("it makes tensors on a device")
    return run(node, args, kwargs)


def _wide(value: Any) -> Any:
    narrow = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if narrow else value
