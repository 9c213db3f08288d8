"""What only shows in a process of its own: the first look-up of the backend, logs, other backends, compile caches."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llcompile

PACKAGE = Path(llcompile.__file__).resolve().parent
ROOT = Path(__file__).resolve().parent.parent


def python(code: str, path: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the code with `path` in front of everything else."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r})\n{code}"],
        cwd=path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


FIRST_LOOK_UP = """
import torch
assert not [name for name in sys.modules if name.startswith("llcompile.backend")]
try:
    torch.compile(torch.nn.Linear(1, 1), backend="loglinear", options={"level_weigths": "linear"})
except Exception as error:
    print(type(error).__module__, type(error).__name__, error)
else:
    print("no error")
"""


LOGGED = """
import torch, warnings
warnings.simplefilter("ignore")
from tests.helpers import small
torch.compile(small.model(), backend="loglinear", options={"inner": "eager"})(small.ids())
"""


@pytest.mark.parametrize(("level", "autoload"), [("loglinear", "1"), ("+loglinear", "1"), ("loglinear", "0")])
def test_first_look_up_and_logs(level: str, autoload: str, tmp_path: Path) -> None:
    """A wrong option is known at the call of torch.compile that imports us, without an import of llcompile before."""
    # Without the autoload nobody can know the name in time, so it cannot be asked for; all else works.
    asked = {"TORCH_LOGS": level} if autoload == "1" else {}
    done = python(FIRST_LOOK_UP + LOGGED, TORCH_DEVICE_BACKEND_AUTOLOAD=autoload, TORCH_TRACE=str(tmp_path), **asked)
    assert done.returncode == 0, done.stderr
    assert "OptionError" in done.stdout
    assert "did you mean 'level_weights'" in done.stdout
    assert ("2 of 2 linear-time mixers are log-linear" in done.stderr) == (autoload == "1")
    assert ("pass prove" in done.stderr) == level.startswith("+")
    (trace,) = tmp_path.iterdir()  # for tlparse: an artifact is a line that names it, and its text below
    report, graph = (trace.read_text().split(f'"name": "loglinear_{name}"')[1] for name in ("report", "graph"))
    assert '"family": "Gated DeltaNet"' in report.splitlines()[1]
    assert "loglinear_attention" in graph


@pytest.mark.parametrize("first", ["import llcompile, torch", "import torch, llcompile"])
def test_without_the_autoload_an_import_in_any_order_will_do(first: str) -> None:
    known = """
import torch.export._trace
assert torch.export._trace._export.__module__ == "torch.export._trace"
assert hasattr(torch.export._trace._export, "__wrapped__")
assert torch.ops.llcompile.loglinear_attention
"""
    done = python(first + known, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr


def test_a_name_nobody_knows_is_told_by_torch_and_ours_are_in_its_list() -> None:
    done = python("import torch", TORCH_LOGS="loglinaer")
    assert "Invalid log settings: loglinaer" in done.stderr
    assert "loglinear" in done.stderr
    assert "loglinear_kernels" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_logs_of_kernels(tmp_path: Path) -> None:
    asked = {"TORCH_LOGS": "loglinear_kernels", "TORCH_TRACE": str(tmp_path / "trace")}
    with_kernels = {"TRITON_INTERPRET": "1", "LLCOMPILE_KERNELS": "triton", "LLCOMPILE_KERNEL_DIR": str(tmp_path)}
    done = python(ONE_CALL, **asked, **with_kernels)
    assert done.returncode == 0, done.stderr
    assert "@triton.jit" in done.stderr
    (trace,) = (tmp_path / "trace").iterdir()
    assert '"name": "loglinear_kernels_' in trace.read_text()


ONE_CALL = """
import torch
from llcompile.ops import loglinear_attention
q = torch.randn(1, 8, 1, 16)
loglinear_attention(q, q, q, torch.ones(1, 8, 1, 4))
"""


SEEN_BY_OTHERS = """
import hashlib, torch, warnings
warnings.simplefilter("ignore")
from tests.helpers import small
if USE:
    torch.compile(small.model(seed=4), backend="loglinear", options={"inner": "eager"})(small.ids())
    torch._dynamo.reset()
