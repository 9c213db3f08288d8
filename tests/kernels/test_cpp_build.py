"""Libraries of generated C++: what is compiled, what is kept, what is refused. The sources here are the tests' own."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llcompile.errors import CompilerError, KernelCacheError
from llcompile.kernels import cache, progress
from llcompile.kernels.cpp import build, compiler

pytestmark = pytest.mark.skipif(
    compiler.unsupported() is not None or shutil.which("g++") is None, reason="needs g++ on Linux or macOS"
)

SOURCE = 'extern "C" long answer() { return 42; }\n'
# Uses what the generated sources use of torch.
WITH_TORCH = """
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
extern "C" double halves(long n) {
  std::atomic<long> sum{0};
  at::parallel_for(0, n, 1, [&](long from, long to) { sum += to - from; });
  return double(c10::BFloat16(1.5f)) + double(c10::Half(0.25f)) + double(sum);
}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder for generated files, and a process that has compiled nothing."""
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "kernels"))
    for table in ("_loaded", "_failed"):
        monkeypatch.setattr(build, table, {})
    return tmp_path / "kernels"


@pytest.fixture
def compiles(tmp_path, monkeypatch):
    """A compiler that writes a line for each library that it makes; gives the lines."""
    log, script = tmp_path / "log", tmp_path / "my c++"
    script.write_text(f'#!/bin/sh\ncase "$*" in *" -o "*) echo library >> {log}; sleep 0.3;; esac\nexec g++ "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv(compiler.VARIABLE, shlex.quote(str(script)))
    return lambda: log.read_text().split() if log.exists() else []


def fresh() -> None:
    """As in a new process."""
    build._loaded.clear()
    build._failed.clear()


def test_compiled_once_and_kept(folder, compiles):
    """The source lies beside the library; neither the same process nor the next one compiles it again."""
    loaded = build.library(SOURCE, "part")
    assert loaded.answer() == 42
    assert build.library(SOURCE, "part") is loaded
    fresh()
    assert build.library(SOURCE, "part").answer() == 42
    assert compiles() == ["library"]
    files = {path.suffix: path for path in folder.iterdir() if not path.name.startswith(".")}
    assert files.keys() == {".cpp", ".so"}
    assert files[".cpp"].read_text() == SOURCE
    assert all(path.name.startswith("part_") for path in files.values())


def test_what_the_sources_include_is_found():
    """Headers of torch, and what they need at link time; threads are torch's."""
    loaded = build.library(WITH_TORCH, "part")
    loaded.halves.restype = build.ctypes.c_double
    assert loaded.halves(1000) == 1001.75


def test_told_once_where_a_person_waits(compiles, caplog, capsys):
    """One line before and one after; the next process has nothing to say."""
    caplog.set_level(logging.INFO, "llcompile.kernels")
    with progress.told_to(progress.on_stderr):
        build.library(SOURCE, "part")
        fresh()
        build.library(SOURCE, "part")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("llcompile: compiling the C++ kernels part_") == 1
    assert len(printed.err.splitlines()) == 2
    assert caplog.text.count("compiling the C++ kernels") == 1
    build.library(SOURCE + "// 2", "part")
    assert capsys.readouterr().err == ""


def test_the_key_has_all_that_a_library_depends_on(monkeypatch):
    """Source, version, flags, torch and the CPU each change it; nothing else does."""
    found = compiler.find()
    key = found.key(SOURCE)
    assert key == found.key(SOURCE) == found._replace(command=("other",)).key(SOURCE)
    others = [found.key(SOURCE + " "), found._replace(version="1").key(SOURCE)]
    others.append(found._replace(flags=(*found.flags, "-g")).key(SOURCE))
    monkeypatch.setattr(compiler, "_cpu", lambda: "another")
    others.append(found.key(SOURCE))
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "0")
    others.append(found.key(SOURCE))
    assert len({key, *others}) == 6


def test_flags():
    """Infinities and NaN mean something; a flag that a compiler does not know is left out."""
    found = compiler.find()
    assert not any("fast-math" in flag or "finite" in flag for flag in found.flags)
    assert not compiler._takes(found.command, "-march=of-a-test")
    assert ("-march=native" in found.flags) == compiler._takes(found.command, "-march=native")


def test_the_cpu_is_told_by_its_instructions():
    """Two machines that share a folder share a library only if they are alike."""
    if Path("/proc/cpuinfo").exists():
        assert len(compiler._cpu().split()) > 5
    assert torch.backends.cpu.get_cpu_capability() in compiler._cpu()


