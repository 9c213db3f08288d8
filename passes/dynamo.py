"""Everything that touches Dynamo's private interfaces, in one place.

Written against torch 2.11 to 2.13; tests/passes/test_dynamo.py exercises each function, so that a torch release that
moves something fails there and not in a user's model.
"""

from __future__ import annotations

import functools
import re
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch._dynamo.backends.debugging import make_eager_backend_with_torch_function_modes
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import ShortenTraceback, TensorifyScalarRestartAnalysis, Unsupported
from torch._dynamo.guards import install_guard
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
from torch._higher_order_ops.utils import setup_compilation_env
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import _pop_mode_temporarily

from llcompile.passes.owner_input import HELD
from llcompile.passes.reach import current_translator, held_modules

# What `restart` raises.
Restart = TensorifyScalarRestartAnalysis

# What Dynamo calls some breaks among friends.
_EVAL_FRAME = torch._dynamo.eval_frame.__file__
_REASONS = {"generic_jump": "it branches on the values of a tensor"}


def tracing_backend() -> tuple[Any, dict[str, Any]]:
    """The backend of the trace under way, without the wrappers around it, and the keyword arguments for it."""
    translator = current_translator()
    return (None, {}) if translator is None else unwrapped(translator.output.compiler_fn)


def unwrapped(function: Any) -> tuple[Any, dict[str, Any]]:
    """A backend without what wraps it (torch.compile, DDP's optimizer, a partial), and its keyword arguments."""
    keywords: dict[str, Any] = {}
    for _ in range(12):  # wrappers are nested a few deep
        given = getattr(function, "keywords" if isinstance(function, functools.partial) else "kwargs", None)
        keywords = {**keywords, **given} if isinstance(given, dict) else keywords
        inner = next((f for read in _INNER if (f := read(function)) is not None), None)
        if inner is None:
            break
        function = inner
    return function, keywords


# How each kind of wrapper holds the backend that it calls.
_INNER: tuple[Callable[[Any], Any], ...] = (
    lambda wrapper: getattr(wrapper, "_torchdynamo_orig_backend", None),
    lambda wrapper: getattr(wrapper, "compiler_fn", None),
    lambda wrapper: getattr(getattr(wrapper, "__self__", None), "backend_compile_fn", None),
    lambda wrapper: wrapper.func if isinstance(wrapper, functools.partial) else None,
)


def leave_out(function: Callable[..., Any]) -> None:
    """Keeps Dynamo from compiling calls of the function by themselves; it is traced where a caller is traced."""
    torch._dynamo.eval_frame.skip_code(function.__code__)


def mark_backend(name: str, value: Any) -> None:
    """Notes something about the backend of the trace under way, for its later traces."""
    translator = current_translator()
    if translator is not None:
        setattr(_outermost(translator.output), name, value)


def backend_mark(name: str) -> Any:
    """What `mark_backend` noted about the backend of the trace under way, or None."""
    translator = current_translator()
    return None if translator is None else getattr(_outermost(translator.output), name, None)


def _outermost(output: Any) -> Any:
    """The object that stands for one torch.compile: it lives as long as the compiled function."""
    function = output.compiler_fn
    function = getattr(function, "_llcompile_watched", function)
    inner = getattr(function, "_torchdynamo_orig_backend", None)
    held = function if inner is None else inner
    return getattr(held, "__self__", held)  # a bound method takes no attributes


def note_trace(name: str, value: Any) -> None:
    """Notes something for the length of the trace under way."""
    translator = current_translator()
    if translator is not None:
        setattr(translator.output, f"_llcompile_{name}", value)


def trace_note(name: str) -> Any:
    """What `note_trace` noted, or None."""
    translator = current_translator()
    return None if translator is None else getattr(translator.output, f"_llcompile_{name}", None)


def is_traced_graph(module: fx.GraphModule) -> bool:
    """Whether this is the graph that Dynamo has traced, and not a piece or a copy of it."""
    translator = current_translator()
    return translator is None or translator.output.graph is module.graph


