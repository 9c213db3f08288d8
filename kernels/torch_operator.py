"""Makes an operator of torch out of functions: its values, its shapes and its gradient.

`torch.library.custom_op` does the same, but the autograd kernel that it writes refuses to run below
`torch.func.grad` and drops the tangents of forward mode without a word. So this file has a kernel of its own, and all
that it takes from torch's private interfaces is in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import _C, Tensor
from torch._compile import _disable_dynamo
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled, unpack_dual
from torch.autograd.function import _SingleLevelFunction

from llcompile.errors import DerivativeError

NAMESPACE = "llcompile"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
# Where the values are computed; other keys of the dispatcher are those of tracers, of subclasses of tensors, and so on.
_DEVICES = (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)

Values = Callable[..., Any]
_values: dict[Any, Values] = {}
Save = Callable[[Any, tuple[Any, ...], Any], None]  # (ctx, inputs, output)
Gradient = Callable[..., tuple[Any, ...]]  # (ctx, *gradients of the outputs) -> a gradient for each input


def define(
    schema: str,
    values: Values,
    shapes: Callable[..., Any],
    save: Save | None = None,
    gradient: Gradient | None = None,
) -> None:
    """Register an operator of `torch.ops.llcompile`. Every function gets all arguments, defaults included.

    Args:
        schema: its name, arguments and results, as torch writes them.
        values: computes the outputs, which must be new tensors. An operator that changes a tensor in place, by its
            schema, cannot be differentiated, and says so.
        shapes: makes empty outputs, from shapes and dtypes alone.
        save: keeps on `ctx` what `gradient` needs.
        gradient: a gradient for each input, None where there is none. Without it the operator cannot be differentiated,
            and says so (`DerivativeError`) when that is tried.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    defaults = [argument.default_value for argument in operator._schema.arguments]

    def complete(function: Callable[..., Any], before: int = 0) -> Callable[..., Any]:
        return lambda *given: function(*given, *defaults[len(given) - before :])

    # Dynamo must not look into the functions: called between two graphs of a user's, they are frames like any other.
    _values[operator] = complete(values)
    _library.impl(name, _disable_dynamo(_values[operator]), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", complete(shapes), lib=_library)
    changed = [i for i, argument in enumerate(operator._schema.arguments) if argument.is_write]
    in_place, functional = (operator, values, changed), (operator, values, save, gradient)
    kernel = _autograd_in_place(*in_place) if changed else _autograd(*functional)
    recorded = complete(kernel, before=1)  # behind the dispatcher's keys
    _library.impl(name, _disable_dynamo(recorded), "Autograd", with_keyset=True)
    if changed:
        counted = complete(_counting(operator, changed), before=1)
        _library.impl(name, _disable_dynamo(counted), "ADInplaceOrView", with_keyset=True)


def run_values(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What `operator` computes on a device, whatever stands between it and there."""
    rest = operator._schema.arguments[len(args) :]
    return _values[operator](*args, *(kwargs.get(x.name, x.default_value) for x in rest))


def _autograd_in_place(operator: Any, values: Values, changed: list[int]) -> Callable[..., Any]:
    """Of an operator that changes a tensor: as nothing is recorded, no input may require a gradient."""

    def kernel(keys: Any, *inputs: Any) -> Any:
        _refuse_tangents(operator, inputs)
        if torch.is_grad_enabled() and _C._any_requires_grad(*inputs):
            raise DerivativeError(
                f"{operator} changes its state in place and has no derivative, but an input requires a gradient; "
                "decode under torch.no_grad(), or use the operator that returns a new state, loglinear_attention_step"
            )
        if not _values_next(keys):
            return _below(operator, keys, inputs)
        with _C._AutoDispatchBelowADInplaceOrView():
            if keys.has(_C.DispatchKey.ADInplaceOrView):  # tensors of inference mode have no versions
                _count(inputs, changed)
            return values(*inputs)

    return kernel


def _counting(operator: Any, changed: list[int]) -> Callable[..., Any]:
    """Has autograd know that tensors were changed, for what was saved of them earlier."""

    def kernel(keys: Any, *inputs: Any) -> Any:
        _count(inputs, changed)
        with _C._AutoDispatchBelowADInplaceOrView():
            return operator.redispatch(keys & _C._after_ADInplaceOrView_keyset, *inputs)

    return kernel


def _count(inputs: tuple[Any, ...], changed: list[int]) -> None:
    for i in changed:
        torch.autograd.graph.increment_version(inputs[i])


def _autograd(operator: Any, values: Values, save: Save | None, gradient: Gradient | None) -> Callable[..., Any]:
    """The kernel that stands above the values: it records what the backward pass needs."""
    function = _function(operator, save, gradient)

    def kernel(keys: Any, *inputs: Any) -> Any:
        _refuse_tangents(operator, inputs)
        if not (torch.is_grad_enabled() and _C._any_requires_grad(*inputs)):
            if not _values_next(keys):
                return _below(operator, keys, inputs)
            with _C._AutoDispatchBelowAutograd():
                return values(*inputs)
        # The dispatcher has one level of torch.func's at hand here, never more.
        with enable_single_level_autograd_function():
            return function.apply(keys, *inputs)

    return kernel


def _function(operator: Any, save: Save | None, gradient: Gradient | None) -> Any:
    """The autograd function of `operator`; its first argument are the keys that the dispatcher came with."""

    def forward(keys: Any, *inputs: Any) -> Any:
        # A function's forward has both modes off, and what is below may be another level of torch.func's.
        with torch.enable_grad(), _set_fwd_grad_enabled(True):
            return _below(operator, keys, inputs)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if save is not None:
            save(ctx, inputs[1:], output)

    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        if gradient is None:
            raise DerivativeError(
                f"{operator} has no derivative: it is a gradient itself, and a second derivative was requested "
                "(create_graph=True, a gradient penalty, torch.func.hessian). llcompile's operators have first "
                "derivatives only; take second ones of the model as it is without the backend (llcompile.revert, or "
                "the model not compiled), where the mixer is plain torch"
            )
        return (None, *gradient(ctx, *gradients))

    functions: dict[str, Callable[..., Any]] = {
        "forward": forward,
        "setup_context": setup_context,
        "backward": backward,
    }
    name = f"{operator._opname.title().replace('_', '')}Function"
    return type(name, (_SingleLevelFunction,), {key: staticmethod(f) for key, f in functions.items()})


def _below(operator: Any, keys: Any, inputs: tuple[Any, ...]) -> Any:
    """What the dispatcher has below autograd."""
    with _C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys & _C._after_autograd_keyset, *inputs)


def _values_next(keys: Any) -> bool:
    """Whether the dispatcher would go from autograd to the values at once, a way that takes longer than a call.

    For an operator that changes tensors, counting that lies between.
    """
    return (keys & _C._after_ADInplaceOrView_keyset).highestPriorityTypeId() in _DEVICES


def _refuse_tangents(operator: Any, inputs: tuple[Any, ...]) -> None:
    """Forward mode would go on with the values alone, that is with a derivative of 0."""
    if forward_ad._current_level < 0:  # no tensor has a tangent
        return
    for x in inputs:
        if isinstance(x, Tensor) and unpack_dual(x).tangent is not None:
            raise DerivativeError(
                f"{operator} has no forward-mode derivative, and an input of shape {list(x.shape)} carries a tangent "
                "(torch.func.jvp, jacfwd, linearize, hessian, torch.autograd.forward_ad); use reverse mode "
                "(backward, torch.func.grad, vjp, jacrev), or the model as it is without the backend"
            )
