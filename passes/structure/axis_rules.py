"""Axis rules: what each ATen operation does to axes. An unknown one starts new axes and mixes all.

A rule gives the axes of the results and notes which axes it *mixes*: those along which a result depends on more than
the same position of its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llcompile.passes.structure.axes import Atoms, Axes, Axis
from llcompile.passes.structure.program import Op, Value


@dataclass
class Call:
    """One operation as its rule sees it.

    Args:
        op: the operation.
        atoms: all atoms.
        axes: value -> its axes, so far.
        lost: value -> axes that its history has cut to pieces; a row of pieces of the same size is that axis again.
        mixed: what the rule notes: axes that the operation mixes.
    """

    op: Op
    atoms: Atoms
    axes: dict[Value, Axes]
    lost: dict[Value, tuple[Axis, ...]]
    mixed: list[Axis] = field(default_factory=list)

    def __post_init__(self) -> None:
        schema = self.op.target._schema.arguments if isinstance(self.op.target, torch._ops.OpOverload) else ()
        self.given = {a.name: self.op.args[i] for i, a in enumerate(schema) if i < len(self.op.args)}
        self.given |= self.op.kwargs
        self.defaults = {a.name: a.default_value for a in schema if a.has_default_value()}

    def arg(self, name: str) -> Any:
        """An argument by its name in the schema, or its default."""
        return self.given.get(name, self.defaults.get(name))

    def of(self, name: str) -> Axes:
        """The axes of a tensor argument."""
        return self.axes[self.arg(name)]

    @property
    def first(self) -> Value:
        """The first tensor argument."""
        return self.op.inputs[0]

    def dim(self, name: str = "dim", rank: int | None = None) -> int:
        """A dimension argument, counted from the front."""
        return int(self.arg(name)) % max(1, len(self.first.shape) if rank is None else rank)

    def new(self, index: int = 0) -> Axes:
        """New axes for a result."""
        return tuple(self.atoms.new(n) for n in self.op.outputs[index].shape)

    def mix(self, *axes: Axis) -> None:
        """Notes axes that are mixed."""
        self.mixed.extend(a for a in axes if a)

    def pair(self, first: Axis, second: Axis) -> Axis:
        """The axis of two operands that run together (one may be of size one)."""
        if not first or not second:
            return first or second
        self.atoms.same(first, second)
        return first

    def assembled(self, size: int, pieces: Sequence[Value]) -> Axis:
        """A new axis put together from pieces; the one they were cut from, where its size says so."""
        made = self.atoms.new(size)
        for atom in made:
            atom.row = True
        found = [a for piece in pieces for a in self.lost.get(piece, ()) if _size(self.atoms, a) == size]
        if found and all(self.atoms.leaves(a) == self.atoms.leaves(found[0]) for a in found):
            self.atoms.same(made, found[0])
        return made


def _size(atoms: Atoms, axis: Axis) -> int:
    size = 1
    for leaf in atoms.leaves(axis):
        size *= leaf.size
    return size


_FILLED = frozenset(["zeros", "ones", "full", "new_zeros", "new_ones", "new_full"])


def _pointwise(c: Call) -> list[Axes]:
    rank = len(c.op.outputs[0].shape)
    axes: list[Axis] = [()] * rank
    for value in c.op.inputs:
        for i, axis in enumerate(c.axes[value]):
            at = rank - len(value.shape) + i
            axes[at] = c.pair(axes[at], axis)
    full = tuple(a if a or n == 1 else c.atoms.new(n) for a, n in zip(axes, c.op.outputs[0].shape, strict=True))
    return [full] * len(c.op.outputs)


def _same(c: Call) -> list[Axes]:
    return [c.axes[c.first]] * len(c.op.outputs)


def _copy(c: Call) -> list[Axes]:
    """The destination's numbers do not matter, its shape does."""
    return _pointwise(c)


