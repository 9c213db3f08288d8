"""Per-level readouts against their definition: lengths, levels, states, sequences, steps and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from llcompile.errors import DerivativeError, OperandError, StateError
from llcompile.kernels import choice, routing_state
from llcompile.kernels.levels import level_table
from llcompile.kernels.readout_reference import reference_readouts
from llcompile.ops import level_readouts, level_readouts_step
from tests.kernels.readout_cases import CHANNELS, SETS, both, old_state, operands


@pytest.fixture(autouse=True, params=["aten", "cpp"])
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run each test on both."""
    with choice.use(request.param):
        yield


def assert_agrees(query: Tensor, key: Tensor, levels: int, state: Tensor | None = None, **sequences: Tensor) -> None:
    """Readouts, final state and gradients, of the operator and of the definition."""
    for ours, definition in both(query, key, levels, state, **sequences).values():
        torch.testing.assert_close(ours, definition, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("levels", [1, 2, 5, 9])
@pytest.mark.parametrize("length", [1, 2, 3, 17, 100])
def test_buckets(length, levels):
    """What the words say: the keys of all tokens of a level, of each pair of tokens by itself."""
    query, key = operands(length)
    seen = level_table(length).clamp(max=levels - 1)[:, :, None] == torch.arange(levels)
    seen &= torch.ones(length, length, dtype=torch.bool).tril()[:, :, None]
    expected = torch.einsum("btwr,bswr,tsl->btwl", query, key, seen.double())
    for found in (level_readouts(query, key, levels)[0], reference_readouts(query, key, levels)[0]):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("levels", [1, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 5, 33, 70])
def test_definition(length, levels):
    """With and without a state, on lengths around powers of two and beyond 2 ** (L - 1)."""
    assert_agrees(*operands(length), levels)
    assert_agrees(*operands(length), levels, old_state(levels, 13, 64))
    assert_agrees(*operands(length), levels, old_state(levels, 7, 0))


def test_packed_and_padded():
    """Levels restart in each sequence; padding is 0 in the readouts and absent from the state."""
    bounds = torch.tensor([0, 3, 3, 24, 40])
    assert_agrees(*operands(40, 1), 4, cu_seqlens=bounds)
    assert_agrees(*operands(40, 1), 4, old_state(4, 0, 5, 9, 16), cu_seqlens=bounds)
    mask = torch.zeros(3, 21)
    mask[0, 6:], mask[1, :13] = 1, 1  # on the left, on the right, and a row of padding alone
    for state in (None, old_state(4, 3, 8, 5)):
        assert_agrees(*operands(21, 3), 4, state, attention_mask=mask)
    readouts, _ = level_readouts(*operands(21, 3), 4, attention_mask=mask)
    assert not readouts[mask == 0].any()
    assert readouts[mask != 0].any()


def test_packed_rows_of_indices():
    """`seq_idx` gives what each sequence gives by itself."""
    query, key = operands(12)
    indices = torch.tensor([[0] * 12, [0] * 5 + [1] * 7])
    found, _ = torch.ops.llcompile.level_readouts(query, key, 4, None, seq_idx=indices)
    for row, start, end in ((0, 0, 12), (1, 0, 5), (1, 5, 12)):
        alone, _ = level_readouts(query[row : row + 1, start:end], key[row : row + 1, start:end], 4)
        torch.testing.assert_close(found[row : row + 1, start:end], alone)


@pytest.mark.parametrize("levels", [1, 3, 9])
def test_pieces_and_steps_equal_one_pass(levels):
    """Prefill in pieces of any size, then decode token by token."""
    query, key = operands(75)
    whole, final = level_readouts(query, key, levels, return_final_state=True)
    state, found = None, []
    for start, end in ((0, 1), (1, 20), (20, 67)):
        piece, state = level_readouts(query[:, start:end], key[:, start:end], levels, state, return_final_state=True)
        found.append(piece)
    for t in range(67, 75):
        token, state = level_readouts_step(query[:, t], key[:, t], state, levels)
        found.append(token[:, None])
    torch.testing.assert_close(torch.cat(found, 1), whole)
    torch.testing.assert_close(state, final)
    assert routing_state.unpack(state, levels)[1].tolist() == [75, 75]


def test_steps_from_an_empty_state():
    """Zeros are an empty state."""
    query, key = operands(9)
    state, found = routing_state.empty(2, SETS, 4, CHANNELS, torch.float64), []
    for t in range(9):
        token, state = level_readouts_step(query[:, t], key[:, t], state, 4)
        found.append(token)
    torch.testing.assert_close(torch.stack(found, 1), level_readouts(query, key, 4)[0])


def test_gradcheck():
    """Numerical derivatives, through readouts and state, of a sequence and of a step."""
    query, key = (x.requires_grad_() for x in operands(6, 1, 1, 2))
    position, sums = reference_readouts(*operands(5, 1, 1, 2), 3)[1].split([8, 6], 2)

    def sequence(query: Tensor, key: Tensor, sums: Tensor) -> Any:
        return level_readouts(query, key, 3, torch.cat([position, sums], 2), return_final_state=True)

    def token(query: Tensor, key: Tensor, sums: Tensor) -> Any:
        return level_readouts_step(query[:, 0], key[:, 0], torch.cat([position, sums], 2), 3)

    for function in (sequence, token):
        assert torch.autograd.gradcheck(function, (query, key, sums.requires_grad_()))


def test_second_derivatives_are_refused():
    query, key = (x.requires_grad_() for x in operands(6))
    (grad,) = torch.autograd.grad(level_readouts(query, key, 3)[0].sum(), query, create_graph=True)
    with pytest.raises(DerivativeError):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)], ids=str
)
def test_sums_are_float32(dtype, eps):
    """What short operands lose is lost before: sums and results are float32."""
    query, key = (x.to(dtype) for x in operands(300))
    found, state = level_readouts(query, key, 10, return_final_state=True)
    expected, final = reference_readouts(query, key, 10)
    assert found.dtype == state.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=eps, atol=eps * 30)
    torch.testing.assert_close(state.double(), final, rtol=eps, atol=eps * 30)
    query.requires_grad_()
    (grad,) = torch.autograd.grad(level_readouts(query, key, 10)[0].sum(), query)
    assert (grad.dtype, grad.is_contiguous()) == (dtype, True)


