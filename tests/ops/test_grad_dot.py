from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract import Contract, assert_within, needs_native, on_devices, unit_roundoff

from torch_influence.ops import grad_dot
from torch_influence.ops._grad_dot import reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def arguments(shape, dtype, device):
    n, s, f, o, k, bias = shape
    a = torch.randn(n, s, f, dtype=torch.float64).to(dtype).to(device)
    g = torch.randn(n, s, o, dtype=torch.float64).to(dtype).to(device)
    v = torch.randn(k, o * f + (o if bias else 0), dtype=torch.float64).to(wide(dtype)).to(device)
    out = torch.randn(n, k, dtype=torch.float64).to(wide(dtype)).to(device)
    return {"a": a, "g": g, "v": v, "bias": bool(bias), "out": out}


def bound(call):
    """Every term is a product of three, and is in sums of at most so many numbers one after the other: f inputs,
    b and s·o products with g, or s positions and (f + 1)·o products with v; then out. A sum of m numbers in any order
    has an error of at most m - 1 roundings of the sum of magnitudes, a product of one. Both sides do.
    """
    s, f = call["a"].shape[1:]
    o = call["g"].shape[2]
    magnitudes = reference(
        *(call[name].double().abs() for name in ("a", "g", "v")), call["bias"], call["out"].double().abs()
    )
    u = unit_roundoff(call["v"].dtype)
    roundings = max(f + 1 + s * o, s + (f + 1) * o) + 4
    error = 2 * roundings * u / (1 - roundings * u) * magnitudes
    return error, error


def changed(**changes):
    return {**arguments((4, 2, 3, 5, 2, 0), torch.float32, "cpu"), **changes}


CONTRACT = Contract(
    arguments=arguments,
    # Which way a size takes is a matter of its costs: few columns k·o by our own kernel (4 rows by 3 or 6 columns, 2048
    # elements of f at a time), vectors first by BLAS (2048 columns of U, 512 rows), gradients first where s·k is larger
    # than s + k (about 128 examples, 2²² elements of gradients; of 16-bit inputs 2²¹ are widened). On CUDA
    # a long sum is divided by positions and by outputs, as "one_sequence" is.
    shapes={
        "usual": (100, 1, 30, 10, 1, 1),
        "empty": (0, 1, 5, 3, 2, 1),
        "no_vectors": (3, 1, 5, 3, 0, 1),
        "no_positions": (3, 0, 5, 3, 2, 1),
        "no_inputs": (3, 2, 0, 3, 2, 1),
        "no_inputs_many_columns": (3, 2, 0, 12, 5, 1),
        "no_outputs": (3, 2, 5, 0, 2, 1),
        "nothing": (3, 2, 0, 3, 2, 0),
        "one_row": (1, 1, 1000, 3, 2, 0),
        "one_element": (1, 1, 1, 1, 1, 0),
        "odd": (37, 3, 29, 7, 3, 1),
        "long_inputs": (9, 1, 5003, 3, 3, 1),
        "vectors_first": (700, 1, 130, 61, 45, 1),
        "vectors_first_two_positions": (301, 2, 300, 40, 2, 1),
        "gradients_first": (37, 11, 29, 17, 13, 1),
        "gradients_first_without_bias": (37, 11, 29, 17, 13, 0),
        "gradients_first_one_position": (301, 1, 7, 33, 300, 1),
        "many_gradients": (150, 3, 400, 130, 80, 1),
        "long_sequence": (3, 3001, 61, 31, 5, 1),
        "long_sequence_one_vector": (2, 2003, 31, 37, 1, 1),
        "wide_sequence": (2, 3001, 900, 2, 9, 1),
        "packs": (9, 2, 16, 64, 5, 1),
        "one_sequence": (1, 301, 400, 1032, 1, 1),
    },
    dtypes=DTYPES,
    written=("out",),
    bound=bound,
    uses_blas=True,
    wrong={
        "a no tensor": (changed(a=[[[1.0]]]), TypeError, "a: expected a tensor, got list"),
        "a integer": (
            changed(a=torch.ones(4, 2, 3, dtype=torch.int64)),
            TypeError,
            "a: expected dtype .* torch.int64",
        ),
        "a without positions": (
            changed(a=torch.ones(4, 3)),
            ValueError,
            r"a: expected shape \(n, s, f\), got \(4, 3\)",
        ),
        "a with gradient": (changed(a=torch.ones(4, 2, 3, requires_grad=True)), ValueError, "a: .*without gradient"),
        "g no tensor": (changed(g=None), TypeError, "g: expected a tensor, got NoneType"),
        "g of other dtype": (changed(g=torch.ones(4, 2, 5).half()), TypeError, "g: .*float32.* got torch.float16"),
        "g of other size": (
            changed(g=torch.ones(4, 1, 5)),
            ValueError,
            r"g: expected shape \(4, 2, o\) .* got \(4, 1, 5\)",
        ),
        "g without positions": (
            changed(g=torch.ones(4, 5)),
            ValueError,
            r"g: expected shape \(4, 2, o\) .* got \(4, 5\)",
        ),
        "g elsewhere": (changed(g=torch.ones(4, 2, 5, device="meta")), ValueError, "g: expected device cpu.* got meta"),
        "g with gradient": (changed(g=torch.ones(4, 2, 5, requires_grad=True)), ValueError, "g: .*without gradient"),
        "v no tensor": (changed(v=1.0), TypeError, "v: expected a tensor, got float"),
        "v of other dtype": (changed(v=torch.ones(2, 15).double()), TypeError, "v: .*float32.* got torch.float64"),
        "v narrow": (
            {**arguments((4, 2, 3, 5, 2, 0), torch.float16, "cpu"), "v": torch.ones(2, 15).half()},
            TypeError,
            "v: expected dtype torch.float32, since a has torch.float16, got torch.float16",
        ),
        "v one vector": (changed(v=torch.ones(15)), ValueError, r"v: expected shape \(k, 15\), .* got \(15,\)"),
        "v without the bias": (
            changed(bias=True),
            ValueError,
            r"v: expected shape \(k, 20\), .* with bias, got \(2, 15\)",
        ),
        "v with a bias": (
            changed(v=torch.ones(2, 20)),
            ValueError,
            r"v: expected shape \(k, 15\), .* without bias, got \(2, 20\)",
        ),
        "v elsewhere": (changed(v=torch.ones(2, 15, device="meta")), ValueError, "v: expected device cpu.* got meta"),
        "v with gradient": (changed(v=torch.ones(2, 15, requires_grad=True)), ValueError, "v: .*without gradient"),
        "bias a tensor": (changed(bias=torch.ones(5)), TypeError, "bias: expected a bool, got Tensor"),
        "out of other dtype": (changed(out=torch.ones(4, 2).double()), TypeError, "out: .*float32.* got torch.float64"),
        "out of other size": (changed(out=torch.ones(2, 4)), ValueError, r"out: expected shape \(4, 2\), got \(2, 4\)"),
        "out with gradient": (changed(out=torch.ones(4, 2, requires_grad=True)), ValueError, "out: .*without gradient"),
        "out expanded": (
            changed(out=torch.ones(4, 1).expand(4, 2)),
            ValueError,
            "out: expected a tensor with memory of its own",
        ),
    },
)

