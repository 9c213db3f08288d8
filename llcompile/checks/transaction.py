"""All or nothing: a model, its example inputs and the random state are put back as they were before it was run.

A forward may fill tables, count its calls, grow lists or keep its last output. `Snapshot` remembers what the model and
the inputs hold: attributes of modules, containers and helper objects by identity, numbers of tensors bit by bit.
"""

from __future__ import annotations

import random
import sys
import types
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from llcompile.errors import LLCompileWarning

# Parameters are copied up to this many bytes in all; beyond, a change in place is noticed and said.
_COPIED = 2**30
_LARGEST = 200_000  # objects that are looked at: an attribute may lead to the user's whole program
_OPAQUE = frozenset({*sys.stdlib_module_names, "torch", "builtins", "numpy"})

# Of tensors: transformers' tensor parallel registers some in its first forward.
_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")

Restore = Callable[[], Any]


class Snapshot:
    """What a model and its inputs hold at one moment.

    Args:
        model: the module, with all below it.
        inputs: anything: tensors, containers, caches.
        earlier: a snapshot of the same model, whose copies of tensors still hold.
    """

    def __init__(self, model: nn.Module, *inputs: Any, earlier: Snapshot | None = None) -> None:
        self._restores: list[Restore] = []
        self._seen: dict[int, Any] = {}  # holds the objects, so that no id is used again
        self._storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {} if earlier is None else earlier._storages
        self._random = _random_state()
        self._cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
        self._cuda_states = [torch.cuda.get_rng_state(device) for device in self._cuda]
        parameters = [p for p in model.parameters() if not isinstance(p, nn.parameter.UninitializedParameter)]
        self._whole = sum(p.numel() * p.element_size() for p in parameters) <= _COPIED
        # A default device or the modes of a caller must have no part in copying.
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            self._visit_all([model, *inputs])

    def restore(self) -> None:
        """Puts everything back; what has not changed is not written to."""
        self.restore_random_state()
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            for restore in self._restores:
                restore()
            for now, before in self._storages.values():
                if now.untyped_storage().nbytes() != before.numel():
                    now.untyped_storage().resize_(before.numel())
                    now.set_(now.untyped_storage())
                if not torch.equal(now, before):
                    now.copy_(before)

    def restore_random_state(self) -> None:
        """The random numbers drawn next are those that were next when the snapshot was taken."""
        for restore in self._random:
            restore()
        for device, state in zip(self._cuda, self._cuda_states, strict=True):
            torch.cuda.set_rng_state(state, device)

    def _visit_all(self, pending: list[Any]) -> None:
        while pending and len(self._seen) < _LARGEST:
            value = pending.pop()
            if id(value) in self._seen or isinstance(value, (str, bytes, int, float, type(None))):
                continue
            self._seen[id(value)] = value
            pending.extend(self._visit(value))

    def _visit(self, value: Any) -> list[Any]:
        """Remembers one object; returns what it leads to."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return [*self._attributes(value), *self._class(type(value))]
        if isinstance(value, dict):
            return self._mapping(value)
        if isinstance(value, (list, deque)):
            return self._sequence(value)
        if isinstance(value, set):
            return self._set(value)
        if isinstance(value, (tuple, frozenset)):
            return [*value, *_plain_attributes(value)]
        if isinstance(value, torch.Generator):
            self._restores.append(partial(value.set_state, value.get_state()))
            return []
        if isinstance(value, types.MethodType):
            return [value.__self__, value.__func__]
        if isinstance(value, partial):
            return [value.func, value.args, value.keywords]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type) or (_is_opaque(type(value)) and not isinstance(value, types.SimpleNamespace)):
            return []
        return self._attributes(value)

    def _attributes(self, value: Any) -> list[Any]:
        held = [] if not hasattr(value, "__dict__") else self._mapping(value.__dict__)
        slots = {s for c in type(value).__mro__ for s in _slots(c) if s not in ("__dict__", "__weakref__")}
        names = [s for s in slots if hasattr(value, s)]
        for name in names:
            self._restores.append(partial(_put_slot, value, name, getattr(value, name)))
        return [*held, *(getattr(value, name) for name in names)]

    def _mapping(self, value: dict[Any, Any]) -> list[Any]:
        # By the methods of the base class: a subclass may make its values when it is asked (transformers' ACT2FN).
        before = {key: dict.__getitem__(value, key) for key in _base(value).__iter__(value)}
        self._restores.append(partial(_put_mapping, value, before))
        return list(before.values())

    def _sequence(self, value: Any) -> list[Any]:
        before = list(_base(value).__iter__(value))
        self._restores.append(partial(_put_sequence, value, before))
        return before

    def _set(self, value: set[Any]) -> list[Any]:
        self._restores.append(partial(_put_set, value, set(value)))
        return []

    def _class(self, kind: type) -> list[Any]:
        """Counters and caches that all modules of a class share, and the globals that its forward names."""
        if id(kind) in self._seen or _is_opaque(kind):
            return []
        self._seen[id(kind)] = kind
        own = {name: v for name, v in vars(kind).items() if not name.startswith("__") and _is_data(v)}
        for name, value in own.items():
            self._restores.append(partial(_put_class_attribute, kind, name, value))
        forward = getattr(kind, "forward", None)
        return [*own.values(), *([] if not isinstance(forward, types.FunctionType) else [forward])]

    def _function(self, function: types.FunctionType) -> list[Any]:
        """What a function keeps between two calls: closure cells, defaults, and data among the globals it names."""
        cells = [cell for cell in function.__closure__ or () if _is_filled(cell)]
        for cell in cells:
            self._restores.append(partial(setattr, cell, "cell_contents", cell.cell_contents))
        if _is_opaque(function):
            return []
        names = function.__globals__
        own = {n: names[n] for n in function.__code__.co_names if n in names and _is_data(names[n])}
        for name, value in own.items():
            self._restores.append(partial(_put_global, names, name, value))
        return [*(cell.cell_contents for cell in cells), *(function.__defaults__ or ()), *own.values()]

    def _tensor(self, tensor: Any) -> list[Any]:
        if isinstance(tensor, (FakeTensor, nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            return []
        self._restores += [
            partial(_put_hooks, tensor, name, dict(getattr(tensor, name, None) or {})) for name in _HOOKS
        ]
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            return [getattr(tensor, name) for name in names]
        if tensor.layout != torch.strided or tensor.is_meta:
            return []
        self._restores.append(partial(_put_geometry, tensor, tensor.detach()))
        if tensor.is_leaf:
            self._restores.append(partial(_put_gradient, tensor, tensor.grad))
        if isinstance(tensor, nn.Parameter) and not self._whole:
            self._restores.append(partial(_expect_version, tensor, tensor._version))
            return []
        storage = tensor.untyped_storage()
        if storage.data_ptr() and storage.data_ptr() not in self._storages:
            now = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._storages[storage.data_ptr()] = now, now.clone()
        return []


@contextmanager
def transaction(model: nn.Module, *inputs: Any) -> Iterator[Snapshot]:
    """Whatever is run inside leaves no trace on the model, the inputs and the random state, if it fails or not.

    Level weights that are attached inside stay: they are what a conversion is for.
    """
    snapshot = Snapshot(model, *inputs)
    try:
        yield snapshot
    finally:
        put_back(model, snapshot)


def put_back(model: nn.Module, snapshot: Snapshot) -> None:
    """Restores a snapshot that was taken before some of the model's level weights were attached; they stay."""
    from llcompile.weights import attachment

    # With what a wrapper has put around them: it keeps the copies of adapters.
    held = [(owner, name, owner._modules[name]) for owner, name, _ in attachment.attached(model)]
    snapshot.restore()
    for owner, name, child in held:
        if child is not None and owner._modules.get(name) is not child:
            attachment.attach(owner, name, child)


