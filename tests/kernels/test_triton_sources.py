"""The generator without running anything: its templates, its files, its choice of implementation."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import linecache
import os
import py_compile
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateSyntaxError, UndefinedError

from llcompile.errors import KernelCacheError, KernelError, OptionError
from llcompile.kernels import cache, choice
from llcompile.kernels.description import describe
from llcompile.kernels.implementations import IMPLEMENTATIONS
from llcompile.kernels.operands import Operands, Token
from llcompile.kernels.triton import engine, limits, source, step
from llcompile.kernels.triton.buffers import BUFFERS
from llcompile.kernels.triton.chips import CHIPS, Chip
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.limits import max_key_dim, unsupported
from llcompile.kernels.triton.schedule import DECODE, KERNELS, kernel_names
from llcompile.kernels.triton.show import kernels_in
from llcompile.kernels.triton.source import generate
from llcompile.ops import loglinear_attention
from tests.kernels.effects import effects
from tests.kernels.kernel_cases import operands

OutOfResources = pytest.importorskip("triton.runtime.errors").OutOfResources

FAMILIES = [
    *itertools.product(("none", "scalar", "channel"), ("none", "delta")),
    ("channel", "erase"),
    ("rate", "none"),
]
# Every family with and without everything else; what else there is comes in all pairs.
ALL = [
    Description(
        *(decay, correction, 48, 80, repeat),
        levels=levels,
        initial_state=old,
        final_state=final,
        padded=rows == "padded",
        packed=rows == "packed",
    )
    for (decay, correction), levels in itertools.product(FAMILIES, (None, 9))
    for old, final, rows, repeat in (
        *(("none", False, "full", 1), ("linear", True, "padded", 1), ("level", True, "full", 2)),
        *(("none", True, "padded", 2), ("linear", False, "full", 2), ("level", False, "padded", 1)),
        *(("none", False, "packed", 1), ("level", True, "packed", 2)),
    )
] + [
    Description(decay, correction, 48, 80, repeat, levels=9, padded=padded, walk=16)
    for decay, correction, (repeat, padded) in itertools.product(
        ("none", "scalar"), ("none", "delta"), ((1, False), (2, True))
    )
]


# Parameters that every kernel of a kind gets.
COME_WITH_OTHERS = {"heads", "tokens", "chunks", "batch_heads", "lengths", "served_levels", "grid_levels", "VALUE_TILE"}
COME_WITH_OTHERS |= {"starts", "first_chunks", "chunk_sequences", "weight_repeat"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder for generated files."""
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def templates() -> dict[str, str]:
    """The text of each template by its path in the folder."""
    return {name: source._templates().loader.get_source(None, name)[0] for name in source._templates().list_templates()}


def test_what_is_called_on_a_line_is_indented_there():
    """All lines of a macro, and of macros that it calls, whatever the depth."""
    text = """
#% macro inner(name)
if {{ name }}:
    {{ name }} = 1
#% endmacro
#% macro outer()
#% if wanted
{{ inner("a") }}
#% endif
for x in y:
    {{ inner("b") }}
#% endmacro
def f():
    {{ outer() }}
"""
    lines = source._templates().from_string(text).render(wanted=True).splitlines()
    assert [line for line in lines if line.strip()] == [
        *("def f():", "    if a:", "        a = 1", "    for x in y:", "        if b:", "            b = 1")
    ]


@pytest.mark.parametrize(
    "text", ["#% if unknown\n#% endif", "{{ unknown }}", "{{ place.unknown() }}", "#% if delta", "#% endif"]
)
def test_wrong_templates(text):
    """A mistake in a template does not pass."""
    context = source._context(Description("none", "delta", 16, 16))
    with pytest.raises((UndefinedError, TemplateSyntaxError)):
        source._templates().from_string(text).render(context)


