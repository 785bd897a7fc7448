from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import Contract, assert_within, needs_native, on_devices, unit_roundoff

from torch_influence.ops import linear_curvature_product
from torch_influence.ops._linear_curvature_product import reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SOFTMAX, BLOCKS = range(2)

implementations = pytest.mark.parametrize("implementation", [linear_curvature_product, reference])


def arguments(shape, dtype, device):
    k, n, f, c, bias, kind = shape
    wide = torch.promote_types(dtype, torch.float32)
    logits = torch.randn(n, c, dtype=torch.float64)
    blocks = torch.randn(n, c, c, dtype=torch.float64)
    weights = 0.5 + torch.rand(n, dtype=torch.float64)
    curvature = logits.softmax(-1) if kind == SOFTMAX else blocks + blocks.mT
    v = torch.randn(k, c * f + bias * c, dtype=torch.float64).to(wide).to(device)
    return {
        "x": torch.randn(n, f, dtype=torch.float64).to(dtype).to(device),
        "v": v,
        "curvature": curvature.to(wide).to(device),
        "weights": weights.to(wide).to(device) if kind == SOFTMAX else None,
        "bias": bool(bias),
        "out": torch.full_like(v, float("nan")),
    }


def magnitudes(call):
    """|x|, |V|, |v_b| and the absolute values of B: what bounds every intermediate, [k, n, c] and [k, c, f]."""
    x, v, curvature = (call[name].double().abs() for name in ("x", "v", "curvature"))
    c = curvature.shape[1]
    columns = v[:, : c * x.shape[1]].reshape(len(v), c, x.shape[1])
    t = torch.einsum("nf,kcf->knc", x, columns)
    if call["bias"]:
        t = t + v[:, None, c * x.shape[1] :]
    if curvature.dim() == 3:
        s = torch.einsum("nab,knb->kna", curvature, t)
    else:
        s = call["weights"].double()[:, None] * curvature * (t + (curvature * t).sum(-1, keepdim=True))
    return x, t, s


def bound(call):
    """A sum of products of m terms is off by at most m roundings of the sum of their magnitudes, in whatever order.
    Errors of t (f + 1 terms), of s (c + 4 more) and of the sum over n examples add up; both sides have them."""
    x, _, s = magnitudes(call)
    c = call["curvature"].shape[1]
    u = unit_roundoff(call["v"].dtype)
    sums = [torch.einsum("knc,nf->kcf", s, x).flatten(1)]
    if call["bias"]:
        sums.append(s.sum(1))
    terms = x.shape[1] + 1 + c + 4 + x.shape[0] + 1
    tiny = torch.finfo(call["v"].dtype).smallest_normal * u * terms
    error = 2 * terms * u * (1 + 2 * terms * u) * torch.cat(sums, dim=1) + tiny
    return error, error


def changed(**changes):
    return {**arguments((2, 4, 3, 2, 1, SOFTMAX), torch.float32, "cpu"), **changes}


CONTRACT = Contract(
    arguments=arguments,
    # k, n, f, c, bias, kind. Up to 48 columns (k c) loops of our own on the CPU, in slabs of 8 tiles of at most 64
    # examples; beyond, and on CUDA, tiles of 24 MiB for BLAS.
    shapes={
        "usual": (2, 100, 33, 5, 1, SOFTMAX),
        "empty": (2, 0, 5, 3, 1, SOFTMAX),
        "no_vectors": (0, 4, 5, 3, 1, SOFTMAX),
        "no_features": (2, 7, 0, 3, 1, SOFTMAX),
        "one_row": (1, 1, 100, 3, 0, SOFTMAX),
        "one_element": (1, 1, 1, 1, 0, BLOCKS),
        "odd": (3, 37, 29, 7, 1, SOFTMAX),
        "logistic": (1, 1003, 77, 1, 1, BLOCKS),
        "slabs": (1, 3001, 41, 10, 1, SOFTMAX),
        "wide_features": (1, 43, 9001, 2, 0, BLOCKS),
        "blocks": (4, 103, 37, 5, 1, BLOCKS),
        "many_columns": (17, 301, 61, 10, 1, SOFTMAX),
        "many_columns_of_blocks": (17, 301, 61, 5, 1, BLOCKS),
        "packs": (2, 37, 32, 8, 1, SOFTMAX),
        "tiles": (3000, 300, 3, 10, 0, SOFTMAX),
        "tiles_with_bias": (3000, 300, 3, 9, 1, BLOCKS),
    },
    dtypes=DTYPES,
    written=("out",),
    bound=bound,
    uses_blas=True,
    wrong={
        "x no tensor": (changed(x=[[1.0]]), TypeError, "x: expected a tensor, got list"),
        "x integer": (changed(x=torch.ones(4, 3, dtype=torch.int64)), TypeError, "x: expected dtype .* torch.int64"),
        "x one row": (changed(x=torch.ones(3)), ValueError, r"x: expected 2 dimensions, got shape \(3,\)"),
        "x with gradient": (changed(x=torch.ones(4, 3, requires_grad=True)), ValueError, "x: .*without gradient"),
        "v no tensor": (changed(v=1.0), TypeError, "v: expected a tensor, got float"),
        "v one vector": (changed(v=torch.ones(8)), ValueError, r"v: expected 2 dimensions, got shape \(8,\)"),
        "v of other dtype": (changed(v=torch.ones(2, 8).double()), TypeError, "v: expected dtype torch.float32"),
        "v narrower than x's arithmetic": (
            changed(x=torch.ones(4, 3).half(), v=torch.ones(2, 8).half()),
            TypeError,
            "v: expected dtype torch.float32, since x has torch.float16, got torch.float16",
        ),
        "v without biases": (
            changed(v=torch.ones(2, 6)),
            ValueError,
            r"v: expected shape \(k, 8\) for 2 x 3 weights and 2 biases, got \(2, 6\)",
        ),
        "v elsewhere": (changed(v=torch.ones(2, 8, device="meta")), ValueError, "v: expected device cpu.* got meta"),
        "v with gradient": (changed(v=torch.ones(2, 8, requires_grad=True)), ValueError, "v: .*without gradient"),
        "curvature no tensor": (changed(curvature=None), TypeError, "curvature: expected a tensor, got NoneType"),
        "curvature of other dtype": (
            changed(curvature=torch.ones(4, 2).double()),
            TypeError,
            "curvature: expected dty",
        ),
        "curvature of other size": (
            changed(curvature=torch.ones(5, 2)),
            ValueError,
            r"curvature: expected shape \(4, c\) or \(4, c, c\) to go with x, got \(5, 2\)",
        ),
        "curvature not square": (
            changed(curvature=torch.ones(4, 2, 3), weights=None),
            ValueError,
            r"curvature: expected shape .* got \(4, 2, 3\)",
        ),
        "weights with blocks": (
            changed(curvature=torch.ones(4, 2, 2)),
            ValueError,
            "weights: expected None with blocks .* multiply the blocks",
        ),
        "weights of other size": (changed(weights=torch.ones(3)), ValueError, r"weights: expected shape \(4,\)"),
        "weights of other dtype": (changed(weights=torch.ones(4).half()), TypeError, "weights: expected dtype"),
        "out of other size": (changed(out=torch.ones(2, 6)), ValueError, r"out: expected shape \(2, 8\).* \(2, 6\)"),
        "out expanded": (
            changed(out=torch.ones(1, 8).expand(2, 8)),
            ValueError,
            "out: expected a tensor with memory of its own",
        ),
    },
)