def _view(c: Call) -> list[Axes]:
    made = c.atoms.regroup(c.axes[c.first], c.op.outputs[0].shape)
    return [tuple(_interleaved(c, axis) for axis in made) if made is not None else _cut_across(c)]


def _interleaved(c: Call, axis: Axis) -> Axis:
    """Rows of pieces laid side by side (evens and odds in the tree of a parallel scan) are the axis they came from."""
    leaves = c.atoms.leaves(axis)
    if len(leaves) < 2 or not any(leaf.row for leaf in leaves):
        return axis
    size = _size(c.atoms, axis)
    if not any(_size(c.atoms, a) == size and c.atoms.leaves(a) != leaves for a in c.lost.get(c.first, ())):
        return axis
    c.mix(axis)
    return c.assembled(size, [c.first])


def _cut_across(c: Call) -> Axes:
    c.mix(*c.axes[c.first])
    return c.new()


def _permute(c: Call) -> list[Axes]:
    axes = c.axes[c.first]
    return [tuple(axes[d] for d in c.arg("dims"))]


def _transpose(c: Call) -> list[Axes]:
    axes = list(c.axes[c.first])
    i, j = c.dim("dim0"), c.dim("dim1")
    axes[i], axes[j] = axes[j], axes[i]
    return [tuple(axes)]


def _t(c: Call) -> list[Axes]:
    return [c.axes[c.first][::-1]]


def _unsqueeze(c: Call) -> list[Axes]:
    axes = c.axes[c.first]
    d = c.dim(rank=len(axes) + 1)
    return [(*axes[:d], (), *axes[d:])]


def _squeeze(c: Call) -> list[Axes]:
    axes, given = c.axes[c.first], c.arg("dim")
    rank = len(axes)
    dims = range(rank) if given is None else [given] if isinstance(given, int) else given
    drop = {d % rank for d in dims if rank} & {i for i, n in enumerate(c.first.shape) if n == 1}
    return [tuple(a for i, a in enumerate(axes) if i not in drop)]


def _expand(c: Call) -> list[Axes]:
    axes, shape = c.axes[c.first], c.op.outputs[0].shape
    old = len(shape) - len(axes)
    made = []
    for i, n in enumerate(shape):
        axis = axes[i - old] if i >= old else ()
        made.append(axis if axis or n == 1 else c.atoms.new(n))
    return [tuple(made)]


def _repeat(c: Call) -> list[Axes]:
    axes, counts = c.axes[c.first], c.arg("repeats")
    axes = ((),) * (len(counts) - len(axes)) + axes
    return [tuple(c.atoms.new(n) + a for n, a in zip(counts, axes, strict=True))]


def _select(c: Call) -> list[Axes]:
    axes, d = c.axes[c.first], c.dim()
    c.mix(axes[d])
    _pin(c, axes[d])
    return [tuple(a for i, a in enumerate(axes) if i != d)]


def _pin(c: Call, axis: Axis) -> None:
    for leaf in c.atoms.leaves(axis):
        leaf.pinned = True


def _slice(c: Call) -> list[Axes]:
    axes, d = c.axes[c.first], c.dim()
    size, start, stop, step = c.first.shape[d], c.arg("start") or 0, c.arg("end"), c.arg("step") or 1
    start = max(0, start + size) if start < 0 else min(start, size)
    stop = size if stop is None else max(0, stop + size) if stop < 0 else min(stop, size)
    if (start, stop, step) == (0, size, 1):
        return [axes]
    c.mix(axes[d])
    whole = [a for a in c.lost.get(c.first, ()) if _size(c.atoms, a) == stop - start and step == 1]
    part = c.atoms.part(axes[d], start, stop, step)
    if whole and part:  # a sequence that was padded, or whose pieces were put together, cut to its length again
        c.atoms.same(part, whole[0])
    return [(*axes[:d], part, *axes[d + 1 :])]


