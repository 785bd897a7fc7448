"""The native part as it was built, and what happens without it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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


def symbols(library: Path) -> dict[str, str]:
    """The undefined symbols of a library and their kinds: U, or w if weak."""
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    return {line.split()[1].split("@")[0]: line.split()[0] for line in listing.stdout.splitlines()}


def test_library_loads_without_libtorch_cuda(library):
    """CPU builds of torch have no libtorch_cuda, so the library may ask for nothing of it but weakly. All else that it
    takes of torch is the stable ABI's C interface, never a C++ symbol."""
    undefined = symbols(library)
    of_torch = {
        name: kind for name, kind in undefined.items() if "torch" in name or "c10" in name or "cuda" in name.lower()
    }
    assert "aoti_torch_get_dtype" in of_torch
    mangled = [name for name in of_torch if name.startswith("_Z")]
    assert not mangled, f"C++ symbols of torch: {mangled}"
    cuda = {
        name: kind
        for name, kind in of_torch.items()
        if "cuda" in name.lower() and name != "aoti_torch_device_type_cuda"  # a constant, which CPU builds have too
    }
    assert set(cuda) <= {"aoti_torch_get_current_cuda_stream"}
    assert all(kind == "w" for kind in cuda.values()), cuda


def test_library_needs_libtorch_by_name_and_nothing_else_of_it(library):
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    listing = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listing)
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name or "c10" in name or "python" in name]
    assert "RPATH" not in listing
    assert "RUNPATH" not in listing


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