def test_empty():
    """No batch, no tokens, no sets."""
    for shape in ((0, 5, 2, 3), (2, 0, 2, 3), (2, 5, 0, 3)):
        readouts, state = level_readouts(torch.zeros(shape), torch.zeros(shape), 4, return_final_state=True)
        assert readouts.shape == (*shape[:3], 4)
        assert state.shape == (shape[0], shape[2], 20)


def test_nan_leaves_earlier_tokens_alone():
    query, key = operands(40)
    clean, _ = level_readouts(query, key, 6)
    key[:, 21] = torch.nan
    found, _ = level_readouts(query, key, 6)
    assert torch.equal(found[:, :21], clean[:, :21])
    assert found[:, 21:].isnan().any()


@pytest.mark.parametrize("kept", [True, False])
def test_opcheck(kept):
    """Schema, autograd registration, shape functions, and dynamic shapes under AOTAutograd."""
    query, key = (x.requires_grad_() for x in operands(7))
    state = old_state(4, 3, 9).requires_grad_()
    operator = torch.ops.llcompile
    torch.library.opcheck(operator.level_readouts.default, (query, key, 4, state), {"return_final_state": kept})
    torch.library.opcheck(operator.level_readouts_step.default, (query[:, 0].detach(), key[:, 0].detach(), state, 4))
    readouts, final = operator.level_readouts(query.detach(), key.detach(), 4, None, return_final_state=kept)
    given = (torch.randn_like(readouts), torch.randn_like(final), query.detach(), key.detach(), 4, None)
    torch.library.opcheck(operator.level_readouts_backward.default, given, {"return_final_state": kept})


def test_errors():
    """Each says what was expected."""
    query, key = operands(5)
    with pytest.raises(OperandError, match=r"query has shape \[2, 5, 2\]"):
        level_readouts(query[..., 0], key, 4)
    with pytest.raises(OperandError, match="levels must be a whole number"):
        level_readouts(query, key, 0)
    with pytest.raises(OperandError, match="of one dtype"):
        level_readouts(query, key.float(), 4)
    with pytest.raises(StateError, match=r"\[2, 2, 20\] with L=4, R=3"):
        level_readouts(query, key, 4, old_state(5, 3, 4))
    broken = old_state(4, 3, 4)
    broken[:, :, 0] += 0.5
    with pytest.raises(StateError, match="has lost the position of row 0"):
        level_readouts(query, key, 4, broken)
    with pytest.raises(StateError, match="has lost the position"):
        level_readouts_step(query[:, 0], key[:, 0], broken, 4)


def test_compiled_once_for_all_lengths():
    """Dynamic lengths neither recompile nor break the graph, forward and backward."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(query: Tensor, key: Tensor) -> Any:
        return level_readouts(query, key, 9, return_final_state=True)

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for length in (20, 70, 131):
        results = []
        for call in (compiled, function):
            query, key = (x.requires_grad_() for x in operands(length))
            readouts, state = call(query, key)
            results.append((readouts, state, *torch.autograd.grad(readouts.sum() + state.sum(), (query, key))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_shapes_without_data():
    """The meta device, where nothing is computed."""
    query, key = (x.to("meta") for x in operands(70))
    readouts, state = level_readouts(query, key, 9, return_final_state=True)
    assert (readouts.shape, state.shape) == ((2, 70, SETS, 9), (2, SETS, 8 + 9 * CHANNELS))
