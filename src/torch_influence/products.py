"""Matrix products of float32 numbers on the CPU: by oneDNN in place of torch's default, where that was measured to pay.

torch multiplies by MKL, which is at its best on the machines of its maker. It has oneDNN besides, but gives matrices of
float32 to it only if products may be rounded to bfloat16. oneDNN does so where a machine multiplies bfloat16 faster
(AMX), and computes in float32 anywhere else. No documentation promises which: so both are measured, and oneDNN is taken
only where its error is that of float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import torch

Context: TypeAlias = Callable[[], contextlib.AbstractContextManager[object]]

# Batch, rows, inner length, columns: 10 to 100 million multiplications each, so that all takes 30 ms on two cores.
_SHAPES = {
    "of wide matrices": (1, 512, 785, 160),
    "with a short inner side": (1, 512, 16, 512),
    "with narrow outputs": (1, 2048, 256, 10),
    "of a Gram matrix": (1, 96, 2048, 96),
    "in batches": (8, 160, 96, 128),
}
LEAST_SIZE = 4096  # parameters: with fewer, products take microseconds, and the measurement longer than most solves
_TURNS = 3  # timings of each: the shortest counts
_LEAST_GAIN = 1.03  # over all shapes: less may be chance, and another choice in the next process
_MOST_OF_A_SHAPE = 1.5  # times torch's default
# The names of torch's settings of float32, by which it is seen that the user has chosen something.
_SETTINGS = {
    "torch.backends.fp32_precision": ("generic", "all"),
    "torch.backends.mkldnn.fp32_precision": ("mkldnn", "all"),
    "torch.backends.mkldnn.matmul.fp32_precision": ("mkldnn", "matmul"),
    "torch.backends.cuda.matmul.fp32_precision": ("cuda", "matmul"),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """How products of some shape compare with those of torch's default.

    Attributes:
        error, error_of_torch: in the Frobenius norm, relative to the product in float64.
        bound: the largest error that roundings to float32 explain.
        seconds, seconds_of_torch: of a product.
    """

    error: float
    error_of_torch: float
    bound: float
    seconds: float
    seconds_of_torch: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """Whether oneDNN multiplies, and why."""

    onednn: bool
    why: str

    def __str__(self) -> str:
        return ("oneDNN, " if self.onednn else "torch's default, because ") + self.why


@contextlib.contextmanager
def _onednn() -> Iterator[None]:
    """Lets torch multiply by oneDNN.

    Of torch's two switches this is the older one: while the newer alone is set, reading the older is an error
    (``torch.get_float32_matmul_precision`` in somebody's forward). It is CUDA's switch as well, so it must not be
    touched where there is a device. What somebody sets meanwhile stays.
    """
    global _in_use
    torch.set_float32_matmul_precision("medium")
    _in_use = True
    try:
        yield
    finally:
        _in_use = False
        if _setting("torch.backends.mkldnn.matmul.fp32_precision") == "bf16":
            torch.set_float32_matmul_precision("highest")
            for name in ("mkldnn", "cuda"):  # "highest" has left "ieee" there
                torch._C._set_fp32_precision_setter(name, "matmul", "none")


def measured(candidate: Context) -> Mapping[str, Measured]:
    """Compares a way to multiply with torch's default, in time and by the product in float64, for each shape."""
    generator = torch.Generator("cpu").manual_seed(0)
    found = {}
    for name, (batch, rows, inner, columns) in _SHAPES.items():
        shapes = [(batch, rows, inner), (batch, columns, inner)]
        a, b = (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes)
        if batch == 1:
            a, b = a[0], b[0]
        exact, out = a.double() @ b.double().mT, torch.empty(*a.shape[:-1], columns, dtype=torch.float32, device="cpu")
        errors, seconds, size = [0.0] * 2, [math.inf] * 2, float(exact.norm())
        for turn in range(_TURNS + 1):  # by turns, since the machine may have other work; the first compiles kernels
            for i, context in enumerate((candidate, contextlib.nullcontext)):
                with context():
                    if not turn:
                        errors[i] = float((a @ b.mT).double().sub_(exact).norm()) / size
                    start = time.perf_counter()
                    torch.matmul(a, b.mT, out=out)  # fresh memory takes longer, or shorter, by chance
                    seconds[i] = min(seconds[i], time.perf_counter() - start)
        found[name] = Measured(errors[0], errors[1], _bound(inner), seconds[0], seconds[1])
    return found


def _bound(inner: int) -> float:
    """Bounds the relative error of float32 in sums of so many random terms.

    Roundings are largest where terms are added one after the other: each is uniform within eps/2 of the partial sum,
    and together they are at most eps sqrt(inner/24) of the result. Half as much again is allowed, and two roundings
    at least. Operands that were rounded to bfloat16 make it 2e-3, to TF32 4e-4, to two parts in bfloat16 4e-6.
    """
    return torch.finfo(torch.float32).eps * max(1.5 * (inner / 24) ** 0.5, 2.0)


def choice() -> Choice:
    """Chooses, once per process: bits of products would change otherwise. The first call measures."""
    global _choice
    with _choosing:
        if _choice is None:
            _choice = _refused_at_once() or _measured_choice()
        return _choice


def setting_of_the_user() -> str:
    """Says what the user has set of float32's precision, or of oneDNN; empty where all is as torch has it."""
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.enabled is False"
    for name in _SETTINGS:
        if (value := _setting(name)) != "none":
            return f"{name} is {value!r}"
    return ""


@contextlib.contextmanager
def fastest() -> Iterator[None]:
    """Products of float32 by the faster library of equal error; those of the user's choice, where there is one."""
    with _onednn() if not setting_of_the_user() and choice().onednn else contextlib.nullcontext():
        yield


def described() -> str:
    """Says how products of float32 are computed on the CPU, and why; measures where nobody has."""
    why = "" if _in_use else setting_of_the_user()
    return str(Choice(False, why) if why else choice())


# ---- private ----

_choosing = threading.Lock()
_choice: Choice | None = None
_in_use = False  # what is set is then not the user's


def _setting(name: str) -> str:
    return torch._C._get_fp32_precision_getter(*_SETTINGS[name])


def _refused_at_once() -> Choice | None:
    if os.environ.get("TORCH_INFLUENCE_BACKEND") == "reference":
        return Choice(False, "TORCH_INFLUENCE_BACKEND=reference asks for plain torch")
    if not torch.backends.mkldnn.is_available():
        return Choice(False, "this torch was built without oneDNN")
    if torch.accelerator.is_available():
        return Choice(False, "the setting that lets oneDNN multiply is also that of TF32 on the accelerator here")
    return None


def _measured_choice() -> Choice:
    try:
        with torch.autocast("cpu", enabled=False), torch.no_grad():  # whatever is set around this call
            return judged(measured(_onednn))
    except Exception as error:  # a torch that knows no such setting
        return Choice(False, f"oneDNN could not be measured: {error}")


def judged(found: Mapping[str, Measured]) -> Choice:
    """Takes oneDNN where its error is that of float32 in every shape, and it is faster."""
    for shape, it in found.items():
        if not it.error <= it.bound:
            why = f"oneDNN's products {shape} have an error of {it.error:.1e}, and float32's is at most {it.bound:.1e}"
            return Choice(False, why)
    for shape, it in found.items():
        if it.seconds > _MOST_OF_A_SHAPE * it.seconds_of_torch:
            return Choice(False, f"oneDNN takes {it.seconds / it.seconds_of_torch:.1f}x the time for products {shape}")
    gain = sum(it.seconds_of_torch for it in found.values()) / sum(it.seconds for it in found.values())
    worst = max(found.values(), key=lambda it: it.error)
    errors = f"at the same float32 error ({worst.error:.1e} against {worst.error_of_torch:.1e})"
    if gain < _LEAST_GAIN:
        return Choice(False, f"oneDNN is {gain:.2f}x as fast {errors}: no gain")
    return Choice(True, f"{gain:.2f}x torch's default {errors}")


def _in_a_child() -> None:
    """Replaces the lock in a process made by fork: a thread that held it does not exist there."""
    global _choosing
    _choosing = threading.Lock()


if hasattr(os, "register_at_fork"):  # not where there is no fork
    os.register_at_fork(after_in_child=_in_a_child)
