"""Reach: from the frame that Dynamo traces to the modules that run in it, by identity, and to their tensors.

Dynamo keeps each object that traced code touches, with the source that leads to it: it does not matter whether the
frame holds a model in an argument, a container, a closure, or behind a decorator.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn
from torch._dynamo.exc import ObservedException, Unsupported
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import AttrSource
from torch._dynamo.variables import ConstantVariable
from torch._dynamo.variables.builder import VariableBuilder
from torch._guards import Source

from llcompile.torch_internals.frame import current_output, modules_of_frame, outermost_frame


def innermost_module() -> nn.Module | None:
    """The nn.Module whose forward is being traced right now, or None."""
    output = current_output()
    if output is None:
        return None
    stack = list(getattr(output.current_tx, "nn_module_stack", {}) or {})
    return find_module(stack[-1]) if stack else root_module()


def root_module() -> nn.Module | None:
    """The module that the outermost traced frame works for; no `nn_module_stack` names it.

    That is the module whose call is under way in Python, as a trace of that call would say; where the frame is no part
    of a module's call, the first one that it holds.
    """
    if current_output() is None:
        return None
    running = running_module()
    if running is not None and find_module(str(id(running))) is not None:
        return running
    return next((module for _, module in modules_of_frame()), None)


def running_module() -> nn.Module | None:
    """The innermost module whose call is under way in Python."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_call_impl":
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and not isinstance(module, fx.GraphModule):
                return module
        frame = frame.f_back
    return None


def innermost_holding(parameter: nn.Parameter, called: Iterable[nn.Module]) -> nn.Module | None:
    """The smallest module that holds a parameter, of those that traced code has touched and not `called`."""
    ids = {id(module) for module in called}
    fitting = [m for m in _touched().values() if id(m) not in ids and any(p is parameter for p in m.parameters())]
    return min(fitting, key=lambda module: sum(1 for _ in module.modules()), default=None)


def is_call_of_a_module() -> bool:
    """Whether the outermost traced frame is (a part of) the call of the module that `root_module` gives."""
    running = running_module()
    return running is not None and running is root_module()


def modules_asked(attribute: str) -> list[nn.Module]:
    """The modules of which traced code has read an attribute that Dynamo guards (`training`, say)."""
    output = current_output()
    guards = () if output is None else output.guards
    sources = (getattr(guard, "originating_source", None) for guard in guards)
    bases = {_text(s.base) for s in sources if isinstance(s, AttrSource) and s.member == attribute}
    return [_value(variable) for variable in _variables().values() if _text(variable.source) in bases]


def _text(source: Source) -> str:
    """A source as code; a method in older releases of torch, a property in newer ones."""
    name: Any = source.name
    return str(name() if callable(name) else name)


def modules_in(graph: fx.Graph) -> list[nn.Module]:
    """The modules that some node of the graph was traced in."""
    keys = {key.split("@")[0]: None for node in graph.nodes for key in node.meta.get("nn_module_stack") or ()}
    found = (find_module(key) for key in keys if key.isdigit())
    return [module for module in found if module is not None]


def exported_module(path: str) -> nn.Module | None:
    """The module at a path of the one exported model that the frame leads to.

    Dynamo gives the nodes of an exported model (`torch.export.export(m).module()`) the names of the export.
    """
    models = {id(module): module for module in held_modules() if isinstance(module, fx.GraphModule)}
    if len(models) != 1:
        return None
    try:
        return next(iter(models.values())).get_submodule(path)
    except AttributeError:
        return None


def find_module(key: str) -> nn.Module | None:
    """The module that a key of `nn_module_stack` (its id, with "@n" for the nth call) stands for."""
    if not key.split("@")[0].isdigit():
        return None
    wanted = int(key.split("@")[0])
    touched = _touched_as(wanted)
    if touched is not None:
        return touched
    found = _below().get(wanted)
    return None if found is None else found[0]


def path_of(module: nn.Module) -> str:
    """The dotted name of a module below the first one that the frame holds, or ""."""
    for _, root in modules_of_frame():
        for name, child in root.named_modules():
            if child is module:
                return name
    return ""


def is_touched(module: nn.Module) -> bool:
    """Whether traced code has read an attribute of the module, or called it."""
    return _touched_as(id(module)) is not None


def held_modules() -> list[nn.Module]:
    """Every module that the traced frame holds or touches."""
    return [*_touched().values(), *(module for module, _, _ in _below().values())]


def guard_modules() -> None:
    """Has Dynamo trace the frame once more for another module, though its code and its sizes are the same."""
    for source, _ in modules_of_frame():
        current_output().guards.add(source.make_guard(GuardBuilder.ID_MATCH))


_GETATTR = nn.Module.__getattr__


