"""Record: reads a Dynamo graph as a Program by running it on meta tensors, functionalised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._C._functorch import _unwrap_functional_tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from llcompile.patterns.boundary import NotKnown, boundary, called_back, running
from llcompile.patterns.graph.regions import Region
from llcompile.patterns.known.capture import captured_function
from llcompile.patterns.structure.modes import Mode, Modes, is_function
from llcompile.patterns.structure.nested import leaves, mapped
from llcompile.patterns.structure.placed import cuts_of, own_numbers
from llcompile.patterns.structure.program import Op, Program, Value
from llcompile.patterns.structure.squared import squared
from llcompile.torch_internals.captured import is_captured
from llcompile.torch_internals.dtensors import is_move
from llcompile.torch_internals.inputs import input_value, is_parameter, module_tensors
from llcompile.torch_internals.nested_gradients import is_about, is_around
from llcompile.torch_internals.sizes import size_hint

aten = torch.ops.aten
# Results of these are their first argument, as far as numbers go.
_SAME = {aten.alias.default}
_CONSTANTS = {aten.lift_fresh.default, aten.lift_fresh_copy.default}


_FILLS = {
    "zeros_like": 0,
    "ones_like": 1,
    "empty_like": 0,
    "full_like": None,
    "new_zeros": 0,
    "new_ones": 1,
    "new_empty": 0,
    "new_full": None,
    "fill": None,  # what `fill_` and `zero_` leave behind
    "zero": 0,
}


# Tensors of one number; two of one shape are two, as what is written to one of them says nothing of the other's axes.
_FILLED = {aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format}
_FEW_NUMBERS = 1 << 16  # of an argument, which may be a decay
_TURNS = 1 << 14  # a longer loop is left alone
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
_SOME_RATE = 0.5  # no subgraph has dropout in it, so any rate stands for all


class _Unknown:
    """Stands for what cannot be had without numbers (`item()`, `nonzero`), and for all that follows from it."""


def record(region: Region, factor: int = 1) -> Program:
    """The region's graph as a program. Nodes that do not run on meta tensors are opaque operations in it.

    Args:
        region: the graph.
        factor: symbolic sizes are this many times what they were in the example.
    """
    recorder = _Recorder(region, factor)
    grad = torch.is_grad_enabled()
    try:
        with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False), recorder.mode:
            torch.func.functionalize(recorder.run)()
    finally:
        torch.set_grad_enabled(grad)
    return recorder.program


class _Mode(TorchDispatchMode):
    """Notes every ATen call below functionalisation."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with called_back():
            return self.recorder.note(func, args, dict(kwargs or {}))


