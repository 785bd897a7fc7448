"""What a wheel's shared objects ask of others: torch's stable C interface, C and C++ libraries, Python; nothing else.

    python .ci/abi.py dist/*.whl

The library of ops may use nothing of Python and, of torch, only the functions in C that keep their meaning from one
version to the next, never a C++ symbol; the module _C may use Python and nothing of torch. A wheel that is tagged
manylinux_2_28 asks for no newer glibc and libstdc++ than that platform has. Uses nm, readelf and c++filt (binutils).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "libgcc_s.so.1"}
SYSTEM_LIBRARIES |= {"libstdc++.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
SYSTEM_VERSIONS = re.compile(r"(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)")
TOOLCHAIN = re.compile(r"_ITM_(de)?registerTMCloneTable|__gmon_start__")  # weak, in whatever gcc links
PYTHON = re.compile(r"_?Py\w+")
TORCH_IN_C = re.compile(r"(aoti_torch|torch)_\w+")
CONSTANTS = {"aoti_torch_device_type_cuda"}  # named after CUDA, and also in CPU builds of torch
# Of glibc and of gcc 8, the system compiler of the platform.
LIMITS = {"manylinux_2_28": {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}}


@dataclass(frozen=True)
class Symbol:
    """An undefined symbol: its name, the version that is asked for or "", and whether the loader may leave it null."""

    name: str
    version: str
    weak: bool

    def __str__(self) -> str:
        demangled = output("c++filt", self.name).strip()
        return demangled + (f"@{self.version}" if self.version else "")


def output(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def undefined_symbols(library: Path) -> list[Symbol]:
    """All that the loader must find elsewhere."""
    symbols = []
    for line in output("nm", "-D", "--undefined-only", "--with-symbol-versions", str(library)).splitlines():
        kind, symbol = line.split()[:2]
        name, _, version = symbol.partition("@")
        symbols.append(Symbol(name, version.lstrip("@"), kind in "wv"))
    return symbols


def system_version(symbol: Symbol) -> tuple[str, tuple[int, ...]] | None:
    """("GLIBC", (2, 28)) for a symbol of the C or C++ libraries."""
    match = SYSTEM_VERSIONS.fullmatch(symbol.version)
    return (match[1], tuple(map(int, match[2].split(".")))) if match else None


def symbol_problem(symbol: Symbol, of_ops: bool, limits: dict[str, tuple[int, ...]]) -> str:
    """What is wrong with asking for this symbol; empty if nothing is."""
    system = system_version(symbol)
    if system is not None:
        family, version = system
        limit = limits.get(family)
        return f"newer than {family}_{'.'.join(map(str, limit))}" if limit and version > limit else ""
    if symbol.weak and TOOLCHAIN.fullmatch(symbol.name):
        return ""
    if symbol.name.startswith("_Z"):
        return "a C++ symbol from outside libstdc++: it changes with every torch"
    if PYTHON.fullmatch(symbol.name):
        return "of Python, which the library of ops does not know" if of_ops else ""
    if TORCH_IN_C.fullmatch(symbol.name):
        if not of_ops:
            return "of torch, which _C must not use"
        if "cuda" in symbol.name.lower() and symbol.name not in CONSTANTS and not symbol.weak:
            return "not in CPU builds of torch, so it must be weak"
        return ""
    return "neither of torch's C interface nor of the C and C++ libraries"


def problems(library: Path, limits: dict[str, tuple[int, ...]] | None = None) -> list[str]:
    """What a shared object asks for and must not, a line each; its name says whether it is the library of ops or _C."""
    of_ops = library.name.startswith("lib")
    dynamic = output("readelf", "-d", str(library))
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    found = [f"needs {name}" for name in sorted(needed - SYSTEM_LIBRARIES - ({"libtorch.so"} if of_ops else set()))]
    if of_ops and "libtorch.so" not in needed:
        found.append("does not need libtorch.so, through which a CUDA build of torch brings libtorch_cuda.so")
    if re.search(r"\((RPATH|RUNPATH)\)", dynamic):
        found.append("has an RPATH: folders of the machine that built it")
    for symbol in undefined_symbols(library):
        problem = symbol_problem(symbol, of_ops, limits or {})
        if problem:
            found.append(f"{symbol}: {problem}")
    return [f"{library.name}: {line}" for line in found]


def newest(library: Path) -> str:
    """The newest version of every family that a shared object asks for: GLIBC_2.34, GLIBCXX_3.4.26, ..."""
    versions: dict[str, tuple[int, ...]] = {}
    for family, version in filter(None, map(system_version, undefined_symbols(library))):
        versions[family] = max(version, versions.get(family, version))
    return ", ".join(f"{family}_{'.'.join(map(str, version))}" for family, version in sorted(versions.items()))


def audit(wheel: Path) -> list[str]:
    """Prints what the shared objects of a wheel ask for, and returns what is wrong with it."""
    limits: dict[str, tuple[int, ...]] = {}
    for platform, its_limits in LIMITS.items():
        if platform in wheel.name:
            limits = its_limits
    found = []
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if re.search(r"\.so(\.\d+)*$", name)]
        if bool(libraries) == wheel.name.endswith("-none-any.whl"):
            found.append(f"{wheel.name}: its tag and its {len(libraries)} shared objects don't fit")
        for name in libraries:
            library = Path(archive.extract(name, folder))
            here = problems(library, limits)
            count = len(undefined_symbols(library))
            print(f"{name}: {count} undefined symbols, {len(here)} problems; asks for {newest(library)}")
            found += here
    return found


def main() -> int:
    """Audits the wheels on the command line."""
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    found = [line for wheel in sys.argv[1:] for line in audit(Path(wheel))]
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
