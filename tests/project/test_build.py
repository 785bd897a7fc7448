"""The native part as it was built, and what happens without it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import abi
import pytest
import torch

import torch_influence
from torch_influence import backend_info

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
PROGRAM = """
import torch
from torch_influence import backend_info
from torch_influence.ops import lissa_step
h, v, hvp = torch.arange(15.0).view(3, 1, 5).unbind()
norms = lissa_step(h, v, hvp, 0.5, 2.0)
print(h.tolist(), norms.tolist())
print(backend_info())
"""
# h = 0..4, v = 5..9, hvp = 10..14: v + h - (hvp + h/2)/2, exact in float32
ANSWER = "[[0.0, 1.25, 2.5, 3.75, 5.0]] [46.875]"

OPS = f"native ops: {', '.join(backend_info().ops)}\n"


@pytest.fixture
def build_info():
    if os.environ.get("TORCH_INFLUENCE_BACKEND") == "reference":
        pytest.skip("TORCH_INFLUENCE_BACKEND=reference")
    assert backend_info().ops, f"the native ops are missing: {backend_info().cpu}"
    from torch_influence import _C

    return _C.build_info()


@pytest.fixture
def library(build_info):
    from torch_influence import _C

    return Path(_C.__file__).with_name("libtorch_influence.so")


# Imports torch, which takes seconds, and then runs each program in a child of its own, where this package is not
# imported yet: [[source, environment], ...] on standard input, [[exit status, output, errors], ...] on standard output.
EACH = """
import json, os, pathlib, sys, tempfile, traceback, torch
found = []
for source, environment in json.load(sys.stdin):
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder, name) for name in ("output", "errors")]
        child = os.fork()
        if not child:
            try:
                for number, file in enumerate(files, 1):
                    os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), number)
                os.environ.update(environment)
                exec(compile(source, "program", "exec"), {"__name__": "__main__"})
                status = 0
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found.append([status, *(file.read_text() for file in files)])
json.dump(found, sys.stdout)
"""


@dataclasses.dataclass
class Outcome:
    returncode: int
    stdout: str
    stderr: str


def run_each(*programs: tuple[str, dict[str, str]]) -> list[Outcome]:
    done = subprocess.run(
        [sys.executable, "-c", EACH], input=json.dumps(programs), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return [Outcome(*found) for found in json.loads(done.stdout)]


def test_build_info(build_info):
    assert build_info["torch_target"] == (2, 10)
    assert build_info["ops"] == tuple(
        re.search(r"set\(OPS\s([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()
    )
    assert build_info["simd_levels"][0] == "base"
    assert build_info["simd_level"] in build_info["simd_levels"]
    assert bool(build_info["nvcc"]) == bool(build_info["cuda_archs"])


def test_library_is_of_these_sources(build_info):
    """Otherwise what is tested is an older build: run `make dev`."""
    manifest = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(CSRC).as_posix()}\n"
        for path in sorted((p for p in CSRC.rglob("*") if p.is_file()), key=lambda p: p.relative_to(CSRC).as_posix())
    )
    assert build_info["csrc_sha256"] == hashlib.sha256(manifest.encode()).hexdigest()


needs_binutils = pytest.mark.skipif(
    not all(map(shutil.which, ("nm", "readelf", "c++filt"))),
    reason="nm, readelf or c++filt (binutils) is not installed",
)


@needs_binutils
def test_the_libraries_ask_only_for_what_is_stable(library):
    from torch_influence import _C

    assert any(symbol.name == "aoti_torch_get_dtype" for symbol in abi.undefined_symbols(library))
    assert abi.problems(library) == []
    assert abi.problems(Path(_C.__file__)) == []


@needs_binutils
def test_what_is_not_stable_is_named(library, tmp_path):
    """A library of torch's own asks for its C++ symbols, and our ops do what _C must not."""
    found = abi.problems(Path(torch.__file__).with_name("lib") / "libshm.so")
    assert "libshm.so: needs libc10.so" in found
    assert any(re.match(r"libshm\.so: (c10|at)::\S+: a C\+\+ symbol from outside libstdc\+\+", line) for line in found)

    as_module = tmp_path / "_C.so"
    shutil.copy(library, as_module)
    found = abi.problems(as_module)
    assert "_C.so: needs libtorch.so" in found
    assert "_C.so: aoti_torch_get_dtype: of torch, which _C must not use" in found


@pytest.mark.parametrize(
    ("symbol", "problem"),
    [
        (abi.Symbol("memcpy", "GLIBC_2.14", False), ""),
        (abi.Symbol("_ZSt9terminatev", "GLIBCXX_3.4", False), ""),
        (abi.Symbol("dlsym", "GLIBC_2.34", False), "newer than GLIBC_2.28"),
        (abi.Symbol("aoti_torch_get_current_cuda_stream", "", True), ""),
        (abi.Symbol("aoti_torch_get_current_cuda_stream", "", False), "not in CPU builds of torch"),
        (abi.Symbol("_Py_Dealloc", "", False), "of Python"),
        (abi.Symbol("cudaMalloc", "", False), "neither of torch's C interface"),
    ],
)
def test_rules_of_the_audit(symbol, problem):
    said = abi.symbol_problem(symbol, of_ops=True, limits=abi.LIMITS["manylinux_2_28"])
    assert said.startswith(problem)
    assert bool(said) == bool(problem)


