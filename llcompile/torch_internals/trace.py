"""The trace under way: where it stands, what ended it, notes for its length, and tracing once more."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import fx
from torch._dynamo.backends.debugging import make_eager_backend_with_torch_function_modes
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import ShortenTraceback, TensorifyScalarRestartAnalysis
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
from torch._dynamo.source import ShapeEnvSource
from torch._higher_order_ops.utils import setup_compilation_env
from torch.overrides import _pop_mode_temporarily

from llcompile.torch_internals.frame import current_output, current_translator, outermost_frame

# What `restart` raises.
Restart = TensorifyScalarRestartAnalysis


def leave_out(function: Callable[..., Any]) -> None:
    """Keeps Dynamo from compiling calls of the function by themselves; it is traced where a caller is traced."""
    torch._dynamo.eval_frame.skip_code(function.__code__)


def note_trace(name: str, value: Any) -> None:
    """Notes something for the length of the trace under way."""
    output = current_output()
    if output is not None:
        setattr(output, f"_llcompile_{name}", value)


def trace_note(name: str) -> Any:
    """What `note_trace` noted, or None."""
    return getattr(current_output(), f"_llcompile_{name}", None)


def is_traced_graph(module: fx.GraphModule) -> bool:
    """Whether this is the graph that Dynamo has traced, and not a piece or a copy of it; True outside of a trace."""
    output = current_output()
    return output is None or output.graph is module.graph


def trace_position() -> dict[str, Any]:
    """Where the trace stands, as a node made now would say it: `nn_module_stack` and `stack_trace`."""
    output = current_output()
    if output is None:
        return {}
    frame = output.current_tx
    stack = "".join(torch._guards.TracingContext.extract_stack().format())
    return {"nn_module_stack": dict(getattr(frame, "nn_module_stack", {}) or {}), "stack_trace": stack}


def is_whole_frame() -> bool:
    """Whether the graph being compiled is all of a call: no break cut it off, and it is not what follows one."""
    output = current_output()
    reason = None if output is None else output.compile_subgraph_reason
    return reason is not None and not reason.graph_break and not is_resumed()


def at_compile_end(callback: Callable[[Any], None]) -> None:
    """Calls `callback` whenever a compilation of Dynamo's has ended, whether it failed or not."""
    if callback not in callback_handler.end_callbacks:
        callback_handler.register_end_callback(callback)


def restart_trace(reason: str) -> NoReturn:
    """Has Dynamo trace the frame once more, from a backend that changed a module which the trace had read."""
    translator = current_translator()
    if translator is not None:
        # Dynamo expects a second trace to take the path of the first; after the change it takes another one.
        translator.speculation_log.clear()
    raise Restart(restart_reason=reason)


@contextmanager
def surfacing(kind: type[Exception]) -> Iterator[None]:
    """Has Dynamo hand errors of a kind to the user as they are: `except StrictError` around a compiled call works.

    Anything else that a backend raises reaches the user as a BackendCompilerFailed that quotes it.
    """
    try:
        yield
    except kind as error:
        own = type(error)
        shown = type(own.__name__, (ShortenTraceback, own), {"__module__": own.__module__, "__doc__": own.__doc__})
        shown.__qualname__ = own.__qualname__
        raise shown(*error.args, first_useful_frame=None).with_traceback(error.__traceback__) from None


def traced_once(call: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """The call, traced for the backend; what Dynamo remembers about the trace dies with what is returned."""
    run = _caller(call)
    code = run.__code__.replace()  # Dynamo keeps what it compiled at the code object
    fresh = types.FunctionType(code, run.__globals__, run.__name__, None, run.__closure__)
    return torch._dynamo.optimize(backend)(fresh)  # type: ignore[no-any-return,no-untyped-call]


def _caller(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return run


def forget_guards_of_one_call() -> None:
    """Takes the guards off the frame of a `traced_once`, for a caller that calls it once: a fifth of a trace's time.

    Frames below it, which Dynamo compiles by themselves after a graph break, keep theirs: they may run again. The
    check of dynamic lengths stays, too: it also says that a length which was to be dynamic is not.
    """
    frame = outermost_frame()
    if frame is None or frame.f_code != _caller(forget_guards_of_one_call).__code__:
        return
    guards = frame.output.guards
    kept = [guard for guard in guards if isinstance(guard.originating_source, ShapeEnvSource)]
    guards.inner.clear()
    guards.inner.update(kept)


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


def is_resumed() -> bool:
    """Whether the frame being compiled is what follows a graph break."""
    frame = outermost_frame()
    return frame is not None and frame.f_code.co_name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX)


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
