"""Checks one program, as written and converted. A part of every program: it needs nothing but torch and llcompile."""

from __future__ import annotations

import contextlib
import copy
import functools  # noqa: F401  (the programs use these)
import types  # noqa: F401
import warnings
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: F401
from torch import nn  # noqa: F401
from torch.utils.checkpoint import checkpoint  # noqa: F401

import llcompile

TOLERANCE = 2e-4


def compiled(function, **how):
    """What converts: the backend, without Inductor."""
    return torch.compile(function, backend="loglinear", options={"inner": "eager"}, **how)


def as_written(function, **how):
    """What leaves the control as it is."""
    return function


def main(make, runner, lengths, width):
    """Raises AssertionError where the converted program is another one, or does not act; returns the report."""
    warnings.simplefilter("ignore")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make()
    control = copy.deepcopy(model)
    names = set(model.state_dict())
    report = llcompile.convert(model, data(lengths[0], width))
    assert report.converted or set(model.state_dict()) == names, "nothing was converted, and something was attached"
    run, plain = runner(model, compiled), runner(control, as_written)
    calls = [(length, 1.0) for length in lengths] + [(lengths[0], 3.0)]
    for training in (True, False):
        model.train(training)
        control.train(training)
        for length, scale in calls:
            same(f"{training=} {length=} {scale=}", model, run, control, plain, scale * data(length, width))
    with torch.no_grad():
        x = data(lengths[0], width)
        close("in evaluation, without gradients, output", output(run, x), output(plain, x))
    if report.converted:
        acting(model, run, control, plain, lengths, width)
    return report


def data(length, width):
    """The input of that many tokens: a shorter one is the beginning of a longer one."""
    return torch.randn(64, 2, width, generator=torch.Generator().manual_seed(1))[:length].transpose(0, 1).contiguous()


def output(run, x):
    """The tensor that the model returns first."""
    return next(leaf for leaf in torch.utils._pytree.tree_leaves(run(x)) if isinstance(leaf, torch.Tensor))


def close(what, actual, expected, rounding=0.0):
    """Both are the same numbers, to rounding; the program itself is off by as much as is given, at least."""
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)} for {list(expected.shape)}"
    error = (off(actual, expected) - rounding) / expected.detach().abs().max().clamp(min=1e-6)
    assert error < TOLERANCE, f"{what}: differs by {error:.1e} of its scale"


def off(actual, expected):
    """The largest difference."""
    return float((actual - expected).detach().abs().max())


def gradients(model, run, x):
    """The output, and the gradients of the input and of the model's own parameters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    o = output(run, x)
    (o * torch.randn(o.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return o, {"input": x.grad} | {n: p.grad for n, p in model.named_parameters() if "loglinear" not in n}


def in_float32(control, plain, x):
    """The same without autocast."""
    with mock.patch("torch.autocast", return_value=contextlib.nullcontext()):
        return gradients(control, plain, x)


def same(what, model, run, control, plain, x):
    """Output and all gradients are the control's; in 16 bits, no further from those of float32 than the control's."""
    want, grads = gradients(control, plain, x)
    if not all(bool(g.isfinite().all()) for g in (want, *grads.values()) if g is not None):
        return  # such numbers are too large for the program as it is written
    exact, slopes = in_float32(control, plain, x) if TOLERANCE > 1e-3 else (want, grads)
    got, others = gradients(model, run, x)
    close(f"{what}, output", got, exact, rounding=off(want, exact))
    scale = max(float(g.abs().max()) for g in slopes.values() if g is not None)
    for name in grads:
        slope, own, other = (torch.zeros(()) if g is None else g for g in (slopes[name], grads[name], others[name]))
        error, allowed = off(other, slope), TOLERANCE * (float(slope.abs().max()) + 0.05 * scale) + off(own, slope)
        assert error <= allowed, f"{what}, {name}.grad: off by {error:.1e}"


def acting(model, run, control, plain, lengths, width):
    """Noise on the level weights moves the output in each mode and at each length, alike; gradients arrive."""
    held = {name: p for name, p in model.named_parameters() if "loglinear" in name}
    with torch.no_grad():
        for number, parameter in enumerate(held.values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    outputs = {}
    for training in (True, False):
        model.train(training)
        control.train(training)
        for length in lengths:
            x = data(length, width).requires_grad_()  # as above, so that nothing is compiled anew
            o, expected = output(run, x), output(plain, x)
            moved = (o - expected).detach().abs().max() / expected.detach().abs().max()
            assert moved > 1e-3, f"{training=} {length=}: noise on the level weights moves the output by {moved:.1e}"
            outputs[training, length] = o.detach(), expected.detach()
            grads = torch.autograd.grad(o.square().mean(), list(held.values()), allow_unused=True)
            without = [name for name, g in zip(held, grads, strict=True) if g is None or not g.abs().max() > 0]
            assert not without, f"{training=} {length=}: no gradient arrives at {without}"
    for length in lengths:
        (first, want), (second, other) = (outputs[training, length] for training in (True, False))
        if torch.equal(want, other):
            close(f"{length=}: in training and in evaluation", first, second)
    short, long = min(lengths), max(lengths)
    (first, want), (second, other) = outputs[False, short], outputs[False, long]
    if (want - other[:, :short]).abs().max() < 1e-5:  # the control is causal, and no length has a part in it
        close(f"the first {short} of {long} tokens", second[:, :short], first)
