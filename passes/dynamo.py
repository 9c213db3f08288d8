"""Everything that touches Dynamo's private interfaces, in one place.

Written against torch 2.11 to 2.13; tests/passes/test_dynamo.py exercises each function, so that a torch release that
moves something fails there and not in a user's model.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch._dynamo.backends.debugging import make_eager_backend_with_torch_function_modes
from torch._dynamo.exc import ShortenTraceback, TensorifyScalarRestartAnalysis, Unsupported
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
from torch._dynamo.source import AttrSource, GlobalSource, LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables.builder import VariableBuilder
from torch._guards import Source
from torch._higher_order_ops.utils import setup_compilation_env
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import _pop_mode_temporarily

# What Dynamo calls some breaks among friends.
_REASONS = {"generic_jump": "it branches on the values of a tensor"}


def current_translator() -> InstructionTranslator | None:
    """The frame that Dynamo is tracing at this moment in this thread, or None."""
    try:
        return InstructionTranslator.current_tx()
    except AttributeError:
        return None


def tracing_backend() -> tuple[Any, dict[str, Any]]:
    """The backend of the trace under way, without Dynamo's wrappers, and the keyword arguments it will be given."""
    translator = current_translator()
    function: Any = translator.output.compiler_fn if translator is not None else None
    keywords: dict[str, Any] = {}
    for _ in range(8):  # wrappers are nested two or three deep
        keywords = getattr(function, "kwargs", None) or keywords
        inner = getattr(function, "_torchdynamo_orig_backend", None) or getattr(function, "compiler_fn", None)
        if inner is None:
            break
        function = inner
    return function, keywords


def innermost_module() -> nn.Module | None:
    """The nn.Module whose forward is being traced right now, or None."""
    translator = current_translator()
    if translator is None:
        return None
    frame = translator.output.current_tx
    stack = list(getattr(frame, "nn_module_stack", {}) or {})
    return find_module(stack[-1]) if stack else root_module()


def root_module() -> nn.Module | None:
    """The module that the outermost traced frame works on, its first argument; no `nn_module_stack` names it.

    That is `self` of a compiled module's forward, under whatever name a decorator gave it.
    """
    translator = current_translator()
    if translator is None:
        return None
    frame = translator.output.root_tx or translator
    arguments = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    if frame.f_code.co_name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX):
        # What follows a graph break takes the values that were on the stack first, then the locals by name.
        arguments = tuple(sorted(arguments, key=lambda name: name != "self"))
        modules = [name for name in arguments if isinstance(frame.f_locals.get(name), nn.Module)]
        arguments = (*modules, *arguments)
    owner = frame.f_locals.get(arguments[0]) if arguments else None
    return owner if isinstance(owner, nn.Module) else None


def position() -> dict[str, Any]:
    """Where the trace stands, as a node made now would say it: `nn_module_stack` and `stack_trace`."""
    translator = current_translator()
    if translator is None:
        return {}
    frame = translator.output.current_tx
    stack = "".join(torch._guards.TracingContext.extract_stack().format())
    return {"nn_module_stack": dict(getattr(frame, "nn_module_stack", {}) or {}), "stack_trace": stack}


def is_whole_frame() -> bool:
    """Whether the graph being compiled is all of a call: no break cut it off, and it is not what follows one."""
    translator = current_translator()
    if translator is None:
        return False
    frame, reason = translator.output.root_tx or translator, translator.output.compile_subgraph_reason
    after_break = frame.f_code.co_name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX)
    return reason is not None and not reason.graph_break and not after_break


def graph_break() -> tuple[str, str] | None:
    """What ended the graph being compiled before its function did: the reason, and `file:line in function`."""
    translator = current_translator()
    reason = None if translator is None else translator.output.compile_subgraph_reason
    if reason is None or not reason.graph_break:
        return None
    return _first_line(reason.reason), _user_frame(list(reason.user_stack))


def no_graph(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, str] | None:
    """Why Dynamo makes no graph at all of a call, and where; None where there is nothing to make one of."""
    try:
        torch._dynamo.optimize(lambda module, _: module, nopython=True)(function)(*args, **kwargs)
    except Unsupported as error:
        return _first_line(str(error)), _user_frame(list(error.real_stack))
    return None


def _first_line(reason: str) -> str:
    return _REASONS.get(reason.split(" ")[0], reason.split("\n")[0].strip())


def _user_frame(stack: list[Any]) -> str:
    own = str(Path(torch.__file__).parent)
    frame = next((f for f in reversed(stack) if not f.filename.startswith(own)), None)
    if frame is None:
        return ""
    name = re.sub(rf"^{TORCH_DYNAMO_RESUME_IN_PREFIX}_(\w+)_at_\d+$", r"\1", frame.name)
    return f"{frame.filename}:{frame.lineno} in {name}"