def around_backend(around: Callable[[Callable[..., Any], fx.GraphModule, list[Any]], Any]) -> None:
    """Has `around(backend, graph, inputs)` called in the place of the backend of the trace under way."""
    translator = current_translator()
    output: Any = None if translator is None else translator.output
    if output is None or output.compiler_fn is None or hasattr(output.compiler_fn, "_llcompile_watched"):
        return
    given = output.compiler_fn

    def watched(module: fx.GraphModule, inputs: list[Any], **configs: Any) -> Any:
        return around(functools.partial(given, **configs), module, inputs)

    watched.__name__ = getattr(given, "__name__", type(given).__name__)
    watched._torchdynamo_orig_backend = given  # type: ignore[attr-defined]
    watched._llcompile_watched = given  # type: ignore[attr-defined]
    output.compiler_fn = watched


def backend_below() -> tuple[Any, dict[str, Any]]:
    """The backend of the innermost compiled call that is under way in Python, and its keyword arguments."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename == _EVAL_FRAME:
            return unwrapped(getattr(frame.f_locals.get("self"), "callback", None))
        frame = frame.f_back
    return None, {}


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
    except RuntimeError as error:
        if "no compiled frames" not in str(error):
            raise
        return "Dynamo leaves it to Python as a whole, for example a checkpoint with a graph break inside", ""
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


def at_compile_end(callback: Callable[[Any], None]) -> None:
    """Calls `callback` whenever a compilation of Dynamo's has ended, whether it failed or not."""
    if callback not in callback_handler.end_callbacks:
        callback_handler.register_end_callback(callback)


def restart(reason: str) -> NoReturn:
    """Has Dynamo trace the frame once more, from a backend that changed a module which the trace had read."""
    translator = current_translator()
    if translator is not None:
        # Dynamo expects a second trace to take the path of the first; after the change it takes another one.
        translator.speculation_log.clear()
    raise Restart(restart_reason=reason)


def surfaced(error: Exception) -> Exception:
    """The error as one that Dynamo hands to the user as it is: `except StrictError` around a compiled call works.

    Anything else that a backend raises reaches the user as a BackendCompilerFailed that quotes it.
    """
    kind = type(error)
    shown = type(kind.__name__, (ShortenTraceback, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
    shown.__qualname__ = kind.__qualname__
    return shown(*error.args, first_useful_frame=None)  # type: ignore[no-any-return]


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


def is_handed_in_twice(node: fx.Node) -> bool:
    """Whether a placeholder's tensor came in under several names in this call (Dynamo has guarded that it does)."""
    translator, name = current_translator(), input_name(node)
    if translator is None or not name:
        return False
    for guard in translator.output.guards:
        create = guard.create_fn
        if getattr(getattr(create, "func", None), "__name__", "") == "DUPLICATE_INPUT":
            other = getattr(create, "keywords", {}).get("source_b")
            if name in (guard.name, getattr(other, "name", None)):
                return True
    return False


def is_resumed() -> bool:
    """Whether the frame being compiled is what follows a graph break."""
    translator = current_translator()
    frame = None if translator is None else translator.output.root_tx or translator
    return frame is not None and frame.f_code.co_name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX)


def is_parameter(held: Any) -> bool:
    """Whether a tensor of the user's program is a parameter, or stands in one's place for a `functional_call`."""
    translator = current_translator()
    if isinstance(held, nn.Parameter) or translator is None or not isinstance(held, torch.Tensor):
        return isinstance(held, nn.Parameter)
    output: Any = translator.output
    if not hasattr(output, "_llcompile_parameters"):  # kept for the length of the trace
        tensors = (t for module in held_modules() for t in module._parameters.values())
        output._llcompile_parameters = {id(t) for t in tensors if t is not None and not isinstance(t, nn.Parameter)}
    return id(held) in output._llcompile_parameters


def module_tensors() -> frozenset[int]:
    """Ids of the tensors that the frame's modules hold and do not train: buffers, and plain attributes."""
    translator = current_translator()
    if translator is None:
        return frozenset()
    output: Any = translator.output
    if not hasattr(output, "_llcompile_tensors"):  # kept for the length of the trace
        modules = {id(module): module for module in held_modules()}.values()
        held = (t for m in modules for t in _held_by(m))
        tensors = (t for t in held if isinstance(t, torch.Tensor) and not isinstance(t, nn.Parameter))
        output._llcompile_tensors = frozenset(id(_real(tensor)) for tensor in tensors)
    return output._llcompile_tensors  # type: ignore[no-any-return]


def _held_by(module: nn.Module) -> Iterator[Any]:
    """What a module holds between calls: not its input, which level weights hold during one."""
    yield from module._buffers.values()
    yield from (value for name, value in vars(module).items() if name != HELD)


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


_CHEAP = 1 << 14  # numbers that are compared in microseconds


class SameNumbers:
    """A check that a tensor holds the numbers that it held; they are compared only where it may have changed."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.numbers = tensor.detach().clone()
        self.seen = self._mark(tensor)

    def __call__(self, tensor: Any) -> bool:
        """Whether these are the numbers."""
        if isinstance(tensor, FakeTensor):  # torch.export, which has put it in the place of what was read
            return tensor.shape == self.numbers.shape and tensor.dtype == self.numbers.dtype
        # Writes through `.data` are not counted: what costs little is always compared.
        cheap = tensor.device.type == "cpu" and tensor.numel() <= _CHEAP
        if not cheap and self._mark(tensor) == self.seen and self.seen[1] >= 0:
            return True
        same = tensor.shape == self.numbers.shape and tensor.dtype == self.numbers.dtype
        same = same and tensor.device == self.numbers.device and self._equal(tensor.detach())
        if same:
            self.seen = self._mark(tensor)
        return same

    def _equal(self, tensor: torch.Tensor) -> bool:
        if tensor.is_floating_point() or tensor.is_complex():
            return torch.allclose(tensor, self.numbers, rtol=0, atol=0, equal_nan=True)
        return torch.equal(tensor, self.numbers)

    def _mark(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Where the numbers are, and how often they were written; tensors of inference mode do not count."""
        return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def guard_numbers(node: fx.Node, tensor: torch.Tensor) -> bool:
    """Has Dynamo trace the frame again once the tensor that fills a placeholder holds other numbers than these.

    False where there is no trace under way that the guard could belong to.
    """
    source = getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)
    if source is None or torch._guards.TracingContext.try_get() is None:
        return False
    install_guard(source.make_guard(partial(_guard_numbers, check=SameNumbers(tensor))))
    return True


