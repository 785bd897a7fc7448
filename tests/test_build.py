"""The native part as it was built, and what happens without it."""

from __future__ import annotations

import hashlib
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

ROOT = Path(__file__).parents[1]
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


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


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


def test_references_give_the_same_answer(build_info):
    for backend, words in (("native", OPS), ("reference", "TORCH_INFLUENCE_BACKEND=reference")):
        result = run(PROGRAM, TORCH_INFLUENCE_BACKEND=backend)
        assert result.returncode == 0, result.stderr
        assert ANSWER in result.stdout
        assert words in result.stdout
        assert "Warning" not in result.stderr


def test_unknown_backend_is_named():
    result = run("import torch_influence", TORCH_INFLUENCE_BACKEND="fast")
    assert "ValueError: TORCH_INFLUENCE_BACKEND: expected auto, native or reference, got 'fast'" in result.stderr


@pytest.fixture
def installed_copy(library, tmp_path):
    """A copy of the package as a wheel would install it, for a process that sees this copy and not the original."""
    package = tmp_path / "torch_influence"
    source = Path(torch_influence.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    from torch_influence import _C

    shutil.copy(_C.__file__, package)
    shutil.copy(library, package)

    def run_copy(**environment: str) -> subprocess.CompletedProcess[str]:
        # An editable install finds its package by an object among the finders; the interpreter's own are classes.
        hide = "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]\n"
        where = "import torch_influence; print(torch_influence.__file__)\n"
        return run(f"{hide}sys.path.insert(0, {str(tmp_path)!r})\n{where}{PROGRAM}", **environment)

    return package, run_copy


def test_a_whole_copy_is_native(installed_copy):
    package, run_copy = installed_copy
    result = run_copy()
    assert result.returncode == 0, result.stderr
    assert str(package) in result.stdout
    assert ANSWER in result.stdout
    assert OPS in result.stdout


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("library missing", "libtorch_influence.so can't be loaded"),
        ("library broken", "libtorch_influence.so can't be loaded"),
        ("module missing", "torch_influence._C can't be imported"),
    ],
)
def test_import_survives_a_damaged_native_part(installed_copy, damage, words):
    package, run_copy = installed_copy
    part, what = damage.split()
    (file,) = package.glob("libtorch_influence.so" if part == "library" else "_C.*.so")
    if what == "missing":
        file.unlink()
    else:
        file.write_bytes(b"\x7fELF, but no more than that")

    result = run_copy()
    assert result.returncode == 0, result.stderr
    assert ANSWER in result.stdout
    assert f"native ops: none, plain torch does their work, because {words}" in result.stdout
    assert "RuntimeWarning: torch_influence runs without its native ops" in result.stderr

    demanded = run_copy(TORCH_INFLUENCE_BACKEND="native")
    assert demanded.returncode != 0
    assert f"ImportError: TORCH_INFLUENCE_BACKEND=native, but the native ops are missing: {words}" in demanded.stderr


def test_a_pure_python_build_says_why(installed_copy):
    package, run_copy = installed_copy
    for file in package.glob("*.so"):
        file.unlink()
    (package / "_no_native.py").write_text('REASON = "it was built with TORCH_INFLUENCE_NATIVE=OFF"\n')
    result = run_copy()
    assert result.returncode == 0, result.stderr
    assert ANSWER in result.stdout
    assert "because it was built with TORCH_INFLUENCE_NATIVE=OFF" in result.stdout
    assert "Warning" not in result.stderr


def test_a_torch_that_is_too_old_is_named(installed_copy):
    package, run_copy = installed_copy
    native = package / "ops" / "_native.py"
    native.write_text(
        native.read_text().replace("import torch\n", "import torch\ntorch.__version__ = '2.9.1+cpu'\n", 1)
    )
    result = run_copy()
    assert result.returncode == 0, result.stderr
    assert ANSWER in result.stdout
    assert "it needs torch >= 2.10, found 2.9.1+cpu" in result.stdout


def test_info_command():
    result = subprocess.run(
        [sys.executable, "-m", "torch_influence", "info"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert str(backend_info()) in result.stdout


def test_cuda_tensors_are_accounted_for():
    info = backend_info()
    if info.cuda_archs and not info.cuda_tested:
        assert "CUDA kernels not yet run on a GPU" in str(info)
    if not (info.ops and info.cuda_archs and torch.version.cuda and torch.cuda.is_available()):
        assert info.cuda, "CUDA tensors can't be native here"
