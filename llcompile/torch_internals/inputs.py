"""The inputs of a graph and the objects of the user's program that they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from llcompile.torch_internals.frame import current_output, kept_for_the_trace
from llcompile.torch_internals.owner_input import HELD
from llcompile.torch_internals.reach import held_modules


def fake_mode_of(graph: fx.Graph) -> Any:
    """The fake mode that the example values of the graph belong to."""
    values = (node.meta.get("example_value") for node in graph.nodes)
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)


@contextmanager
def tracing_fake_mode(graph: fx.Graph) -> Iterator[None]:
    """Lets Dynamo's builders make values of the graph's own fake mode.

    Dynamo hands backends a fresh mode; a value of one mode cannot meet a value of another.
    """
    context, mode = torch._guards.TracingContext.try_get(), fake_mode_of(graph)
    if context is None or mode is None:
        yield
        return
    fresh, context.fake_mode = context.fake_mode, mode
    try:
        yield
    finally:
        context.fake_mode = fresh


def hold_tensor(module: fx.GraphModule, path: tuple[str, ...], tensor: torch.Tensor) -> fx.Node:
    """Makes a tensor a constant of the graph, for a graph that is looked at and does not run.

    `path` is where its owner would hold it; the node's meta says so as `held_as`.
    """
    name = "_".join(path)
    while hasattr(module, name):
        name += "_"
    setattr(module, name, tensor)
    first = next(iter(module.graph.nodes))
    with module.graph.inserting_before(first):
        node = module.graph.create_node("get_attr", name)  # `get_attr` itself warns of a tensor that is no buffer
    node.meta["held_as"] = ".".join(path)
    node.meta["example_value"] = fake_mode_of(module.graph).from_tensor(tensor, static_shapes=True)
    return node


def graph_inputs(graph: fx.Graph) -> list[Any]:
    """The example inputs that belong to the graph's placeholders, in order."""
    return [node.meta["grapharg"].example for node in graph.find_nodes(op="placeholder")]


def input_value(node: fx.Node) -> Any:
    """The object that the user's program holds for a placeholder (a Parameter, say), or None."""
    if node.meta.get("stands_for") is not None:
        return node.meta["stands_for"]
    argument = node.meta.get("grapharg")
    try:
        return None if argument is None else _real(argument.example)
    except AssertionError:  # Dynamo has erased the example
        return None


def input_name(node: fx.Node) -> str:
    """How the compiled frame reaches a placeholder's value: "L['model']._modules['head']._parameters['weight']"."""
    source = getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)
    return "" if source is None else str(source.name)


def is_number(node: fx.Node) -> bool:
    """Whether a placeholder stands for a number of the user's program, which Dynamo hands in as a tensor.

    It does with `dynamic=True`, for floats that modules hold or calls are given.
    """
    argument = node.meta.get("grapharg")
    return bool(getattr(argument, "pass_arg_as_tensor", False)) and not getattr(argument, "is_tensor", True)


def is_handed_in_twice(node: fx.Node) -> bool:
    """Whether a placeholder's tensor came in under several names in this call (Dynamo has guarded that it does)."""
    output, name = current_output(), input_name(node)
    for guard in output.guards if output is not None and name else ():
        create = guard.create_fn
        if getattr(getattr(create, "func", None), "__name__", "") == "DUPLICATE_INPUT":
            other = getattr(create, "keywords", {}).get("source_b")
            if name in (guard.name, getattr(other, "name", None)):
                return True
    return False


def is_parameter(held: Any) -> bool:
    """Whether a tensor of the user's program is a parameter, or stands in one's place in a module that the frame holds.

    That is so while a `functional_call` from outside runs the frame; one that is traced itself leaves modules alone.
    """
    return isinstance(held, nn.Parameter) or (isinstance(held, torch.Tensor) and id(held) in _stand_ins())


@kept_for_the_trace
def _stand_ins() -> set[int]:
    """Ids of the tensors that stand in the place of a parameter."""
    tensors = (t for module in held_modules() for t in module._parameters.values())
    return {id(t) for t in tensors if t is not None and not isinstance(t, nn.Parameter)}


@kept_for_the_trace
def module_tensors() -> frozenset[int]:
    """Ids of the tensors that the frame's modules hold and do not train: buffers, and plain attributes."""
    modules = {id(module): module for module in held_modules()}.values()
    held = (t for m in modules for t in _held_by(m))
    tensors = (t for t in held if isinstance(t, torch.Tensor) and not isinstance(t, nn.Parameter))
    return frozenset(id(_real(tensor)) for tensor in tensors)


def _held_by(module: nn.Module) -> Iterator[Any]:
    """What a module holds between calls: not its input, which level weights hold during one."""
    yield from module._buffers.values()
    yield from (value for name, value in vars(module).items() if name != HELD)


def _real(value: Any) -> Any:
    """The tensor that a fake one stands for, where that is known: torch.export puts fake ones into the model."""
    output = current_output()
    if not isinstance(value, FakeTensor) or output is None:
        return value
    if not hasattr(output, "_llcompile_real"):  # kept for the length of the trace
        converter = value.fake_mode.fake_tensor_converter
        real = list(converter.meta_converter.describer.lookup_tensor)
        output._llcompile_real = {id(converter._get_memo(tensor)): tensor for tensor in real}
    return output._llcompile_real.get(id(value), value)
