"""Lets a CUDA build of torch be imported where NVIDIA's libraries are not installed: for tests on CPUs, and only there.

pip's torch for Linux is a CUDA build. Its wheel is half a gigabyte; the libraries that it links to are several. On a
machine without a GPU they are loaded and asked for the number of devices, no more. `python cuda_stubs.py TORCH_FOLDER`
puts one small library beside torch's own, under the names of all of NVIDIA's; it has every symbol that torch takes from
them, and each of its functions returns "no CUDA device". Needs gcc, nm and readelf.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

NO_DEVICE = 100  # cudaErrorNoDevice, which is an error for every other library of NVIDIA's, too
STUB = "libllcompile_no_cuda.so"
_NVIDIA = re.compile(r"lib(cu|nv|nccl)\w*\.so")
_NVIDIAS = re.compile(r"_*(cu|nv|nccl)\w+(@\S+)?$", re.IGNORECASE)  # their symbols


def install(torch_folder: Path) -> list[str]:
    """Makes the stub library and its names; returns the names of the libraries that it stands for."""
    folder = torch_folder / "lib"
    libraries = [path for path in sorted(folder.glob("*.so*")) if not path.is_symlink() and path.name != STUB]
    names = sorted(set(_linked(libraries)) - {path.name for path in libraries})
    given = {name.split("@")[0] for name in _symbols(libraries, "--defined-only")}
    taken = {name for name in _symbols(libraries, "--undefined-only") if name.split("@")[0] not in given}
    if names:
        _compile(taken, folder / STUB)
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(STUB)
    return names


def _linked(libraries: list[Path]) -> list[str]:
    """The libraries of NVIDIA's that these are linked to."""
    printed = _printed("readelf", "-d", *libraries)
    return [name for name in re.findall(r"\(NEEDED\).*\[(\S+)\]", printed) if _NVIDIA.match(name)]


def _symbols(libraries: list[Path], which: str) -> set[str]:
    """Symbols, as `name` or `name@VERSION`, that the libraries take (`--undefined-only`) or give (`--defined-only`)."""
    found = re.findall(r"^[ 0-9a-f]* ([A-Za-z]) (\S+)$", _printed("nm", "-D", which, *libraries), re.MULTILINE)
    return {name for kind, name in found if kind not in "wv" and _NVIDIAS.match(name)}  # weak ones may stay undefined


def _compile(symbols: set[str], target: Path) -> None:
    """A library with these symbols in their versions: the loader refuses one without the versions that it looks for."""
    versions: dict[str, list[str]] = defaultdict(list)
    for symbol in sorted(symbols):
        name, _, version = symbol.partition("@")
        versions[version].append(name)
    functions = [_function(name) for names in versions.values() for name in names]
    script = [f"{v} {{ global: {'; '.join(names)}; }};" for v, names in versions.items() if v]
    with tempfile.TemporaryDirectory() as scratch:
        source, exports = Path(scratch) / "stubs.c", Path(scratch) / "exports.map"
        source.write_text("\n".join(functions) + "\n")
        exports.write_text("\n".join(script) + "\n")
        more = [f"-Wl,--version-script={exports}"] if script else []
        _printed("gcc", "-shared", "-fPIC", "-w", "-fno-builtin", *more, "-o", target, source)


def _function(name: str) -> str:
    if re.search(r"(String|Name)$", name):  # the text of an error
        return f'const char *{name}(void) {{ return "no CUDA device (a stand-in of llcompile\'s tests)"; }}'
    return f"int {name}(void) {{ return {NO_DEVICE}; }}"


def _printed(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print("stand-ins for", ", ".join(install(Path(sys.argv[1]))) or "nothing: this is a build without CUDA")