def _split(c: Call) -> list[Axes]:
    axes, d, start, made = c.axes[c.first], c.dim(), 0, []
    c.mix(axes[d])
    for value in c.op.outputs:
        n = value.shape[d]
        made.append((*axes[:d], c.atoms.part(axes[d], start, start + n, 1), *axes[d + 1 :]))
        start += n
    return made


def _unbind(c: Call) -> list[Axes]:
    return _select(c) * len(c.op.outputs)


def _cat(c: Call) -> list[Axes]:
    rank = len(c.op.outputs[0].shape)
    d = c.dim(rank=rank)
    tensors = [v for v in c.op.inputs if v.shape != (0,) and v.shape[d] > 0]
    axes: list[Axis] = [()] * rank
    for value in tensors:
        axes = [
            c.pair(old, new) if i != d else () for i, (old, new) in enumerate(zip(axes, c.axes[value], strict=True))
        ]
    if len(tensors) == 1:
        return [c.axes[tensors[0]]]
    size, whole = c.op.outputs[0].shape[d], c.axes[tensors[0]][d]
    filled = all(_is_filled(value) for value in tensors[1:]) and 2 * tensors[0].shape[d] > size
    padded = filled and bool(whole)
    axes[d] = c.atoms.longer(whole, size) if padded else c.assembled(size, tensors)
    c.mix(*(() if padded else (axes[d],)), *(c.axes[v][d] for v in tensors))
    for value in tensors:
        _pin(c, c.axes[value][d])
    _pin(c, axes[d])
    return [tuple(axes)]


def _is_filled(value: Value) -> bool:
    """Whether it is a tensor of one number, for padding."""
    return value.op is not None and not value.op.inputs and value.op.name in _FILLED


def _stack(c: Call) -> list[Axes]:
    rank = len(c.op.outputs[0].shape)
    d = c.dim(rank=rank)
    axes: list[Axis] = [()] * (rank - 1)
    for value in c.op.inputs:
        axes = [c.pair(old, new) for old, new in zip(axes, c.axes[value], strict=True)]
    row = c.assembled(c.op.outputs[0].shape[d], c.op.inputs)
    c.mix(row)
    _pin(c, row)
    return [(*axes[:d], row, *axes[d:])]


def _scatter(c: Call) -> list[Axes]:
    """A piece written into a whole: `select_scatter`, `slice_scatter`."""
    base, piece, d = c.of("self"), c.of("src"), c.dim()
    if len(piece) < len(base):
        piece = (*piece[:d], (), *piece[d:])
    axes = [c.pair(old, new) if i != d else old for i, (old, new) in enumerate(zip(base, piece, strict=True))]
    whole = [a for a in c.lost.get(c.arg("src"), ()) if _size(c.atoms, a) == _size(c.atoms, axes[d])]
    if whole and axes[d]:
        c.atoms.same(axes[d], whole[0])
    c.mix(axes[d], piece[d])
    _pin(c, axes[d])
    return [tuple(axes)]


def _reduce(c: Call) -> list[Axes]:
    axes, given = c.axes[c.first], c.arg("dim")
    rank = len(axes)
    dims = range(rank) if given is None or given == [] else [given] if isinstance(given, int) else given
    gone = {d % rank for d in dims} if rank else set()
    c.mix(*(axes[d] for d in gone))
    kept = tuple(() if i in gone else a for i, a in enumerate(axes) if i not in gone or c.arg("keepdim"))
    return [kept] * len(c.op.outputs)


def _scan(c: Call) -> list[Axes]:
    """Along one axis, same shape: cumsum, softmax, sort."""
    axes = c.axes[c.first]
    if axes:
        given = c.arg("dim") if c.arg("dim") is not None else c.arg("dims")
        for d in [given] if isinstance(given, int) else given or range(len(axes)):
            c.mix(axes[d % len(axes)])
    return [axes] * len(c.op.outputs)


