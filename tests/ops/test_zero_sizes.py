"""Every op with no examples, vectors, positions, outputs ...: each dimension in turn, and each two, of size 0."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import as_tuple, copy_of, needs_native, on_devices
from torch import Tensor

import torch_influence.ops

pytestmark = needs_native

Sizes = dict[str, int]


def rows(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=device)


def cg_step(at: Sizes, device: str) -> list[dict[str, Any]]:
    shape = at["k"], at["d"]
    scalars = torch.zeros(9, at["k"], dtype=torch.float64, device=device)
    scalars[0] = 1.0
    scalars[2] = 0.5
    state = {name: rows(*shape, device=device) for name in ("x", "r", "p")} | {"scalars": scalars}
    given = rows(*shape, device=device)
    return [
        state | {"q": given, "z": None, "preconditioned": False},
        state | {"q": given, "z": None, "preconditioned": True},
        state | {"q": None, "z": given, "preconditioned": True},
    ]


def grad_dot(at: Sizes, device: str) -> list[dict[str, Any]]:
    n, s, f, o, k = (at[name] for name in "nsfok")
    return [
        {
            "a": rows(n, s, f, device=device),
            "g": rows(n, s, o, device=device),
            "v": rows(k, o * f + bias * o, device=device),
            "bias": bias,
            "out": rows(n, k, device=device),
        }
        for bias in (False, True)
    ]


def linear_curvature_product(at: Sizes, device: str) -> list[dict[str, Any]]:
    n, f, c, k = (at[name] for name in "nfck")
    p, weights = rows(n, c, device=device), rows(n, device=device)
    blocks = rows(n, c, c, device=device)
    return [
        {
            "x": rows(n, f, device=device),
            "v": (v := rows(k, c * f + bias * c, device=device)),
            "curvature": curvature,
            "weights": weighted,
            "bias": bias,
            "out": torch.ones_like(v),
        }
        for bias in (False, True)
        for curvature, weighted in ((p, None), (p, weights), (blocks, None))
    ]


def lissa_step(at: Sizes, device: str) -> list[dict[str, Any]]:
    shape = at["k"], at["d"]
    return [{name: rows(*shape, device=device) for name in ("h", "v", "hvp")} | {"damp": 0.1, "scale": 2.0}]


def softmax_curvature(at: Sizes, device: str) -> list[dict[str, Any]]:
    k, n, c = (at[name] for name in "knc")
    t = rows(k, n, c, device=device)
    return [
        {"p": rows(n, c, device=device), "t": t, "weights": weights, "out": torch.ones_like(t)}
        for weights in (None, rows(n, device=device))
    ]


# The sizes that each op's arguments have, and what makes the arguments of them.
OPS: dict[str, tuple[str, Any]] = {
    "cg_step": ("kd", cg_step),
    "grad_dot": ("nsfok", grad_dot),
    "linear_curvature_product": ("nfck", linear_curvature_product),
    "lissa_step": ("kd", lissa_step),
    "softmax_curvature": ("knc", softmax_curvature),
}
FEW, MANY = 3, 8  # of everything else: 9 columns take the ops' own loops, 64 go to BLAS


def zeros_in(op: str) -> list[tuple[str, ...]]:
    names = OPS[op][0]
    return [none for count in (1, 2, len(names)) for none in itertools.combinations(names, count)]


CASES = [(op, none, most) for op in OPS for none in zeros_in(op) for most in (FEW, MANY)]


def native_and_reference(op: str, none: tuple[str, ...], most: int, device: str) -> None:
    """Runs the op, by its wrapper and without its checks, and compares with the reference."""
    names, arguments_of = OPS[op]
    torch.manual_seed(0)
    module = importlib.import_module(f"torch_influence.ops._{op}")
    for arguments in arguments_of({name: 0 if name in none else most for name in names}, device):
        results = []
        for call in (module.reference, getattr(torch_influence.ops, op), getattr(torch.ops.torch_influence, op)):
            mine = {name: copy_of(value) for name, value in arguments.items()}
            tensors = [value for value in mine.values() if isinstance(value, Tensor)]
            returned = [one for one in as_tuple(call(**mine)) if all(one is not tensor for tensor in tensors)]
            results.append([*tensors, *returned])
        for expected, checked, bare in zip(*results, strict=True):
            assert torch.equal(checked.nan_to_num(7.0), bare.nan_to_num(7.0))
            torch.testing.assert_close(bare, expected, rtol=1e-12, atol=1e-12 * most**2, equal_nan=True)


def test_every_op_is_here() -> None:
    assert set(OPS) == set(torch_influence.ops.OPS)


@on_devices
def test_sizes_of_zero(device: str) -> None:
    """In a process of its own, since an integer division by zero would end it."""
    program = f"import test_zero_sizes\ntest_zero_sizes.every_case({device!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(CASES)


def every_case(device: str) -> None:
    """Prints each before it runs: the last one is what ended the process."""
    for op, none, most in CASES:
        print(op, "without", *none, "at", most, flush=True)
        native_and_reference(op, none, most, device)


@pytest.mark.parametrize("op", ["cg_step", "lissa_step"])
def test_an_empty_tensor_may_have_strides_of_zero(op: str) -> None:
    """As what comes from NumPy has: there is no memory that could be shared."""
    arguments = OPS[op][1]({"k": 0, "d": 3}, "cpu")[0]
    empty = torch.empty_strided((0, 3), (0, 0), dtype=torch.float64)
    arguments = {name: empty if name in ("x", "r", "p", "q", "h", "v", "hvp") else v for name, v in arguments.items()}
    getattr(torch_influence.ops, op)(**arguments)
