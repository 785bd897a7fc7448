from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract import Contract, assert_within, needs_native, on_devices, unit_roundoff

from torch_influence.ops import lissa_step
from torch_influence.ops._lissa_step import reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def arguments(shape, dtype, device):
    h, v, hvp = torch.randn(3, *shape, dtype=torch.float64).to(dtype).to(device).unbind()
    return {"h": h.clone(), "v": v.clone(), "hvp": hvp.clone(), "damp": 0.03, "scale": 7.0}


def bound(call):
    """Both sides round at most 7 times per element (damp, 1/scale, two products, three sums), every intermediate being
    at most |v| + |h| + (|hvp| + damp·|h|) / scale; storing 16-bit rows rounds once more. The float64 norms are sums of
    d squares on either side, of rows that lie within the rows' bound."""
    h, v, hvp = (call[name].double().abs() for name in ("h", "v", "hvp"))
    wide = torch.promote_types(call["h"].dtype, torch.float32)
    magnitude = v + h + (hvp + call["damp"] * h) / call["scale"]
    roundings = 2 * 7 * unit_roundoff(wide) * (1 + 8 * unit_roundoff(wide))  # and a little for products of roundings
    if wide != call["h"].dtype:
        roundings += 2 * unit_roundoff(call["h"].dtype) * (1 + roundings)
    # below the normal range the spacing is fixed
    rows = roundings * magnitude + 2 * unit_roundoff(call["h"].dtype) * torch.finfo(call["h"].dtype).smallest_normal
    squares = (2 * magnitude * rows + rows.square()).sum(1)
    summing = 2 * (h.shape[1] + 4) * unit_roundoff(torch.float64) * (magnitude + rows).square().sum(1)
    return rows, squares + summing


def changed(**changes):
    return {**arguments((2, 3), torch.float32, "cpu"), **changes}


CONTRACT = Contract(
    arguments=arguments,
    # A CPU block has 16384 columns, a CUDA block up to 8192: "long" and "many" have several, and a part of one.
    # Rows of "packs" are multiples of 16 bytes.
    shapes={
        "usual": (4, 256),
        "empty": (0, 5),
        "no_columns": (3, 0),
        "one_row": (1, 1000),
        "one_element": (1, 1),
        "odd": (3, 1237),
        "long": (1, 100_003),
        "many": (7, 40_001),
        "packs": (3, 4104),
        "rows_beyond_a_grid": (65_540, 1),
    },
    dtypes=DTYPES,
    written=("h",),
    bound=bound,
    wrong={
        "h no tensor": (changed(h=[[1.0]]), TypeError, "h: expected a tensor, got list"),
        "h integer": (
            changed(h=torch.ones(2, 3, dtype=torch.int64)),
            TypeError,
            "h: expected dtype .* got torch.int64",
        ),
        "h complex": (changed(h=torch.ones(2, 3) + 0j), TypeError, "h: expected dtype .* got torch.complex64"),
        "h one row": (changed(h=torch.ones(3)), ValueError, r"h: expected 2 dimensions, got shape \(3,\)"),
        "h expanded": (
            changed(h=torch.ones(1, 3).expand(2, 3)),
            ValueError,
            "h: expected a tensor with memory of its own",
        ),
        "h with gradient": (changed(h=torch.ones(2, 3, requires_grad=True)), ValueError, "h: .*without gradient"),
        "v no tensor": (changed(v=None), TypeError, "v: expected a tensor, got NoneType"),
        "v of other shape": (changed(v=torch.ones(2, 4)), ValueError, r"v: expected shape \(2, 3\), .* got \(2, 4\)"),
        "v of other dtype": (changed(v=torch.ones(2, 3).double()), TypeError, "v: .*float32.* got torch.float64"),
        "v elsewhere": (changed(v=torch.ones(2, 3, device="meta")), ValueError, "v: expected device cpu.* got meta"),
        "v with gradient": (changed(v=torch.ones(2, 3, requires_grad=True)), ValueError, "v: .*without gradient"),
        "hvp of other shape": (changed(hvp=torch.ones(1, 3)), ValueError, r"hvp: expected shape \(2, 3\), .* \(1, 3\)"),
        "damp no number": (changed(damp="1"), TypeError, "damp: expected a number, got str"),
        "damp infinite": (changed(damp=float("inf")), ValueError, "damp: expected a finite number, got inf"),
        "scale zero": (changed(scale=0.0), ValueError, "scale: expected a finite nonzero number, got 0.0"),
        "scale nan": (changed(scale=float("nan")), ValueError, "scale: expected a finite nonzero number, got nan"),
    },
)


