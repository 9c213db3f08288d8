"""Effects: what each node of a graph writes to and whose memory it shows, found out by running it on meta tensors.

A name says little: `h *= 2`, `F.relu(h, inplace=True)`, `torch.mul(h, 2, out=h)` and `h.data[0] = 1` all write. PyTorch
counts the writes to a tensor (`_version`), and its operators say what they change; so a node is run and looked at.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from llcompile.patterns.boundary import NOT_SHOWN, boundary, called_back, running
from llcompile.patterns.known.capture import captured_function
from llcompile.patterns.structure.modes import is_function
from llcompile.patterns.structure.nested import leaves, mapped
from llcompile.torch_internals.nested_gradients import is_about
from llcompile.torch_internals.sizes import size_hint

Storages = frozenset[int]
_NONE: Storages = frozenset()
_UNKNOWN_SIZE = 8  # of a dimension that depends on data
# These only read, even where they do not run because what they read is not known.
_READS = {operator.getitem}
# What Dynamo writes around the operations of a vmap.
_NESTING = ("_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions")


class Effects:
    """Writes and shared memory in one graph. Memory is named by numbers; a node that was added later has none.

    Args:
        module: holds the graph's constants and bodies.
        graph: the graph.
    """

    def __init__(self, module: fx.GraphModule, graph: fx.Graph) -> None:
        self._shows: dict[fx.Node, Storages] = {}
        self._writes: dict[fx.Node, Storages] = {}
        self._acts: set[fx.Node] = set()
        self._views: dict[fx.Node, object] = {}
        self.outside: set[int] = set()
        self._count = 0
        with _on_meta() as mode:
            runner = _Runner(self, module, mode)
            for node in graph.nodes:
                runner.step(node)

    def shows(self, node: fx.Node) -> Storages:
        """The memory that the node's result lies in."""
        return self._shows.get(node, _NONE)

    def writes(self, node: fx.Node) -> Storages:
        """The memory that the node changes."""
        return self._writes.get(node, _NONE)

    def view(self, node: fx.Node) -> object:
        """Equal for two nodes that show one memory in the same way: shape, strides, offset and dtype."""
        return self._views.get(node)

    def acts(self, node: fx.Node) -> bool:
        """Whether the node does more than to compute its result and to write to memory, as far as is known."""
        return node in self._acts

    def outlives(self, storages: Storages) -> bool:
        """Whether some of the memory is there before or after the graph runs: an input, a buffer."""
        return not self.outside.isdisjoint(storages)

    def is_written(self, node: fx.Node) -> bool:
        """Whether some node changes the memory of this one."""
        shown = self.shows(node)
        return any(not shown.isdisjoint(written) for written in self._writes.values())

    def add(self, nodes: Iterable[fx.Node]) -> None:
        """Adds nodes that a pass has made. What none of them reads is there for what it does: an assertion, a write."""
        self._acts.update(node for node in nodes if not node.users)

    def new(self) -> Storages:
        """Memory of its own."""
        self._count += 1
        return frozenset((self._count,))

    def place(self, node: fx.Node, storages: Storages, like: fx.Node) -> None:
        """Says of a node that was added what memory it shows, in the same way as another node shows its own."""
        self._shows[node], self._views[node] = storages, self._views.get(like)

    def rename(self, nodes: Iterable[fx.Node], old: Storages, new: Storages) -> None:
        """Says that these nodes show and write to other memory than was thought."""
        for node in nodes:
            for table in (self._shows, self._writes):
                if not old.isdisjoint(table.get(node, _NONE)):
                    table[node] = (table[node] - old) | new