def _topk(c: Call) -> list[Axes]:
    axes, d = c.axes[c.first], c.dim()
    c.mix(axes[d])
    return [(*axes[:d], c.atoms.new(v.shape[d]), *axes[d + 1 :]) for v in c.op.outputs]


def _triangle(c: Call) -> list[Axes]:
    axes = c.axes[c.first]
    if len(axes) > 1 and c.first.shape[-1] == c.first.shape[-2]:
        c.pair(axes[-1], axes[-2])  # what is above a diagonal tells before from after: both are the same axis
    return [axes]


def _diagonal(c: Call) -> list[Axes]:
    axes = list(c.axes[c.first])
    i, j = c.dim("dim1"), c.dim("dim2")
    if c.arg("offset") == 0:
        c.atoms.same(axes[i], axes[j])
        row = axes[i] or axes[j]
    else:
        row = c.atoms.new(c.op.outputs[0].shape[-1])
    c.mix(axes[i], axes[j])
    return [(*(a for n, a in enumerate(axes) if n not in (i, j)), row)]


def _diag_embed(c: Call) -> list[Axes]:
    axes = c.axes[c.first]
    if c.arg("offset") != 0:
        return [c.new()]
    rank = len(axes) + 1
    i, j = c.dim("dim1", rank), c.dim("dim2", rank)
    made = list(axes[:-1])
    for d in sorted((i, j)):
        made.insert(d, axes[-1])
    return [tuple(made)]


def _bmm(c: Call) -> list[Axes]:
    first, second = c.axes[c.op.inputs[-2]], c.axes[c.op.inputs[-1]]
    return [_matmul(c, first, second)]


def _matmul(c: Call, first: Axes, second: Axes) -> Axes:
    c.pair(first[-1], second[-2] if len(second) > 1 else second[-1])
    c.mix(first[-1] or (second[-2] if len(second) > 1 else second[-1]))
    heads = tuple(c.pair(a, b) for a, b in zip(first[:-2], second[:-2], strict=True))
    return (*heads, *(first[-2:-1] if len(first) > 1 else ()), *(second[-1:] if len(second) > 1 else ()))


def _distances(c: Call) -> list[Axes]:
    """All pairs of rows, as in a product with the transposed."""
    first, second = (c.axes[value] for value in c.op.inputs[:2])
    return [_matmul(c, first, (*second[:-2], second[-1], second[-2]))]


def _added_matmul(c: Call) -> list[Axes]:
    axes = _bmm(c)[0]
    bias = c.axes[c.op.inputs[0]]
    for i, axis in enumerate(bias):
        c.pair(axes[len(axes) - len(bias) + i], axis)
    return [axes]


def _solve(c: Call) -> list[Axes]:
    operands = (c.arg("A") if c.arg("A") is not None else c.arg("self"), c.arg("B"))
    matrix, right = (c.axes[value] for value in operands)
    c.atoms.same(matrix[-1], matrix[-2])
    c.pair(matrix[-1], right[-2])
    for a, b in zip(matrix[:-2], right[:-2], strict=False):
        c.pair(a, b)
    c.mix(matrix[-1])
    return [right] * len(c.op.outputs)


def _solve_ex(c: Call) -> list[Axes]:
    solved = _solve(c)[0]
    return [solved if v.shape == c.arg("B").shape else c.new(i) for i, v in enumerate(c.op.outputs)]


def _inverse(c: Call) -> list[Axes]:
    axes = c.axes[c.first]
    c.atoms.same(axes[-1], axes[-2])
    c.mix(axes[-1])
    return [axes if len(v.shape) == len(axes) else c.new(i) for i, v in enumerate(c.op.outputs)]


def _embedding(c: Call) -> list[Axes]:
    weight, indices = c.of("weight"), c.of("indices")
    return [(*indices, weight[-1])]