def _guard_numbers(builder: Any, guard: Any, check: SameNumbers) -> None:
    code = [f"the numbers of {guard.name} are those that the graph was compiled for"]
    manager = builder.get_guard_manager(guard)
    try:
        manager.add_lambda_guard(check, code, guard.user_stack)
    except TypeError:  # before torch 2.12 there was no stack
        manager.add_lambda_guard(check, code)


def hold(size: Any) -> bool:
    """Makes a size that may vary a number: Dynamo guards it, and traces the frame again where it is another one.

    False where the user demands that it varies (`mark_dynamic`, a dimension of an export).
    """
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return True
    node = size.node
    if not node.has_hint() or node.expr.free_symbols & _demanded(node.shape_env):
        return False
    if isinstance(size, torch.SymInt):
        int(size)
    elif isinstance(size, torch.SymFloat):
        float(size)
    else:
        bool(size)
    return True


def _demanded(shape_env: Any) -> set[Any]:
    """The symbols of sizes that must not become numbers."""
    found: set[Any] = set()
    for tracked in getattr(shape_env, "tracked_fakes", None) or ():
        constraints = getattr(getattr(tracked, "symbolic_context", None), "constraint_sizes", None) or ()
        for dim, constraint in enumerate(constraints):
            if constraint is not None and not getattr(constraint, "warn_only", False):
                size = tracked.fake.shape[dim]
                found |= size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()
    return found


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


@contextmanager
def without_traces_of_transforms() -> Iterator[None]:
    """An error inside of torch.func.grad, whose graph opens and closes a level by nodes, leaves no level open, and
    hooks on saved tensors as allowed as they were."""
    functorch, autograd = torch._C._functorch, torch._C._autograd
    level = functorch.maybe_current_level() or 0
    allowed = autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    try:
        yield
    except BaseException:
        while (functorch.maybe_current_level() or 0) > level:
            functorch.pop_dynamic_layer_stack()
        if allowed:
            autograd._saved_tensors_hooks_enable()
        raise
