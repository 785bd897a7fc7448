"""What test_contract.py must know of an op to test it; each tests/ops/test_<op>.py defines one as CONTRACT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_influence import backend_info

Arguments = dict[str, Any]

needs_native = pytest.mark.skipif(not backend_info().ops, reason=f"no native ops: {backend_info().cpu}")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


@dataclass(frozen=True)
class Contract:
    """An op's inputs and what its results may differ by.

    arguments: shape, dtype, device -> valid arguments by name, tensors freshly made and contiguous.
    shapes: what `arguments` takes, by what it stands for; "usual", "empty", "one_row", "odd" and "packs" (rows
        of multiples of 16 bytes) must be there.
    dtypes: those that the op takes.
    written: names of the arguments that it changes.
    bound: arguments (before the call) -> for every written argument, then every result, how far two right
        implementations may lie apart: from the unit roundoff, the number of roundings and the magnitudes.
    wrong: what is wrong -> (arguments that are not valid, exception, what its message names).
    uses_blas: whether it calls BLAS, which may sum in another order when it has another number of threads.
    """

    arguments: Callable[[tuple[int, ...], torch.dtype, str], Arguments]
    shapes: dict[str, tuple[int, ...]]
    dtypes: tuple[torch.dtype, ...]
    written: tuple[str, ...]
    bound: Callable[[Arguments], tuple[Tensor, ...]]
    wrong: dict[str, tuple[Arguments, type[Exception], str]]
    uses_blas: bool = False

    def run(self, op: Callable[..., Any], arguments: Arguments) -> tuple[Tensor, ...]:
        """The written arguments, then the results, of a call on copies of the arguments with the same strides."""
        arguments = {name: copy_of(value) for name, value in arguments.items()}
        results = as_tuple(op(**arguments))
        return (*(arguments[name] for name in self.written), *results)


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """An op's results: none, one or several."""
    return results if isinstance(results, tuple) else () if results is None else (results,)


def copy_of(value: Any) -> Any:
    """A tensor of its own memory with the strides of the given one; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding a number of the normal range to nearest."""
    return torch.finfo(dtype).eps / 2


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """|actual - expected| <= bound elementwise, compared in float64."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert actual.device == expected.device
    excess = (actual.double() - expected.double()).abs() - bound
    assert (excess <= 0).all(), f"beyond the bound by {excess.max().item():.3g} (bound {bound.max().item():.3g})"
