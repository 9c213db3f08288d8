"""Forgets what Dynamo compiled with a module that has changed since in a way that Dynamo does not guard."""

from __future__ import annotations

import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch._dynamo import convert_frame
from torch._dynamo.guards import DeletedGuardManagerWrapper

from llcompile.torch_internals.backends import unwrapped

# Compiled code that was forgotten last: another thread may be in the middle of it.
_forgotten: deque[Any] = deque(maxlen=256)

# In the source of a guard that every traced call of a module brings along: no module has a global hook.
_CALLS_A_MODULE = "__import_torch_dot_nn_dot_modules_dot_module'"


def forget_compiled(kinds: Iterable[type], is_passing: Callable[[Any], bool]) -> None:
    """Has every frame that was compiled with a module of these classes compiled again, when it is called next.

    Dynamo guards no hooks, so that what was compiled before a model was converted would run on and ignore its level
    weights. Nothing else is forgotten: other threads run other models' compiled code.

    Args:
        kinds: classes of the modules that have changed.
        is_passing: whether code compiled for a backend is for nobody any more, and may be dropped.
    """
    changed = frozenset(kinds)
    with convert_frame.compile_lock:
        for code in [code for ref in list(convert_frame.input_codes.seen) if (code := ref()) is not None]:
            entries = eval_frame._debug_get_cache_entry_list(code)
            passing = entries and all(is_passing(unwrapped(entry.backend)[0]) for entry in entries)
            stale = [entry for entry in entries if changed and _may_run(entry.guard_manager, code, changed)]
            if passing or (stale and not _others_run(code)):
                eval_frame.reset_code(code)  # the graphs no longer count towards the limit of recompilations
                continue
            for entry in stale:
                _invalidate(entry)


def forget_others(kinds: Iterable[type], is_ours: Callable[[Any], bool]) -> None:
    """Has what other backends compiled with a module of these classes compiled again, from inside of a compilation.

    Args:
        kinds: classes of the modules that have changed.
        is_ours: whether a backend's code has seen the change, or guards it.
    """
    changed = frozenset(kinds)
    with convert_frame.compile_lock:
        for code in [code for ref in list(convert_frame.input_codes.seen) if (code := ref()) is not None]:
            for entry in eval_frame._debug_get_cache_entry_list(code):
                if not is_ours(unwrapped(entry.backend)[0]) and _may_run(entry.guard_manager, code, changed):
                    _invalidate(entry)


def _may_run(manager: Any, code: types.CodeType, kinds: frozenset[type]) -> bool:
    """Whether code that was compiled under these guards may run a module of one of the classes.

    The guards lead to each module that traced code has called. Where a `guard_filter_fn` has left them out, nobody can
    tell which modules there were: then the code is taken for one that runs them.
    """
    if isinstance(manager, DeletedGuardManagerWrapper):
        return False
    nodes = list(_nodes(manager.root))
    types_ = {node.get_type_of_guarded_value() for node in nodes}
    if not kinds.isdisjoint(types_):
        return True
    if any(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in types_):
        return False
    sources = {node.get_source() for node in nodes}
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    is_filtered = any(f"L['{name}']" not in sources for name in (*arguments, *code.co_freevars))
    return is_filtered or any(_CALLS_A_MODULE in source for source in sources)


def _nodes(root: Any) -> Iterator[Any]:
    """The guarded values of a tree of guards; what a container holds is reached by its keys (a ModuleList's layers)."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.get_child_managers()
        if hasattr(node, "get_key_value_managers"):
            waiting += [held for pair in node.get_key_value_managers().values() for held in pair if held is not None]


def _others_run(code: types.CodeType) -> bool:
    """Whether another thread may be in the middle of finding or running compiled code of this code object."""
    own, folder = threading.get_ident(), str(Path(torch._dynamo.__file__).parent)
    for thread, top in sys._current_frames().items():
        frame: types.FrameType | None = None if thread == own else top
        while frame is not None:
            name = frame.f_code.co_filename
            if frame.f_code is code or name.startswith(folder) or name == "<string>":  # guards in Python are of no file
                return True
            frame = frame.f_back
    return False


def _invalidate(entry: Any) -> None:
    """Has compiled code never be found again; whoever runs it goes on."""
    state = entry.guard_manager.extra_state
    if state is not None:
        _forgotten.append((entry.guard_manager, entry.code))
        state.invalidate(entry, DeletedGuardManagerWrapper("a module that it runs got level weights of llcompile"))
