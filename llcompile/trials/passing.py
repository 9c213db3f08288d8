"""State passing: whether a model can begin a batch with the states that the batch before has left.

Trained like that, a linear model copes with longer sequences than those of its training (arXiv 2507.02782), which
makes it the control that a conversion must beat there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llcompile.trials.outputs import logits_of

_EQUAL = 1e-3  # relative, in float32: a passed state may be rounded otherwise
_DEPTH = 6  # of objects in a cache


@dataclass(frozen=True)
class Protocol:
    """How a model takes and gives a state.

    Args:
        keyword: of the forward, for the state.
        flag: the keyword that asks for the state.
        attribute: of the output; "" where the output is a pair (logits, state).
    """

    keyword: str
    flag: str
    attribute: str = ""

    def call(self, model: nn.Module, tokens: Tensor, state: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The output and the state after it, which starts from `state` (None: an empty one)."""
        output = model(tokens, **inputs, **{self.flag: True, self.keyword: state})
        return output, getattr(output, self.attribute) if self.attribute else output[1]


PROTOCOLS = (
    Protocol("initial_state", "return_state"),
    Protocol("cache", "use_cache", "cache"),
    Protocol("cache_params", "use_cache", "cache_params"),
    Protocol("past_key_values", "use_cache", "past_key_values"),
)


def protocol_of(model: nn.Module) -> Protocol | None:
    """The first protocol whose keywords the model's forward has."""
    takes = inspect.signature(model.forward).parameters
    return next((p for p in PROTOCOLS if p.keyword in takes and p.flag in takes), None)


def refusal(model: nn.Module, tokens: Tensor, inputs: Mapping[str, Any]) -> str:
    """Why the model cannot pass a state, as measured on a batch [B, T]; "" where it can.

    The batch is read in one pass, and in two halves with the state passed between them: the second half's outputs
    must be the same, other than those without a state, and a backward pass must run.
    """
    protocol = protocol_of(model)
    if protocol is None:
        known = ", ".join(f"{p.keyword} with {p.flag}" for p in PROTOCOLS)
        return f"the model's forward takes no state (looked for {known})"
    if inputs:
        return f"the batches have further inputs ({', '.join(inputs)}), which may hold for a whole sequence only"
    if tokens.shape[1] < 4:
        return f"sequences of {tokens.shape[1]} tokens are too short to try it"
    was = model.training
    try:
        return _measured(model.eval(), protocol, tokens) or _trained(model.train(was), protocol, tokens)
    except Exception as error:  # whatever the user's model raises for a state
        return f"with `{protocol.keyword}`, the model raised {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    finally:
        model.train(was)


@torch.no_grad()
def _measured(model: nn.Module, protocol: Protocol, tokens: Tensor) -> str:
    middle = tokens.shape[1] // 2
    whole = logits_of(protocol.call(model, tokens, None, {})[0])[:, middle:]
    _, state = protocol.call(model, tokens[:, :middle], None, {})
    size = _numbers(state)
    passed, state = protocol.call(model, tokens[:, middle:], state, {})
    alone, _ = protocol.call(model, tokens[:, middle:], None, {})
    scale = whole.abs().max().clamp(min=1e-12)
    error = float((logits_of(passed) - whole).abs().max() / scale)
    effect = float((logits_of(alone) - whole).abs().max() / scale)
    if _numbers(state) > size:
        return f"its state grows with the sequence ({size:,} numbers, then {_numbers(state):,}): it has a cache of keys"
    if not error <= _EQUAL:
        return (
            f"it takes `{protocol.keyword}`, but a sequence that is continued from a state differs from the whole one "
            f"by {error:.1e} (limit {_EQUAL:g}; without the state by {effect:.1e})"
        )
    if effect <= _EQUAL:
        return f"its state has no effect: without it the outputs differ by {effect:.1e} (needed: more than {_EQUAL:g})"
    return ""


def _trained(model: nn.Module, protocol: Protocol, tokens: Tensor) -> str:
    _, state = protocol.call(model, tokens, None, {})
    output, _ = protocol.call(model, tokens, detached(state), {})
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(logits_of(output).float().square().mean(), parameters, allow_unused=True)
    return ""


def detached(state: Any, depth: int = _DEPTH) -> Any:
    """The state without its history; tensors that an object holds are replaced in it."""
    if isinstance(state, Tensor):
        return state.detach().clone()  # a cache that is written in place must not change what autograd has kept
    if isinstance(state, (list, tuple)) and not hasattr(state, "_fields"):
        return type(state)(detached(x, depth - 1) for x in state)
    if isinstance(state, dict):
        return {name: detached(x, depth - 1) for name, x in state.items()}
    if depth > 0 and hasattr(state, "__dict__"):
        for name, x in vars(state).items():
            if isinstance(x, (Tensor, list, tuple, dict)) or type(x).__module__.startswith("transformers.cache"):
                setattr(state, name, detached(x, depth - 1))
    return state


def _numbers(state: Any, depth: int = _DEPTH) -> int:
    if isinstance(state, Tensor):
        return state.numel()
    if depth == 0 or (not isinstance(state, (list, tuple, dict)) and not hasattr(state, "__dict__")):
        return 0
    inside = state if isinstance(state, (list, tuple)) else (state if isinstance(state, dict) else vars(state)).values()
    return sum(_numbers(x, depth - 1) for x in inside)