class _Recorder:
    def __init__(self, region: Region, factor: int = 1) -> None:
        self.region, self.factor = region, factor
        self.mode = _Mode(self)
        self.program = Program()
        self.node: fx.Node | None = None
        self.pending: Value | None = None  # the value that the next `empty_strided` stands for
        self.modes = Modes(region.graph, torch.is_grad_enabled())
        self.program.grad = self.modes.now.grad
        self.now = self.modes.now  # of the operation that is noted next
        self.known: dict[int, Value] = {}
        self.folds = False  # numbers of counters are computed, not recorded
        self.twins: dict[Any, Op] = {}
        self.alive: list[Tensor] = []  # an id must not come up twice
        self.squared = squared(region.graph)

    def run(self) -> tuple[()]:
        """Runs the graph node by node."""
        results: dict[fx.Node, Any] = {}
        held = module_tensors()
        made: dict[fx.Node, Mode] = {}
        for node in self.region.graph.nodes:
            self.node = node
            self._read(node, results, made)
            if node.op == "output" or self.modes.switch(node):
                continue
            self.now = made[node] = self.modes.now
            results[node] = self._typed(node, self._result(node, results, held))
            value = self._value(results[node])
            if value is not None:
                value.node = value.node or node
                self.program.results[node] = value
        return ()

    def _typed(self, node: fx.Node, result: Any) -> Any:
        """The result in the dtype that it has: autocast does nothing on meta tensors."""
        example = node.meta.get("example_value")
        if not isinstance(result, Tensor) or not isinstance(example, Tensor) or result.dtype == example.dtype:
            return result
        return result.to(example.dtype) if _is_float(result) and _is_float(example) else result

    def _read(self, node: fx.Node, results: Mapping[fx.Node, Any], made: Mapping[fx.Node, Mode]) -> None:
        for live_in in node.all_input_nodes:
            # A view of what was written to since is made anew, in the mode in which it was made.
            self.now = made.get(live_in, self.modes.now)
            value = self._value(results.get(live_in))
            if value is not None:
                self.program.reads[node, live_in] = value
                if self._is_unnamed(value, live_in) and self.modes.now == made.get(live_in):
                    self.program.unnamed.setdefault(value, (node, live_in))

    def _is_unnamed(self, value: Value, node: fx.Node) -> bool:
        """Whether the value is what a write through a view has left in a node, as large as that was."""
        example = node.meta.get("example_value")
        whole = isinstance(example, Tensor) and self._sizes_known(example.shape) == value.shape
        return value.node is None and value.op is not None and whole

    def _result(self, node: fx.Node, results: Mapping[fx.Node, Any], module_tensors: frozenset[int]) -> Any:
        if node.op == "placeholder":
            return self._input(node, module_tensors)
        if node.op == "get_attr":
            return self._attribute(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: results[n])  # type: ignore[misc]
        if is_about(node) or is_around(node):
            return self._opaque(node, args, kwargs)
        if is_move(node):
            return self._moved(node, results, args, kwargs)
        if node.target in _DROPOUTS:  # with dynamic=True its rate is a number that Dynamo reads from an input
            rate = lambda n: isinstance(n.meta.get("example_value"), torch.SymFloat)  # noqa: E731
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _SOME_RATE if rate(n) else results[n])  # type: ignore[misc]
        if not any(isinstance(a, _Unknown) for a in leaves((args, kwargs))):
            for run in self._ways(node):
                with boundary(str(node.target), NotKnown):
                    return run(node, self._apart(node, results, args), kwargs)
        return self._opaque(node, args, kwargs)

    def _moved(self, node: fx.Node, results: Mapping[fx.Node, Any], args: Any, kwargs: Any) -> Any:
        """What a DTensor is made of or taken apart to; see `placed`."""
        cuts, x = cuts_of(node), results.get(node.all_input_nodes[0])
        if cuts is None or self._value(x) is None:
            return self._opaque(node, args, kwargs)
        for dim, start, length in cuts:
            x = x.narrow(dim, int(self._concrete(start)), int(self._concrete(length)))  # type: ignore[union-attr]
        return x if cuts else self._alias(node, x)

    def _apart(self, node: fx.Node, results: Mapping[fx.Node, Any], args: Any) -> Any:
        """The arguments of a product; each use of a tensor that is multiplied with itself is a value of its own.

        Queries, keys and values may be one tensor; the mixer is proved for any three.
        """
        again = {n for n in self.squared.get(node, ()) if self._is_whole(n, results.get(n))}
        if not again:
            return args
        return fx.map_arg(node.args, lambda n: self._alias(n, results[n]) if n in again else results[n])

    def _is_whole(self, node: fx.Node, result: Any) -> bool:
        """Whether a tensor that depends on the input is what its node returned."""
        value = self._value(result)
        return value is not None and value.op is not None and value.node is node

    def _alias(self, node: fx.Node, result: Any) -> Tensor:
        value = self._value(result)
        assert value is not None
        op = self._add(aten.alias.default, ((value,), {}))
        made = Value(value.shape, value.dtype, op=op, node=node, number=op.number)
        op.outputs.append(made)
        return self._make(made, result)

    def _ways(self, node: fx.Node) -> Iterable[Callable[[fx.Node, Any, Any], Any]]:
        """How a node may be run, the first choice first; none for what is opaque as a whole."""
        if node.target is torch.ops.higher_order.scan:
            return (_unrolled_scan,)
        if node.target is torch.ops.higher_order.while_loop:
            return (self._unrolled_while,)
        if is_function(node):
            return (self._applied,)
        whole = isinstance(node.target, torch._ops.HigherOrderOperator) or captured_function(node.target) is not None
        return () if whole or node.op == "call_module" else (_run, _run_in_one_dtype)

    def _input(self, node: fx.Node, module_tensors: frozenset[int]) -> Any:
        example = node.meta.get("example_value")
        if not isinstance(example, Tensor):
            return self._concrete(example)
        outer = self.region.outer(node)
        held = input_value(outer)
        known = isinstance(held, Tensor) and (id(held) in module_tensors or is_captured(outer, held))
        return self._stands_for(node, example, held, known)

    def _attribute(self, node: fx.Node) -> Any:
        held: Any = self.region.module
        for name in str(node.target).split("."):
            held = getattr(held, name)
        if not isinstance(held, Tensor):
            return held
        return self._stands_for(node, held, held, True)

    def _stands_for(self, node: fx.Node, like: Tensor, held: Any, known: bool) -> Tensor:
        """A meta tensor for an input or a constant; its numbers are `held`'s where they are known."""
        value = Value(self._sizes(like.shape), like.dtype, node=node, parameter=is_parameter(held))
        own = own_numbers(held)
        known = known and (own is held or tuple(own.shape) == value.shape)
        held = own
        if value.parameter or (isinstance(held, Tensor) and held.numel() <= _FEW_NUMBERS):
            value.held = held
        fixed = known and (node.op == "get_attr" or not value.parameter)
        value.data = held if fixed and not held.is_meta else None
        value.lost = fixed and held.is_meta and not value.parameter
        return self._make(value, like)

    def _opaque(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """One operation for the whole node; its results have the shapes that Dynamo knows."""
        example = node.meta.get("example_value")
        plain = mapped(lambda a: self._value(a) if isinstance(a, Tensor) else a, (args, kwargs))
        op = self._add(_runner(node), plain)

        def made(leaf: Any) -> Any:
            if isinstance(
                leaf, torch.SymFloat
            ):  # a number of the user's, read from an input; whoever uses it guards it
                return self._concrete(leaf)
            if not isinstance(leaf, Tensor) or any(not _is_hinted(n) for n in leaf.shape):
                return _Unknown()
            value = Value(self._sizes(leaf.shape), leaf.dtype, op=op, index=len(op.outputs))
            op.outputs.append(value)
            return self._make(value, leaf)

        return _Unknown() if example is None else mapped(made, example)

    def _unrolled_while(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """A while loop over a counter as the loop that it stands for; its counters are kept as numbers.

        Raises:
            NotKnown: the condition is not one of counters alone.
        """
        condition, body, carried, additional = (*args, ()) if len(args) == 3 else args
        self.folds = True
        try:
            state = [self._folded(x) for x in carried]
            for _ in range(_TURNS):
                with running("a loop's condition"):
                    going = _unwrapped(condition(*state, *additional))
                if isinstance(going, Tensor) and going.is_meta:
                    raise NotKnown("when the loop ends depends on data")
                if not bool(going):
                    return tuple(state)
                with running("a loop's body"):
                    state = list(body(*state, *additional))
            raise NotKnown("a long loop")
        finally:
            self.folds = False

    def _applied(self, node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """An autograd.Function as its forward, in a mode of its own; its results are never those of other code."""
        outside, self.now = self.now, self.now._replace(function=node)
        try:
            with running("a function's forward"):
                outputs, _ = args[0](*args[2:])
            return tuple(x.detach() if isinstance(x, Tensor) else x for x in outputs)
        finally:
            self.now = outside

    def _folded(self, x: Any) -> Any:
        """A counter as its number; anything else as it is."""
        if not isinstance(x, Tensor) or x.is_floating_point() or x.numel() > 1:
            return x
        value = self._value(x)
        if value is not None and value.data is not None:
            return value.data.detach().clone()
        filled = value is not None and value.op is not None and value.op.name in ("full", "zeros", "scalar_tensor")
        if not filled:
            raise NotKnown("a counter depends on data")
        assert value is not None
        assert value.op is not None
        numbers = [a for a in value.op.args if isinstance(a, (int, float))]
        with _disable_current_modes():
            return torch.full(value.shape, numbers[-1] if numbers else 0, dtype=value.dtype, device="cpu")

    def _concrete(self, size: Any) -> Any:
        """A number for a symbolic one."""
        if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            found = size_hint(size, self.factor)
            return _Unknown() if found is None else found
        return size

    def _sizes_known(self, shape: Any) -> tuple[int, ...] | None:
        return self._sizes(shape) if all(map(_is_hinted, shape)) else None

    def _sizes(self, shape: Any) -> tuple[int, ...]:
        return tuple(int(self._concrete(n)) for n in shape)

    def _make(self, value: Value, like: Tensor) -> Tensor:
        """A meta tensor that stands for a value which no recorded operation computes."""
        self.pending = value
        if value.op is None:
            value.number = len(self.program.inputs)
            self.program.inputs.append(value)
        strides = [self._concrete(s) for s in like.stride()] if like.layout == torch.strided else None
        if strides is None:
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        return torch.empty_strided(value.shape, strides, dtype=value.dtype, device="meta")

    def note(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs one ATen call on meta tensors and records it."""
        if self.pending is not None:
            result, value, self.pending = func(*args, **kwargs), self.pending, None
            self._know(result, value)
            return result
        if self.folds:
            tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if tensors and not any(t.is_meta or id(t) in self.known for t in tensors):
                with running(func):
                    return func(*args, **kwargs)
        func, args = _at_number(func, args)
        if func in _CONSTANTS and isinstance(args[0], Tensor) and not args[0].is_meta:
            return self._constant(args[0])
        args, kwargs = mapped(self._meta, (args, kwargs))
        run = dict(kwargs)
        if run.get("device") is not None:
            run["device"] = torch.device("meta")
        result = _dispatched(func, args, run)
        if func in _SAME or (func is aten.detach.default and self.known[id(args[0])].data is not None):
            self._know(result, self.known[id(args[0])])
            return result
        if func is aten.copy.default:
            self._know(result, self._copied(args[0], args[1]))
        else:
            self._append(*_plain_fill(func, args, kwargs, result), result)
        return result

    def _copied(self, destination: Tensor, live_in: Tensor) -> Value:
        """What lands in a destination: the source in its shape and dtype; what was there before does not matter."""
        value = self.known[id(live_in)]
        if live_in.dtype != destination.dtype:
            live_in = aten._to_copy.default(live_in, dtype=destination.dtype)
            value = self._append(aten._to_copy.default, (value,), {"dtype": destination.dtype}, live_in)
        if live_in.shape != destination.shape:
            live_in = aten.expand.default(live_in, list(destination.shape))
            value = self._append(aten.expand.default, (value, list(destination.shape)), {}, live_in)
        return value

    def _append(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Value:
        plain = mapped(lambda a: self.known[id(a)] if isinstance(a, Tensor) else a, (args, dict(kwargs)))
        key = (self.now, func, repr(plain), tuple(id(v) for v in leaves(plain) if isinstance(v, Value)))
        once = func in _FILLED or torch.Tag.nondeterministic_seeded in func.tags
        if key in self.twins and not once:
            # Functionalisation makes a view anew whenever it is read.
            made = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
            for tensor, value in zip(made, self.twins[key].outputs, strict=True):
                self._know(tensor, value)
            return self.twins[key].outputs[0]
        self.twins[key] = op = self._add(func, plain)
        for tensor in leaves(result):
            if isinstance(tensor, Tensor):
                value = Value(tuple(tensor.shape), tensor.dtype, op=op, index=len(op.outputs), number=op.number)
                op.outputs.append(value)
                self._know(tensor, value)
        return op.outputs[0] if op.outputs else Value((), torch.float32)

    def _add(self, target: Any, plain: Any) -> Op:
        """A new operation, of the node that is run."""
        assert self.node is not None
        args, kwargs = plain
        op = Op(target, tuple(args), dict(kwargs), self.node, len(self.program.ops), mode=self.now)
        op.inputs = [v for v in leaves(plain) if isinstance(v, Value)]
        for value in dict.fromkeys(op.inputs):
            value.users.append(op)
        self.program.ops.append(op)
        return op

    def _meta(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or id(leaf) in self.known:
            return leaf
        return self._constant(leaf)

    def _constant(self, tensor: Tensor) -> Tensor:
        """A tensor of numbers that the graph holds (`torch.tensor([...])`)."""
        value = Value(tuple(tensor.shape), tensor.dtype, data=None if tensor.is_meta else tensor)
        value.number = len(self.program.inputs)
        self.program.inputs.append(value)
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self._know(made, value)
        return made

    def _know(self, tensor: Tensor, value: Value) -> None:
        self.known[id(tensor)] = value
        self.alive.append(tensor)

    def _value(self, result: Any) -> Value | None:
        """The value that a tensor of the run stands for at this moment (after the mutations so far)."""
        return self.known.get(id(_unwrapped(result))) if isinstance(result, Tensor) else None


def _run(node: fx.Node, args: Any, kwargs: Any) -> Any:
    with running(node.target):
        return _called(node, _below_functionalisation(node, args), kwargs)


def _run_in_one_dtype(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Autocast would give all operands one dtype."""
    return _run(node, *_of_one_dtype(node, args, kwargs))


def _called(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.target is getattr(torch._C._autograd, "_get_data_attr", None):  # x.data: no dispatcher sees it
        return args[0].detach()
    out = kwargs.get("out")
    if isinstance(out, Tensor):  # functionalisation does not know it of what is made of other operations (matmul)
        made = node.target(*args, **{name: given for name, given in kwargs.items() if name != "out"})  # type: ignore[operator]
        if made.shape != out.shape:
            raise NotKnown("out is resized")
        return out.copy_(made)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _of_one_dtype(node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments in the dtype of the result, where they are of several."""
    example = node.meta.get("example_value")
    floats = {a.dtype for a in leaves((args, kwargs)) if _is_float(a)}
    if not isinstance(example, Tensor) or not _is_float(example) or len(floats) < 2:
        raise NotKnown(str(node.target))
    given = mapped(lambda a: a.to(example.dtype) if _is_float(a) else a, (args, dict(kwargs)))
    return given[0], given[1]


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The call; functionalisation asks for views of what a write has left in another layout than the trace had."""
    with running(func):
        if func is aten.view.default:
            try:
                return func(*args, **kwargs)
            except RuntimeError:
                args = (args[0].contiguous(), *args[1:])
        return func(*args, **kwargs)


def _unwrapped(result: Any) -> Any:
    """The tensor below functionalisation, with all writes done."""
    if isinstance(result, Tensor) and torch._is_functional_tensor(result):
        torch._sync(result)  # type: ignore[attr-defined,no-untyped-call]
        return _unwrap_functional_tensor(result, False)
    return result


def _at_number(func: Any, args: Any) -> tuple[Any, Any]:
    """Reads and writes at a position that is a number, as slices."""
    if func is aten.index_select.default and not args[2].is_meta and args[2].numel() == 1:
        start = int(args[2])
        return aten.slice.Tensor, (args[0], args[1], start, start + 1)
    if func is aten.index_copy.default and not args[2].is_meta and args[2].numel() == 1:
        start = int(args[2])
        return aten.slice_scatter.default, (args[0], args[3], args[1], start, start + 1)
    return func, args


def _below_functionalisation(node: fx.Node, args: Any) -> Any:
    """The graph's vmap levels are one higher here: functionalisation is a level, too."""
    name = getattr(node.target, "__name__", "")
    if name == "_add_batch_dim":
        return (*args[:2], args[2] + 1)
    if name == "_remove_batch_dim":
        return (args[0], args[1] + 1, *args[2:])
    return args


def _unrolled_scan(node: fx.Node, args: Any, kwargs: Any) -> list[Any]:
    """A scan as the loop that it stands for: one spelling for both."""
    body, init, xs, additional = (*args, ()) if len(args) == 3 else args
    carry, outputs = list(init), []
    with running("a scan"):
        for position in range(xs[0].shape[0]):
            made = list(body(*carry, *(x[position] for x in xs), *additional))
            carry = made[: len(carry)]
            outputs.append(made[len(carry) :])
        return [*carry, *(torch.stack(column) for column in zip(*outputs, strict=True))]


def _plain_fill(
    func: Any, args: Any, kwargs: dict[str, Any], result: Any
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """`zeros_like(x)`, `x.fill_(1)` and their kin as `full(shape)`: they do not depend on x."""
    name = func._schema.name.split("::")[-1]
    if name not in _FILLS or not isinstance(result, Tensor):
        return func, args, kwargs
    number = _FILLS[name]
    if number is None:
        number = args[2] if name == "new_full" else args[1]
    if isinstance(number, Tensor):
        return func, args, kwargs
    return aten.full.default, (list(result.shape), number), {"dtype": result.dtype}


def _runner(node: fx.Node) -> Callable[..., Any]:
    if node.op == "call_method":
        name = str(node.target)
        return lambda first, *args, **kwargs: getattr(first, name)(*args, **kwargs)
    return node.target  # type: ignore[return-value]


def _is_hinted(size: Any) -> bool:
    return isinstance(size, int) or size_hint(size) is not None
