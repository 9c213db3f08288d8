"""Runs `llcompile doctor`'s self-test in a virtual environment for each row of a table of releases.

    python .ci/matrix.py all --write docs/compatibility.md      `make matrix`
    python .ci/matrix.py smoke                                  what .ci/run does: newest and oldest torch

A row passes if every line of the self-test acts: outputs move with the level weights, gradients arrive, a training step
helps, generation agrees with a full pass. Nothing but the standard library, pip, and gcc for CUDA builds of torch, of
which the wheel alone is installed (cuda_stubs.py). Where pip is capped, "newest" is the newest that it gives.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cuda_stubs

ROOT = Path(__file__).resolve().parent.parent
NEWEST = "newest"
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
LIMIT = 1500  # seconds for one command
SIDE_BY_SIDE = {"smoke": 2, "all": 1}  # environments at a time: each takes gigabytes, and one core


@dataclass(frozen=True)
class Row:
    """One environment; a Python of None is the one that runs this file."""

    torch: str
    transformers: str
    python: str | None = None
    fla: str | None = None
    mamba_ssm: str | None = None
    triton: str | None = None  # beside FLA; its older releases do not import with the newest


# Rows of one Python and one torch stand together: they share an environment, in which only the libraries change.
ROWS = {
    "smoke": (Row(NEWEST, NEWEST), Row("2.11.0", NEWEST)),
    "all": (
        Row("2.15.0", "5.24.0", "3.11"),
        Row("2.11.0", "5.24.0", "3.11"),
        Row("2.13.0", "5.24.0", "3.11"),
        Row("2.13.0", "5.20.2", "3.11"),
        Row("2.13.0", "5.15.0", "3.11"),
        Row("2.13.0", "5.24.0", "3.11", fla="0.6.0"),
        Row("2.13.0", "5.24.0", "3.11", fla="0.5.2", triton="3.5.1"),
        Row("2.13.0", "5.24.0", "3.11", fla="0.4.2", triton="3.5.1"),
        Row("2.13.0", "5.24.0", "3.11", mamba_ssm="2.3.2.post1"),
        Row("2.11.0", "5.15.0", "3.10"),
        Row("2.15.0", "5.24.0", "3.12"),
        Row("2.15.0", "5.24.0", "3.13"),
        Row("2.14.1", "5.24.0", "3.11"),
        Row("2.12.1", "5.24.0", "3.11"),
    ),
}


@dataclass
class Result:
    """What was really installed and what was seen; `problem` where the row could not be tried."""

    row: Row
    versions: dict[str, str] = field(default_factory=dict)
    lines: list[dict[str, object]] = field(default_factory=list)
    problem: str = ""
    seconds: float = 0.0
    megabytes: int = 0

    @property
    def acts(self) -> bool:
        """Whether the row was tried, no line of it fails, and every library of it has one that acts."""
        acting = " ".join(str(line["topic"]) for line in self.lines if line["ok"] is True)
        wanted = {"transformers": True, "fla": self.row.fla, "mamba_ssm": self.row.mamba_ssm}
        shown = all(f"self-test: {name}:" in acting for name, there in wanted.items() if there)
        return not self.problem and shown and all(line["ok"] is not False for line in self.lines)

    @property
    def seen(self) -> str:
        """In a few words."""
        if self.problem:
            return self.problem
        acting = sum(line["ok"] is True for line in self.lines)
        rest = [f"{_name(line)}: {line['found']}" for line in self.lines if line["ok"] is not True]
        return f"{acting} of {len(self.lines)} act" + "".join(f"; {one}" for one in rest)


class Refused(Exception):
    """A command failed; the message is its last telling line."""


def main() -> int:
    """Runs the rows that were asked for; 0 if all that could be tried act."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", choices=ROWS)
    parser.add_argument("--write", type=Path, help="write the table to this page, too")
    parser.add_argument("--only", default="", help="run the rows whose description has this text")
    parser.add_argument("--kept", type=Path, help="folder where results are kept; rows that are there do not run again")
    args = parser.parse_args()
    rows = ROWS[args.rows]
    done = _kept(args.kept, rows) if args.kept else {}
    with tempfile.TemporaryDirectory(prefix="llcompile-matrix-") as scratch:

        def keep(result: Result) -> None:
            done[result.row] = result
            if args.kept:
                (args.kept / f"{rows.index(result.row)}.json").write_text(json.dumps(asdict(result)))

        missing = [row for row in rows if row not in done and args.only in _describe(row)]
        _run(missing, Path(scratch), SIDE_BY_SIDE[args.rows], keep)
    results = [done[row] for row in rows if row in done]
    page = _page(results)
    print(page)
    if args.write:
        args.write.write_text(page)
    acting, failed = sum(r.acts for r in results), sum(not r.acts and not r.problem for r in results)
    print(f"{acting} passed, {failed} failed, {len(results) - acting - failed} skipped")
    smoke_missing = args.rows == "smoke" and acting < len(results)
    return int(failed > 0 or acting == 0 or smoke_missing)