def _norm(c: Call) -> list[Axes]:
    axes = c.axes[c.first]
    for value in c.op.inputs[1:]:
        for i, axis in enumerate(reversed(c.axes[value])):
            c.pair(axes[-1 - i], axis)
    width = len(c.arg("normalized_shape"))
    c.mix(*axes[-width:])
    out = [axes]
    for i, value in enumerate(c.op.outputs[1:], 1):
        out.append((*axes[:-width], *((),) * width) if len(value.shape) == len(axes) else c.new(i))
    return out


def _grouped_norm(c: Call) -> list[Axes]:
    axes = c.axes[c.first]
    c.mix(*axes[1:])
    return [axes if v.shape == c.first.shape else c.new(i) for i, v in enumerate(c.op.outputs)]


def _convolution(c: Call) -> list[Axes]:
    axes, weight, out = c.of("input"), c.of("weight"), c.op.outputs[0].shape
    made: list[Axis] = [axes[0], weight[0] if len(weight[0]) else c.atoms.new(out[1])]
    for i in range(2, len(out)):
        keeps = out[i] == c.first.shape[i]
        c.mix(axes[i])
        made.append(axes[i] if keeps else c.assembled(out[i], [c.first]))
    if c.arg("groups") == 1:
        c.mix(axes[1])
    else:
        c.pair(axes[1], made[1])
    return [tuple(made)]