implementations = pytest.mark.parametrize("implementation", [grad_dot, reference], ids=["grad_dot", "reference"])


@on_devices
@implementations
def test_by_hand(implementation, device):
    a = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]], device=device)
    g = torch.tensor([[[1.0, -1.0]], [[2.0, 0.0]]], device=device)
    v = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 0.5, 0.25]], device=device)
    # gradients [1 2; -1 -2] and [6 8; 0 0], of the bias [1, -1] and [2, 0]
    assert implementation(a, g, v[:, :4]).tolist() == [[21.0 - 2100.0], [86.0]]
    assert implementation(a, g, v, bias=True).tolist() == [[21.0 - 2100.0 + 0.25], [87.0]]
    # the two as positions of one example
    sequence = implementation(a.view(1, 2, 2), g.view(1, 2, 2), v, bias=True)
    assert sequence.tolist() == [[21.0 - 2100.0 + 0.25 + 87.0]]
    out = torch.tensor([[1.0], [2.0]], device=device)
    assert implementation(a, g, v, True, out) is out
    assert out.tolist() == [[22.0 - 2100.0 + 0.25], [89.0]]


@on_devices
@implementations
@pytest.mark.parametrize("k", [1, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_gradient_of_each_example_times_the_vectors(implementation, bias, k, device):
    """Of a linear layer within a network, by autograd."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4, bias=bias, dtype=torch.float64, device=device)
    x = torch.randn(5, 3, 6, dtype=torch.float64, device=device)
    d = sum(p.numel() for p in layer.parameters())
    v = torch.randn(k, d, dtype=torch.float64, device=device)
    expected, g = [], []
    for example in x:
        y = layer(example)
        loss = torch.tanh(y).pow(3).sum()
        g.append(torch.autograd.grad(loss, y, retain_graph=True)[0])
        row = torch.cat([p.flatten() for p in torch.autograd.grad(loss, tuple(layer.parameters()))])
        expected.append(v @ row)
    allowed = bound({"a": x, "g": torch.stack(g), "v": v, "bias": bias, "out": torch.zeros(5, k).to(x)})[0]
    assert_within(implementation(x, torch.stack(g), v, bias), torch.stack(expected), allowed)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3])
def test_native_equals_reference_at_every_small_size(k, dtype, device):
    """Of rows, columns and vectors there is something left over in every way."""
    for f in (*range(1, 20), 31, 33):
        for o in range(1, 12):
            call = arguments((1 + f % 5, 1, f, o, k, o % 2), dtype, device)
            expected = reference(**{**call, "out": call["out"].clone()})
            assert_within(grad_dot(**{**call, "out": call["out"].clone()}), expected, bound(call)[0])


@on_devices
@pytest.mark.parametrize("shape", [(50, 1, 40, 5, 2, 1), (50, 1, 80, 30, 20, 1), (50, 20, 40, 30, 20, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_add_up_from_parts_of_whole_rows(shape, dtype, device):
    """Two layers' vectors are neighbours in rows of parameters, and their scores the rows' with the whole gradients."""
    first, second = arguments(shape, dtype, device), arguments(shape, dtype, device)
    d = first["v"].shape[1]
    rows = torch.cat([first["v"], second["v"]], dim=1)
    scores = grad_dot(first["a"], first["g"], rows[:, :d], True)
    grad_dot(second["a"], second["g"], rows[:, d:], True, out=scores)
    expected, allowed = torch.zeros_like(scores), torch.zeros_like(scores, dtype=torch.float64)
    for call in (first, second):
        call["out"] = expected
        allowed += bound(call)[0]
        reference(**call)
    assert_within(scores, expected, allowed)


@on_devices
@pytest.mark.parametrize("shape", [(60, 1, 40, 5, 2, 1), (60, 1, 80, 30, 20, 1), (60, 9, 40, 30, 20, 1)])
def test_examples_and_positions_in_any_order_in_memory(shape, device):
    """A transformer may keep [s, n, f]."""
    for dtype in (torch.float32, torch.float16):
        call = arguments(shape, dtype, device)
        swapped = {name: call[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("a", "g")}
        expected = reference(**{**call, "out": call["out"].clone()})
        assert_within(grad_dot(**{**call, **swapped, "out": call["out"].clone()}), expected, bound(call)[0])


@on_devices
@implementations
@pytest.mark.parametrize("shape", [(8, 1, 20, 5, 2, 1), (8, 1, 80, 30, 20, 1), (8, 9, 40, 30, 20, 1)])
def test_what_is_not_finite_stays_with_its_example_and_its_vector(implementation, shape, device):
    call = arguments(shape, torch.float32, device)
    call["a"][3, -1, -1] = float("inf")
    call["v"][1, 0] = float("nan")
    finite = implementation(**call).isfinite()
    assert not finite[3].any()
    assert not finite[:, 1].any()
    assert finite.sum() == (finite.shape[0] - 1) * (finite.shape[1] - 1)


MEMORY = """
import sys, torch
from pathlib import Path
from torch_influence.ops import grad_dot
def resident(field):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field + ":"))
def peak(dtype, n, s, f, o, k):
    wide = torch.promote_types(dtype, torch.float32)
    a, g, v = torch.randn(n, s, f).to(dtype), torch.randn(n, s, o).to(dtype), torch.randn(k, o * f + o).to(wide)
    out = torch.zeros(n, k, dtype=wide)
    grad_dot(a[:3, :3], g[:3, :3], v, True, out[:3])  # BLAS's own buffers
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    grad_dot(a, g, v, True, out)
    return resident("VmHWM") - before
for case in sys.argv[1:]:
    dtype, *shape = case.split()
    print(peak(getattr(torch, dtype), *map(int, shape)))
"""


@needs_native
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the system doesn't tell how much memory is used"
)
def test_memory_stays_below_64_mib(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back at once, so that reuse counts
    cases = [
        "float32 6000 1 256 64 60",  # 92 MB of products of a and v, 393 MB of gradients
        "float64 4000 1 256 64 60",  # 123 MB, 524 MB
        "float32 600 9 200 200 40",  # 173 MB, 96 MB
        "bfloat16 40 2000 300 50 20",  # 320 MB; the inputs in float32 are 96 MB
    ]
    done = subprocess.run([sys.executable, "-c", MEMORY, *cases], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    peaks = dict(zip(cases, map(int, done.stdout.split()), strict=True))
    assert max(peaks.values()) < 64 * 2**20, peaks
