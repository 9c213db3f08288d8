"""The scripts of .ci/: stand-ins for NVIDIA's libraries, and the table of releases. The tiers of the tests."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from tests import tiers

FOLDER = Path(__file__).parent.parent / ".ci"


@pytest.mark.parametrize("table", [tiers.LONG_TESTS, tiers.SECOND_CASES], ids=["check", "test"])
def test_what_a_tier_leaves_out_is_there(table: dict[str, tuple[str, ...]]) -> None:
    """A renamed test would come into the tier unseen."""
    assert all((tiers.FOLDER / name).exists() for name in tiers.LONG_FILES | tiers.LONG_FOLDERS)
    for file, names in table.items():
        text = (tiers.FOLDER / file).read_text()
        assert all(f"def {name.split('[')[0]}(" in text for name in names), file


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(request.param)


def library(folder: Path, name: str, code: str, *arguments: str) -> Path:
    (folder / "code.c").write_text(code)
    command = ["gcc", "-shared", "-fPIC", "-o", str(folder / name), str(folder / "code.c"), *arguments]
    subprocess.run(command, check=True, cwd=folder)
    return folder / name


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize("script", ["cuda_stubs"], indirect=True)
@pytest.mark.parametrize("versioned", [False, True])
def test_a_library_loads_without_the_one_it_is_linked_to(script: ModuleType, versioned: bool, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "exports.map").write_text("libcuda_x.so.9 { global: cudaCount; };")
    more = [f"-Wl,--version-script={tmp_path / 'exports.map'}"] if versioned else []
    cuda = library(tmp_path, "libcuda_x.so.9", "int cudaCount(void) { return 0; }", "-Wl,-soname,libcuda_x.so.9", *more)
    code = "int cudaCount(void); int count(void) { return cudaCount(); }"
    torch = library(tmp_path, "lib/libtorch_x.so", code, str(cuda), "-Wl,-rpath,$ORIGIN")
    cuda.unlink()
    load = f"import ctypes; print(ctypes.CDLL({str(torch)!r}).count())"
    assert subprocess.run([sys.executable, "-c", load], capture_output=True, check=False).returncode != 0
    assert script.install(tmp_path) == ["libcuda_x.so.9"]
    assert script.install(tmp_path) == ["libcuda_x.so.9"]  # once more
    printed = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=True).stdout
    assert int(printed) == script.NO_DEVICE


@pytest.mark.parametrize("script", ["cuda_stubs"], indirect=True)
def test_a_build_without_cuda_is_left_alone(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    library(tmp_path, "lib/libtorch_x.so", "int count(void) { return 1; }")
    assert script.install(tmp_path) == []
    assert [path.name for path in (tmp_path / "lib").iterdir()] == ["libtorch_x.so"]


@pytest.mark.parametrize("script", ["matrix"], indirect=True)
class TestMatrix:
    def result(self, script: ModuleType, *ok: bool | None) -> object:
        lines = [
            {"topic": f"self-test: transformers: {i}", "found": "moved | 0", "ok": one} for i, one in enumerate(ok)
        ]
        return script.Result(script.Row("2.15.0", "5.24.0", "3.11"), {"torch": "2.15.0+cu132"}, lines)

    def test_a_row_needs_every_line(self, script: ModuleType) -> None:
        assert self.result(script, True, None).acts
        assert not self.result(script, True, False).acts
        assert not self.result(script).acts
        assert not self.result(script, None).acts
        assert not script.Result(script.Row("2.15.0", "5.24.0"), problem="no Python 3.9").acts

    def test_the_page(self, script: ModuleType) -> None:
        page = script._page(
            [self.result(script, True, False), script.Result(script.Row("9.9", "1"), problem="refused")]
        )
        table = page[page.index("| torch") :].splitlines()
        assert {line.count("|") for line in table} == {8}
        assert "| 2.15.0+cu132 | 5.24.0 | 3.11 | - | - | **no** | 1 of 2 act; transformers: 1: moved / 0 |" in table
        assert "not tried | refused |" in table[-1]

    def test_kept_results_come_back(self, script: ModuleType, tmp_path: Path) -> None:
        result = self.result(script, True)
        refused = script.Result(script.Row("9.9", "1"), problem="refused")
        for name, one in (("0", result), ("1", refused)):
            (tmp_path / f"{name}.json").write_text(json.dumps(asdict(one)))
        assert script._kept(tmp_path, (result.row, refused.row)) == {result.row: result}

    def test_what_a_registry_refuses_is_said(self, script: ModuleType) -> None:
        said = script._last_line("WARNING: x\nERROR: No matching distribution found for torch==2.15.0\n[notice] y\n")
        assert said == "ERROR: No matching distribution found for torch==2.15.0"
        with pytest.raises(script.Refused, match="no such thing"):
            script._output([sys.executable, "-c", "raise SystemExit('no such thing')"])

    def test_a_python_that_is_not_there(self, script: ModuleType) -> None:
        assert script._interpreter(None) == sys.executable
        with pytest.raises(script.Refused, match=r"no Python 2\.0"):
            script._interpreter("2.0")
