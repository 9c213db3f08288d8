"""Programs in which the operators are written in ATen operations: they run where llcompile is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llcompile
from llcompile.errors import DecompositionError
from llcompile.kernels import routing_state
from llcompile.kernels.state import empty_state
from llcompile.ops import level_readouts, level_readouts_step, loglinear_attention, loglinear_attention_step
from tests.helpers import small
from tests.kernels.kernel_cases import operands

MORE = [("token", True, 9, None), ("channel", True, 4, "linear")]
CASES = [
    (None, False, None, None),
    ("token", False, 9, None),
    ("token", True, None, "level"),
    ("channel", "erase", 9, None),
    ("rate", False, 9, None),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE),
]


class Call(nn.Module):
    """One operator as a module."""

    def __init__(self, function: Callable[..., Any], **fixed: Any) -> None:
        super().__init__()
        self.function, self.fixed = function, fixed

    def forward(self, x: dict[str, Tensor]) -> Any:
        return self.function(**{"level_weights": None, **x}, **self.fixed)


def decomposed(module: nn.Module, x: Any) -> torch.export.ExportedProgram:
    program = torch.export.export(module, (x,))
    assert "llcompile" in program.graph_module.code
    program = program.run_decompositions(llcompile.decompositions())
    assert "llcompile" not in program.graph_module.code
    return program


class Routed(nn.Module):
    """Readouts and the operator, whose state holds theirs."""

    def forward(self, x: dict[str, Tensor], query: Tensor, key: Tensor) -> Any:
        found, sums = level_readouts(query, key, 9, return_final_state=True)
        _, state = loglinear_attention(**x, return_final_state=True, routing_state=sums)
        old = routing_state.read(state, 2, 9, 4)
        again, sums = level_readouts_step(query[:, 0], key[:, 0], old, 9)
        token = {name: t[:, 0] for name, t in x.items()}
        return found, again, loglinear_attention_step(**token, state=state, routing_state=sums)[1]


def test_readouts() -> None:
    """Their state stays in the header of the level state."""
    cases = operands(70, "token", False, 9, key_dim=8, value_dim=8)
    x = {n: t for n, t in cases.items() if t is not None}
    query, key = torch.randn(2, 2, 70, 2, 4, dtype=torch.float64)
    program = torch.export.export(Routed(), (x, query, key))
    program = program.run_decompositions(llcompile.decompositions())
    assert "llcompile" not in program.graph_module.code
    found = program.module()(x, query, key)
    for a, b in zip(found, Routed()(x, query, key), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not torch.equal(found[2], program.module()(x, query, key.flip(1))[2])


@pytest.mark.parametrize(("decay", "delta", "levels", "state"), CASES)
def test_a_sequence(decay: str | None, delta: Any, levels: int | None, state: str | None) -> None:
    x = {n: t for n, t in operands(70, decay, delta, levels, state).items() if t is not None}
    module = Call(loglinear_attention, return_final_state=True, scale=0.3)
    program = decomposed(module, x).module()
    found = program(x)
    for a, b in zip(found, module(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert (program({**x, "v": x["v"].flip(1)})[0] - found[0]).abs().max() > 0.1


@pytest.mark.parametrize("levels", [None, 6])
def test_a_step(levels: int | None) -> None:
    x = {n: t[:, 0] for n, t in operands(1, "token", True, levels).items() if t is not None}
    x["state"] = empty_state(2, 4, 5, 3, levels, torch.float64)
    module = Call(loglinear_attention_step)
    for a, b in zip(decomposed(module, x).module()(x), module(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_what_it_cannot_do_is_said() -> None:
    x = {n: t for n, t in operands(20).items() if t is not None}
    masked = Call(loglinear_attention, attention_mask=torch.ones(2, 20, dtype=torch.bool))
    with pytest.raises(
        DecompositionError, match=r"\[2, 20, 4, 3\] has attention_mask.*Export the model for whole rows"
    ):
        torch.export.export(masked, (x,)).run_decompositions(llcompile.decompositions())
    continued = {n: t for n, t in operands(20, state="level").items() if t is not None}
    with pytest.raises(DecompositionError, match="continues a level state"):
        decomposed(Call(loglinear_attention), continued)
    length = torch.export.Dim("length", min=2, max=64)
    model, ids = small.model(), small.ids()
    llcompile.convert(model, ids, verify=False)
    program = torch.export.export(model, (ids,), dynamic_shapes={"ids": {1: length}})
    with pytest.raises(DecompositionError, match="a symbolic length"):
        program.run_decompositions(llcompile.decompositions())


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("size", [1, 8, 64])
def test_solves_are_products(size: int, upper: bool) -> None:
    """Also where keys are all alike, so that powers of the triangle would overflow what their sum is."""
    solve = llcompile.decompositions()[torch.ops.aten.linalg_solve_triangular.default]
    make = torch.Generator().manual_seed(0)
    for triangle in (2 * torch.ones(size, size), torch.randn(3, size, size, generator=make)):
        a = (triangle.triu(1) if upper else triangle.tril(-1)) + torch.eye(size) * 7  # the diagonal is not read
        b = torch.randn(size, 5, generator=make).double()
        exact = torch.linalg.solve_triangular(a.double(), b, upper=upper, unitriangular=True)
        own = torch.linalg.solve_triangular(a, b.float(), upper=upper, unitriangular=True)
        found = solve(a, b.float(), upper=upper, unitriangular=True)
        limit = 4 * (own - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (found - exact).abs().max() <= limit
    assert solve(a, b, upper=upper) is NotImplemented


RUN = """
import sys, torch
path = sys.argv[1]
if path.endswith("aoti.pt2"):
    program = torch._inductor.aoti_load_package(path)
else:
    program = torch.export.load(path).module()
x, expected = torch.load(sys.argv[2])
print(float((program(x) - expected).abs().max() / expected.abs().max()))
print([name for name in sys.modules if name.startswith("llcompile")])
"""


@pytest.mark.parametrize("package", ["plain.pt2", pytest.param("aoti.pt2", marks=pytest.mark.slow)])
def test_a_process_without_llcompile(tmp_path: Path, package: str) -> None:
    """A converted model whose level weights are not 1, saved as a program and as an AOTInductor package."""
    model, ids = small.model().eval(), small.ids()
    llcompile.convert(model, ids, verify=False)
    small.perturb(model)
    with torch.no_grad():
        expected = torch.compile(model, backend="loglinear", options={"inner": "eager"})(ids)
        linear = model(ids)
    assert (expected - linear).abs().max() > 1e-2 * expected.abs().max()
    with torch.no_grad():
        program = decomposed(model, ids)
    path = tmp_path / package
    if package == "aoti.pt2":
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    else:
        torch.export.save(program, path)
    torch.save((ids, expected), tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", RUN, path, tmp_path / "expected.pt"],
        cwd=tmp_path,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    error, modules = done.stdout.strip().splitlines()[-2:]
    assert float(error) < 1e-5
    assert modules == "[]"


@pytest.mark.slow
def test_onnx(tmp_path: Path) -> None:
    """A converted model whose level weights are not 1, in onnxruntime."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    model, ids = small.model().eval(), small.ids()
    llcompile.convert(model, ids, verify=False)
    small.perturb(model)
    with torch.no_grad():
        expected, linear = torch.compile(model, backend="loglinear", options={"inner": "eager"})(ids), model(ids)
        program: Any = torch.onnx.export(decomposed(model, ids), verbose=False)
    program.save(str(tmp_path / "model.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    assert small.difference(torch.from_numpy(found), expected) < 1e-5
    assert small.difference(expected, linear) > 1e-2
