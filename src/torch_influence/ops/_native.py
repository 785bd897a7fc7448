"""Loads the native op library and answers, for every op and tensor, whether it runs there; if not, why.

TORCH_INFLUENCE_BACKEND, read at import: ``auto`` (native where possible), ``native`` (an ImportError where not even the
CPU ops load), ``reference`` (plain torch everywhere).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from torch_influence import products

# The csrc_sha256 whose CUDA kernels last passed `make gpu` on a GPU, with the results in benchmarks/results.
_CSRC_RUN_ON_GPU: str | None = None


@dataclass(frozen=True)
class BackendInfo:
    """The native ops that run here, and why not others; ``str()`` says it in words.

    Attributes:
        ops: Names of the native ops that are loaded.
        cpu: Why CPU tensors go to the references; empty if they run natively.
        cuda: Why CUDA tensors go to the references; empty if they run natively.
        simd_level: Instruction set of the CPU ops on this machine.
        cuda_archs: GPU architectures that the kernels were compiled for; empty without CUDA.
        cuda_tested: Whether exactly these kernels have passed their tests on a GPU. On an emulator of CUDA's execution,
            on the CPU, they have passed them in any case: docs/emulator.md.
        csrc_sha256: Hash of the C++ and CUDA sources that the library was built from.
        products: Which library multiplies float32 matrices on the CPU in sessions of modules and in solvers, and why:
            oneDNN where a measurement, once per process, finds the error of float32 and a gain; nothing changes where
            you have set torch's precision of float32 yourself.
    """

    ops: tuple[str, ...]
    cpu: str
    cuda: str
    simd_level: str
    cuda_archs: tuple[str, ...]
    cuda_tested: bool
    csrc_sha256: str
    products: str

    def __str__(self) -> str:
        multiplied = f"cpu matrix products: {self.products}"
        if not self.ops:
            return f"native ops: none, plain torch does their work, because {self.cpu}\n{multiplied}"
        cuda = "native" if not self.cuda else f"reference, because {self.cuda}"
        lines = [f"native ops: {', '.join(self.ops)}", f"cpu: native, {self.simd_level} instructions"]
        lines += [multiplied, f"cuda: {cuda}"]
        if self.cuda_archs:
            tested = "" if self.cuda_tested else "; run on an emulator of CUDA's execution; not yet on a GPU"
            lines.append(f"cuda kernels: compiled for {', '.join(self.cuda_archs)}{tested}")
        lines.append(f"csrc: {self.csrc_sha256}")
        return "\n".join(lines)


def _load() -> tuple[dict, str]:
    """Loads the library; returns what it was built for, or an empty dict and the reason why it isn't there."""
    backend = os.environ.get("TORCH_INFLUENCE_BACKEND", "auto")
    if backend not in ("auto", "native", "reference"):
        raise ValueError(f"TORCH_INFLUENCE_BACKEND: expected auto, native or reference, got {backend!r}")
    if backend == "reference":
        return {}, "TORCH_INFLUENCE_BACKEND=reference asks for that"
    build, problem, broken = _try_load()
    if problem and backend == "native":
        raise ImportError(f"TORCH_INFLUENCE_BACKEND=native, but the native ops are missing: {problem}")
    if broken:
        warnings.warn(
            f"torch_influence runs without its native ops (slower, same results): {problem}",
            RuntimeWarning,
            stacklevel=2,
        )
    return build, problem


def _try_load() -> tuple[dict, str, bool]:
    """Returns (build, problem, broken); broken: a library should have loaded, and was not left out on purpose."""
    try:
        from torch_influence import _C
    except ImportError as error:
        try:
            from torch_influence._no_native import REASON
        except ImportError:
            return {}, f"torch_influence._C can't be imported ({error}); reinstall the package", True
        return {}, REASON, False

    build = _C.build_info()
    needed = build["torch_target"]
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < needed:
        return {}, f"it needs torch >= {needed[0]}.{needed[1]}, found {torch.__version__}", True
    # Beside _C, not beside this file: an editable install leaves this one in the source tree.
    library = Path(_C.__file__).with_name("libtorch_influence.so")
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return {}, f"{library.name} can't be loaded ({error}); reinstall the package", True
    return build, "", False


_build, _cpu_problem = _load()
_ops = frozenset(_build.get("ops", ()))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_cuda_problems: dict[int, str] = {}


def _problem(device: torch.device) -> str:
    """Says why tensors on this device go to the references; empty if they run natively."""
    if _cpu_problem or device.type == "cpu":
        return _cpu_problem
    if device.type != "cuda":
        return f"there are no native ops for {device.type}"
    if not _build["cuda_archs"]:
        return "the library was built without CUDA kernels"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if is_compiling():
        return ""  # a trace can't launch anything
    if device.index not in _cuda_problems:
        _cuda_problems[device.index] = _launch_problem(device)
    return _cuda_problems[device.index]


def _launch_problem(device: torch.device) -> str:
    """Says what keeps the kernels from running on a GPU: it, or its driver, may be too old; empty if nothing does."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    # A kernel that can't run fails at its first launch; no synchronisation is needed, since nothing is read back.
    row = torch.zeros(1, 1, device=device)
    try:
        torch.ops.torch_influence.lissa_step(row, row.clone(), row.clone(), 0.0, 1.0)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def runs_natively(op: str, tensor: Tensor) -> bool:
    """Tells whether the native `op` takes tensors like this one."""
    return op in _ops and tensor.dtype in DTYPES and not _problem(tensor.device)


def checks_itself(op: str, *tensors: Tensor | None) -> bool:
    """Tells whether the native `op` may be called with arguments that nobody has checked: these tensors, and others.

    On the CPU it refuses what it can't take before it writes anything, and Python would need longer to check than the
    op for a small call. It can't see that a graph is recorded; and something else is called for subclasses of tensors,
    for tensors of another device among them, and while a trace is taken.
    """
    if op not in _ops or is_compiling():
        return False
    for tensor in tensors:  # all() and a generator take twice as long
        if tensor is not None and (type(tensor) is not Tensor or not tensor.is_cpu or tensor.requires_grad):
            return False
    return True


def backend_info() -> BackendInfo:
    """Says what runs natively, on which devices, and why not otherwise.

    Returns:
        A ``BackendInfo``: ``print`` it, or look at ``.ops``, ``.cpu``, ``.cuda``, ``.products``.

    Examples:
        >>> import torch_influence
        >>> print(torch_influence.backend_info())  # doctest: +ELLIPSIS
        native ops: ...
    """
    csrc_sha256 = _build.get("csrc_sha256", "")
    return BackendInfo(
        ops=tuple(sorted(_ops)),
        cpu=_problem(torch.device("cpu")),
        cuda=_problem(torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)),
        simd_level=_build.get("simd_level", ""),
        cuda_archs=_build.get("cuda_archs", ()),
        cuda_tested=bool(csrc_sha256) and csrc_sha256 == _CSRC_RUN_ON_GPU,
        csrc_sha256=csrc_sha256,
        products=products.described(),
    )


def native_op(op: str, fake: Callable[..., Any]) -> Any:
    """Looks the native op up, once for all calls; None where it isn't loaded.

    `fake` tells torch.compile and torch.export the shapes of its results.
    """
    if op not in _ops:
        return None
    torch.library.register_fake(f"torch_influence::{op}", fake)
    return getattr(torch.ops.torch_influence, op).default
