"""Every native op against its reference on the devices at hand: tells a working build from one that returns garbage."""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_influence.ops._native import DTYPES, backend_info, runs_natively

Arguments = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Check:
    """The result for an op on a device in a dtype.

    Attributes:
        op: its name.
        device: "cpu" or "cuda".
        dtype: of its arguments.
        runs: "native", or "reference" where the native op does not run here.
        error: largest relative difference of a result from the reference's in float64, in the 2-norm.
        bound: the largest error allowed: the square root of the dtype's epsilon. Rounding stays far below it; the
            package's tests show that it also stays below the derived bounds.
        seconds: for one call.
    """

    op: str
    device: str
    dtype: torch.dtype
    runs: str
    error: float
    bound: float
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; a NaN is not."""
        return self.error <= self.bound


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """The outcome of ``self_test``; ``str()`` is a table."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{'op':<26}{'device':<8}{'dtype':<10}{'runs':<11}{'error':>9}{'allowed':>9}{'time':>11}"]
        for c in self.checks:
            dtype = str(c.dtype).removeprefix("torch.")
            verdict = "" if c.passed else "  FAILED"
            lines.append(
                f"{c.op:<26}{c.device:<8}{dtype:<10}{c.runs:<11}{c.error:>9.1e}{c.bound:>9.1e}"
                f"{1e6 * c.seconds:>8.0f} us{verdict}"
            )
        failed = sum(not c.passed for c in self.checks)
        native = sum(c.runs == "native" for c in self.checks)
        lines.append(f"{len(self.checks)} checks, {native} of native ops, {failed} failed")
        if not backend_info().ops:
            lines.append(f"no native ops: {backend_info().cpu}")
        return "\n".join(lines)


def self_test() -> SelfTest:
    """Runs every op on small inputs, on the CPU and the current CUDA device, and compares with its float64 reference.

    Returns:
        The checks; ``passed`` says whether all is well, ``print`` shows a table.

    Cost:
        A second or so; a few megabytes.

    Examples:
        >>> import torch_influence
        >>> assert torch_influence.self_test().passed
    """
    from torch_influence import ops

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    checks = []
    for op in ops.OPS:
        module = importlib.import_module(f"torch_influence.ops._{op}")
        for device in devices:
            for dtype in DTYPES:
                drawn = module.example(torch.Generator().manual_seed(0))  # on the CPU, in float32
                rounded = _rounded(drawn, dtype, getattr(module, "WIDE", ()))
                checks.append(_check(op, getattr(ops, op), module.reference, rounded, device, dtype))
    return SelfTest(tuple(checks))


def _check(
    op: str,
    wrapper: Callable[..., Any],
    reference: Callable[..., Any],
    rounded: Arguments,
    device: str,
    dtype: torch.dtype,
) -> Check:
    exact = {name: value.double().clone() if isinstance(value, Tensor) else value for name, value in rounded.items()}
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in rounded.items()}
    again = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}

    expected = _outcome(reference, exact)
    actual = _outcome(wrapper, given)
    begin = time.perf_counter()
    wrapper(**again)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    error = max(_relative(a, e) for a, e in zip(actual, expected, strict=True))
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    runs = "native" if runs_natively(op, tensors[0]) else "reference"
    return Check(op, device, dtype, runs, error, torch.finfo(dtype).eps ** 0.5, seconds)


def _rounded(drawn: Arguments, dtype: torch.dtype, wide: tuple[str, ...]) -> Arguments:
    """Rounds the arguments for both sides: to the dtype, those named ``wide`` to float32 at least.

    Arguments that are always float64 (scalars of a solver) stay so.
    """

    def rounded(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype == torch.float64:
            return value
        return value.to(torch.promote_types(dtype, torch.float32) if name in wide else dtype)

    return {name: rounded(name, value) for name, value in drawn.items()}


def _outcome(function: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    """Calls the function; returns its arguments afterwards and its results, on the CPU in float64."""
    results = function(**arguments)
    results = results if isinstance(results, tuple) else () if results is None else (results,)
    tensors = [value for value in (*arguments.values(), *results) if isinstance(value, Tensor)]
    return [t.detach().cpu().double() for t in tensors]


def _relative(actual: Tensor, expected: Tensor) -> float:
    scale = float(expected.norm())
    return float((actual - expected).norm()) / scale if scale else float(actual.norm())