def _attribute(variable: Any, frame: Any, name: str) -> Any:
    """What Dynamo reads as an attribute; torch 2.15 gave the method another name.

    A module with a `__getattr__` of its own (PEFT's wrappers) has its children read where they are: in a frame that is
    resumed, Dynamo runs that method without the frame's state.
    """
    variable = getattr(variable, "realize", lambda: variable)()
    read = getattr(variable, "var_getattr", None) or variable.tp_getattro_impl
    module = _value(variable)
    if isinstance(module, nn.Module) and name in module._modules and type(module).__getattr__ is not _GETATTR:
        children = read(frame, "_modules")
        return children.call_method(frame, "__getitem__", [ConstantVariable.create(name)], {})
    return read(frame, name)


def add_tensor_input(graph: fx.Graph, owner: nn.Module, path: tuple[str, ...]) -> fx.Node:
    """Makes the tensor at `owner.<path>` an input of the graph being compiled, which Dynamo fills on each call.

    Dynamo itself reads the attributes, so the tensor is guarded, fakeified and reconstructed like any parameter that
    the traced code had read: `load_state_dict(assign=True)`, `setattr` and regional compilation see the current one.

    Raises:
        LookupError: no object of the traced frame leads to the tensor.
    """
    frame, variable = outermost_frame(), _variable(owner)
    if variable is None:
        raise LookupError(f"the compiled frame holds no reference to {type(owner).__name__}")
    try:
        for name in path:
            variable = _attribute(variable, frame, name)
        node = variable.as_proxy().node
        if "grapharg" not in node.meta:  # code asked for its device, say, and Dynamo took the input out as unused
            node = _wrapped_again(frame, variable, functools.reduce(getattr, path, owner)).as_proxy().node
    except (ObservedException, Unsupported, NotImplementedError) as error:
        raise LookupError(f"Dynamo cannot read {type(owner).__name__}.{'.'.join(path)}: {error}") from error
    if node.graph is not graph or "grapharg" not in node.meta:
        raise LookupError(f"Dynamo does not make {type(owner).__name__}.{'.'.join(path)} an input of the graph")
    node._dynamo_source = node.meta["grapharg"].source
    assert isinstance(node, fx.Node)
    return node


def _wrapped_again(frame: Any, variable: Any, tensor: Any) -> Any:
    """What Dynamo makes of a tensor that it has wrapped and whose input is gone from the graph."""
    output = frame.output
    # Under the name that it was wrapped with: Dynamo guards that tensors with a name each are not the same one.
    source = output.side_effects.id_to_variable.pop(id(tensor), variable).source
    output.guards.remove_guards_with_source(source)  # they are made again
    for known in (getattr(output, name, {}) for name in ("variable_tracker_cache", "input_source_to_var")):
        known.pop(source, None)
    return VariableBuilder(frame, source)(tensor)


def _variable(module: nn.Module) -> Any:
    """What Dynamo has of a module, made where the traced code has not touched it; None where nothing leads to it."""
    frame, variable = outermost_frame(), _variables().get(id(module))
    if variable is not None or id(module) not in _below():
        return variable
    _, root, names = _below()[id(module)]
    variable = VariableBuilder(frame, root)(_below_root(module)) if isinstance(root, Source) else root
    for name in names:
        variable = _attribute(variable, frame, name)
    return variable


def _below_root(module: nn.Module) -> nn.Module:
    _, root, _ = _below()[id(module)]
    return next(held for source, held in modules_of_frame() if source is root)


def _variables() -> dict[int, Any]:
    """By id, what Dynamo has of each module that traced code has touched."""
    return {key: v for key, v in _known().items() if _is_module(v)}


def _touched_as(key: int) -> nn.Module | None:
    """The touched module with an id; not by way of `_touched`, which looks at all that Dynamo knows."""
    variable = _known().get(key)
    found: nn.Module | None = _value(variable) if variable is not None and _is_module(variable) else None
    return found


def _known() -> Mapping[int, Any]:
    output = current_output()
    known: Mapping[int, Any] = {} if output is None else output.side_effects.id_to_variable
    return known


def _is_module(variable: Any) -> bool:
    return variable.source is not None and isinstance(_value(variable), nn.Module)


def _value(variable: Any) -> Any:
    return vars(variable).get("value")  # `value` is computed, and may fail, in other kinds of variables


def _touched() -> dict[int, nn.Module]:
    return {key: _value(variable) for key, variable in _variables().items()}


def _below() -> dict[int, tuple[nn.Module, Any, tuple[str, ...]]]:
    """By id, the modules below those that the frame touches or holds: the module, where to start, and the names."""
    output = current_output()
    if output is None:
        return {}
    variables = _variables()
    count, kept = getattr(output, "_llcompile_below", (-1, {}))
    found: dict[int, tuple[nn.Module, Any, tuple[str, ...]]] = kept
    if count != len(variables):  # kept until the trace has touched more
        memo: set[nn.Module] = set()
        found = {}
        roots: list[tuple[Any, nn.Module]] = [(variable, _value(variable)) for variable in variables.values()]
        for root, module in (*roots, *modules_of_frame()):
            for name, child in module.named_modules(memo):
                found.setdefault(id(child), (child, root, tuple(name.split(".")) if name else ()))
        output._llcompile_below = (len(variables), found)
    return found