def _random_state() -> list[Restore]:
    restores: list[Restore] = [
        partial(torch.set_rng_state, torch.get_rng_state()),
        partial(random.setstate, random.getstate()),
    ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        restores.append(partial(numpy.random.set_state, numpy.random.get_state()))
    return restores


def _is_opaque(definition: Any) -> bool:
    """Whether a class or function is no part of the user's program."""
    return (definition.__module__ or "torch").split(".")[0] in _OPAQUE


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_data(value: Any) -> bool:
    """Whether a global or class attribute may be state, and is no part of the program's text."""
    plain = (bool, int, float, str, type(None), list, dict, set, deque, tuple, torch.Tensor)
    return isinstance(value, plain)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _plain_attributes(value: Any) -> list[Any]:
    return list(vars(value).values()) if hasattr(value, "__dict__") else []


def _base(value: Any) -> Any:
    """The builtin container that the value's class was derived from."""
    return next(kind for kind in (OrderedDict, dict, list, deque) if isinstance(value, kind))


def _put_mapping(target: dict[Any, Any], before: dict[Any, Any]) -> None:
    base = _base(target)
    if list(base.__iter__(target)) != list(before):
        base.clear(target)
    for key, value in before.items():
        if dict.get(target, key, _base) is not value:
            base.__setitem__(target, key, value)


def _put_sequence(target: Any, before: list[Any]) -> None:
    base = _base(target)
    now = list(base.__iter__(target))
    if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
        base.clear(target)
        base.extend(target, before)


def _put_set(target: set[Any], before: set[Any]) -> None:
    if target != before:
        target.clear()
        target.update(before)


def _put_slot(owner: Any, name: str, value: Any) -> None:
    if getattr(owner, name, None) is not value:
        object.__setattr__(owner, name, value)


def _put_class_attribute(kind: type, name: str, value: Any) -> None:
    if vars(kind).get(name) is not value:
        setattr(kind, name, value)


def _put_global(names: dict[str, Any], name: str, value: Any) -> None:
    if names.get(name) is not value:
        names[name] = value


def _put_geometry(tensor: torch.Tensor, before: torch.Tensor) -> None:
    """The same memory, size and strides (`resize_`, `set_` and `.data =` change them)."""
    same = tensor.data_ptr() == before.data_ptr() and tensor.shape == before.shape
    if not same or tensor.stride() != before.stride() or tensor.dtype != before.dtype:
        tensor.data = before


def _put_hooks(tensor: torch.Tensor, name: str, before: dict[int, Any]) -> None:
    now: dict[int, Any] | None = getattr(tensor, name, None)
    if now is not None and now != before:
        now.clear()
        now.update(before)


def _put_gradient(tensor: torch.Tensor, before: torch.Tensor | None) -> None:
    if tensor.grad is not before:
        tensor.grad = before


def _expect_version(tensor: torch.Tensor, version: int) -> None:
    if tensor._version != version:
        warnings.warn(
            f"the forward changes a parameter of shape {list(tensor.shape)} in place, and the model is too large for "
            "its parameters to be copied before the example run: this one keeps its value from that run.",
            LLCompileWarning,
            stacklevel=2,
        )