def test_every_template_is_used():
    """A file for each kernel; and no macro of the shared ones that nobody calls."""
    kernels = {f"{name}.jinja" for name in KERNELS}
    shared = {f"blocks/{name}.jinja" for name in source.BLOCKS}
    readouts = {f"readouts/{name}" for name in re.findall(r'include "readouts/(.+)"', templates()["readouts.jinja"])}
    assert templates().keys() == kernels | shared | readouts | {"functions.jinja", "readouts.jinja"}
    everything = "\n".join(templates().values())
    for name in shared:
        for macro in re.findall(r"#% macro (\w+)", templates()[name]):
            assert re.search(rf"{{{{ (\w+\.)?{macro}\(", everything), macro


@functools.cache
def tree_of(d: Description) -> ast.Module:
    return ast.parse(generate(d))


def test_every_source_is_python_that_names_what_it_uses():
    """Nothing of the template language is left, and every name is a parameter, a local or a constant."""
    seen = set()
    for d in ALL:
        text = generate(d)
        assert repr(d) in text
        assert not re.search(r"\{[{%]|[}%]\}|#[%#]", text)
        tree = tree_of(d)
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        known = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        known |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
        known |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        assert names - known <= {"range", "tl", "triton"}, names - known
        seen |= set(kernel_names(d))
    assert seen == KERNELS.keys()


def test_every_parameter_is_used():
    """A kernel asks for nothing that it does not need (strides and sizes that come with others aside)."""
    for d in ALL:
        for function in tree_of(d).body:
            if isinstance(function, ast.FunctionDef) and function.name in KERNELS:
                used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
                unused = {a.arg for a in function.args.args} - used - COME_WITH_OTHERS
                assert not {n for n in unused if not n.endswith(("_row", "_token", "_head"))}, (d, function.name)


def test_packed_sequences_have_their_own_chunks():
    """No kernel reckons where a sequence's chunks are but by the tables."""
    for d in ALL:
        if d.packed:
            assert not re.search(r"_head \* chunks(?! \+ first_chunk)", generate(d)), d


NUMBERS = {"scale", "heads", "tokens", "chunks", "batch_heads", "half", "pairs", "level"}
NUMBERS |= {"far_levels", "grid_levels", "old_levels", "end_levels", "share", "weight_repeat", "parts", "VALUE_TILE"}


def test_buffers_are_as_signatures_say():
    """Each parameter is an operand with its strides, a number, or a buffer, whose axes stand beside it."""
    seen = set()
    for d in ALL:
        for name, text in kernels_in(generate(d)).items():
            if name in DECODE:
                continue
            for line in text[text.index("def ") : text.index("):\n")].splitlines()[1:]:
                parameters, _, comment = line.strip().partition("  # ")
                if parameters.rstrip(",") in BUFFERS:
                    assert comment.startswith(BUFFERS[parameters.rstrip(",")].axes), (name, line)
                    seen.add(parameters.rstrip(","))
                else:
                    words = {p.partition(":")[0] for p in parameters.rstrip(",").split(", ")}
                    assert all(p in NUMBERS or p.endswith(("_ptr", "_row", "_token", "_head")) for p in words), line
    assert seen == BUFFERS.keys()


def test_buffers_are_written_before_they_are_read():
    """In the order of the schedule; and what a kernel changes in place is what its entry says."""
    changed = {name: set() for name in KERNELS}
    for d in ALL:
        filled = {name for name, buffer in BUFFERS.items() if buffer.first in ("given", "zero")}
        for name in kernel_names(d):
            read, written = (names & BUFFERS.keys() for names in effects(tree_of(d), name))
            changed[name] |= read & written
            if name not in DECODE:  # the output's kernels write for nobody that comes after
                assert read <= filled | written, (d, name)
                filled |= written
    for name, entry in KERNELS.items():
        assert changed[name] - FOR_ITSELF == set(entry.changes), name


# Buffers that a kernel reads and writes, and others only read: it finds there what it has written itself.
FOR_ITSELF = {"readers", "reaches", "old_readers", "old_reaches", "carries", "low_states", "passing_states"}