def test_references_give_the_same_answer_and_an_unknown_backend_is_named(build_info):
    *answers, unknown = run_each(
        *((PROGRAM, {"TORCH_INFLUENCE_BACKEND": it}) for it in ("native", "reference", "fast"))
    )
    for result, words in zip(answers, (OPS, "TORCH_INFLUENCE_BACKEND=reference"), strict=True):
        assert result.returncode == 0, result.stderr
        assert ANSWER in result.stdout
        assert words in result.stdout
        assert "Warning" not in result.stderr
    assert unknown.returncode != 0
    assert "ValueError: TORCH_INFLUENCE_BACKEND: expected auto, native or reference, got 'fast'" in unknown.stderr


def installed_copy(folder: Path) -> Path:
    """Of the package, as a wheel would install it."""
    from torch_influence import _C

    package, compiled = folder / "torch_influence", Path(_C.__file__)
    shutil.copytree(
        Path(torch_influence.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    for file in (compiled, compiled.with_name("libtorch_influence.so")):
        shutil.copy(file, package)
    return package


def program_of(package: Path) -> str:
    """The program, for a process that sees this copy and not the original."""
    # An editable install finds its package by an object among the finders; the interpreter's own are classes.
    hide = "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]\n"
    where = "import torch_influence; print(torch_influence.__file__)\n"
    return f"{hide}sys.path.insert(0, {str(package.parent)!r})\n{where}{PROGRAM}"


def without(package: Path, pattern: str) -> None:
    (file,) = package.glob(pattern)
    file.unlink()


def broken(package: Path, pattern: str) -> None:
    (file,) = package.glob(pattern)
    file.write_bytes(b"\x7fELF, but no more than that")


def pure_python(package: Path) -> None:
    for file in package.glob("*.so"):
        file.unlink()
    (package / "_no_native.py").write_text('REASON = "it was built with TORCH_INFLUENCE_NATIVE=OFF"\n')


def for_an_older_torch(package: Path) -> None:
    native = package / "ops" / "_native.py"
    text = native.read_text()
    native.write_text(text.replace("import torch\n", "import torch\ntorch.__version__ = '2.9.1+cpu'\n", 1))


LIBRARY, MODULE = "libtorch_influence.so", "_C.*.so"
# How a copy is changed, and why it says to have no native ops.
DAMAGED = {
    "library missing": (lambda package: without(package, LIBRARY), "libtorch_influence.so can't be loaded"),
    "library broken": (lambda package: broken(package, LIBRARY), "libtorch_influence.so can't be loaded"),
    "module missing": (lambda package: without(package, MODULE), "torch_influence._C can't be imported"),
    "torch too old": (for_an_older_torch, "it needs torch >= 2.10, found 2.9.1+cpu"),
    "pure Python": (pure_python, "it was built with TORCH_INFLUENCE_NATIVE=OFF"),
}


def test_a_whole_copy_is_native_and_a_damaged_one_says_why_it_is_not(build_info, tmp_path):
    whole = installed_copy(tmp_path / "whole")
    programs = [(program_of(whole), {})]
    for name, (damage, _) in DAMAGED.items():
        package = installed_copy(tmp_path / name)
        damage(package)
        programs += [(program_of(package), {}), (program_of(package), {"TORCH_INFLUENCE_BACKEND": "native"})]
    native, *damaged = run_each(*programs)

    assert native.returncode == 0, native.stderr
    assert str(whole) in native.stdout
    assert ANSWER in native.stdout
    assert OPS in native.stdout
    for (name, (_, words)), result, demanded in zip(DAMAGED.items(), damaged[::2], damaged[1::2], strict=True):
        assert result.returncode == 0, f"{name}: {result.stderr}"
        assert str(tmp_path / name) in result.stdout
        assert ANSWER in result.stdout, name
        assert f"native ops: none, plain torch does their work, because {words}" in result.stdout, name
        said = "RuntimeWarning: torch_influence runs without its native ops" in result.stderr
        assert said == (name != "pure Python"), f"{name}: {result.stderr}"  # which is how it was built
        assert demanded.returncode != 0, name
        reason = f"ImportError: TORCH_INFLUENCE_BACKEND=native, but the native ops are missing: {words}"
        assert reason in demanded.stderr, f"{name}: {demanded.stderr}"


def test_info_command():
    result = subprocess.run(
        [sys.executable, "-m", "torch_influence", "info"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in str(backend_info()).splitlines() if not line.startswith("cpu matrix products: ")]
    assert set(lines) < set(result.stdout.splitlines())
    assert "\ncpu matrix products: " in result.stdout  # how much faster they are differs from process to process


def test_cuda_tensors_are_accounted_for():
    info = backend_info()
    if info.cuda_archs and not info.cuda_tested:
        assert "run on an emulator of CUDA's execution; not yet on a GPU" in str(info)
    if not (info.ops and info.cuda_archs and torch.version.cuda and torch.cuda.is_available()):
        assert info.cuda, "CUDA tensors can't be native here"