def test_by_hand():
    h = torch.tensor([[1.0, 2.0], [0.0, -4.0]])
    norms = lissa_step(h, torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([[3.0, 0.0], [8.0, 4.0]]), 0.5, 2.0)
    # 1 + 1 - (3 + 0.5) / 2, 1 + 2 - (0 + 1) / 2; 2 + 0 - (8 + 0) / 2, 0 - 4 - (4 - 2) / 2
    assert h.tolist() == [[0.25, 2.5], [-2.0, -5.0]]
    assert norms.dtype == torch.float64
    assert norms.tolist() == [0.0625 + 6.25, 29.0]


@on_devices
def test_fixed_point_is_the_damped_inverse(device):
    d, damp = 12, 0.2
    root = torch.randn(d, d, dtype=torch.float64)
    hessian = (root @ root.T / d).to(device)
    damped = hessian + damp * torch.eye(d, dtype=torch.float64, device=device)
    v = torch.randn(3, d, dtype=torch.float64).to(device)
    eigenvalues = torch.linalg.eigvalsh(damped)
    scale = eigenvalues[-1].item()
    h = v.clone()
    contraction = 1 - (eigenvalues[0] / scale).item()
    error = (h - scale * torch.linalg.solve(damped, v.T).T).norm().item()
    steps = 0
    while error > 1e-11:
        norms = lissa_step(h, v, h @ hessian, damp, scale)
        error *= contraction
        steps += 1
    # What remains of the start, and what steps and solve round: a step's bound, amplified by the geometric series.
    rounding = 30 * d * unit_roundoff(torch.float64) * h.norm().item() / (1 - contraction)
    assert (h - scale * torch.linalg.solve(damped, v.T).T).norm().item() <= error + rounding
    assert norms.tolist() == pytest.approx(h.square().sum(1).tolist(), rel=2 * d * unit_roundoff(torch.float64))


@on_devices
@pytest.mark.parametrize("implementation", [lissa_step, reference])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_those_of_the_stored_rows(implementation, dtype, device):
    call = arguments((3, 40_001), dtype, device)
    norms = implementation(**call)
    squares = call["h"].double().square().sum(1)
    assert ((norms - squares).abs() <= 2 * 40_001 * unit_roundoff(torch.float64) * squares).all()


@on_devices
@pytest.mark.parametrize("implementation", [lissa_step, reference])
def test_rows_that_are_not_finite_show(implementation, device):
    call = arguments((4, 20_000), torch.float32, device)
    call["h"][1, 19_999] = float("inf")
    call["h"][2, 3] = float("nan")
    norms = implementation(**call)
    assert norms.isfinite().tolist() == [True, False, False, True]


@on_devices
@pytest.mark.parametrize("implementation", [lissa_step, reference])
def test_float32_rows_whose_squares_overflow_float32(implementation, device):
    h, zero = torch.full((1, 64), 1e30, device=device), torch.zeros(1, 64, device=device)
    norms = implementation(h, zero, zero, 0.0, 1.0)
    assert norms.item() == pytest.approx(64e60, rel=4 * unit_roundoff(torch.float32))


@on_devices
@pytest.mark.parametrize("implementation", [lissa_step, reference])
def test_float16_overflow_is_infinite(implementation, device):
    h = torch.full((1, 40), 60000.0, dtype=torch.float16, device=device)
    norms = implementation(h, h.clone(), torch.zeros_like(h), 0.0, 1.0)
    assert h.isinf().all()
    assert norms.isinf().all()


@on_devices
@pytest.mark.parametrize("implementation", [lissa_step, reference])
def test_v_and_hvp_may_be_h(implementation, device):
    h = arguments((3, 1237), torch.float64, device)["h"]
    expected = 2 * h - (h + 0.5 * h) / 4
    implementation(h, h, h, 0.5, 4.0)
    assert_within(h, expected, 12 * unit_roundoff(torch.float64) * (2 * h.abs() + 2 * expected.abs()))