class _Runner:
    """Runs nodes on meta tensors, in order, and notes what they do."""

    def __init__(self, effects: Effects, module: fx.GraphModule, mode: _OnMeta) -> None:
        self.effects, self.module, self.mode = effects, module, mode
        self.results: dict[fx.Node, Any] = {}
        self.numbers: dict[int, Storages] = {}  # address of a storage -> its number
        self.given: dict[int, Storages] = {}  # the same for the storages of example values
        self.alive: list[Any] = []  # an address must not come up twice

    def step(self, node: fx.Node) -> None:
        effects = self.effects
        if node.op == "output":
            return
        if node.op in ("placeholder", "get_attr"):
            self._enter(node)
            return
        args = fx.map_arg((node.args, dict(node.kwargs)), lambda n: self.results.get(n))  # type: ignore[misc]
        tensors = [_bare(leaf) for leaf in leaves(args) if isinstance(leaf, Tensor)]
        if is_about(node):
            self._keep(node, self._example(node))
            effects._shows[node] = _NONE.union(*map(effects.shows, node.all_input_nodes))
            return
        with boundary(str(node.target), *NOT_SHOWN) as outcome:
            written = self._written(node, args, tensors)
        if outcome.failed:
            # A kernel that does not run here, or what depends on data: `item()`, `x[mask]`.
            self._keep(node, self._example(node))
            written = self._written_by_another(node, tensors)
        if not written and (self.results[node] is None or is_nesting(node)):
            effects._acts.add(node)
        if written:
            effects._writes[node] = _NONE.union(*map(self._storage, written))

    def _written(self, node: fx.Node, args: Any, tensors: list[Tensor]) -> list[Tensor]:
        """Runs the node; the tensors that are not afterwards what they were before."""
        before = [_state(tensor) for tensor in tensors]
        self.mode.written.clear()
        with running(node.target):
            result = _run(node, *args)
        self._keep(node, result)
        written = self.mode.written
        now = [(_address(tensor) in written, _state(tensor)) for tensor in tensors]
        return [t for t, old, (wrote, new) in zip(tensors, before, now, strict=True) if wrote or old != new]

    def _written_by_another(self, node: fx.Node, tensors: list[Tensor]) -> list[Tensor]:
        """The same for a node that does not run on meta tensors: what its schema says, else any it could write to."""
        if isinstance(node.target, HigherOrderOperator) or captured_function(node.target) is not None:
            return []  # Dynamo lets neither change what it is given
        if node.target in _READS:
            return []
        self.effects._acts.add(node)
        schema = getattr(node.target, "_schema", None)
        return [] if schema is not None and not schema.is_mutable else tensors

    def _enter(self, node: fx.Node) -> None:
        """An input or a constant. Two inputs may show one memory."""
        held: Any = self._example(node)
        source: Any = node.meta.get("example_value")
        if node.op == "get_attr":
            source = functools.reduce(getattr, str(node.target).split("."), self.module)  # type: ignore[arg-type]
            held = _empty(source) if isinstance(source, Tensor) else source
        self._keep(node, held)
        if isinstance(source, Tensor) and isinstance(held, Tensor):
            numbers = self.given.setdefault(_address(source), self.effects.shows(node))
            self.numbers[_address(held)] = numbers
            self.effects._shows[node] = numbers
            self.effects.outside.update(numbers)

    def _example(self, node: fx.Node) -> Any:
        """The result that Dynamo knows, in memory of its own."""
        example = node.meta.get("example_value")
        return mapped(lambda leaf: _empty(leaf) if isinstance(leaf, Tensor) else _number(leaf), example)

    def _keep(self, node: fx.Node, result: Any) -> None:
        self.results[node] = result
        self.alive.append(result)
        shown = [_bare(leaf) for leaf in leaves(result) if isinstance(leaf, Tensor)]
        storages = _NONE.union(*map(self._storage, shown))
        example = node.meta.get("example_value")
        # `x.to("cpu")` may be x itself on the device that it is really on.
        if isinstance(example, Tensor) and node.op.startswith("call"):
            for read in node.all_input_nodes:
                other = read.meta.get("example_value")
                if isinstance(other, Tensor) and _address(other) == _address(example):
                    storages |= self.effects.shows(read)
        self.effects._shows[node] = storages
        if len(shown) == 1:
            (x,) = shown
            self.effects._views[node] = (tuple(x.shape), x.stride(), x.storage_offset(), x.dtype)

    def _storage(self, tensor: Tensor) -> Storages:
        address = _address(tensor)
        if address not in self.numbers:
            self.numbers[address] = self.effects.new()
            self.alive.append(tensor)
        return self.numbers[address]