def _kept(folder: Path, rows: tuple[Row, ...]) -> dict[Row, Result]:
    """Results of earlier runs of this table, as far as the rows could be tried."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [Result(**json.loads(path.read_text())) for path in folder.glob("*.json")]
    for result in found:
        result.row = Row(**result.row)  # type: ignore[arg-type]
    return {result.row: result for result in found if result.row in rows and not result.problem}


def _run(rows: list[Row], scratch: Path, jobs: int, keep: Callable[[Result], None]) -> None:
    """So many environments at a time; the rows of one come one after the other."""
    if not rows:
        return
    wheel = _wheel(scratch)
    groups = [list(group) for _, group in itertools.groupby(rows, lambda row: (row.python, row.torch))]
    with ThreadPoolExecutor(jobs) as pool:
        ended = [pool.submit(_run_in_one, group, scratch / str(i), wheel, keep) for i, group in enumerate(groups)]
        for one in ended:
            one.result()


def _run_in_one(rows: list[Row], folder: Path, wheel: Path, keep: Callable[[Result], None]) -> None:
    folder.mkdir()
    venv, made, installed = folder / "venv", False, 0.0
    for row in rows:
        started, result = time.monotonic(), Result(row)
        print(f"==> {_describe(row)}", flush=True)
        try:
            fresh = not made
            if fresh:
                shutil.rmtree(venv, ignore_errors=True)
                _make(venv, row, wheel)
                made = True
            _libraries(venv, row, fresh)
            installed = time.monotonic() - started
            result.versions, result.lines = _self_test(venv, folder)
        except Refused as error:
            result.problem = f"not tried: {error}"
        result.seconds = time.monotonic() - started
        result.megabytes = _megabytes(venv)
        there = ", ".join(f"{name} {result.versions[name]}" for name in ("torch", "transformers") if result.versions)
        spent = f"{result.seconds:.0f} s, {installed:.0f} of them to install, {result.megabytes} MB"
        print(f"    {there}: {result.seen} ({spent})", flush=True)
        keep(result)
    shutil.rmtree(folder)


def _wheel(scratch: Path) -> Path:
    """Our own package, built as users get it."""
    _output([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(scratch), str(ROOT)])
    return next(scratch.glob("llcompile-*.whl"))


def _make(venv: Path, row: Row, wheel: Path) -> None:
    """An environment with torch, without what only GPUs need, and with llcompile."""
    _output([_interpreter(row.python), "-m", "venv", str(venv)])
    version = "" if row.torch == NEWEST else f"=={row.torch}"
    _pip(venv, "--no-deps", f"torch{version}", str(wheel))
    _pip(venv, *_requirements(venv, "torch"), *_requirements(venv, "llcompile"), "numpy")
    if shutil.which("gcc"):
        cuda_stubs.install(_site(venv) / "torch")


def _libraries(venv: Path, row: Row, fresh: bool) -> None:
    """The libraries of this row, in place of those of the row before."""
    if not fresh:
        gone = ["transformers", "fla-core", "flash-linear-attention", "mamba-ssm"]
        _output([str(venv / "bin" / "python"), "-m", "pip", "uninstall", "-q", "-y", *gone])
    _pip(venv, "transformers" + ("" if row.transformers == NEWEST else f"=={row.transformers}"))
    if row.fla:
        triton = "triton" if row.triton is None else f"triton=={row.triton}"
        _pip(venv, "--no-deps", f"fla-core=={row.fla}", f"flash-linear-attention=={row.fla}", "einops", triton)
    if row.mamba_ssm:  # its Python code alone: what it compiles needs CUDA's compiler and a GPU to run
        # Built here, for its own wheels are chosen by the version of CUDA.
        environment = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "MAMBA_FORCE_BUILD": "TRUE"}
        _pip(venv, "setuptools", "wheel", "packaging")  # what its build reads, which sees this environment
        _pip(
            venv, "--no-deps", "--no-build-isolation", f"mamba-ssm=={row.mamba_ssm}", "einops", "triton", **environment
        )


def _self_test(venv: Path, folder: Path) -> tuple[dict[str, str], list[dict[str, object]]]:
    """What `llcompile doctor` says there, seen from a folder that is not the repository."""
    python = str(venv / "bin" / "python")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LLCOMPILE_SELF_TEST": "0"}
    environment.pop("PYTHONPATH", None)
    command = [python, "-m", "llcompile", "doctor", "--json", "--device", "cpu"]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
        findings = json.loads(done.stdout[done.stdout.index("[") :])
    except subprocess.TimeoutExpired as error:
        raise Refused(f"no answer in {LIMIT} s") from error
    except ValueError as error:
        raise Refused(f"doctor failed: {_last_line(done.stderr)}") from error
    lines = [finding for finding in findings if finding["topic"].startswith("self-test")]
    ask = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    versions = json.loads(_output([python, "-c", ask]))
    versions["python"] = _output([python, "-c", "import platform; print(platform.python_version())"]).strip()
    return versions, lines


def _requirements(venv: Path, distribution: str) -> list[str]:
    """What a distribution needs on a CPU: without torch, without NVIDIA's libraries, without Triton."""
    ask = f"import importlib.metadata as m, json; print(json.dumps(m.requires({distribution!r}) or []))"
    needed = json.loads(_output([str(venv / "bin" / "python"), "-c", ask]))
    return [one for one in needed if "extra ==" not in one and not re.match(r"cuda|nvidia|triton|torch", one)]


