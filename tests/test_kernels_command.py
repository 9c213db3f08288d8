"""`llcompile kernels`: what is printed is what is run, and every mistake is one line."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
import torch

from llcompile.commands import cli
from llcompile.kernels import cache
from llcompile.kernels.triton import show
from llcompile.kernels.triton.chips import DEFAULT
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.schedule import kernel_names


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Generated files, and what Triton makes of them, stay in the test's folder."""
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "kernels"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path / "kernels"


def test_show(capsys):
    """All flags reach the description, and the whole file is printed."""
    flags = "--decay channel --correction delta --key-dim 48 --value-dim 80 --repeat 2 --dtype float16 --levels 9"
    flags += " --initial-state level --final-state --padded"
    assert cli.main(["kernels", "show", *flags.split()]) == 0
    d = Description("channel", "delta", 48, 80, 2, torch.float16, 64, 9, "level", True, True)
    assert capsys.readouterr().out == show.source_of(d)
    assert cli.main(["kernels", "show", "--linear"]) == 0
    assert capsys.readouterr().out == show.source_of(Description("scalar", "none", 64, 64))


def test_show_targets(capsys, tmp_path):
    """A CPU's file is C++ and serves every size; those of GPUs say for which they are."""
    assert cli.main(["kernels", "show", "--target", "cpu", "--correction", "delta", "--dtype", "float64"]) == 0
    source = capsys.readouterr().out
    assert source.startswith("//")
    assert "#include <ATen/Parallel.h>" in source
    flags = ["--correction", "delta", "--dtype", "float64", "--key-dim", "7", "--keep", str(tmp_path / "mine")]
    assert cli.main(["kernels", "show", "--target", "cpu", *flags]) == 0
    assert capsys.readouterr().out == source
    (path,) = (tmp_path / "mine").glob("*.cpp")
    assert path.read_text().strip() == source.strip()
    for flags, words in (
        (["--decay", "rate"], "decay: rate, correction: none"),
        (["--correction", "erase"], "correction: erase"),
    ):
        assert cli.main(["kernels", "show", "--target", "cpu", *flags]) == 0
        assert words in capsys.readouterr().out
    for target in ("cuda", "hip"):
        assert cli.main(["kernels", "show", "--target", target]) == 0
        assert f"backend='{target}'" in capsys.readouterr().out


def test_one_kernel(capsys):
    """Kernels come one by one, each whole, together all that there are."""
    d = Description("none", "delta", 64, 64, levels=17)
    source = show.source_of(d)
    parts = show.kernels_in(source)
    assert tuple(parts) == kernel_names(d)
    assert all(
        text in source and re.match(rf"@triton\.jit(\(do_not_specialize=\[[^\]]*\]\))?\ndef {name}\(", text)
        for name, text in parts.items()
    )
    assert cli.main(["kernels", "show", "--decay", "none", "--correction", "delta", "--kernel", "tree_up"]) == 0
    assert capsys.readouterr().out == parts["tree_up"]


def test_colours_on_a_terminal(monkeypatch):
    """On a terminal the source is coloured, and still the source."""
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["kernels", "show", "--kernel", "tree_up"]) == 0
    assert "\x1b[" in out.getvalue()
    assert "tree_up" in out.getvalue()


def test_who_reads_may_stop():
    """A pipe that closes early, as that of `head`, is no error."""
    code = "from llcompile.commands.cli import main; raise SystemExit(main('kernels show --correction delta'.split()))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_keep_and_list(folder, tmp_path, capsys):
    """Files can be kept in a folder of one's own; those in the cache are listed with their descriptions."""
    assert cli.main(["kernels", "list"]) == 0
    assert f"no generated kernels in {folder}" in capsys.readouterr().out
    assert cli.main(["kernels", "show", "--keep", str(tmp_path / "mine")]) == 0
    printed = capsys.readouterr()
    (path,) = (tmp_path / "mine").iterdir()
    assert path.read_text() == printed.out
    assert str(path) in printed.err
    assert not folder.exists()
    assert cli.main(["kernels", "show", "--keep", str(folder)]) == 0
    (folder / "notes.py").write_text("")
    assert cli.main(["kernels", "show", "--target", "cpu", "--keep", str(folder)]) == 0
    (folder / "notes.cpp").write_text("// mine")
    (cpp,) = folder.glob("scalar*.cpp")
    capsys.readouterr()
    assert cli.main(["kernels", "list"]) == 0
    listed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert listed[:2] == [str(folder / path.name), repr(Description("scalar", "none", 64, 64, levels=17).on(DEFAULT))]
    assert listed[2] == str(cpp)
    assert "decay: scalar, correction: none" in listed[3]
    assert len(listed) == 4


def test_chip(capsys):
    """What a kernel takes on a chip stands below its source."""
    pytest.importorskip("triton")
    assert cli.main(["kernels", "show", "--kernel", "tree_up", "--chip", "sm_90"]) == 0
    *_, heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["#", "chip"]
    assert row.split()[:2] == ["#", "sm_90"]
    (report,) = show.resources(Description("scalar", "none", 64, 64, levels=17), "sm_90", ("tree_up",))
    assert report.kernel == "tree_up"
    assert report.registers > 0
    assert f" {report.registers} " in row


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kernel", "outputs"], "did you mean 'output'?"),
        (["--kernel", "tree_up", "--linear"], "Known: chunk_state, state_scan"),
        (["--kernel", "tree_up", "--chip", "h100"], "Known: sm_80"),
        (["--key-dim", "0"], "integer of at least 1"),
        (["--levels", "3", "--linear"], "not allowed with argument"),
        (["--target", "cpu", "--chip", "sm_90"], "of Triton kernels only"),
        (["--target", "hip", "--chip", "sm_90"], "a chip of target cuda"),
        (["--dtype", "float64"], "see --target cpu"),
        (["--decay", "rate", "--correction", "erase"], "there are no kernels for decay 'rate' with correction 'erase'"),
    ],
)
def test_mistakes(flags, words, capsys):
    """One line that tells what would be right; exit code 2."""
    pytest.importorskip("triton")
    assert cli.main(["kernels", "show", *flags]) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_what_cannot_be_done(monkeypatch, tmp_path, capsys):
    """A folder that cannot be written, and compiling while Triton interprets, are errors of ours: exit code 1."""
    (tmp_path / "file").write_text("")
    assert cli.main(["kernels", "show", "--keep", str(tmp_path / "file" / "mine")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["kernels", "show", "--chip", "sm_90"]) == 1
    assert "TRITON_INTERPRET" in capsys.readouterr().err