def test_effects_are_read_off_the_source():
    """Loads, stores and both, through local names, through loops, and not through what was loaded."""
    text = """
def kernel(a, b, c, d, e, table, number):
    at = a + number
    for i in range(3):
        x = load_rows(at, i) + tl.load(table + i)
        at = b + i
    store_rows(at, x)
    tl.store(c + x, x)
    add_column(d + number, x)
    seen = tl.load(table)
    tl.store(e + seen, x)
"""
    read, written = effects(ast.parse(text), "kernel")
    assert read - {"number"} == {"a", "b", "d", "table"}
    assert written - {"number"} == {"a", "b", "c", "d", "e"}


def test_files(folder, caplog):
    """A file is named by its content, damaged ones are written anew, and writers at the same time do not disturb."""
    path = cache.file_of("x = 1\n", "part")
    assert path.parent == folder
    assert path.read_text() == "x = 1\n"
    path.write_text("x = ")
    assert not caplog.text
    assert cache.file_of("x = 1\n", "part") == path
    assert f"{path} is damaged" in caplog.text
    assert path.read_text() == "x = 1\n"
    assert cache.load(path).x == 1
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: cache.file_of("y = 2\n", "part"), range(64)))
    assert len(paths) == 1
    assert sorted(p.suffix for p in folder.iterdir() if p.is_file()) == [".py", ".py"]


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """The message names the folder and the way out."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "file" / "kernels"))
    with pytest.raises(KernelCacheError, match=cache.FOLDER_VARIABLE):
        cache.file_of("x = 1\n", "part")


def test_nothing_but_the_checked_text_runs(folder):
    """Not the bytecode beside it, not what a file was changed to, not what it is changed to while it is looked at."""
    path = cache.file_of("def f():\n    return 'ours'\n", "part")
    other = folder / "other.py"
    other.write_text("def f():\n    return 'other'\n")
    compiled = Path(importlib.util.cache_from_source(str(path)))
    compiled.parent.mkdir()
    py_compile.compile(str(other), str(compiled), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    module = cache.load(path)
    assert module.f() == "ours"
    path.write_text(other.read_text())
    linecache.checkcache()
    assert "ours" in inspect.getsource(module.f)  # what Triton is given
    assert cache.load(path) is module
    changed = cache.file_of("x = 3\n", "part")
    changed.write_text("x = 4\n")
    with pytest.raises(KernelCacheError, match=r"is damaged: .* hash in the file's name"):
        cache.load(changed)
    with pytest.raises(KernelCacheError, match="cannot be read"):
        cache.load(folder / f"gone_{changed.stem[-16:]}.py")
    with pytest.raises(KernelCacheError, match="is damaged"):
        cache.load(other)
    assert not list(compiled.parent.glob("*other*"))


def test_a_module_is_whole_when_a_thread_finds_it(folder):
    """Threads that load at once wait for the one that runs it."""
    sources = [f"import time\nfirst = {i}\ntime.sleep(0.02)\nlast = {i}\n" for i in range(4)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: cache.load(cache.file_of(sources[i % 4], "slow")).last, range(32)))
    assert found == [i % 4 for i in range(32)]
    path = cache.file_of("raise ValueError('mine')\n", "part")
    for _ in range(2):  # and one that fails is not kept
        with pytest.raises(ValueError, match="mine"):
            cache.load(path)


@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")
def test_folders_and_files_of_others(folder, monkeypatch):
    """Refused with a sentence, where the kernels are to run; the control is a folder of one's own."""
    path = cache.file_of("x = 5\n", "part")
    assert stat.S_IMODE(folder.stat().st_mode) & 0o022 == 0
    folder.chmod(0o777)
    with pytest.raises(KernelCacheError, match=f"{folder}, can be written by other users.*{cache.FOLDER_VARIABLE}"):
        cache.file_of("x = 5\n", "part")
    folder.chmod(0o1777)  # as /tmp: files there are their owners'
    assert cache.file_of("x = 5\n", "part") == path
    path.chmod(0o666)
    with pytest.raises(KernelCacheError):
        cache.load(path)
    assert cache.load(cache.file_of("x = 5\n", "part")).x == 5  # written anew
    folder.chmod(0o755)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    if me:  # root's folders are everybody's
        with pytest.raises(KernelCacheError, match="belongs to another user"):
            cache.file_of("x = 5\n", "part")
    else:
        os.chown(folder, 12345, -1)
        with pytest.raises(KernelCacheError, match="belongs to another user"):
            cache.file_of("x = 5\n", "part")


