"""Which derivatives the operators have: first ones, in reverse, also below torch.func. Others are an error, never 0."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from llcompile.errors import DerivativeError
from llcompile.ops import loglinear_attention, loglinear_attention_step
from tests.kernels.kernel_cases import operands

TOKENS = 9
FAMILIES = {"scalar": ("token", False), "delta": (None, True)}
FORWARD = {
    "jvp": lambda f, q: jvp(f, (q,), (q,)),
    "jvp of a gradient": lambda f, q: jvp(grad(lambda z: f(z).sum()), (q,), (q,)),
    "jvp of a pull-back": lambda f, q: jvp(lambda z: vjp(f, z)[1](f(q))[0], (q,), (q,)),
    "jacfwd": lambda f, q: jacfwd(f)(q),
    "hessian": lambda f, q: hessian(lambda z: f(z).square().sum())(q),
    "dual numbers": lambda f, q: _dual(f, q),
    "dual numbers with a graph": lambda f, q: _dual(f, q.clone().requires_grad_()),
}
SECOND = {
    "create_graph": lambda f, q: _twice(f, q),
    "grad of grad": lambda f, q: grad(lambda y: grad(lambda z: f(z).square().sum())(y).square().sum())(q),
    "jacrev of grad": lambda f, q: jacrev(grad(lambda z: f(z).square().sum()))(q),
    "functional.hvp": lambda f, q: torch.autograd.functional.hvp(lambda z: f(z).square().sum(), q, q),
}


def _dual(f, q):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(q, torch.ones_like(q)))


def _twice(f, q):
    q = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(q).square().sum(), q, create_graph=True)
    return torch.autograd.grad(first.square().sum(), q)


def run(kind, x, q):
    """The operator as a function of its queries alone."""
    if kind == "step":
        token = {n: a if a is None else a[:, 0] for n, a in x.items() if n != "initial_state"}
        return loglinear_attention_step(**{**token, "q": q[:, 0]}, state=torch.zeros(2, 4, 13, 5, 3, dtype=q.dtype))[0]
    mask = torch.ones(2, TOKENS) if kind == "varlen" else None
    if mask is not None:
        mask[0, :3] = 0
    return loglinear_attention(**{**x, "q": q}, attention_mask=mask)[0]


@pytest.fixture(params=["sequence", "varlen", "step"])
def function(request):
    return partial(run, request.param, operands(TOKENS, "token", True))


@pytest.fixture
def q():
    return operands(TOKENS, seed=3)["q"]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("way", FORWARD)
def test_forward_mode_raises(function, q, way):
    with pytest.raises(
        DerivativeError, match=r"llcompile\.loglinear_attention\w*\.default has no forward-mode derivative"
    ):
        FORWARD[way](function, q)


def test_linearize_raises():
    """Its tracer has no values to look at, so that it may fail before."""
    x = operands(TOKENS, None, True)
    with pytest.raises(DerivativeError, match="has no forward-mode derivative"):
        linearize(lambda q: loglinear_attention(**{**x, "q": q})[0], x["q"])


@pytest.mark.parametrize("way", SECOND)
def test_second_derivatives_raise(function, q, way):
    with pytest.raises(DerivativeError, match=r"has no derivative: it is a gradient itself.*llcompile\.revert"):
        SECOND[way](function, q)


def test_first_derivatives_below_torch_func(function, q):
    """What plain autograd gives, to the last bit; as a pull-back, and for each element of a batch."""
    weights = torch.randn(function(q).shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
    loss = lambda z: (function(z) * weights).sum()  # noqa: E731
    z = q.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(z), z)
    assert want.abs().max() > 0
    assert torch.equal(grad(loss)(q), want)
    assert torch.equal(vjp(function, q)[1](weights)[0], want)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(function, q):
    """One after the other, values and gradients."""
    batch = torch.stack([q, q.flip(1), -q])
    assert torch.equal(vmap(function)(batch), torch.stack([function(x) for x in batch]))
    slope = grad(lambda z: function(z).square().sum())
    assert torch.equal(vmap(slope)(batch), torch.stack([slope(x) for x in batch]))


def test_tangents_of_others_pass_by(function, q):
    """The control: within forward mode, an operator that no tangent reaches runs."""
    value, tangent = jvp(lambda z: (function(q), z * z), (q,), (q,))
    assert torch.equal(value[0], function(q))
    assert not tangent[0].any()
    assert torch.equal(tangent[1], 2 * q * q)


def test_below_a_compiled_transform():
    """torch.func.grad inside of compiled code, with Dynamo's own tracing of it."""
    x = operands(TOKENS, dtype=torch.float32)
    loss = lambda q: loglinear_attention(**{**x, "q": q})[0].square().sum()  # noqa: E731
    want = grad(loss)(x["q"])
    assert torch.equal(torch.compile(grad(loss), backend="eager", fullgraph=True)(x["q"]), want)