torch.manual_seed(0)
model, ids, graphs = small.Model([small.DeltaMixer()]), small.ids(), []
def keep(graph, inputs):
    graphs.append("".join(str((n.op, str(n.target).split(" at 0x")[0], len(n.args))) for n in graph.graph.nodes))
    return graph.forward
results = [torch.compile(model, backend=name, fullgraph=True)(ids) for name in (keep, *OTHERS)]
small.loss(results[1], ids).backward()
results += [p.grad for p in model.parameters()]
assert USE == ("llcompile.backend" in sys.modules)
print(hashlib.sha256("".join(graphs).encode()).hexdigest(), len(graphs))
print(hashlib.sha256(b"".join(r.detach().numpy().tobytes() for r in results)).hexdigest())
"""


@pytest.mark.parametrize("others", [("aot_eager",), pytest.param(("inductor",), marks=pytest.mark.slow)])
def test_other_backends_see_what_they_saw_without_us(others: tuple[str, ...]) -> None:
    """The same graph and the same bits, whether or not our backend has been at work in the process."""
    cache = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}  # what the first has compiled must not serve the second
    code = f"OTHERS = {others}\n{SEEN_BY_OTHERS}"
    without = python("USE = False\n" + code, TORCH_DEVICE_BACKEND_AUTOLOAD="0", **cache)
    beside = python("USE = True\n" + code, **cache)
    assert without.returncode == 0, without.stderr
    assert beside.returncode == 0, beside.stderr
    assert without.stdout == beside.stdout
    assert without.stdout.split()[1] == "1"


CACHED = """
import torch, warnings
warnings.simplefilter("ignore")
torch.manual_seed(0)
import llcompile
from pathlib import Path
assert Path(llcompile.__file__).is_relative_to(Path.cwd()), llcompile.__file__
from tests.helpers import small
from torch._dynamo.utils import counters
model, ids = small.Model([small.DeltaMixer()]), small.ids()
llcompile.convert(model, ids)
run = torch.compile(model, backend="loglinear")
small.loss(run(ids), ids).backward()
gradient = model.layers[0].loglinear.weight.grad
print("gradient", float(gradient.abs().sum()), float(model.layers[0].qkv.weight.grad.abs().sum()))
print("hits", counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"])
"""


def _copy_of_the_package(folder: Path) -> Path:
    shutil.copytree(PACKAGE, folder / "llcompile", ignore=shutil.ignore_patterns("__pycache__"))
    helpers = folder / "tests" / "helpers"
    helpers.mkdir(parents=True)
    for package in (helpers, helpers.parent):
        (package / "__init__.py").touch()
    shutil.copy(ROOT / "tests" / "helpers" / "small.py", helpers / "small.py")
    return folder


def _numbers(done: subprocess.CompletedProcess[str], line: str) -> list[float]:
    assert done.returncode == 0, done.stderr
    return [float(n) for row in done.stdout.splitlines() if row.startswith(line) for n in row.split()[1:]]


@pytest.mark.slow
def test_an_edited_formula_is_not_served_from_a_cache(tmp_path: Path) -> None:
    """The backward pass of the operator is no part of the graph that a compile cache hashes; our key covers it."""
    folder = _copy_of_the_package(tmp_path)
    cache = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",  # they would be compiled anew for the fresh folder
    }
    first = python(CACHED, folder, **cache)
    again = python(CACHED, folder, **cache)
    operators = folder / "llcompile" / "kernels" / "operators.py"
    source = operators.read_text()
    # Of level weights alone: a mixer whose other gradients are not the model's would not be converted.
    edited = source.replace(
        "    return (*_present(tensors, grads), None,",
        "    grads = (*grads[:3], 2.0 * grads[3], *grads[4:])\n    return (*_present(tensors, grads), None,",
    )
    assert edited != source
    operators.write_text(edited)
    third = python(CACHED, folder, **cache)
    assert _numbers(first, "hits") == [0, 0]
    assert max(_numbers(again, "hits")) > 0, "equal sources are served from the cache"
    assert _numbers(again, "gradient") == _numbers(first, "gradient")
    assert _numbers(third, "hits") == [0, 0]
    before, after = _numbers(first, "gradient"), _numbers(third, "gradient")
    assert after[0] == pytest.approx(2.0 * before[0], rel=1e-4)
    assert after[1] == pytest.approx(before[1], rel=1e-4)
