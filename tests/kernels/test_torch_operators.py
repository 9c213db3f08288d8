"""The operators as PyTorch sees them: opcheck, compilation, dtypes, layouts."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from llcompile.kernels.operands import Token
from llcompile.ops import loglinear_attention, loglinear_attention_step
from llcompile.torch_internals.sources import source_tag
from tests.kernels.kernel_cases import NAMES, operands


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize(
    ("decay", "delta"), [("token", False), ("channel", True), (None, False), ("rate", False), ("channel", "erase")]
)
def test_opcheck(decay, delta, levels):
    """Schema, autograd registration, shape functions, and dynamic shapes under AOTAutograd."""
    x = operands(7, decay, delta, levels, "linear")
    tensors = [x[n] if x[n] is None else x[n].requires_grad_() for n in NAMES]
    torch.library.opcheck(torch.ops.llcompile.loglinear_attention.default, (*tensors, 0.7, True))
    token = {n: t if t is None or t.dim() < 3 else t[:, 0].detach().requires_grad_() for n, t in x.items()}
    token["state"], token["scale"] = x["initial_state"], 0.7
    arguments = tuple(token[n] for n in Token._fields)
    torch.library.opcheck(torch.ops.llcompile.loglinear_attention_step.default, arguments)


@pytest.mark.parametrize("where", ["cu_seqlens", "attention_mask", "seq_idx"])
def test_opcheck_of_sequences(where):
    """The same where sequences do not fill their rows."""
    x = operands(7, "token", True, 4, None, batch=1 if where == "cu_seqlens" else 2)
    tensors = [x[n] if x[n] is None else x[n].requires_grad_() for n in NAMES]
    given = {
        "cu_seqlens": torch.tensor([0, 3, 7]),
        "attention_mask": torch.tensor([[1] * 7, [0] * 4 + [1] * 3]),
        "seq_idx": torch.tensor([[0] * 7, [0] * 4 + [1] * 3]),
    }
    found = {where: given[where]}
    keeps_state = where != "seq_idx"  # the number of sequences is in the values of the indices
    torch.library.opcheck(torch.ops.llcompile.loglinear_attention.default, (*tensors, 0.7, keeps_state), found)


@pytest.mark.parametrize("delta", [False, True])
def test_opcheck_of_the_backward(delta):
    """The gradient is an operator, too, for which there is no second derivative."""
    x = operands(7, "channel", delta, 4, "levels")
    tensors = [x[n] for n in NAMES]
    o, state = torch.ops.llcompile.loglinear_attention(*tensors, 0.7, True)
    grads = (torch.randn_like(o), torch.randn_like(state))
    operator = torch.ops.llcompile.loglinear_attention_backward.default
    torch.library.opcheck(operator, (*grads, *tensors, 0.7, True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_once_for_all_lengths(backend):
    """Dynamic lengths neither recompile nor break the graph, forward and backward."""
    torch._dynamo.reset()
    compilations = []
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(loglinear_attention, backend=counter, fullgraph=True, dynamic=True)
    for length in (20, 70, 131):  # none is equal to another size, which torch would take for the same one
        x = operands(length, "token", True, 9)
        names = [n for n in NAMES if x[n] is not None]
        results = []
        for function in (compiled, loglinear_attention):
            tensors = {n: x[n].detach().clone().requires_grad_() for n in names}
            o, state = function(**{**x, **tensors}, return_final_state=True)
            results.append((o, state, *torch.autograd.grad(o.sum() + state.sum(), list(tensors.values()))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        compilations.append(counter.frame_count)  # the first may be restarted, once torch finds that scale is fixed
    assert len(set(compilations)) == 1


def test_shapes_without_data():
    """The meta device, where nothing is computed."""
    x = {n: t if t is None else t.to("meta") for n, t in operands(70).items()}
    o, state = loglinear_attention(**x, return_final_state=True)
    assert (o.shape, state.shape) == (x["v"].shape, (2, 4, 13, 5, 3))


def test_autocast_leaves_operands_alone():
    """Inside autocast the operator computes as outside of it."""
    x = operands(70, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, _ = loglinear_attention(**x)
    assert torch.equal(o, loglinear_attention(**x)[0])


def test_mixed_dtypes_and_layouts():
    """float32 weights and decays beside bfloat16 operands; gradients like their inputs, contiguous."""
    x = operands(70, "token", True, dtype=torch.bfloat16)
    for name in ("level_weights", "log_decay"):
        x[name] = x[name].float()
    x["v"] = x["v"].transpose(1, 3).contiguous().transpose(1, 3)
    tensors = {n: t.requires_grad_() for n, t in x.items() if t is not None}
    o, state = loglinear_attention(**x, return_final_state=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    for t, g in zip(tensors.values(), torch.autograd.grad(o.sum(), list(tensors.values())), strict=True):
        assert (g.dtype, g.shape, g.is_contiguous()) == (t.dtype, t.shape, True)


def test_outputs_are_new():
    """A state handed in is never changed, nor handed back."""
    x = operands(1, state="level")
    state, before = x.pop("initial_state"), None
    before = state.clone()
    token = {n: t if t is None else t[:, 0] for n, t in x.items()}
    _, new = loglinear_attention_step(**token, state=state)
    assert torch.equal(state, before)
    assert new.untyped_storage().data_ptr() != state.untyped_storage().data_ptr()


@pytest.mark.parametrize("step", [False, True])
def test_a_compile_cache_sees_by_which_sources_a_call_was_traced(step):
    """An operator is only a name in the graphs that caches hash, and its gradient is traced out of our sources."""
    from torch._dynamo.backends.common import aot_autograd

    revisions = []

    def look(module, inputs):
        calls = [n for n in module.graph.nodes if "loglinear" in str(n.target)]
        revisions.extend((n.target._opname, n.args[-1]) for n in calls)
        return module.forward

    torch._dynamo.reset()
    x = {n: t if t is None else t.requires_grad_() for n, t in operands(7, "token", True, 4, "level").items()}
    if step:
        state = x.pop("initial_state")
        token = {n: t if t is None else t[:, 0] for n, t in x.items()}
        o, _ = torch.compile(loglinear_attention_step, backend=aot_autograd(fw_compiler=look))(**token, state=state)
    else:
        o, _ = torch.compile(loglinear_attention, backend=aot_autograd(fw_compiler=look))(**x)
    o.sum().backward()
    forward = "loglinear_attention_step" if step else "loglinear_attention"
    assert revisions == [(forward, source_tag()), ("loglinear_attention_backward", source_tag())]