@on_devices
@pytest.mark.parametrize("implementation", [lissa_step, reference])
def test_damping_far_below_the_scale_is_not_lost(implementation, device):
    # 1 - damp/scale would be 1 in float32; where v + h cancels, the damping is all that is left.
    h = torch.full((1, 32), 0.75, device=device)
    implementation(h, -h.clone(), torch.zeros_like(h), 1e-9, 1.0)
    assert h[0].tolist() == pytest.approx([-0.75e-9] * 32, rel=4 * unit_roundoff(torch.float32))


@needs_native
@on_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_conversions_are_torchs(dtype, device):
    """With nothing to subtract the new row is h + v, added in float32 and rounded to 16 bits: every finite pattern is
    read, and every kind of number is written."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    h = patterns[patterns.isfinite()].to(device)
    for seed in range(8):
        v = h[torch.randperm(len(h), generator=torch.Generator().manual_seed(seed)).to(device)]
        row = h.clone()[None]
        lissa_step(row, v[None], torch.zeros_like(row), 0.0, 1.0)
        expected = (h.float() + v.float()).to(dtype)
        assert torch.equal(row[0], expected)
    special = torch.tensor([[float("nan"), float("inf"), float("-inf")]], dtype=dtype, device=device)
    row = torch.zeros_like(special)
    lissa_step(row, special, torch.zeros_like(row), 0.0, 1.0)
    assert row.isnan().tolist() == [[True, False, False]]
    assert row[0, 1:].tolist() == [float("inf"), float("-inf")]


SIMD_LEVEL = """
import sys, torch
from torch_influence import _C
if _C.build_info()["simd_level"] != sys.argv[1]:
    sys.exit("this processor has none of it")
import test_contract as contract, test_lissa_step as lissa

def run(test, *case):
    print(test.__name__, *case, flush=True)  # the last line is the case that failed
    torch.manual_seed(0)
    test(*case)

for op in contract.REGISTERED:
    for dtype in contract.contract_of(op).dtypes:
        for shape in (s for s in contract.contract_of(op).shapes if not s.endswith("beyond_a_grid")):
            run(contract.native_equals_reference, op, dtype, shape, "cpu", ())
        for layout in contract.LAYOUTS:
            run(contract.test_any_memory_layout, op, dtype, "odd", layout, "cpu")
for dtype in lissa.DTYPES:
    run(lissa.test_norms_are_those_of_the_stored_rows, lissa.lissa_step, dtype, "cpu")
for dtype in (torch.float16, torch.bfloat16):
    run(lissa.test_16_bit_conversions_are_torchs, dtype, "cpu")
"""


@needs_native
@pytest.mark.parametrize("level", ["base", "avx2", "avx512"])
def test_every_simd_level_keeps_the_contract(level):
    """The levels that this machine doesn't choose: in a process each, by the tests that compare with references."""
    from torch_influence import _C

    if level not in _C.build_info()["simd_levels"]:
        pytest.skip(f"{level} was not compiled for this processor's family")
    if level == _C.build_info()["simd_level"]:
        pytest.skip(f"{level} is what this machine chooses: every other test runs it")
    environment = {**os.environ, "TORCH_INFLUENCE_SIMD": level, "TORCH_INFLUENCE_BACKEND": "native"}
    command = [sys.executable, "-c", SIMD_LEVEL, level]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    if "this processor has none of it" in done.stderr:
        pytest.skip(f"this processor has no {level}")
    assert done.returncode == 0, done.stdout[-500:] + done.stderr


@needs_native
@pytest.mark.parametrize(("damp", "scale"), [(float("nan"), 1.0), (0.0, 0.0), (0.0, float("inf"))])
def test_the_op_itself_refuses_numbers_that_make_no_sense(damp, scale):
    h, v, hvp = torch.ones(3, 2, 3)
    with pytest.raises((RuntimeError, ValueError), match="expected a"):
        torch.ops.torch_influence.lissa_step(h, v, hvp, damp, scale)
    assert torch.equal(h, torch.ones(2, 3))
