"""`llcompile repro`: the file runs by itself and comes to the same decision."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from llcompile.commands import cli
from llcompile.commands.repro import reproducer
from llcompile.errors import ReproError
from llcompile.look import source_text

ROOT = Path(__file__).resolve().parent.parent
FACTORIES = """
import torch
from torch import nn
from tests.helpers import small


def known():
    return small.model(), small.ids()


class Quadratic(nn.Module):
    def __init__(self, diagonal):
        super().__init__()
        self.all, self.diagonal = nn.Linear(16, 50), diagonal

    def forward(self, x):
        q, k, v, gate = self.all(x).split([16, 16, 16, 2], -1)
        q, k, v = (y.unflatten(-1, (2, 8)) for y in (q, k, v))
        total = torch.log(torch.sigmoid(gate)).cumsum(1)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(self.diagonal)
        decay = (total[:, :, None] - total[:, None]).masked_fill(future[..., None], -torch.inf).exp()
        return torch.einsum("bijh,bjhd->bihd", torch.einsum("bihd,bjhd->bijh", q, k) * decay, v).flatten(2)


def written_out():
    return nn.Sequential(Quadratic(1)), torch.randn(2, 40, 16)


def near_miss():
    return nn.Sequential(Quadratic(2)), torch.randn(2, 40, 16)


class Tabled(nn.Module):
    # The decay is a buffer, and results have the names of the functions that made them.
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        at = torch.arange(40)
        self.register_buffer("table", (0.9 ** (at[:, None] - at).clamp(min=0)).tril())

    def forward(self, x):
        einsum = torch.einsum("bid,bjd->bij", self.q(x), self.k(x))
        matmul = torch.matmul(einsum * self.table[: x.shape[1], : x.shape[1]], self.v(x))
        return matmul


def tabled():
    return nn.Sequential(Tabled()), torch.randn(2, 30, 16)
"""

CASES = {
    "known": ("layers.1", "Gated DeltaNet", "w = 1: "),
    "written_out": ("0", "scalar-decay linear attention", "w = 1: "),
    "tabled": ("0", "scalar-decay linear attention", "w = 1: "),
    "near_miss": ("0", "not causal: output", "not causal"),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("known", "written_out")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "made.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "made", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


@pytest.mark.parametrize("name", ["near_miss", "tabled", *SLOW])
def test_the_file_runs_by_itself(here: Path, name: str) -> None:
    mixer, fate, said = CASES[name]
    assert cli.main(["repro", f"made:{name}", "--mixer", mixer, "--out", "shown.py"]) == 0
    text = (here / "shown.py").read_text()
    assert fate in text
    assert any(shape in text for shape in ("[2, 40, 50]", "[2, 21, 48]", "[2, 30, 16]"))  # what projections hand over
    done = subprocess.run([sys.executable, "shown.py"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    if said == "w = 1: ":
        assert float(done.stdout.split(said)[1]) < 1e-5


def test_mistakes_leave_no_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["repro", "made:near_miss", "--mixer", "layers.7", "--out", "shown.py"]) == cli.USAGE_ERROR
    assert "no linear-time mixer in Sequential is named 'layers.7'; known: 0" in capsys.readouterr().err
    assert cli.main(["repro", "made:near_miss", "--mixer", "0", "--out", "no/such/folder/shown.py"]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert [path.name for path in here.iterdir() if path.suffix == ".py"] == ["made.py"]


HARM = '"""\nraise SystemExit("run")\n"""\\'


@pytest.mark.parametrize(
    "text", [HARM, '""""', "a\\", "\\N{x}", "\r\u2028\x00'", "plain (model.py:3 in forward)", "größer"]
)
def test_a_name_in_a_docstring_is_read_back(text: str) -> None:
    written = source_text.in_docstring(f"A {text} of {text}.")
    (only,) = ast.parse(f'"""{written}\n"""').body
    assert isinstance(only, ast.Expr)
    assert ast.literal_eval(only.value) == f"A {text} of {text}.\n"


@pytest.mark.parametrize(
    ("module", "name", "fine"),
    [
        ("math", "sqrt", True),
        ("torch.nn.functional", "softplus", True),
        ("os; import evil", "path", False),
        ("math", "sqrt as x; import evil", False),
        ("math", "<lambda>", False),
        ("this", "s", False),  # importing it would run it, and nothing has imported it here
        ("math", "no_such", False),
        ("", "sqrt", False),
    ],
)
def test_what_may_be_imported(module: str, name: str, fine: bool) -> None:
    if fine:
        source_text.check_import(module, name)
    else:
        with pytest.raises(ReproError, match="cannot be imported from there"):
            source_text.check_import(module, name)


class Harmful(int):
    def __repr__(self) -> str:
        return "__import__('os')._exit(3)"


def test_what_may_be_written() -> None:
    for value in (3, -0.5, float("inf"), True, None, 'a"\n', torch.float32):
        assert eval(source_text.literal(value), {"torch": torch}) == value
    for value in (Harmful(3), object(), [Harmful(3)]):
        with pytest.raises(ReproError, match="cannot be written"):
            source_text.literal(value)


class Ahead(nn.Module):
    """A near miss: a token sees the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.q(x) @ self.k(x).mT).tril(1) @ self.v(x)


def test_names_are_data() -> None:
    """A class of any name gives the file that a class of a plain name gives, but for its docstring."""

    def written(name: str) -> list[str]:
        mixer = type(name, (Ahead,), {})()
        text = reproducer(mixer, (torch.randn(2, 20, 8),), {}, "")
        docstring, *code = ast.parse(text).body
        assert name in ast.literal_eval(docstring.value)  # type: ignore[attr-defined]
        return [ast.dump(statement) for statement in code]

    assert written(HARM) == written("Plain")
