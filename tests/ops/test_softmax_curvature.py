from __future__ import annotations

import pytest
import torch
from contract import Contract, assert_within, on_devices, unit_roundoff

from torch_influence.ops import softmax_curvature
from torch_influence.ops._softmax_curvature import reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def arguments(shape, dtype, device):
    k, n, c = shape
    t = torch.randn(k, n, c, dtype=torch.float64).to(dtype).to(device)
    return {
        "p": torch.softmax(torch.randn(n, c, dtype=torch.float64), -1).to(dtype).to(device),
        "t": t,
        "weights": (0.5 + torch.rand(n, dtype=torch.float64)).to(torch.promote_types(dtype, torch.float32)).to(device),
        "out": torch.full_like(t, float("nan")),
    }


def bound(call):
    """A mean is a sum of c rounded products in any order: it is off by at most c roundings of Σ p|t|; the difference,
    two products and, in 16 bits, storing round once each. Both sides do."""
    p, t = call["p"].double().abs(), call["t"].double().abs()
    weights = 1.0 if call["weights"] is None else call["weights"].double().abs()[:, None]
    dtype = call["t"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    u = unit_roundoff(wide)
    mean = (p * t).sum(-1, keepdim=True)
    error = 2 * u * (p.shape[1] * mean + 3 * (mean + t)) * weights * p
    error = error * (1 + 2 * (p.shape[1] + 3) * u)  # products of roundings
    if dtype != wide:
        error = error + 2 * unit_roundoff(dtype) * (weights * p * (mean + t) + error)
    # below the normal range the spacing is fixed
    error = error + 2 * unit_roundoff(dtype) * torch.finfo(dtype).smallest_normal
    return error, error


def changed(**changes):
    return {**arguments((2, 4, 3), torch.float32, "cpu"), **changes}


CONTRACT = Contract(
    arguments=arguments,
    # On the CPU rows of less than a vector (2 to 15 elements), of up to 4 vectors and longer ones differ; on CUDA rows
    # of up to 32 elements, those that some lanes or a warp keep in few and many registers, a block in few and many, and
    # longer ones, each aligned (multiples of 8 elements) and not; where one ends depends on the dtype.
    shapes={
        "usual": (2, 100, 10),
        "empty": (2, 0, 5),
        "no_tangents": (0, 3, 5),
        "no_classes": (2, 3, 0),
        "one_row": (1, 1, 1000),
        "one_element": (1, 1, 1),
        "two_classes": (3, 3001, 2),
        "many_examples": (5, 1003, 7),
        "odd": (3, 37, 29),
        "packs": (2, 5, 64),
        "aligned_tiles": (2, 1000, 7),
        "lanes": (1, 9, 120),
        "odd_lanes": (3, 9, 121),
        "warp": (2, 9, 504),
        "odd_warp": (2, 9, 501),
        "wide_warp": (2, 3, 2000),
        "odd_wide_warp": (2, 3, 2001),
        "block": (2, 3, 4000),
        "odd_block": (2, 3, 4001),
        "large_block": (1, 2, 16_000),
        "odd_large_block": (1, 2, 14_001),
        "vocabulary": (2, 2, 32_000),
        "odd_vocabulary": (2, 2, 50_257),
        "beyond": (1, 1, 65_544),
        "odd_beyond": (1, 1, 65_537),
    },
    dtypes=DTYPES,
    written=("out",),
    bound=bound,
    wrong={
        "p no tensor": (changed(p=[[1.0]]), TypeError, "p: expected a tensor, got list"),
        "p integer": (
            changed(p=torch.ones(4, 3, dtype=torch.int64)),
            TypeError,
            "p: expected dtype .* got torch.int64",
        ),
        "p one row": (changed(p=torch.ones(3)), ValueError, r"p: expected 2 dimensions, got shape \(3,\)"),
        "p with gradient": (changed(p=torch.ones(4, 3, requires_grad=True)), ValueError, "p: .*without gradient"),
        "t no tensor": (changed(t=None), TypeError, "t: expected a tensor, got NoneType"),
        "t of other dtype": (changed(t=torch.ones(2, 4, 3).double()), TypeError, "t: .*float32.* got torch.float64"),
        "t one tangent": (changed(t=torch.ones(4, 3)), ValueError, r"t: expected shape \(k, 4, 3\).* got \(4, 3\)"),
        "t of other size": (
            changed(t=torch.ones(2, 4, 5)),
            ValueError,
            r"t: expected shape \(k, 4, 3\).* got \(2, 4, 5\)",
        ),
        "t elsewhere": (changed(t=torch.ones(2, 4, 3, device="meta")), ValueError, "t: expected device cpu.* got meta"),
        "t with gradient": (changed(t=torch.ones(2, 4, 3, requires_grad=True)), ValueError, "t: .*without gradient"),
        "weights no tensor": (changed(weights=0.5), TypeError, "weights: expected a tensor, got float"),
        "weights of other dtype": (
            changed(weights=torch.ones(4).half()),
            TypeError,
            "weights: .*float32.* torch.float16",
        ),
        "weights of other size": (
            changed(weights=torch.ones(3)),
            ValueError,
            r"weights: expected shape \(4,\).* \(3,\)",
        ),
        "out of other dtype": (changed(out=torch.ones(2, 4, 3).double()), TypeError, "out: .* got torch.float64"),
        "out of other size": (changed(out=torch.ones(4, 3)), ValueError, r"out: expected shape \(2, 4, 3\).* \(4, 3\)"),
        "out expanded": (
            changed(out=torch.ones(1, 4, 3).expand(2, 4, 3)),
            ValueError,
            "out: expected a tensor with memory of its own",
        ),
    },
)


def test_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    t = torch.tensor([[[4.0, 0.0, 8.0], [3.0, 1.0, 2.0]]])
    # means 4 and 3
    assert softmax_curvature(p, t).tolist() == [[[0.0, -1.0, 1.0], [0.0, 0.0, 0.0]]]
    assert softmax_curvature(p, t, torch.tensor([0.5, 1.0])).tolist() == [[[0.0, -0.5, 0.5], [0.0, 0.0, 0.0]]]


@on_devices
@pytest.mark.parametrize("implementation", [softmax_curvature, reference])
@pytest.mark.parametrize("c", [2, 10, 40])
def test_is_the_hessian_of_cross_entropy(implementation, c, device):
    logits = torch.randn(5, c, dtype=torch.float64, device=device)
    targets = torch.randint(c, (5,), device=device)
    t = torch.randn(3, 5, c, dtype=torch.float64, device=device)
    product = implementation(torch.softmax(logits, -1), t)
    for example in range(5):
        hessian = torch.autograd.functional.hessian(
            lambda z, target=targets[example]: torch.nn.functional.cross_entropy(z, target), logits[example]
        )
        # Exponentials, their sum and the products: some c + 20 roundings on either side, of numbers up to max|t|.
        allowed = 2 * (c + 20) * unit_roundoff(torch.float64) * t[:, example].abs().amax()
        assert_within(product[:, example], t[:, example] @ hessian, torch.full_like(product[:, example], allowed))


@on_devices
@pytest.mark.parametrize("implementation", [softmax_curvature, reference])
@pytest.mark.parametrize("c", [2, 13, 1000])
def test_symmetric_and_positive_semidefinite(implementation, c, device):
    call = arguments((2, 6, c), torch.float64, device)
    first, second = call["t"]
    to_first, to_second = implementation(call["p"], call["t"], call["weights"])
    rounding = 4 * (c + 3) * unit_roundoff(torch.float64) * first.norm() * second.norm()
    assert ((first * to_second).sum(-1) - (second * to_first).sum(-1)).abs().max() <= rounding
    assert ((first * to_first).sum(-1) >= -4 * (c + 3) * unit_roundoff(torch.float64) * first.square().sum(-1)).all()


@on_devices
@pytest.mark.parametrize("implementation", [softmax_curvature, reference])
def test_a_certain_prediction_has_no_curvature(implementation, device):
    """Also in float32, where diag(p) t and p pᵀ t would cancel but for their rounding."""
    p = torch.nn.functional.one_hot(torch.arange(12, device=device), 12).float()
    t = 1e6 * torch.randn(2, 12, 12, device=device)
    assert not implementation(p, t).any()


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_equals_reference_at_every_small_c(dtype, device):
    for c in range(1, 70):
        call = arguments((2, 19, c), dtype, device)
        for weights in (call["weights"], None):
            call["weights"] = weights
            assert_within(softmax_curvature(**call), reference(call["p"], call["t"], weights), bound(call)[0])


@on_devices
@pytest.mark.parametrize("implementation", [softmax_curvature, reference])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 50, 3), (2, 9, 10), (2, 9, 29), (2, 4, 1001), (1, 1, 50257)])
def test_out_may_be_t(implementation, dtype, shape, device):
    call = arguments(shape, dtype, device)
    new = implementation(call["p"], call["t"], call["weights"])
    in_place = implementation(call["p"], call["t"], call["weights"], call["t"])
    assert in_place is call["t"]
    assert torch.equal(in_place, new)


@on_devices
def test_tangents_of_an_example_side_by_side(device):
    """The order [n, k, c] in memory, which a linear layer with k weights gives; the result has it too."""
    call = arguments((4, 25, 17), torch.float32, device)
    t = call["t"].transpose(0, 1).contiguous().transpose(0, 1)
    product = softmax_curvature(call["p"], t, call["weights"])
    assert product.stride() == t.stride()
    assert_within(product, reference(call["p"], call["t"], call["weights"]), bound(call)[0])


@on_devices
@pytest.mark.parametrize("implementation", [softmax_curvature, reference])
@pytest.mark.parametrize("c", [5, 13, 100])
def test_what_is_not_finite_stays_in_its_row(implementation, c, device):
    call = arguments((2, 8, c), torch.float32, device)
    call["t"][1, 3, c - 1] = float("inf")
    call["t"][0, 5, 0] = float("nan")
    product = implementation(**call)
    rows = product.isfinite().all(-1)
    assert not rows[1, 3]
    assert not rows[0, 5]
    assert rows.sum() == 14