def test_by_hand():
    x = torch.tensor([[1.0, 2.0]])
    v = torch.tensor([[1.0, 0.0, 0.0, 1.0, 2.0, -1.0]])  # V = identity, v_b = (2, -1): t = (3, 1)
    p = torch.tensor([[0.5, 0.5]])  # mean 2: s = (0.5, -0.5)
    assert linear_curvature_product(x, v, p, bias=True).tolist() == [[0.5, 1.0, -0.5, -1.0, 0.5, -0.5]]
    # without the bias t = (1, 2), mean 1.5
    assert linear_curvature_product(x, v[:, :4], p, torch.tensor([4.0])).tolist() == [[-1.0, -2.0, 1.0, 2.0]]
    blocks = torch.tensor([[[1.0, 2.0], [2.0, 0.0]]])  # s = (5, 6)
    assert linear_curvature_product(x, v, blocks, bias=True).tolist() == [[5.0, 10.0, 6.0, 12.0, 5.0, 6.0]]


@on_devices
@implementations
@pytest.mark.parametrize("k", [1, 2, 30])
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_hessian_of_softmax_regression(implementation, bias, k, device):
    """Reverse over reverse in float64; both sides round in a product of n f c terms or so."""
    n, f, c = 40, 6, 5
    x = torch.randn(n, f, dtype=torch.float64, device=device)
    y = torch.randint(c, (n,), device=device)
    weights = (0.5 + torch.rand(n, dtype=torch.float64)).to(device)
    theta = torch.randn(c * f + bias * c, dtype=torch.float64, device=device, requires_grad=True)

    def logits(theta):
        z = x @ theta[: c * f].view(c, f).mT
        return z + theta[c * f :] if bias else z

    loss = (weights * F.cross_entropy(logits(theta), y, reduction="none")).sum()
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(g, theta, retain_graph=True)[0] for g in gradient])
    v = torch.randn(k, theta.numel(), dtype=torch.float64, device=device)
    p = logits(theta.detach()).softmax(-1)
    product = implementation(x, v, p, weights, bias)
    blocks = weights[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    allowed = 10 * n * f * c * unit_roundoff(torch.float64) * (v.abs() @ hessian.abs()).max()
    assert ((product - v @ hessian).abs() <= allowed).all()
    assert ((implementation(x, v, blocks, None, bias) - v @ hessian).abs() <= allowed).all()


@on_devices
@pytest.mark.parametrize("shape", ["usual", "many_columns"])
def test_rows_of_a_larger_matrix(shape, device):
    """A head's part of all parameters' vectors is a view with gaps."""
    call = arguments(CONTRACT.shapes[shape], torch.float32, device)
    whole = torch.randn(len(call["v"]), call["v"].shape[1] + 7, device=device)
    part = whole[:, 3:-4]
    part.copy_(call["v"])
    out = torch.zeros_like(whole)
    linear_curvature_product(call["x"], part, call["curvature"], call["weights"], True, out[:, 3:-4])
    expected = reference(call["x"], call["v"], call["curvature"], call["weights"], True)
    assert_within(out[:, 3:-4].contiguous(), expected, bound(call)[0])
    assert out[:, :3].eq(0).all()
    assert out[:, -4:].eq(0).all()


@needs_native
@pytest.mark.parametrize("kind", [SOFTMAX, BLOCKS])
def test_memory_does_not_grow_with_the_examples(kind):
    """With four times as many tiles not one byte more is allocated."""

    def allocated(n):
        call = arguments((40, n, 8, 10, 1, kind), torch.float32, "cpu")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            linear_curvature_product(**call)
        return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())

    once = allocated(16_000)  # more than a tile of 24 MiB
    assert 0 < once <= 64 * 2**20
    assert allocated(64_000) == once
