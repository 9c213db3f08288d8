"""The command line: instant help, one clear line for every mistake, and the report of a model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llcompile import __version__
from llcompile.commands import cli, doctor, spec
from llcompile.errors import CaptureError
from llcompile.patterns.known import ENTRIES

TINY = ["--set", "num_hidden_layers=2", "--set", "hidden_size=32", "--set", "num_heads=4", "--set", "head_dim=16"]
TINY += ["--set", "state_size=8", "--set", "vocab_size=32", "--set", "n_groups=1", "--set", "chunk_size=16"]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def test_help_imports_no_torch() -> None:
    code = """import sys
from llcompile.commands.cli import main
code = main(["--help"])
assert "torch" not in sys.modules
sys.exit(code)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in cli.COMMANDS:
        assert command.name in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llcompile {__version__}\n"


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "inspect" in capsys.readouterr().out


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help(command: cli.Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command.name, "--help"]) == 0
    assert f"llcompile {command.name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["inspect"], "SPEC"),
        (["inspect", "--nonsense", "mamba2"], "--nonsense"),
        (["inspect", "mambo2"], "did you mean 'mamba2'"),
        (["inspect", "no_such_module:make"], "cannot import 'no_such_module'"),
        (["inspect", "json:no_such_function"], "has no 'no_such_function'"),
        (["inspect", "no/such/config.json"], "no/such/config.json does not exist"),
        (["inspect", "mamba2", "--set", "nonsense=1"], "KEY=VALUE"),
        (["inspect", "mamba2", "--chip", "sm_1"], "known: sm_80"),
        (["inspect", "factories:needs"], "factories:needs(width, depth=2) needs arguments"),
        (["inspect", "factories:fails"], "raised ZeroDivisionError: division by zero"),
        (["inspect", "factories:thing"], "is a int; expected a function"),
        (["inspect", "broken_factories:make"], "cannot import 'broken_factories': RuntimeError: at import"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "factories.py").write_text(
        "thing = 3\ndef needs(width, depth=2): return width\ndef fails(): return 1 / 0\n"
    )
    (tmp_path / "broken_factories.py").write_text("raise RuntimeError('at import')\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == cli.USAGE_ERROR
    assert words in one_line(capsys)


def test_an_error_of_ours_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: object) -> int:
        raise CaptureError("the model does not run")

    monkeypatch.setattr(doctor, "run", fail)
    assert cli.main(["doctor"]) == 1
    assert one_line(capsys) == "llcompile: the model does not run\n"


def test_doctor_tells_whether_cpp_kernels_can_be_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def found() -> dict[str, dict[str, Any]]:
        cli.main(["doctor", "--json", "--no-self-test"])
        return {finding["topic"]: finding for finding in json.loads(capsys.readouterr().out)}

    monkeypatch.setenv("CXX", "g++")
    if shutil.which("g++"):
        assert found()["C++ kernels"]["found"].startswith("g++ works: ")
    monkeypatch.setenv("CXX", "/nonexistent")
    missing = found()["C++ kernels"]
    assert missing["ok"] is None
    assert "/nonexistent does not run" in missing["found"]
    monkeypatch.setenv("LLCOMPILE_KERNELS", "c++")
    wrong = found()["operator"]
    assert wrong["ok"] is False
    assert "auto, cpp, triton, aten" in wrong["advice"]


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json", "--no-self-test"]) in (0, 1)
    findings = {finding["topic"]: finding for finding in json.loads(capsys.readouterr().out)}
    libraries = {entry.library for entry in ENTRIES}
    assert {"llcompile", "python", "torch", "C++ compiler", "cpu", *libraries} <= set(findings)
    assert all(finding["advice"] for finding in findings.values() if finding["ok"] is False)
    assert cli.main(["doctor", "--no-self-test"]) in (0, 1)
    assert "torch" in capsys.readouterr().out