def _run(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _is_context(node) and not is_nesting(node):
        return None
    if isinstance(node.target, HigherOrderOperator):
        bodies = [a for a in args if isinstance(a, torch.nn.Module)]
        if len(bodies) != 1 + is_function(node):
            raise NotImplementedError(str(node.target))
        result = bodies[0](*(a for a in args if not isinstance(a, (str, torch.nn.Module))))
        return result[0] if is_function(node) else result  # the rest is for its backward
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op != "call_function" or captured_function(node.target) is not None:
        raise NotImplementedError(str(node.target))
    return node.target(*args, **kwargs)  # type: ignore[operator]


class _OnMeta(TorchDispatchMode):
    """Has everything run on the device meta: what the graph makes elsewhere, and the numbers that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, Tensor]] = {}
        self.written: set[int] = set()  # addresses of memory, as the operators' schemas have it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with called_back():
            args, kwargs = mapped(self._moved, (args, dict(kwargs or {})))
            self._note(func, args, kwargs)
        return func(*args, **kwargs)

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Notes what the call changes."""
        if func._schema.is_mutable:
            given = zip(func._schema.arguments, args, strict=False)
            pairs = [*given, *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs)]
            changed = (leaves(x) for a, x in pairs if a.alias_info is not None and a.alias_info.is_write)
            self.written.update(_address(x) for xs in changed for x in xs if isinstance(x, Tensor))

    def _moved(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("meta")
        if not isinstance(leaf, Tensor) or leaf.is_meta:
            return leaf
        return self.known.setdefault(id(leaf), (leaf, _empty(leaf)))[1]


@contextmanager
def _on_meta() -> Iterator[_OnMeta]:
    level = _level()
    try:
        with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False), _OnMeta() as mode:
            yield mode
    finally:
        while _level() > level:  # a vmap that was left early
            torch._C._functorch._vmap_decrement_nesting()


def _level() -> int:
    return int(torch._C._functorch.maybe_current_level() or 0)


def _is_context(node: fx.Node) -> bool:
    """Whether the node switches a mode, for what comes after it: it reads no tensor and has no value."""
    if node.op != "call_function" or "example_value" in node.meta:
        return False
    return not any(isinstance(n.meta.get("example_value"), Tensor) for n in node.all_input_nodes)


def is_nesting(node: fx.Node) -> bool:
    """Whether the node opens or closes a vmap."""
    return getattr(node.target, "__name__", "") in _NESTING


def _state(tensor: Tensor) -> tuple[object, ...]:
    if tensor.layout != torch.strided:
        return (tensor._version,)
    return tensor._version, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _bare(tensor: Tensor) -> Tensor:
    """The tensor inside of those that functorch wraps around it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _address(tensor: Tensor) -> int:
    """Equal for tensors that show one memory."""
    try:
        return _bare(tensor).untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse ones, and other kinds that are made of several
        return id(tensor)


def _empty(like: Tensor) -> Tensor:
    if like.layout != torch.strided:
        return torch.empty([_number(n) for n in like.shape], dtype=like.dtype, device="meta")
    sizes, strides = ([_number(n) for n in numbers] for numbers in (like.shape, like.stride()))
    return torch.empty_strided(sizes, strides, dtype=like.dtype, device="meta")


def _number(size: Any) -> Any:
    """A number for a symbolic one; what is no number is itself."""
    found = size_hint(size)
    return _UNKNOWN_SIZE if found is None and size is not None else found