def _interpreter(version: str | None) -> str:
    if version is None or version == HERE:
        return sys.executable
    found = shutil.which(f"python{version}")
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    candidates = [str(path) for path in pyenv] + ([found] if found else [])
    for candidate in candidates:
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    raise Refused(f"no Python {version} on this machine")


def _pip(venv: Path, *arguments: str, **environment: str) -> None:
    command = [
        str(venv / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "-q",
        "--no-compile",
        "--disable-pip-version-check",
        *arguments,
    ]
    _output(command, **environment)


def _output(command: list[str], **environment: str) -> str:
    """What a command prints.

    Raises:
        Refused: it failed.
    """
    try:
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        raise Refused(f"{' '.join(command[1:5])} did not end in {LIMIT} s") from error
    if done.returncode:
        raise Refused(f"{' '.join(command[1:4])}: {_last_line(done.stderr)}")
    return done.stdout


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(("WARNING", "[notice"))]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["no message"])[-1][:200]


def _site(venv: Path) -> Path:
    return next(venv.glob("lib/python3*/site-packages"))


def _megabytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) >> 20


def _name(line: dict[str, object]) -> str:
    return str(line["topic"]).partition(": ")[2]


def _describe(row: Row) -> str:
    more = "".join(f", {n} {v}" for n, v in (("FLA", row.fla), ("mamba_ssm", row.mamba_ssm)) if v)
    return f"torch {row.torch}, transformers {row.transformers}, Python {row.python or HERE}{more}"


_HEAD = """# Compatibility

`make matrix` generated this page on {date} ({machine}). It lists only what was run. Each line is one virtual
environment with llcompile, in which `llcompile doctor` converted, compiled and trained a tiny model for each
family and each installed library. `acts` is yes if noise on the level weights changes each output, every level
weight has a gradient, a training step lowers the loss, and generation agrees with a full pass. Triton is
installed only with mamba_ssm and FLA (Triton 3.5.1 with FLA before 0.6, which cannot import the newest Triton).

| torch | transformers | Python | FLA | mamba_ssm | acts | seen |
|---|---|---|---|---|---|---|
"""


def _page(results: list[Result]) -> str:
    head = _HEAD.format(date=datetime.date.today(), machine=f"{platform.machine()}, CPU only")
    return head + "".join(_line(result) for result in results)


def _line(result: Result) -> str:
    row, there = result.row, result.versions
    cells = [
        there.get("torch", row.torch),
        there.get("transformers", row.transformers),
        there.get("python", row.python or HERE),
        there.get("fla-core", row.fla or "-"),
        there.get("mamba_ssm", there.get("mamba-ssm", row.mamba_ssm or "-")),
        "yes" if result.acts else "not tried" if result.problem else "**no**",
        result.seen.replace("|", "/").replace("\n", " "),
    ]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    sys.exit(main())
