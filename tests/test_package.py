"""The package as it is shipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "passes", "patterns")

CHECK_INSTALLED = """
import importlib, importlib.metadata, pathlib, pkgutil, sys
import llcompile
home = pathlib.Path(llcompile.__file__).resolve().parent
assert home.is_relative_to(pathlib.Path(sys.prefix).resolve()), home
for name in ("torch", "kernels", "passes", "patterns"):
    assert name not in sys.modules, f"import llcompile imports {name}"
for module in pkgutil.walk_packages([str(home)], "llcompile."):
    found = importlib.import_module(module.name)
    assert pathlib.Path(found.__file__).resolve().is_relative_to(home), found.__file__
    print(module.name)
import torch
assert "loglinear" in torch._dynamo.list_backends(), torch._dynamo.list_backends()
assert torch._dynamo.lookup_backend("loglinear") is not None
points = importlib.metadata.distribution("llcompile").entry_points
assert {(point.group, point.name) for point in points} == {
    ("console_scripts", "llcompile"), ("torch.backends", "llcompile"), ("torch_dynamo_backends", "loglinear"),
}
for point in points:
    assert callable(point.load()), point
for name in llcompile.__all__:
    getattr(llcompile, name)
"""


def run(*command: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd="/", env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, f"{' '.join(command[:4])}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, links kept as links, so that nothing left over from earlier builds gets in."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("llcompile", *FOLDERS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(copy))
    (built,) = out.glob("*.whl")
    return built


def expected_files() -> Iterator[str]:
    """Every source file under the name that it has in the package; links are walked by their own folders."""
    for folder in ("llcompile", *FOLDERS):
        prefix = "" if folder == "llcompile" else "llcompile/"
        for file in (ROOT / folder).rglob("*.py"):
            relative = file.relative_to(ROOT).as_posix()
            linked = folder == "llcompile" and file.relative_to(ROOT / folder).parts[0] in FOLDERS
            if not linked:
                yield prefix + relative


@pytest.mark.wheel
def test_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    expected = set(expected_files())
    assert expected - sizes.keys() == set()
    assert {name for name in sizes if name.endswith(".py")} - expected == set()
    for name in expected:
        assert sizes[name] == (ROOT / name).stat().st_size, name
    assert "llcompile/py.typed" in sizes
    templates = {f"llcompile/look/templates/{file.name}" for file in (ROOT / "llcompile/look/templates").iterdir()}
    templates |= {f"llcompile/{file.relative_to(ROOT)}" for file in (ROOT / "kernels").rglob("*.jinja")}
    assert "llcompile/kernels/triton/templates/blocks/place.jinja" in templates
    assert templates <= sizes.keys()
    assert any(name.endswith("licenses/LICENSE") for name in sizes)


@pytest.mark.wheel
def test_wheel_installs_and_works(wheel: Path, tmp_path: Path) -> None:
    """In a new environment, which borrows torch and the rest from this one."""
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", str(venv))
    python = str(venv / "bin" / "python")
    candidate = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", str(wheel))
    # A plain path behind the environment's own: .pth files over there, our editable install among them, are not read.
    (candidate / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    modules = run(python, "-I", "-c", CHECK_INSTALLED).split()
    assert {f"llcompile.{folder}" for folder in FOLDERS} <= set(modules)
    assert len(modules) == len([name for name in expected_files() if not name.endswith("llcompile/__init__.py")])
    assert run(str(venv / "bin" / "llcompile"), "--version").startswith("llcompile ")
    assert "def output(" in run(str(venv / "bin" / "llcompile"), "kernels", "show")
    logged = run(
        python, "-I", "-c", "import torch, logging; print(logging.getLogger('llcompile.x').getEffectiveLevel())",
        env={"TORCH_LOGS": "+loglinear"},
    )  # fmt: skip
    assert logged.split() == ["10"]


def test_log_name_is_registered_once_and_again() -> None:
    from torch._logging._internal import log_registry

    from llcompile.autoload import register

    register()
    register()
    assert log_registry.is_log("loglinear")


def test_autoload_survives_any_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from llcompile.autoload import register

    monkeypatch.setitem(sys.modules, "torch._logging._internal", None)
    register()


def test_links_point_to_the_folders() -> None:
    for folder in FOLDERS:
        assert (ROOT / "llcompile" / folder).resolve() == ROOT / folder