@pytest.mark.parametrize("named", ["/nonexistent", "false"])
def test_no_compiler_of_that_name(monkeypatch, named):
    """`CXX` is not replaced in silence by another compiler."""
    monkeypatch.setenv(compiler.VARIABLE, named)
    with pytest.raises(CompilerError, match=f"{named} does not run .*CXX"):
        build.library(SOURCE, "part")


def test_another_platform(monkeypatch):
    """Told, whatever `CXX` says."""
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(CompilerError, match="on linux and darwin only"):
        compiler.find()


def test_no_compiler(monkeypatch, tmp_path):
    """The message says how to get one."""
    monkeypatch.delenv(compiler.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilerError, match=r"no C\+\+ compiler was found: install one \(.+\), or set .*CXX"):
        build.library(SOURCE, "part")


def test_a_compiler_that_fails(folder, compiles):
    """The message has the error, the source and the command; the process does not try again."""
    for _ in range(2):
        with pytest.raises(CompilerError) as raised:
            build.library("not C++\n", "part")
    (source,) = folder.glob("*.cpp")
    message = str(raised.value)
    assert "error: " in message
    assert message.count(str(source)) >= 2
    assert " -O3 " in message
    assert compiles() == ["library"]
    assert not list(folder.glob("*.so"))


def test_what_cannot_be_loaded(monkeypatch):
    """A missing symbol is an error of ours, with the loader's words."""
    with pytest.raises(CompilerError, match=r"cannot be loaded .*nowhere"):
        build.library('extern "C" long nowhere(); extern "C" long f() { return nowhere(); } long x = f();', "part")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, compiles):
    """Told before anything is compiled."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "file" / "kernels"))
    with pytest.raises(KernelCacheError, match=cache.FOLDER_VARIABLE):
        build.library(SOURCE, "part")
    assert compiles() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_can_only_be_read(folder, compiles):
    """What is there is used; what is not there is told before anything is compiled."""
    build.library(SOURCE, "part")
    folder.chmod(0o555)
    fresh()
    assert build.library(SOURCE, "part").answer() == 42
    with pytest.raises(KernelCacheError, match=cache.FOLDER_VARIABLE):
        build.library(SOURCE + "// 2", "part")
    assert compiles() == ["library"]


def test_a_damaged_library(folder, compiles, caplog):
    """Never loaded: compiled again, which is told."""
    build.library(SOURCE, "part")
    (path,) = folder.glob("*.so")
    content = path.read_bytes()
    path.unlink()  # its memory is this process's, too
    path.write_bytes(content[:-10])
    fresh()
    assert build.library(SOURCE, "part").answer() == 42
    assert f"{path} is damaged" in caplog.text
    assert compiles() == ["library"] * 2
    assert path.read_bytes() == content


@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")
def test_a_library_of_others(folder, compiles):
    """What others can change is not loaded, nor is anything from a folder in which they can write."""
    build.library(SOURCE, "part")
    (path,) = folder.glob("*.so")
    path.chmod(0o666)
    fresh()
    build.library(SOURCE, "part")
    assert compiles() == ["library"] * 2
    folder.chmod(0o777)
    fresh()
    with pytest.raises(KernelCacheError, match="can be written by other users"):
        build.library(SOURCE, "part")


def test_threads_wait_for_the_one_that_compiles(compiles):
    """One library, whoever comes first."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: build.library(SOURCE, "part"), range(8)))
    assert len({id(one) for one in found}) == 1
    assert compiles() == ["library"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_while_another_thread_compiles(compiles):
    """The child does not wait for a thread that it does not have, but for the parent to finish."""
    code = f"""
import os, threading, time
from llcompile.kernels.cpp import build
compiled, ready = build.compiled, threading.Event()
def slow(*arguments):  # both locks are held, and no other program runs
    content = compiled(*arguments)
    ready.set()
    time.sleep(0.5)
    return content
build.compiled = slow
thread = threading.Thread(target=build.library, args=({SOURCE!r}, "part"))
thread.start()
ready.wait()
child = os.fork()
if not child:
    os._exit(build.library({SOURCE!r}, "part").answer())
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["42"]
    assert compiles() == ["library"]


def test_two_processes_at_once(folder, compiles):
    """The second waits for the first and compiles nothing; both run the same file."""
    code = f"from llcompile.kernels.cpp.build import library; print(library({SOURCE!r}, 'part').answer())"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["42", "42"]
    assert compiles() == ["library"]
    assert len(list(folder.glob("*.so"))) == 1
