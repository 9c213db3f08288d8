"""Axis rules of what runs along axes of one tensor: sums, scans, triangles, norms, convolutions."""

from __future__ import annotations

from llcompile.patterns.structure.axes import Axes, Axis
from llcompile.patterns.structure.axis_rules.call import Call, Rules


def _reduce(c: Call) -> list[Axes]:
    axes, given = c.axes[c.first], c.arg("dim")
    rank = len(axes)
    removed = range(rank) if given is None or given == [] else [given] if isinstance(given, int) else given
    gone = {d % rank for d in removed} if rank else set()
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
    return [(*axes[:d], c.dims.new(v.shape[d]), *axes[d + 1 :]) for v in c.op.outputs]


def _triangle(c: Call) -> list[Axes]:
    axes = c.axes[c.first]
    if len(axes) > 1 and c.first.shape[-1] == c.first.shape[-2]:
        c.pair(axes[-1], axes[-2])  # what is above a diagonal tells before from after: both are the same axis
    return [axes]


def _gated(c: Call) -> list[Axes]:
    """One half of an axis, gated by the other."""
    axes, d = list(c.axes[c.first]), c.dim()
    c.mix(axes[d])
    axes[d] = c.dims.part(axes[d], 0, c.first.shape[d] // 2, 1)
    return [tuple(axes)]


def _diagonal(c: Call) -> list[Axes]:
    axes = list(c.axes[c.first])
    i, j = c.dim("dim1"), c.dim("dim2")
    if c.arg("offset") == 0:
        c.dims.same(axes[i], axes[j])
        axis = axes[i] or axes[j]
    else:
        axis = c.dims.new(c.op.outputs[0].shape[-1])
    c.mix(axes[i], axes[j])
    return [(*(a for n, a in enumerate(axes) if n not in (i, j)), axis)]


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


def _batch_norm(c: Call) -> list[Axes]:
    """Channel by channel; its statistics are those of all the rest in training, and numbers of the model otherwise."""
    axes = c.axes[c.first]
    for value in c.op.inputs[1:]:
        c.pair(axes[1], c.axes[value][0])
    if c.arg("training"):
        c.mix(axes[0], *axes[2:])
    return [axes, *(c.new(i) for i in range(1, len(c.op.outputs)))]


def _convolution(c: Call) -> list[Axes]:
    axes, weight, out = c.of("input"), c.of("weight"), c.op.outputs[0].shape
    made: list[Axis] = [axes[0], weight[0] if len(weight[0]) else c.dims.new(out[1])]
    for i in range(2, len(out)):
        keeps = out[i] == c.first.shape[i]
        c.mix(axes[i])
        made.append(axes[i] if keeps else c.assembled(out[i], {c.first: axes[i]}))
    if c.arg("groups") == 1:
        c.mix(axes[1])
    else:
        c.pair(axes[1], made[1])
    return [tuple(made)]


# Rule, and the operations that follow it.
RULES: Rules = (
    (_grouped_norm, "native_group_norm"),
    (_batch_norm, "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"),
    (_reduce, "sum mean prod amax amin max min any all var std norm linalg_vector_norm logsumexp argmax argmin"),
    (_scan, "cumsum cumprod cummax logcumsumexp _softmax _log_softmax softmax flip roll sort _safe_softmax"),
    (_topk, "topk"),
    (_gated, "glu"),
    (_triangle, "tril triu"),
    (_diagonal, "diagonal"),
    (_diag_embed, "diag_embed"),
    (_norm, "native_layer_norm _fused_rms_norm rms_norm"),
    (_convolution, "convolution"),
)