class TestInspect:
    """On the meta device, from each of the three kinds of SPEC."""

    def test_model_type(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("transformers")
        file = tmp_path / "report.json"
        assert cli.main(["inspect", "mamba2", *TINY, "--strict", "--json", str(file)]) == 0
        assert "2 of 2 linear-time mixers" in capsys.readouterr().out
        assert [record["origin"] for record in json.loads(file.read_text())["converted"]] == ["function"] * 2

    def test_config_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("transformers")
        (tmp_path / "config.json").write_text(
            '{"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,'
            '"num_key_value_heads": 2, "intermediate_size": 16, "vocab_size": 8}'
        )
        for given in (tmp_path, tmp_path / "config.json"):
            assert cli.main(["inspect", str(given), "--json", "-"]) == 0
            assert json.loads(capsys.readouterr().out)["converted"] == []
        assert cli.main(["inspect", str(tmp_path), "--strict"]) == 0  # softmax attention is no miss

    def test_a_folder_that_save_pretrained_wrote(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        transformers.Mamba2Config(state_size=48, time_step_limit=(0.0, float("inf"))).save_pretrained(tmp_path)
        config = spec._read_config(tmp_path)  # infinity has a spelling of its own there
        assert (config.state_size, config.time_step_limit[1]) == (48, float("inf"))

    def test_a_file_that_is_no_config(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("transformers")
        for text in ("{", "{}", "[1]", '{"model_type": "nonsense"}'):
            (tmp_path / "config.json").write_text(text)
            assert cli.main(["inspect", str(tmp_path)]) == cli.USAGE_ERROR
            assert "is not a transformers config" in capsys.readouterr().err

    def test_factory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "my_factory_for_a_test.py").write_text(
            "import torch\ndef make(): return torch.nn.Linear(3, 3), torch.zeros(2, 3)\ndef wrong(): return 3\n"
        )
        monkeypatch.chdir(tmp_path)
        assert cli.main(["inspect", "my_factory_for_a_test:make"]) == 0
        assert "No linear-time mixer" in capsys.readouterr().out
        assert cli.main(["inspect", "my_factory_for_a_test:wrong"]) == cli.USAGE_ERROR
        assert "returned int; expected a tuple" in capsys.readouterr().err

    def test_everything_that_can_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("grandalf")
        (tmp_path / "looked_at.py").write_text(
            "from tests.helpers import small\ndef make(): return small.Model([small.DeltaMixer()]), small.ids()\n"
        )
        monkeypatch.chdir(tmp_path)
        written = ["--html", "page.html", "--json", "look.json", "--kernels", "generated"]
        assert cli.main(["inspect", "looked_at:make", *written]) == 0
        assert "Gated DeltaNet" in capsys.readouterr().out
        assert "<h1>Model</h1>" in Path("page.html").read_text()
        (mixer,) = json.loads(Path("look.json").read_text())["mixers"]
        assert "loglinear_attention" in mixer["after"]
        kernels = sorted(Path("generated").iterdir())
        assert [k.name.rpartition("_")[2] for k in kernels] == ["cpu.cpp", "cuda.py", "hip.py"]
        assert all(k.name.startswith("scalar_delta_level17_k8_v8_float32_") for k in kernels)
        assert ["@triton.jit" in k.read_text() for k in kernels] == [False, True, True]
        assert "#include" in kernels[0].read_text()

    def test_what_cannot_be_written_is_said_before_the_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("llcompile.commands.inspect.load_asked", lambda *_: pytest.fail("it began to work"))
        (tmp_path / "file").write_text("")
        for flag, path in (("--html", "no/page.html"), ("--json", "."), ("--kernels", "file/below")):
            assert cli.main(["inspect", "mamba2", flag, str(tmp_path / path)]) == 1
            assert "cannot write" in one_line(capsys)
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    def test_a_model_that_does_not_trace(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "untraceable.py").write_text(
            "import torch\nclass Hidden(torch.nn.Module):\n    @torch.compiler.disable\n"
            "    def forward(self, x): return x + 1\ndef make(): return Hidden(), torch.zeros(3)\n"
        )
        monkeypatch.chdir(tmp_path)
        assert cli.main(["inspect", "untraceable:make"]) == 0
        shown = capsys.readouterr().out
        assert "Dynamo makes no graph of Hidden" in shown
        assert "untraceable.py:3 in forward" in shown
        assert cli.main(["inspect", "untraceable:make", "--strict"]) == 1


@pytest.mark.parametrize("name", ["demo", "bench"])
def test_what_is_not_in_the_installed_package_says_where_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_BESIDE", tmp_path)
    assert cli.main([name]) == 2
    said = capsys.readouterr().err
    assert "not part of the installed package" in said
    assert {"demo": "examples/demo/", "bench": "benchmarks/"}[name] in said