def modules_in(graph: fx.Graph) -> list[nn.Module]:
    """The modules that some node of the graph was traced in."""
    keys = {key.split("@")[0]: None for node in graph.nodes for key in node.meta.get("nn_module_stack") or ()}
    found = (find_module(key) for key in keys if key.isdigit())
    return [module for module in found if module is not None]


def find_module(key: str) -> nn.Module | None:
    """The module that a key of `nn_module_stack` (its id, with "@n" for the nth call) stands for."""
    found = _modules_by_id().get(int(key.split("@")[0]))
    return None if found is None else found[0]


def restart(reason: str) -> NoReturn:
    """Has Dynamo trace the frame once more, from a backend that changed a module which the trace had read."""
    translator = current_translator()
    if translator is not None:
        # Dynamo expects a second trace to take the path of the first; after the change it takes another one.
        translator.speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason=reason)


def surfaced(error: Exception) -> Exception:
    """The error as one that Dynamo hands to the user as it is: `except StrictError` around a compiled call works.

    Anything else that a backend raises reaches the user as a BackendCompilerFailed that quotes it.
    """
    kind = type(error)
    shown = type(kind.__name__, (ShortenTraceback, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
    shown.__qualname__ = kind.__qualname__
    return shown(*error.args, first_useful_frame=None)  # type: ignore[no-any-return]


def forget_compiled() -> None:
    """Drops all compiled code, which does not notice a hook that a module gets later (Dynamo guards no hooks).

    Otherwise what another backend compiled before the model was converted would run on and ignore the level weights.
    """
    torch._dynamo.reset()


def traced_once(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced for the backend; what Dynamo remembers about the trace dies with what is returned."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()  # Dynamo keeps what it compiled at the code object
    fresh = types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
    return torch._dynamo.optimize(backend)(fresh)  # type: ignore[no-any-return,no-untyped-call]


@contextmanager
def below_export() -> Iterator[Callable[..., Any]]:
    """Lets Dynamo trace while torch.export records; yields the backend whose graphs are recorded as they run.

    It is what higher-order operations do there. Export's modes for functions of torch are put aside for the trace,
    which would trace them, too.
    """
    with ExitStack() as stack:
        count = torch._C._len_torch_function_stack()
        modes = [stack.enter_context(_pop_mode_temporarily()) for _ in range(count)]
        stack.enter_context(setup_compilation_env())
        yield make_eager_backend_with_torch_function_modes(modes[::-1])


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


def add_tensor_input(graph: fx.Graph, owner: nn.Module, path: tuple[str, ...]) -> fx.Node:
    """Makes the tensor at `owner.<path>` an input of the graph being compiled, which Dynamo fills on each call.

    Dynamo's own builder makes it, so it is guarded, fakeified and reconstructed like any parameter that the traced
    code had read: `load_state_dict(assign=True)`, `setattr` and regional compilation see the current tensor.

    Raises:
        LookupError: no object of the traced frame leads to `owner`.
    """
    translator = current_translator()
    located = _modules_by_id().get(id(owner))
    if translator is None or located is None:
        raise LookupError(f"no local, closure or global variable of the compiled frame leads to {type(owner).__name__}")
    _, source, names = located
    tensor: Any = owner
    for name in names:
        source = AttrSource(source, name)
    for name in path:
        tensor = getattr(tensor, name)
        source = AttrSource(source, name)
    variable = VariableBuilder(translator.output.root_tx or translator, source)(tensor)  # type: ignore[arg-type]
    node: fx.Node = variable.as_proxy().node
    if node.graph is not graph:
        raise LookupError(f"Dynamo put {source.name} into another graph")
    node._dynamo_source = node.meta["grapharg"].source
    return node


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
        node = module.graph.get_attr(name)
    node.meta["held_as"] = ".".join(path)
    node.meta["example_value"] = fake_mode_of(module.graph).from_tensor(tensor, static_shapes=True)
    return node


def example_inputs(graph: fx.Graph) -> list[Any]:
    """The example inputs that belong to the graph's placeholders, in order."""
    return [node.meta["grapharg"].example for node in graph.find_nodes(op="placeholder")]


def input_value(node: fx.Node) -> Any:
    """The object that the user's program holds for a placeholder (a Parameter, say), or None."""
    argument = node.meta.get("grapharg")
    try:
        return None if argument is None else _real(argument.example)
    except AssertionError:  # Dynamo has erased the example
        return None


def input_name(node: fx.Node) -> str:
    """How the compiled frame reaches a placeholder's value: "L['model']._modules['head']._parameters['weight']"."""
    source = getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)
    return "" if source is None else str(source.name)


def module_tensors() -> frozenset[int]:
    """Ids of the tensors that the frame's modules hold and do not train: buffers, and plain attributes."""
    translator = current_translator()
    if translator is None:
        return frozenset()
    output: Any = translator.output
    if not hasattr(output, "_llcompile_tensors"):  # kept for the length of the trace
        modules = [root for _, root in _root_modules()]
        held = (t for root in modules for m in root.modules() for t in (*m._buffers.values(), *vars(m).values()))
        tensors = (t for t in held if isinstance(t, torch.Tensor) and not isinstance(t, nn.Parameter))
        output._llcompile_tensors = frozenset(id(_real(tensor)) for tensor in tensors)
    return output._llcompile_tensors  # type: ignore[no-any-return]


def _real(value: Any) -> Any:
    """The tensor that a fake one stands for, where that is known: torch.export puts fake ones into the model."""
    translator = current_translator()
    if not isinstance(value, FakeTensor) or translator is None:
        return value
    output: Any = translator.output
    if not hasattr(output, "_llcompile_real"):  # kept for the length of the trace
        converter = value.fake_mode.fake_tensor_converter
        real = list(converter.meta_converter.describer.lookup_tensor)
        output._llcompile_real = {id(converter._get_memo(tensor)): tensor for tensor in real}
    return output._llcompile_real.get(id(value), value)


def hint(size: Any, factor: int = 1) -> Any:
    """The number that a symbolic size had in the example, or None where it depends on data.

    With a `factor`, the number that it would have if all sizes that may vary were that many times as large.
    """
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return size
    if not size.node.has_hint():
        return None
    if factor == 1:
        return size.node.hint
    values = size.node.shape_env.backed_var_to_val
    found = size.node.expr.subs({symbol: value * factor for symbol, value in values.items()})
    return int(found) if found.is_Integer else size.node.hint


def dims_by_stride(x: torch.Tensor) -> list[int] | None:
    """The dimensions from the outermost in memory to the innermost; None where the tensor is not dense."""
    order = sorted(range(x.dim()), key=lambda dim: (-int(hint(x.stride(dim)) or 0), dim))
    return order if x.permute(order).is_contiguous() else None


def is_symbolic(graph: fx.Graph) -> bool:
    """Whether some size of the graph's inputs may vary from call to call."""
    inputs = [node.meta.get("example_value") for node in graph.find_nodes(op="placeholder")]
    sizes = [size for x in inputs for size in (x.shape if isinstance(x, torch.Tensor) else (x,))]
    return any(isinstance(size, torch.SymInt) for size in sizes)


def substitute(function: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Has Dynamo trace `replacement` wherever traced code calls `function`; eager calls are untouched."""
    torch.compiler.substitute_in_graph(function, skip_signature_check=True)(replacement)  # type: ignore[arg-type]


def unsubstituted(function: types.FunctionType) -> types.FunctionType:
    """A copy of `function` that Dynamo does not know to be substituted."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return copy


def _modules_by_id() -> dict[int, tuple[nn.Module, Source, tuple[str, ...]]]:
    """Every module that the outermost frame leads to: the module, its root's source, and the names below the root."""
    translator = current_translator()
    if translator is None:
        return {}
    output: Any = translator.output
    # Kept for the length of the trace: a lookup per layer must not walk all layers.
    if not hasattr(output, "_llcompile_modules"):
        output._llcompile_modules = {
            id(module): (module, source, tuple(name.split(".")) if name else ())
            for source, root in reversed(_root_modules())
            for name, module in root.named_modules()
        }
    return output._llcompile_modules  # type: ignore[no-any-return]


def _root_modules() -> list[tuple[Source, nn.Module]]:
    """The modules that the outermost traced frame holds: its locals, closure cells and globals."""
    translator = current_translator()
    if translator is None:
        return []
    frame = translator.output.root_tx or translator
    cells = set(frame.f_code.co_freevars) | set(frame.f_code.co_cellvars)
    found: list[tuple[Source, nn.Module]] = []
    for name, value in frame.f_locals.items():
        if isinstance(value, types.CellType):
            value = value.cell_contents
        if isinstance(value, nn.Module):
            source = LocalSource(name, is_input=name not in cells, is_derefed_cell_contents=name in cells)
            found.append((source, value))
        owner = getattr(value, "__self__", None)
        if isinstance(owner, nn.Module):
            found.append((AttrSource(LocalSource(name), "__self__"), owner))
    for name in frame.f_code.co_names:
        value = frame.f_globals.get(name)
        if isinstance(value, nn.Module):
            found.append((GlobalSource(name), value))
    return found
