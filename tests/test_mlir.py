"""MLIR of rewritten mixers: what torch-mlir makes of them computes what the compiled model does."""

from __future__ import annotations

import ctypes
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llcompile
from llcompile.commands import cli
from llcompile.errors import MissingLibraryError, MlirError
from llcompile.kernels.aten.parallel import parallel_attention
from llcompile.kernels.operands import Operands
from llcompile.kernels.reference import reference_attention
from llcompile.look.look import Look
from llcompile.look.mlir import to_mlir
from tests.helpers import small
from tests.kernels import kernel_cases

DECAYS = {None: None, "fixed": (4,), "scalar": (2, 0, 4), "channel": (2, 0, 4, 5)}


@pytest.mark.parametrize(("decay", "delta"), list(itertools.product(DECAYS, (False, True))))
@pytest.mark.parametrize(("length", "levels"), [(1, 3), (7, None), (40, 8), (40, 3)])
def test_the_parallel_form_is_the_operator(decay: str | None, delta: bool, length: int, levels: int | None) -> None:
    draw = lambda *shape: torch.rand(*shape, dtype=torch.float64)  # noqa: E731
    q, k = torch.randn(2, 2, length, 2, 5, dtype=torch.float64).unbind()
    k, v = torch.nn.functional.normalize(k, dim=-1), draw(2, length, 4, 3)
    w = None if levels is None else draw(2, length, 4, levels)
    shape = DECAYS[decay]
    g = None if shape is None else -3 * draw(*(length if n == 0 else n for n in shape))
    beta = draw(2, length, 4) if delta else None
    expected, _ = reference_attention(q, k, v, w, g, beta, 0.5)
    x = Operands(q, k, v, w, g, beta=beta)
    torch.testing.assert_close(parallel_attention(x, 0.5), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("decay", "delta"), [("rate", False), ("rate", "erase"), (None, "erase"), ("channel", "erase")]
)
def test_the_parallel_form_of_rates_and_erase_keys(decay: str | None, delta: bool | str) -> None:
    x = kernel_cases.operands(13, decay, delta, 5)
    expected, _ = reference_attention(**x, scale=0.5)
    torch.testing.assert_close(parallel_attention(Operands(**x), 0.5), expected, rtol=1e-10, atol=1e-10)


def test_a_decay_of_zero_empties_the_state() -> None:
    q = torch.ones(1, 3, 1, 1)
    x = Operands(q, q, q, None, torch.tensor([0.0, -torch.inf, 0.0]).view(1, 3, 1))
    o = parallel_attention(x, 1.0)
    assert o.flatten().tolist() == [1.0, 1.0, 2.0]


def look(length: int = 21, **options: Any) -> tuple[torch.nn.Module, Tensor, Look]:
    model, x = small.model().eval(), small.ids(1, length)
    return model, x, llcompile.inspect(model, x, options=options)


def test_without_torch_mlir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_mlir", None)
    _, _, seen = look()
    with pytest.raises(MissingLibraryError, match="pip install 'llcompile\\[mlir\\]'"):
        to_mlir(seen)
    with pytest.raises(MlirError, match="one of 'torch', 'linalg'"):
        to_mlir(seen, "tosa")