def test_temporary_files_of_the_dead(folder):
    """Removed once they are old; those that somebody may be writing stay."""
    cache.file_of("x = 6\n", "part")
    old, new = folder / ".part.a.tmp", folder / ".part.b.tmp"
    old.write_text("x")
    new.write_text("x")
    os.utime(old, (0, 0))
    cache.file_of("x = 7\n", "part")
    assert not old.exists()
    assert new.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path, monkeypatch):
    """A folder of somebody else's."""
    tmp_path.chmod(stat.S_IREAD | stat.S_IEXEC)
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "kernels"))
    with pytest.raises(KernelCacheError):
        cache.file_of("x = 1\n", "part")


def test_limits():
    """Each limit is told with its number."""
    cuda = torch.device("cuda")
    assert unsupported(Description("none", "none", 128, 512), cuda) is None
    assert "the limit is 128" in str(unsupported(Description("none", "delta", 129, 64), cuda))
    wide = Description("none", "delta", 128, 64)
    chips = ("sm_80", "sm_89", "sm_90", "gfx942")
    assert [max_key_dim(wide, CHIPS[name]) for name in chips] == [128, 64, 128, 128]
    exact = dataclasses.replace(wide, dtype=torch.float32)
    assert [max_key_dim(exact, CHIPS[name]) for name in chips] == [64, 64, 128, 128]
    assert max_key_dim(wide, Chip("sm_75", "cuda", 75, 32, 64 * 1024)) == 0
    assert "float64" in str(unsupported(Description("none", "none", 64, 64, dtype=torch.float64), cuda))
    assert "operands are on cpu" in str(unsupported(Description("none", "none", 64, 64), torch.device("cpu")))
    assert unsupported(Description("rate", "none", 256, 1), cuda) is None
    assert "K = 257 is more than their 256" in str(unsupported(Description("rate", "none", 257, 1), cuda))
    assert "the limit is 128" in str(unsupported(Description("channel", "erase", 129, 64), cuda))
    assert "no kernels for decay 'rate' with correction 'delta'" in str(
        unsupported(Description("rate", "delta", 16, 1), cuda)
    )


def test_old_devices(monkeypatch):
    """A GPU that Triton does not know is told by its capability."""
    monkeypatch.setattr(limits, "capability", lambda device: (7, 5))
    reason = unsupported(Description("none", "none", 64, 64), torch.device("cuda"))
    assert reason == "cuda has compute capability 7.5; Triton needs 8.0 or later"


@pytest.fixture
def on_gpu(monkeypatch):
    """Operands whose calls are chosen as on a GPU; no kernel of these tests comes so far as to run."""
    monkeypatch.setattr(choice, "preferred", lambda device: IMPLEMENTATIONS["triton"])
    monkeypatch.setattr(choice, "_refused", {})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    choice._tell.cache_clear()

    def make(**options: object) -> Operands:
        return Operands(*operands(20, dtype=torch.float32, **options).values(), None)

    return make


def raises(error: Exception) -> object:
    def run(*arguments: object) -> object:
        raise error

    return run


FAILURES = {
    "folder": (KernelCacheError("generated kernels cannot be written to /nowhere"), "/nowhere"),
    "room": (OutOfResources(232448, 101376, "shared memory"), "out of resource: shared memory"),
    "import": (ImportError("libcuda.so.1: cannot open"), "libcuda.so.1"),
}