def _pad(c: Call) -> list[Axes]:
    axes, pads, shape = list(c.axes[c.first]), c.arg("pad"), c.op.outputs[0].shape
    for i in range(len(pads) // 2):
        before, after, d = pads[2 * i], pads[2 * i + 1], len(axes) - 1 - i
        if before or after:
            c.mix(axes[d])
            _pin(c, axes[d])
            if before == 0 and after > 0 and axes[d]:
                axes[d] = c.atoms.longer(axes[d], shape[d])
            elif before + after:  # else a shift: padded at one end and cut at the other
                axes[d] = c.assembled(shape[d], [c.first])
    return [tuple(axes)]


def _index(c: Call) -> list[Axes]:
    axes, indices = c.axes[c.first], c.arg("indices")
    given = [i for i, v in enumerate(indices) if v is not None]
    for i in given:
        c.mix(axes[i])
        _pin(c, axes[i])
    if len(given) != 1:
        return [c.new()]
    at = given[0]
    return [(*axes[:at], *c.axes[indices[at]], *axes[at + 1 :])]


def _index_put(c: Call) -> list[Axes]:
    axes, indices = c.axes[c.first], c.arg("indices")
    if len(indices) == 1 and indices[0] is not None and indices[0].shape == c.first.shape:
        for axis, other in zip(axes, c.axes[indices[0]], strict=True):  # where a mask says so
            c.pair(axis, other)
        return [axes]
    for i, index in enumerate(indices):
        if index is not None:
            c.mix(axes[i])
            _pin(c, axes[i])
    return [axes]


def _index_select(c: Call) -> list[Axes]:
    axes, d = c.axes[c.first], c.dim()
    c.mix(axes[d])
    _pin(c, axes[d])
    return [(*axes[:d], c.atoms.new(c.op.outputs[0].shape[d]), *axes[d + 1 :])]


def _index_add(c: Call) -> list[Axes]:
    """Pieces added up in a whole, each at a place that a number names."""
    base, pieces, d = c.of("self"), c.of("source"), c.dim()
    axes = [old if i == d else c.pair(old, new) for i, (old, new) in enumerate(zip(base, pieces, strict=True))]
    whole = [a for a in c.lost.get(c.arg("source"), ()) if _size(c.atoms, a) == _size(c.atoms, axes[d])]
    if whole and axes[d]:
        c.atoms.same(axes[d], whole[0])
    c.mix(axes[d], pieces[d])
    _pin(c, axes[d])
    return [tuple(axes)]


def _made(c: Call) -> list[Axes]:
    return [c.new(i) for i in range(len(c.op.outputs))]


def _like(c: Call) -> list[Axes]:
    return [c.axes[c.first]]


def _attention(c: Call) -> list[Axes]:
    query, key, value = c.of("query"), c.of("key"), c.of("value")
    c.mix(query[-2], key[-2])
    out = (*query[:-1], value[-1])
    return [out, *(c.new(i) for i in range(1, len(c.op.outputs)))]


def opaque(c: Call) -> list[Axes]:
    """An operation that the table does not know (a scan, say): axes of sizes that only one axis has are that axis."""
    c.mix(*(axis for value in c.op.inputs for axis in c.axes[value]))
    known: dict[int, set[Axis]] = {}
    for value in c.op.inputs:
        for axis in c.axes[value]:
            _pin(c, axis)
            known.setdefault(_size(c.atoms, axis), set()).add(c.atoms.leaves(axis))
    made = []
    for value in c.op.outputs:
        axes = [next(iter(known[n])) if n > 1 and len(known.get(n, ())) == 1 else c.atoms.new(n) for n in value.shape]
        twice = {a for a in axes if a and axes.count(a) > 1}
        axes = [c.atoms.new(n) if a in twice else a for a, n in zip(axes, value.shape, strict=True)]
        for axis in axes:
            _pin(c, axis)
        made.append(tuple(axes))
    return made


Rule = Callable[[Call], list[Axes]]

_ROWS: tuple[tuple[Rule, str], ...] = (
    (_same, "clone contiguous _to_copy lift_fresh_copy detach alias native_dropout bernoulli log_sigmoid_forward"),
    (_grouped_norm, "native_group_norm"),
    (_copy, "copy"),
    (_view, "view _unsafe_view reshape _reshape_alias"),
    (_permute, "permute"),
    (_transpose, "transpose"),
    (_t, "t"),
    (_unsqueeze, "unsqueeze"),
    (_squeeze, "squeeze"),
    (_expand, "expand"),
    (_repeat, "repeat"),
    (_select, "select"),
    (_slice, "slice"),
    (_split, "split split_with_sizes"),
    (_unbind, "unbind"),
    (_cat, "cat"),
    (_stack, "stack"),
    (_scatter, "select_scatter slice_scatter"),
    (_reduce, "sum mean prod amax amin max min any all var std norm linalg_vector_norm logsumexp argmax argmin"),
    (_scan, "cumsum cumprod cummax logcumsumexp _softmax _log_softmax softmax flip roll sort _safe_softmax"),
    (_topk, "topk"),
    (_triangle, "tril triu"),
    (_diagonal, "diagonal"),
    (_diag_embed, "diag_embed"),
    (_bmm, "bmm mm mv dot"),
    (_distances, "_cdist_forward _euclidean_dist"),
    (_added_matmul, "addmm baddbmm addmv"),
    (_solve, "linalg_solve_triangular"),
    (_solve_ex, "_linalg_solve_ex"),
    (_inverse, "linalg_inv_ex inverse"),
    (_embedding, "embedding"),
    (_norm, "native_layer_norm _fused_rms_norm rms_norm"),
    (_convolution, "convolution"),
    (_pad, "constant_pad_nd"),
    (_index, "index"),
    (_index_put, "index_put _unsafe_index_put"),
    (_index_select, "index_select"),
    (_index_add, "index_add"),
    (_made, "zeros ones full empty arange eye scalar_tensor empty_strided rand randn linspace"),
    (_made, "new_zeros new_ones new_full new_empty new_empty_strided tril_indices triu_indices"),
    (_like, "zeros_like ones_like full_like empty_like rand_like randn_like"),
    (
        _attention,
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math "
        "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention",
    ),
)
RULES: dict[str, Rule] = {name: rule for rule, names in _ROWS for name in names.split()}


def rule_for(op: Op) -> Rule | None:
    """The operation's rule; None for an unknown one."""
    if op.name in RULES:
        return RULES[op.name]
    tags = getattr(op.target, "tags", ())
    return _pointwise if torch.Tag.pointwise in tags else None