class TestWithTorchMlir:
    @pytest.fixture(autouse=True)
    def torch_mlir(self) -> None:
        pytest.importorskip("torch_mlir", reason="torch-mlir is not installed: pip install 'llcompile[mlir]'")

    def test_wrong_names_and_no_values(self) -> None:
        _, _, seen = look()
        with pytest.raises(MlirError, match=r"there are 'layers\.0', 'layers\.1'"):
            to_mlir(seen, mixer="layers.7")
        with torch.device("meta"):
            model = small.model()
        with pytest.raises(MlirError, match="weights have no values"):
            to_mlir(llcompile.inspect(model, small.ids().to("meta")))

    def test_the_model_is_left_as_it_was(self) -> None:
        model, _, seen = look()
        names = [name for name, _ in model.named_parameters()]
        text = to_mlir(seen)
        assert "func.func @main(%arg0: !torch.vtensor<[1,21],si64>) -> !torch.vtensor<[1,21,32],f32>" in text
        assert [name for name, _ in model.named_parameters()] == names
        assert model._compiled_call_impl is None

    def test_the_command_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "made.py").write_text(
            "from tests.helpers import small\n\n\ndef make():\n    return small.model(), small.ids(1)\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        asked = ["inspect", "made:make", "--mlir", str(tmp_path / "out.mlir"), "--mixer"]
        assert cli.main([*asked, "layers.9"]) == 2
        assert not (tmp_path / "out.mlir").exists()
        assert cli.main([*asked, "layers.0"]) == 0
        assert "!torch.vtensor<[1,21,16],f32>" in (tmp_path / "out.mlir").read_text()

    @pytest.mark.slow
    @pytest.mark.parametrize("mixer", [None, "layers.1"])
    def test_numbers_of_what_was_lowered_to_machine_code(self, mixer: str | None) -> None:
        """Level weights that are not 1; through torch-mlir's passes and LLVM."""
        model, plain, x = small.model().eval(), small.model().eval(), small.ids(1)
        llcompile.convert(model, x)
        small.perturb(model)
        part = model if mixer is None else model.get_submodule(mixer)
        with torch.no_grad():
            # The second mixer reads what the first one's own code computes, as in a plain run of the model.
            given = x if mixer is None else plain.layers[0](plain.embed(x))
            expected = torch.compile(part, backend="loglinear", options={"inner": "eager"})(given)
        text = to_mlir(llcompile.inspect(model, x), "linalg", mixer)
        assert small.difference(executed(text, given), expected) < 1e-5


# torch-mlir's own way from linalg to LLVM, that of its reference backend, with the passes that this needs.
PIPELINE = """builtin.module(
  func.func(linalg-generalize-named-ops),
  one-shot-bufferize{bufferize-function-boundaries function-boundary-type-conversion=identity-layout-map},
  refback-mlprogram-bufferize,
  refback-munge-calling-conventions,
  func.func(tm-tensor-to-loops),
  func.func(refback-munge-memref-copy),
  func.func(convert-linalg-to-loops),
  func.func(lower-affine),
  convert-scf-to-cf,
  func.func(refback-expand-ops-for-llvm),
  func.func(arith-expand),
  func.func(convert-math-to-llvm),
  convert-math-to-libm,
  expand-strided-metadata,
  lower-affine,
  finalize-memref-to-llvm,
  func.func(convert-arith-to-llvm),
  convert-func-to-llvm,
  convert-cf-to-llvm,
  reconcile-unrealized-casts
)"""


def executed(text: str, x: Tensor) -> Tensor:
    """The only result of `main` in a module of linalg on tensors."""
    import numpy
    from torch_mlir import ir, passmanager
    from torch_mlir.dialects import torch as torch_dialect
    from torch_mlir.execution_engine import ExecutionEngine
    from torch_mlir.runtime import get_unranked_memref_descriptor, unranked_memref_to_numpy

    results: list[Any] = []
    with ir.Context() as context:
        torch_dialect.register_dialect(context)
        module = ir.Module.parse(text)  # what was printed is read back
        main = next(op for op in module.body.operations if op.operation.name == "func.func")
        main.attributes["llvm.emit_c_interface"] = ir.UnitAttr.get()
        passmanager.PassManager.parse(PIPELINE.replace("\n", "")).run(module.operation)
        engine = ExecutionEngine(module)

    @ctypes.CFUNCTYPE(None, ctypes.POINTER(type(get_unranked_memref_descriptor(numpy.zeros(1, numpy.float32)))))
    def consume(result: Any) -> None:
        results.append(torch.from_numpy(unranked_memref_to_numpy(result, numpy.float32).copy()))

    engine.register_runtime("refbackend_consume_func_return_mrf32", consume)
    argument = ctypes.pointer(ctypes.pointer(get_unranked_memref_descriptor(x.contiguous().numpy())))
    engine.invoke("main", argument)
    return results[0]