@pytest.mark.parametrize("what", FAILURES)
@pytest.mark.parametrize("sweep", ["forward", "backward", "step"])
def test_what_fails_on_a_gpu(on_gpu, monkeypatch, caplog, what, sweep):
    """Under auto the lowering runs and one warning tells why; asked for by name, the kernels raise."""
    error, words = FAILURES[what]
    for module in (engine, step):
        if hasattr(module, sweep):
            monkeypatch.setattr(module, sweep, raises(error))
    x = on_gpu(delta=True, batch=2)
    token = (*(None if t is None else t[:, 0] for t in x[:4]), torch.zeros(2, 4, 13, 5, 3), x.log_decay[:, 0])
    calls = {
        "forward": lambda: choice.forward(x, 1.0, False)[0],
        "backward": lambda: choice.backward(x, 1.0, x.v, None)[2],
        "step": lambda: choice.step(Token(*token, beta=x.beta[:, 0]))[0],
    }
    with choice.use("aten"):
        want = calls[sweep]()
    with choice.use("auto"):
        for _ in range(2):
            assert torch.equal(calls[sweep](), want)
    assert caplog.text.count("the ATen lowering is used instead of Triton kernels") == 1
    assert words in caplog.text.replace("Out of", "out of")
    with choice.use("triton"), pytest.raises(KernelError) as raised:
        calls[sweep]()
    assert words in str(raised.value).replace("Out of", "out of")
    assert (what == "folder") == isinstance(raised.value, KernelCacheError)


def test_what_does_not_fit_on_a_gpu(on_gpu, caplog):
    """K beyond the limit: the warning names the limit and what runs instead."""
    x = on_gpu(delta=True, key_dim=129)
    with choice.use("auto"):
        assert choice.forward(x, 1.0, False)[0].shape == x.v.shape
    assert "instead of Triton kernels, because K = 129 does not fit" in caplog.text
    assert "the limit is 128" in caplog.text
    with choice.use("triton"), pytest.raises(KernelError, match="the limit is 128"):
        choice.forward(x, 1.0, False)


def test_folder_that_cannot_be_written_on_a_gpu(on_gpu, tmp_path, monkeypatch, caplog):
    """The whole way: no file, no kernels; the lowering's result and a warning that names the variable."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "file" / "kernels"))
    x = on_gpu(key_dim=7, value_dim=11)
    with choice.use("auto"):
        assert choice.forward(x, 1.0, False)[0].shape == x.v.shape
    assert cache.FOLDER_VARIABLE in caplog.text
    with choice.use("triton"), pytest.raises(KernelCacheError, match=cache.FOLDER_VARIABLE):
        choice.forward(x, 1.0, False)


def test_choice():
    """What was asked for by name runs or raises; everything else falls through."""
    x = operands(5)
    for found in ("auto", "aten"):
        with choice.use(found):
            loglinear_attention(**x)
    with choice.use("triton"), pytest.raises(KernelError, match=r"operands are on cpu|not installed"):
        loglinear_attention(**x)
    with pytest.raises(OptionError, match="auto, cpp, triton, aten"), choice.use("cuda"):
        pass


def test_description_of_a_call():
    """Everything that kernels depend on is read off the operands."""
    x = operands(9, "channel", True, 4, "level", groups=2, heads=4, dtype=torch.float32)
    d = Description.of(describe(Operands(*x.values(), torch.tensor([9, 2])), True))
    assert d == Description("channel", "delta", 5, 3, 2, torch.float32, 64, 4, "level", True, padded=True)
    d = Description.of(describe(Operands(*x.values(), torch.tensor([9, 2]), torch.tensor([0, 9])), False))
    assert d == Description("channel", "delta", 5, 3, 2, torch.float32, 64, 4, "level", packed=True)
    d = Description.of(describe(Operands(**operands(9, "token", "erase", None, dtype=torch.float32)), False))
    assert (d.decay, d.correction) == ("channel", "erase")  # the one decay that there are kernels for


def test_triton_is_optional():
    """Nothing imports Triton before kernels run, so all else works without it."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from llcompile.ops import loglinear_attention as f; "
        "import llcompile.kernels.triton.source; x = torch.ones(1, 3, 1, 2); print(f(x, x, x, None)[0].sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == 24.0
