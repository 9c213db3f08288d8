"""Graph breaks: what ended a graph before its function did, and why a call makes no graph at all."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX

from llcompile.torch_internals.frame import current_output

_REASONS = {"generic_jump": "it branches on the values of a tensor"}
_LEFT_ALONE = "Dynamo does not compile any of it, for example because of a checkpoint with a graph break inside"


def graph_break() -> tuple[str, str] | None:
    """What ended the graph being compiled before its function did: the reason, and `file:line in function`."""
    output = current_output()
    reason = None if output is None else output.compile_subgraph_reason
    if reason is None or not reason.graph_break:
        return None
    return _first_line(reason.reason), _user_frame(list(reason.user_stack))


def why_no_graph(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, str] | None:
    """Why Dynamo makes no graph at all of a call, and where; None where there is nothing to make one of."""
    frames = torch._dynamo.utils.curr_frame
    try:
        torch._dynamo.optimize(lambda module, _: module, nopython=True)(function)(*args, **kwargs)
    except Unsupported as error:
        return _first_line(str(error)), _user_frame(list(error.real_stack))
    except RuntimeError as error:
        if "no compiled frames" not in str(error):
            raise
        return _LEFT_ALONE, ""
    # Dynamo of torch 2.11 says nothing where it looked at no frame.
    return (_LEFT_ALONE, "") if torch._dynamo.utils.curr_frame == frames else None


def _first_line(reason: str) -> str:
    return _REASONS.get(reason.split(" ")[0], reason.split("\n")[0].strip())


def _user_frame(stack: list[Any]) -> str:
    own = str(Path(torch.__file__).parent)
    frame = next((f for f in reversed(stack) if not f.filename.startswith(own)), None)
    if frame is None:
        return ""
    name = re.sub(rf"^{TORCH_DYNAMO_RESUME_IN_PREFIX}_(\w+)_at_\d+$", r"\1", frame.name)
    return f"{frame.filename}:{frame.lineno} in {name}"
